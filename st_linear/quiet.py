"""Leave the screen to progress bars and to what the commands say."""

from __future__ import annotations

import logging

from huggingface_hub.utils import enable_progress_bars
from transformers.utils import logging as transformers_logging


def quieten_libraries() -> None:
    """Silence what transformers and Sentence Transformers say of their own, but for downloads, which take long."""
    transformers_logging.set_verbosity_error()
    # This turns off the hub's bars as well.
    transformers_logging.disable_progress_bar()
    enable_progress_bars()
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
