"""Figures of a study, from its records alone: convergence, means over seeds, paired comparisons, scaling laws."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.integrate import trapezoid
from scipy.stats import false_discovery_control, linregress, t, ttest_rel

from st_linear.evaluation import METRICS, Mean
from st_linear.records import read_json
from st_linear.study.cells import CELLS, RECORD
from st_linear.study.config import STUDY, Cell, Study, number_format, student_name
from st_linear.training import reached

UNITS = ("steps", "examples", "tokens", "seconds", "operations")
"""What convergence is counted in."""

TARGETS = (0.90, 0.95, 0.99)
"""Shares of a final Pearson."""

BASES = ("own", "control", "gain")
"""Whose: the cell's own final Pearson, the control's, or the cell's own way from its start to its end."""

_CONFIDENCE = 0.95
_CURVE_KEYS = {"steps": "step"}


@dataclass(frozen=True)
class Group:
    """Cells that differ in their seed alone."""

    attention: str
    transfer: bool
    length: int
    protocol: str

    @property
    def student(self) -> str:
        """The attention, and whether there was transfer."""
        return student_name(self.attention, self.transfer)

    def control(self) -> Group:
        """The softmax cells at the same length under the same protocol."""
        return Group("softmax", False, self.length, self.protocol)


@dataclass(frozen=True)
class Place:
    """What times depend on: a processor or accelerator, its instructions, its system, and the format of training."""

    device: str
    instructions: str | None
    platform: str
    half: bool

    @classmethod
    def of(cls, record: dict[str, Any]) -> Place:
        """Where a cell ran."""
        environment, half = record["environment"], record["cell"].get("half")
        return cls(
            environment["device"],
            environment.get("instructions"),
            environment["platform"],
            record["study"]["training"]["half"] if half is None else half,
        )

    def __str__(self) -> str:
        device = " ".join(filter(None, (self.device, self.instructions)))
        return f"{device}, {number_format(self.half)}, {self.platform}"


@dataclass
class Records:
    """A study's records.

    Attributes:
        name: Of the study.
        finished: By group and seed.
        failed: Records of failures.
        missing: Cells of the grid without a record.
    """

    name: str
    finished: dict[Group, dict[int, dict[str, Any]]]
    failed: list[dict[str, Any]]
    missing: int

    @classmethod
    def read(cls, folder: Path) -> Records:
        """Read a study's folder.

        Raises:
            FileNotFoundError: If it is none.
            ValueError: If no cell is finished, or a record is damaged.
        """
        if not (folder / STUDY).is_file():
            raise FileNotFoundError(f"{folder} holds no study: {STUDY} is missing")
        study = Study.model_validate(read_json(folder / STUDY)["study"])
        read = [read_json(path) for path in sorted((folder / CELLS).glob(f"*/{RECORD}"))]
        finished: dict[Group, dict[int, dict[str, Any]]] = {}
        for record in read:
            if "failure" not in record:
                cell = Cell(**record["cell"])
                seeds = finished.setdefault(Group(cell.attention, cell.transfer, cell.length, cell.protocol), {})
                if cell.seed in seeds:
                    name = Cell(**seeds[cell.seed]["cell"]).name
                    raise ValueError(f"{folder} has two records of one cell, {name!r} and {cell.name!r}: remove one")
                seeds[cell.seed] = record
        if not finished:
            raise ValueError(f"{folder} has no finished cell: nothing to report")
        there = {Cell(**record["cell"]) for record in read}
        missing = len(set(study.cells()) - there)
        ordered = sorted(finished, key=lambda g: (g.protocol, g.length, g.attention != "softmax", g.student))
        failed = [record for record in read if "failure" in record]
        return cls(study.name, {group: dict(sorted(finished[group].items())) for group in ordered}, failed, missing)

    def groups(self, **chosen: Any) -> list[Group]:
        """Groups of finished cells whose attributes are as given."""
        return [g for g in self.finished if all(getattr(g, key) == value for key, value in chosen.items())]

    def values(self, attribute: str) -> list[Any]:
        """What finished cells have of an attribute, each once, in order."""
        return list(dict.fromkeys(getattr(group, attribute) for group in self.finished))

    @cached_property
    def timed_in(self) -> Place:
        """Where most cells ran: speed, seconds and memory are of these alone."""
        return Counter(Place.of(r) for seeds in self.finished.values() for r in seeds.values()).most_common(1)[0][0]

    def timed(self, group: Group) -> dict[int, dict[str, Any]]:
        """The group's cells, by seed, whose speed, seconds and memory compare with those of other groups."""
        return {seed: r for seed, r in self.finished[group].items() if Place.of(r) == self.timed_in}

    def any(self) -> dict[str, Any]:
        """One finished record: all have the same settings."""
        return next(iter(next(iter(self.finished.values())).values()))


def area_under(curve: Sequence[dict[str, Any]]) -> float:
    """Mean Pearson over the examples of training, by the trapezoid rule."""
    examples = [point["examples"] for point in curve]
    return float(trapezoid([point["pearson"] for point in curve], examples)) / (examples[-1] - examples[0])


