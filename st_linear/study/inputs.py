"""What all cells of a study read: the base model, a fixed subset of the pairs, and the teacher's scores of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from filelock import FileLock

from st_linear.data import evenly_spaced, token_counts
from st_linear.models import load
from st_linear.protocols import lengthen
from st_linear.recipe import Pairs, Teacher, base_name, packaged_base, prepare_teacher
from st_linear.study.config import Study

TEACHER_COLUMN = "teacher"
LOCKS = ".locks"

_SPLITS = ("train", "dev", "test")


@dataclass
class Inputs:
    """The inputs of a study's cells.

    Attributes:
        base: Hub id or folder of the encoder.
        pairs: The subset; ``train`` has the teacher's scores in a column of their own, unless there is no teacher.
        described: What a record says of all this.
    """

    base: str
    pairs: Pairs
    described: dict[str, Any]


def prepare(study: Study, folder: Path, *, show_progress_bar: bool = False) -> Inputs:
    """Read the data, and have the teacher's scores; a teacher trained here, and its scores, lie in ``folder/teacher``.

    Raises:
        ValueError: If data, teacher and lengths do not fit together.
        FileNotFoundError: If what the study names is not there.
    """
    base = packaged_base() if study.base == "packaged" else study.base
    tokenizer = load(base).tokenizer
    pairs = Pairs.load(study.data.source)
    rows = {split: _rows(getattr(pairs, split), study, split, tokenizer) for split in _SPLITS}
    subset = Pairs(pairs.source, *(Dataset.from_dict(getattr(pairs, split)[rows[split]]) for split in _SPLITS))
    if len(subset.train) < study.training.batch_size:
        raise ValueError(
            f"{len(subset.train)} training pairs make no batch of batch_size={study.training.batch_size}: lower it"
        )
    check_lengths(study, subset, tokenizer)
    digest = subset.digest()
    teacher = None
    if study.training.alpha:
        # Cached scores are those of all pairs, row for row.
        whole = study.teacher.scores is not None
        (folder / LOCKS).mkdir(parents=True, exist_ok=True)
        # Two processes that begin with the same folder would train the same teacher.
        with FileLock(folder / LOCKS / "teacher"):
            taught = prepare_teacher(
                pairs if whole else subset,
                base,
                folder / "teacher",
                teacher=study.teacher.model,
                teacher_scores=study.teacher.scores,
                settings=study.settings(study.data.seed),
                show_progress_bar=show_progress_bar,
            )
        scores = {s: [taught.scores[s][row] for row in rows[s]] if whole else taught.scores[s] for s in _SPLITS}
        teacher = Teacher(taught.name, scores, taught.figures)
        subset.train = subset.train.add_column(TEACHER_COLUMN, scores["train"])
    described = {
        "base": base_name(base),
        "data": pairs.source,
        "digest": digest,
        "pairs": {split: len(getattr(subset, split)) for split in _SPLITS},
        "of": {split: len(getattr(pairs, split)) for split in _SPLITS},
        "teacher": None if teacher is None else {**teacher.described(), "figures": teacher.figures},
    }
    return Inputs(base, subset, described)


def check_lengths(study: Study, pairs: Pairs, tokenizer: Any) -> None:
    """Find out before the work, not after it, that a sentence does not fit into the shortest of the lengths.

    Raises:
        ValueError: If one does not.
    """
    shortest = min(study.lengths())
    for split in _SPLITS:
        for protocol in study.protocols():
            try:
                lengthen(getattr(pairs, split), tokenizer, shortest, protocol, seed=study.data.seed)
            except ValueError as error:
                raise ValueError(f"{split}: {error}; data.most_tokens leaves long sentences out") from error


def _rows(pairs: Dataset, study: Study, split: str, tokenizer: Any) -> list[int]:
    rows: Sequence[int] = range(len(pairs))
    most = study.data.most_tokens
    if most is not None:
        counts = [token_counts(pairs[column], tokenizer) for column in ("sentence1", "sentence2")]
        rows = [row for row in rows if max(count[row] for count in counts) <= most]
        if len(rows) < 4:
            raise ValueError(f"data.most_tokens={most} leaves {len(rows)} pairs of {split}; at least 4 are needed")
    wanted = getattr(study.data, split)
    return list(rows if wanted is None else evenly_spaced(rows, wanted))
