"""The methods section of a report, written from the records: every setting, and how each figure comes about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from st_linear.markdown import table as markdown_table
from st_linear.study.config import number_format
from st_linear.study.statistics import Group, Place, Records

_DEFINITIONS = """\
- **Texts.** Each sentence pair is brought to a length in tokens by the protocol named: `repeat` says each sentence
  again and again, `filler-…` puts neutral sentences around it, `document` makes one text of four, `truncate` cuts
  that at 512 tokens. Training texts, dev texts (of the learning curve) and test texts (of the final figures) are
  apart, and the same for every cell.
- **Budget.** Every cell spends the same amount of one unit, named below, on distillation, in whole steps. The other
  units are stated for each student. Operations are those of matrix products, two for each multiplication and
  addition, counted from the encoder's shapes; a training step is three forward passes. Attention transfer comes on
  top.
- **Convergence.** Pearson is measured on dev at fixed shares of training. Between these points it is taken to change
  evenly; the first crossing of a target counts. Seconds are those of training alone, without measuring and saving.
- **Intervals.** Over seeds: Student's t, 95 %, for other draws of seeds on the same pairs. A single seed has none.
  Over pairs: Fisher's transformation, for other pairs of the same kind.
- **Comparisons.** Differences from softmax are taken seed by seed: same pairs, same order, same length. The p-values
  of paired t-tests are adjusted for their number after Benjamini and Hochberg; effects carry Hedges' correction.
- **Memory.** The peak beyond what was held before: of the device where there is one, else of the process."""


def methods(records: Records) -> str:
    """The section, in Markdown."""
    record = records.any()
    inputs = record["inputs"]
    pairs = ", ".join(f"{inputs['pairs'][s]:,} of {inputs['of'][s]:,} {s}" for s in ("train", "dev", "test"))
    teacher = "none" if inputs["teacher"] is None else inputs["teacher"]["name"]
    lines = [
        f"- base model: {inputs['base']}",
        f"- sentence pairs: {inputs['data']} ({pairs}; digest {inputs['digest']})",
        f"- teacher: {teacher}",
        *(f"- {name}: {value}" for name, value in _flat(record["study"])),
    ]
    header = ["student", "protocol", "length", "seeds"]
    rows = [
        [g.student, g.protocol, f"{g.length:,}", ", ".join(map(str, seeds))] for g, seeds in records.finished.items()
    ]
    at_once = [_pairs_at_once(seeds.values()) for seeds in records.finished.values()]
    if any(at_once):
        header.append("pairs of a step in memory at once")
        rows = [[*row, parts or "all"] for row, parts in zip(rows, at_once)]
    own = [_own_format(seeds) for seeds in records.finished.values()]
    if any(own):
        header.append("seeds in a format of their own")
        rows = [[*row, text or "–"] for row, text in zip(rows, own)]
    parts = ["## Methods", _DEFINITIONS, "### Settings, the same for all cells", "\n".join(lines)]
    parts += [
        "### Cells",
        markdown_table(header, rows).rstrip(),
        "### Where it ran",
        "\n".join(_places(records.finished)),
    ]
    return "\n\n".join(parts)


def _pairs_at_once(cells: Iterable[dict[str, Any]]) -> str:
    return ", ".join(str(n) for n in sorted({record["cell"].get("pairs_at_once") or 0 for record in cells}) if n)


def _own_format(cells: dict[int, dict[str, Any]]) -> str:
    """The seeds that did not train as ``training.half`` says the others do."""
    halves = {seed: record["cell"].get("half") for seed, record in cells.items()}
    return ", ".join(f"{seed}: {number_format(half)}" for seed, half in halves.items() if half is not None)


def _flat(settings: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        name = f"{before}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        elif value is not None:
            yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _places(finished: dict[Group, dict[int, dict[str, Any]]]) -> Iterator[str]:
    """Each environment that cells ran in, and how many did."""
    counts: dict[str, int] = {}
    for seeds in finished.values():
        for record in seeds.values():
            place = record["environment"]
            commit = "no checkout" if place["git_commit"] is None else f"commit {place['git_commit'][:12]}"
            dirty = ", changed" if place["git_dirty"] else ""
            versions = ", ".join(
                f"{name} {place[name]}" for name in ("st_linear", "torch", "transformers", "sentence_transformers")
            )
            text = f"{Place.of(record)}, {place['threads']} threads, {versions}, {commit}{dirty}"
            counts[text] = counts.get(text, 0) + 1
    for text, count in counts.items():
        yield f"- {count} cells: {text}"
