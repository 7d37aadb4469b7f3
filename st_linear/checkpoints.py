"""Files of a saved model: where they are, and one-line errors where they are missing or damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import model_info
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from sentence_transformers.util import load_file_path
from torch import Tensor


def hub_kwargs_of(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """What :func:`load_file_path` needs of the keyword arguments of a load."""
    kwargs = kwargs or {}
    names = {"token": "token", "cache_folder": "cache_folder", "cache_dir": "cache_folder", "revision": "revision"}
    found = {new: kwargs[old] for old, new in names.items() if kwargs.get(old) is not None}
    return {**found, "local_files_only": bool(kwargs.get("local_files_only", False))}


def hub_out_of_reach(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> bool:
    """Whether the Hugging Face Hub gives no answer, asked once.

    Its client asks for each file of a model again and again, which takes minutes without a network: who knows the
    answer passes ``local_files_only=True``.
    """
    try:
        model_info(repo_id, revision=revision, token=token, timeout=5)
    except (HfHubHTTPError, HFValidationError):
        return False
    except Exception:  # the hub's client lets through whatever its HTTP library raises
        return True
    return False


def read_json_file(path: str, filename: str, subfolder: str = "", **hub_kwargs: Any) -> Any:
    """Contents of a JSON file of a model, None where there is no such file."""
    file = load_file_path(path, filename, subfolder, **hub_kwargs)
    if file is None:
        return None
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: {filename} is damaged ({error})") from error


def read_tensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def read_header(path: str | Path) -> dict[str, tuple[str, list[int]]]:
    """Number format, as safetensors names it, and shape of each tensor of a safetensors file; none of them is read.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            slices = {name: file.get_slice(name) for name in names}
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def refuse_mismatch(where: str, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raise a ValueError unless a file holds just the tensors it should."""
    if missing:
        raise ValueError(f"{where} lacks tensors: {some_of(missing)}")
    if unexpected:
        raise ValueError(f"{where} holds tensors that the model has no place for: {some_of(unexpected)}")


def some_of(names: Collection[str]) -> str:
    """The first of some names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def refuse_misshapen_weights(where: str, mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]]) -> None:
    """Raise a ValueError if tensors of a checkpoint have other shapes than its config says."""
    for name, shape, expected in mismatched:
        raise ValueError(f"{where}: {name} has shape {tuple(shape)}, expected {tuple(expected)} by the config")


def refuse_missing_weights(where: str, missing: Collection[str]) -> None:
    """Raise a ValueError if a checkpoint lacks weights of the encoder, which transformers would draw at random."""
    missing = [key for key in missing if "pooler" not in key]
    if missing:
        raise ValueError(f"{where} lacks weights of the encoder: {some_of(missing)}")


@contextmanager
def one_line_if_missing(path: str) -> Iterator[None]:
    """Say in a line that a model is neither here nor on the hub, where transformers takes several."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) or os.path.isdir(path):
            raise
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(f"no folder {path!r} here, and none on the Hugging Face Hub ({reason})") from error
