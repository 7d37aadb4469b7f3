"""Tables and plots of a benchmark, made from its record alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from st_linear.markdown import table as markdown_table
from st_linear.plots import plot_speed
from st_linear.records import write_text

_HEADER = ("length", "model", "ms", "tokens/s", "documents/s", "tensors, MiB", "resident, MiB")


def rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the record's table: one row for each contender at each length.

    Args:
        record: As :func:`~st_linear.benchmarks.runner.run` returns it.
    """
    baselines = list(record["settings"]["baselines"])
    others = {
        baseline
        for result in record["results"]
        for figures in result["contenders"].values()
        for baseline in figures.get("speed", {})
    } - set(baselines)
    grows = bool(record["settings"].get("across_lengths"))
    bandwidth = any("bytes_per_second" in f for r in record["results"] for f in r["contenders"].values())
    header = [*_HEADER, *(["GB/s"] if bandwidth else []), *(f"speed × {name}" for name in baselines)]
    header += ["speed × padded"] if others else []
    header += ["time per token ×", "memory per token ×"] if grows else []
    lines = []
    for result in record["results"]:
        for name, figures in result["contenders"].items():
            if "skipped" in figures:
                lines.append([result["name"], name, figures["skipped"], *[""] * (len(header) - 3)])
                continue
            line = [
                result["name"],
                name,
                _number(1000 * figures["median_seconds"]),
                f"{figures['tokens_per_second']:,.0f}",
                _number(figures["documents_per_second"]),
                *(_memory(figures["memory"], part) for part in ("tensors_mib", "resident_mib")),
                *([_number(figures["bytes_per_second"] / 1e9)] if bandwidth else []),
                *(_interval(figures["speed"].get(baseline)) for baseline in baselines),
            ]
            if others:
                line.append(
                    _interval(next((figures["speed"][key] for key in figures["speed"] if key in others), None))
                )
            if grows:
                growth = figures["growth_per_token"] or {"time": None, "memory": None}
                line.append(_interval(growth["time"]))
                line.append("–" if growth["memory"] is None else f"{growth['memory']:.3f}")
            lines.append(line)
    return header, lines


def table(record: dict[str, Any]) -> Table:
    """The record's table for a terminal."""
    header, lines = rows(record)
    made = Table(title=_title(record), caption=_caption(record))
    for column in header:
        made.add_column(column, justify="left" if column in ("length", "model") else "right")
    before = None
    for line in lines:
        if before is not None and line[0] != before:
            made.add_section()
        before = line[0]
        made.add_row(*line)
    return made


def markdown(record: dict[str, Any]) -> str:
    """The record's table in Markdown, with a line on what it shows above and below it."""
    return f"{_title(record)}\n\n{markdown_table(*rows(record))}\n{_caption(record)}\n"


def write_report(record: dict[str, Any], folder: Path, name: str) -> None:
    """Write ``name.md`` and ``name.svg`` beside the record.

    Args:
        record: As :func:`~st_linear.benchmarks.runner.run` returns it.
        folder: Where to.
        name: Of the files.
    """
    write_text(folder / f"{name}.md", markdown(record))
    speed, baseline = speed_by_length(record)
    if speed:
        plot_speed(speed, folder / f"{name}.svg", baseline=baseline)


def speed_by_length(record: dict[str, Any]) -> tuple[dict[str, dict[str, dict[str, float]]], str]:
    """For the plot: by contender and length, its speed relative to the first baseline, and that baseline's name."""
    baseline = record["settings"]["baselines"][0]
    speed: dict[str, dict[str, dict[str, float]]] = {}
    for result in record["results"]:
        for name, figures in result["contenders"].items():
            if name != baseline and baseline in figures.get("speed", {}):
                speed.setdefault(name, {})[result["name"]] = figures["speed"][baseline]
    return speed, baseline


def _title(record: dict[str, Any]) -> str:
    settings, environment = record["settings"], record["environment"]
    parts = [record["level"] + (", forward and backward" if settings.get("backward") else "")]
    if "heads" in settings:
        parts.append(f"{settings['heads']} heads of {settings['head_dim']}")
    parts += [settings["dtype"], f"{settings['device']} ({environment['device']})"]
    if settings["device"] == "cpu":
        parts.append(f"{environment['threads']} threads")
    return " · ".join(parts)


def _caption(record: dict[str, Any]) -> str:
    rounds = record["settings"]["rounds"]
    held = "inputs and outputs" if record["level"] == "attention" else "what is held before"
    return (
        f"Medians of up to {rounds} interleaved rounds; speed is the baseline's time over the model's, with 95 % "
        f"intervals; memory is the peak beyond {held}, of live tensors and of the process."
    )


def _interval(figures: dict[str, float] | None) -> str:
    if figures is None:
        return "–"
    return f"{_ratio(figures['median'])} [{_ratio(figures['low'])}, {_ratio(figures['high'])}]"


def _memory(figures: dict[str, float | None] | None, part: str) -> str:
    value = None if figures is None else figures[part]
    return "–" if value is None else _number(value)


def _ratio(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
