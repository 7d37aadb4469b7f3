"""Groups that the averaged teacher's bi-encoder has scored: ``python groups.py OUT TEXTS.jsonl COUNT``.

``OUT`` is the folder that ``teacher.py`` wrote, ``TEXTS.jsonl`` is of ``texts.py``. The groups go to
``OUT/groups.jsonl``, in random order; each holds sentences of one kind.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from sentence_transformers import SentenceTransformer
from teacher import HALF

from st_linear import add_teacher_scores, mine_groups

KINDS = {"train": "train", "flickr": "caption", "coco": "caption", "sick": "caption", "forum": "forum"}
SHARES = {"news": 0.42, "caption": 0.2, "forum": 0.2, "train": 0.18}


class ReadOnce(SentenceTransformer):
    """A bi-encoder that keeps its embeddings: neighbours and scores are of the same ones."""

    def __init__(self, folder: str, sentences: list[str]) -> None:
        super().__init__(folder)
        self.rows = {sentence: row for row, sentence in enumerate(sentences)}
        with torch.autocast("cpu", torch.bfloat16, enabled=HALF):
            found = super().encode(sentences, batch_size=64, convert_to_tensor=True, show_progress_bar=True)
        self.embeddings = torch.nn.functional.normalize(found.float(), dim=1)  # type: ignore[union-attr]

    def encode(self, sentences: list[str], *, convert_to_tensor: bool = False, **options: Any) -> Any:  # type: ignore[override]
        """As they were read."""
        found = self.embeddings[[self.rows[sentence] for sentence in sentences]]
        return found if convert_to_tensor else found.numpy()


def main(output: str, texts: str, count: str) -> None:
    """Mine, score, write."""
    kept = [json.loads(line) for line in Path(texts).read_text(encoding="utf-8").splitlines()]
    model = ReadOnce(f"{output}/bi-encoder", [sentence for _, sentence in kept])
    parts = []
    for seed, (kind, share) in enumerate(SHARES.items()):
        sentences = [sentence for genre, sentence in kept if KINDS.get(genre, "news") == kind]
        parts.append(mine_groups(sentences, model, round(int(count) * share), seed=seed))
    groups = concatenate_datasets(parts).shuffle(seed=0)
    add_teacher_scores(groups, model, cache_folder=f"{output}/cache").to_json(f"{output}/groups.jsonl")


if __name__ == "__main__":
    main(*sys.argv[1:])
