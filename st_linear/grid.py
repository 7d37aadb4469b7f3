"""Models over a grid of protocols and lengths; finished cells are kept."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from tqdm.auto import tqdm

from st_linear.data import evenly_spaced
from st_linear.evaluation import NATURAL, LengthSimilarityEvaluator
from st_linear.protocols import check_protocol
from st_linear.records import digest, environment, read_json, write_json
from st_linear.references import BM25
from st_linear.runtimes import ExportedEncoder


@dataclass(frozen=True)
class Grid:
    """
    What is asked of a model: all pairs as they are, and a subset of them, evenly spaced, in each cell of the grid.

    Attributes:
        lengths: Lengths in tokens, special tokens included.
        protocols: Each is asked at every length.
        pairs_at_length: How many pairs, for all lengths or for each of them.
        seed: Of what the protocols draw.
    """

    lengths: tuple[int, ...] = ()
    protocols: tuple[str, ...] = ("repeat",)
    pairs_at_length: tuple[int, ...] = (200,)
    seed: int = 0

    def __post_init__(self) -> None:
        for protocol in self.protocols:
            check_protocol(protocol)
        counts = self.pairs_at_length
        if not counts or len(counts) not in (1, len(self.lengths)):
            raise ValueError(f"pairs_at_length={counts} has {len(counts)} entries for {len(self.lengths)} lengths")
        if self.lengths and not self.protocols:
            raise ValueError(f"protocols is empty: name one for lengths={self.lengths}")
        if min(counts) < 4:
            raise ValueError(f"pairs_at_length must be at least 4, got {min(counts)}")

    def cells(self) -> list[tuple[str, int | None, int | None]]:
        """Protocol, length and number of pairs of each cell, natural length and all pairs first."""
        counts = self.pairs_at_length * (len(self.lengths) if len(self.pairs_at_length) == 1 else 1)
        sized = list(zip(self.lengths, counts))
        return [(NATURAL, None, None), *((protocol, *cell) for protocol in self.protocols for cell in sized)]


def evaluate_grid(
    model: SentenceTransformer | BM25,
    pairs: Dataset,
    grid: Grid,
    *,
    measured_by: SentenceTransformer | None = None,
    folder: Path | None = None,
    show_progress_bar: bool = True,
) -> dict[str, Any]:
    """
    Evaluate a model in all cells.

    Args:
        model: The model, or a reference.
        pairs: Columns ``sentence1``, ``sentence2`` and ``score``.
        grid: The cells.
        measured_by: As for :class:`~st_linear.evaluation.LengthSimilarityEvaluator`.
        folder: Where each cell's figures are kept as soon as they are there. Those of the same model on the same texts
            are read, not measured again.
        show_progress_bar: Show progress.

    Returns:
        ``"natural"``: its figures, as in :class:`~st_linear.evaluation.LengthSimilarityEvaluator`; and by protocol
        and length (as a string) those of each cell. All have ``environment``, where they were measured.

    Raises:
        ValueError: As that evaluator.
    """
    fingerprint = _fingerprint(model)
    results: dict[str, Any] = {}
    for protocol, length, count in tqdm(grid.cells(), desc="Cells", unit="cell", disable=not show_progress_bar):
        some = pairs if count is None else pairs.select(evenly_spaced(range(len(pairs)), count))
        evaluator = LengthSimilarityEvaluator(
            some["sentence1"],
            some["sentence2"],
            some["score"],
            lengths=(length,),
            protocols=("repeat",) if length is None else (protocol,),
            seed=grid.seed,
            measured_by=measured_by,
            show_progress_bar=show_progress_bar,
            write_csv=False,
        )
        texts = evaluator.pairs_at(model, protocol, length)[0].to_dict()
        cell = {"model": fingerprint, "texts": digest(texts), "protocol": protocol, "length": length}
        # Other cells of a protocol and length lie beside it: nothing that is finished is overwritten.
        name = protocol if length is None else f"{protocol}-{length}"
        path = None if folder is None else folder / f"{name}-{digest(cell)}.json"
        if path is not None and path.is_file():
            figures = read_json(path)["figures"]
        else:
            evaluator(model)
            figures = {**evaluator.results[protocol][length], "environment": environment()}
            if path is not None:
                write_json(path, {**cell, "figures": figures})
        if length is None:
            results[protocol] = figures
        else:
            results.setdefault(protocol, {})[str(length)] = figures
    return results


def _fingerprint(model: SentenceTransformer | BM25) -> str:
    """Of all that a model's vectors depend on, but for the texts."""
    if isinstance(model, BM25):
        return "BM25"
    modules = [(type(module).__name__, repr(module)) for module in model]
    settings = (
        modules,
        model.max_seq_length,
        model.prompts,
        model.default_prompt_name,
        model.truncate_dim,
        model.dtype,
    )
    found = hashlib.sha256(repr(settings).encode())
    found.update(_rules(model.tokenizer).encode())
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    for module in model.modules():
        if isinstance(module, ExportedEncoder):
            found.update(module.fingerprint().encode())
    return found.hexdigest()


def _rules(tokenizer: Any) -> str:
    """How a tokenizer cuts words, without what its last call has left in it: how it cut and padded texts."""
    copy = Tokenizer.from_str(getattr(tokenizer, "backend_tokenizer", tokenizer).to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy.to_str()