def convergence(
    curve: Sequence[dict[str, Any]], control: Sequence[dict[str, Any]] | None
) -> dict[str, dict[str, dict[str, float | None] | None]]:
    """How much of each unit a cell took to shares of a final Pearson.

    Args:
        curve: The cell's.
        control: The control's, of the same seed; None where there is none.

    Returns:
        By basis and target ("90", …), the amounts by unit; None where the basis says nothing: there is no control, or
        nothing was gained.
    """
    start, end = curve[0]["pearson"], curve[-1]["pearson"]
    targets: dict[str, Callable[[float], float] | None] = {
        "own": lambda share: share * end,
        "control": None if control is None else (lambda share: share * control[-1]["pearson"]),
        "gain": (lambda share: start + share * (end - start)) if end > start else None,
    }
    return {
        basis: {
            f"{100 * share:.0f}": None
            if target is None
            else {unit: reached(curve, target(share), _CURVE_KEYS.get(unit, unit)) for unit in UNITS}
            for share in TARGETS
        }
        for basis, target in targets.items()
    }


def mean(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Mean over seeds with its interval; ``reached`` of ``n`` where some never were, and then no mean."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    if not listed:
        return None
    if len(known) < len(listed):
        return {"mean": None, "low": None, "high": None, "n": len(listed), "reached": len(known)}
    return {**asdict(Mean.of(known, _CONFIDENCE)), "reached": len(known)}


def compare(own: dict[int, float], control: dict[int, float]) -> dict[str, Any] | None:
    """Compare cells with their controls, seed by seed.

    Args:
        own: By seed.
        control: By seed.

    Returns:
        ``mean`` of the differences with its interval (``low``, ``high``: None with one seed), ``n`` seeds, ``p`` of
        the paired t-test, and ``effect``, the differences' mean over their standard deviation, with Hedges' correction
        for few seeds, from three seeds on; None without a common seed.

    References:
        - Hedges (1981), Distribution theory for Glass's estimator of effect size, J. Educational Statistics 6, 107–128
    """
    seeds = sorted(own.keys() & control.keys())
    if not seeds:
        return None
    first, second = ([values[seed] for seed in seeds] for values in (own, control))
    differences = np.subtract(first, second)
    n = len(seeds)
    figures: dict[str, Any] = {**asdict(Mean.of(differences.tolist(), _CONFIDENCE)), "p": None, "effect": None}
    deviation = float(np.std(differences, ddof=1)) if n > 1 else 0.0
    # Students that are the control in all but name, near/far ones at short lengths, differ by rounding at most.
    if deviation > 1e-12:
        figures["p"] = float(ttest_rel(first, second).pvalue)
        # Of two seeds the correction leaves nothing.
        if n > 2:
            figures["effect"] = (1 - 3 / (4 * (n - 1) - 1)) * float(differences.mean()) / deviation
    return figures


def fit_line(x: Sequence[float], y: Sequence[float]) -> dict[str, Any] | None:
    """Least squares with a 95 % interval of the slope; None with fewer than three points, or a single x."""
    if len(x) < 3 or len(set(x)) < 2:
        return None
    fitted = linregress(x, y)
    margin = float(t.ppf(0.5 + _CONFIDENCE / 2, len(x) - 2)) * float(fitted.stderr)
    slope = float(fitted.slope)
    return {
        "slope": slope,
        "low": slope - margin,
        "high": slope + margin,
        "intercept": float(fitted.intercept),
        "r_squared": float(fitted.rvalue) ** 2,
        "n": len(x),
    }


def summarise(records: Records) -> dict[str, Any]:
    """All figures of the report, as JSON values.

    Returns:
        ``name``; ``groups``, one for each student, length and protocol, with its means over seeds; ``laws``, by
        protocol and student; ``timed``, of which cells speed, seconds and memory are; ``failed`` and ``missing``.
    """
    groups = [_summarise_group(records, group) for group in records.finished]
    _adjust(groups)
    laws: dict[str, dict[str, Any]] = {}
    for protocol in records.values("protocol"):
        laws[protocol] = {}
        for student in dict.fromkeys(g.student for g in records.groups(protocol=protocol)):
            laws[protocol][student] = _laws(records, protocol, student)
    return {
        "name": records.name,
        "groups": groups,
        "laws": laws,
        "timed": {"in": str(records.timed_in), "cells": sum(len(records.timed(group)) for group in records.finished)},
        "failed": [{"cell": r["cell"], **r["failure"]} for r in records.failed],
        "missing": records.missing,
    }


def _summarise_group(records: Records, group: Group) -> dict[str, Any]:
    seeds, timed = records.finished[group], records.timed(group)
    controls = records.finished.get(group.control(), {})
    converged = {
        seed: convergence(record["curve"], controls[seed]["curve"] if seed in controls else None)
        for seed, record in seeds.items()
    }
    place = str(group.length)
    areas = {seed: area_under(record["curve"]) for seed, record in seeds.items()}
    control_areas = {seed: area_under(record["curve"]) for seed, record in controls.items()}
    against = None
    if controls and group != group.control():
        against = {
            "pearson": compare(_at(seeds, place, "pearson"), _at(controls, place, "pearson")),
            "spearman": compare(_at(seeds, place, "spearman"), _at(controls, place, "spearman")),
            "area": compare(areas, control_areas),
        }
    return {
        **asdict(group),
        "student": group.student,
        "seeds": list(seeds),
        "budget": {
            unit: mean(record["budget"][unit] for record in seeds.values())
            for unit in ("steps", "examples", "tokens", "operations")
        },
        "transfer_cost": None
        if not group.transfer
        else {
            key: mean(record["transfer"][key] for record in (timed if key == "seconds" else seeds).values())
            for key in ("texts", "tokens", "operations", "seconds")
        },
        "start": mean(record["curve"][0]["pearson"] for record in seeds.values()),
        "dev": mean(record["curve"][-1]["pearson"] for record in seeds.values()),
        "area": mean(areas.values()),
        "convergence": {
            basis: {
                f"{100 * share:.0f}": {
                    unit: mean(
                        amounts[unit]
                        for seed, amounts in (
                            (seed, some[basis][f"{100 * share:.0f}"]) for seed, some in converged.items()
                        )
                        if amounts is not None and (unit != "seconds" or seed in timed)
                    )
                    for unit in UNITS
                }
                for share in TARGETS
            }
            for basis in BASES
        },
        "read": {length: _read(seeds, timed, length) for length in _lengths(seeds)},
        "training": {
            "tokens_per_second": mean(record["training"]["tokens_per_second"] for record in timed.values()),
            "memory_mib": mean(_memory(record["training"]) for record in timed.values()),
            "seconds": mean(record["training"]["seconds"] for record in timed.values()),
        },
        "against_control": against,
    }


def _lengths(seeds: dict[int, dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(length for record in seeds.values() for length in record["final"]))


def _read(seeds: dict[int, dict[str, Any]], timed: dict[int, dict[str, Any]], length: str) -> dict[str, Any] | None:
    """Means at a reading length, over the seeds that could be read there; None if none could."""
    figures, of_timed = (
        [r["final"][length] for r in some.values() if "failure" not in r["final"].get(length, {"failure": ""})]
        for some in (seeds, timed)
    )
    if not figures:
        return None
    return {
        **{metric: mean(some[metric] for some in figures) for metric in METRICS},
        "pairs": figures[0]["n"],
        # Of the pairs, for the first seed: what other pairs would give.
        "pearson_of_pairs": [figures[0]["pearson_low"], figures[0]["pearson_high"]],
        "mean_tokens": mean(some["mean_tokens"] for some in figures),
        "truncated": mean(some["truncated"] for some in figures),
        "mean_pairwise_cosine": mean(some["mean_pairwise_cosine"] for some in figures),
        "tokens_per_second": mean(some["tokens_per_second"] for some in of_timed),
        "memory_mib": mean(_memory(some) for some in of_timed),
    }


def _at(seeds: dict[int, dict[str, Any]], length: str, key: str) -> dict[int, float]:
    return {seed: r["final"][length][key] for seed, r in seeds.items() if key in r["final"].get(length, {})}


def _memory(figures: dict[str, Any]) -> float:
    """Peak memory beyond what was held before."""
    return max(0.0, figures["peak_memory_mib"] - figures["memory_before_mib"])


def _adjust(groups: Sequence[dict[str, Any]]) -> None:
    """Add ``p_adjusted`` to each comparison: many are made, and some would look significant by chance.

    Benjamini and Hochberg's, over all comparisons of final Pearson.
    """
    compared = [g["against_control"]["pearson"] for g in groups if g["against_control"] is not None]
    tested = [figures for figures in compared if figures is not None and figures["p"] is not None]
    if tested:
        for figures, p in zip(tested, false_discovery_control([figures["p"] for figures in tested])):
            figures["p_adjusted"] = float(p)


def _laws(records: Records, protocol: str, student: str) -> dict[str, Any]:
    """How a student's figures change with the training length, fitted to its cells."""
    points: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ("pearson", "to_95", "cost")}
    left_out = 0

    def add(law: str, length: int, value: float) -> None:
        points[law][0].append(math.log2(length))
        points[law][1].append(value)

    for group in records.groups(protocol=protocol, student=student):
        controls, timed = records.finished.get(group.control(), {}), records.timed(group)
        for seed, record in records.finished[group].items():
            add("pearson", group.length, record["final"][str(group.length)]["pearson"])
            if seed not in timed:
                continue
            last = record["curve"][-1]
            add("cost", group.length, math.log2(last["seconds"] / last["examples"]))
            if seed in controls:
                target = 0.95 * controls[seed]["curve"][-1]["pearson"]
                seconds = reached(record["curve"], target, "seconds")
                if seconds:
                    add("to_95", group.length, math.log2(seconds))
                else:
                    left_out += 1
    fitted: dict[str, Any] = {name: fit_line(x, y) for name, (x, y) in points.items()}
    return {**fitted, "to_95_left_out": left_out}
