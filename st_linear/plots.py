"""Plots of learning curves, and of fidelity and Pearson correlation by text length (extra: quickstart)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_linear.records import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008), which colour-blind readers can tell apart, grey in the place of the yellow that fades on white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
_MARKERS = ("o", "s", "^", "D", "v")
_SUFFIXES = (".svg", ".png")
_PANELS_A_ROW = 4


def plot_learning_curves(curves: dict[str, list[dict[str, Any]]], path: str | Path) -> None:
    """
    Plot how fast students learn: dev Pearson times 100 against the pairs seen, one line per student.

    Args:
        curves: By student, its points in the order of training, each with ``examples`` and ``pearson``.
        path: A ``.svg`` or ``.png`` file, written atomically.

    Raises:
        ValueError: If there is nothing to draw, a point lacks a figure, or the suffix is another.
        ImportError: If matplotlib is not installed.
    """
    figure, axes = new_figure(path)
    _nonempty("curves", curves)
    for index, (student, points) in enumerate(curves.items()):
        x = _column("curves", student, points, "examples")
        y = [100 * value for value in _column("curves", student, points, "pearson")]
        axes.plot(x, y, label=student, **_line(index))
    axes.set_xlabel("training pairs seen")
    axes.set_ylabel("Pearson × 100 on dev")
    axes.set_title("Learning: the further up and to the left, the better", loc="left")
    _save(figure, axes, path)


def plot_fidelity(results: dict[str, dict[str, dict[str, float]]], path: str | Path) -> None:
    """
    Plot how close a conversion's vectors stay as texts grow: the mean cosine, with bars to the 5th percentile.

    Args:
        results: Under a title each, figures by length, with ``cosine`` and ``cosine_p5``; see
            :class:`~st_linear.evaluation.FidelityEvaluator`.
        path: A ``.svg`` or ``.png`` file, written atomically.

    Raises:
        ValueError: If there is nothing to draw, a figure is missing, or the suffix is another.
        ImportError: If matplotlib is not installed.
    """
    figure, axes = new_figure(path)
    _nonempty("results", results)
    for index, (title, by_length) in enumerate(results.items()):
        lengths = sorted(by_length, key=int)
        points = [by_length[length] for length in lengths]
        mean, low = (_column("results", title, points, key) for key in ("cosine", "cosine_p5"))
        apart = _beside(index, len(results))
        # Of few texts with one far off, the mean may be below.
        below = [max(0.0, most - least) for most, least in zip(mean, low)]
        axes.errorbar(
            [int(length) * apart for length in lengths],
            mean,
            yerr=[below, [0.0] * len(mean)],
            label=title,
            capsize=3,
            **_line(index),
        )
    length_axis(axes, {int(length) for some in results.values() for length in some}, "tokens per text")
    axes.set_ylabel("cosine with the encoder's own vector")
    axes.set_title("Same vectors: the closer to 1, the better (bars: to the 5th percentile)", loc="left")
    _save(figure, axes, path)


def plot_pearson_by_length(results: dict[str, dict[int | None, dict[str, Any]]], path: str | Path) -> None:
    """
    Plot how models hold up as texts grow: Pearson times 100 with its interval against tokens, one line per model.

    Args:
        results: By model, the figures by length as ``LengthSimilarityEvaluator.results`` holds them for a protocol
            (``pearson``, ``pearson_low``, ``pearson_high``, ``mean_tokens``). The natural length, None (or ``"null"``
            as in a record read back from JSON), is drawn at its ``mean_tokens``, and so is a length at which texts
            were cut. Lengths read on equally many pairs (``n``) are joined by a line. An undefined correlation is
            left out.
        path: A ``.svg`` or ``.png`` file, written atomically.

    Raises:
        ValueError: If there is nothing to draw, a figure is missing, or the suffix is another.
        ImportError: If matplotlib is not installed.
    """
    figure, axes = new_figure(path)
    length_axis(axes, _draw_lengths(axes, "results", results, cut_where_read=True), "tokens per text")
    axes.set_ylabel("Pearson × 100")
    axes.set_title("The same texts, longer: the flatter, the better (bars: 95 % intervals)", loc="left")
    _save(figure, axes, path)


def plot_pearson_by_protocol(
    results: dict[str, dict[str, dict[int | None, dict[str, Any]]]], path: str | Path
) -> None:
    """
    Plot how models hold up as texts grow, a panel for each protocol.

    Args:
        results: By protocol and model, the figures by length as for :func:`plot_pearson_by_length`. A length at which
            texts were cut stays where it is, as the texts that were asked for are as long.
        path: A ``.svg`` or ``.png`` file, written atomically.

    Raises:
        ValueError: If there is nothing to draw, a figure is missing, or the suffix is another.
        ImportError: If matplotlib is not installed.
    """
    figure, first = new_figure(path)
    _nonempty("results", results)
    first.remove()
    columns = min(_PANELS_A_ROW, len(results))
    rows = math.ceil(len(results) / columns)
    figure.set_size_inches(3 * columns + 2, 2.6 * rows + 0.6)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    ticks: set[int] = set()
    for axes, (protocol, by_model) in zip(panels, results.items()):
        _style(axes)
        ticks |= _draw_lengths(axes, f"results[{protocol!r}]", by_model, cut_where_read=False)
        axes.set_title(protocol, loc="left", fontsize="medium")
    # The panels share their axes, and a panel may lack a length where nothing is defined.
    length_axis(panels[0], ticks)
    for axes in panels[len(results) :]:
        axes.remove()
    for axes in panels[max(0, len(results) - columns) : len(results)]:
        axes.tick_params(axis="x", labelbottom=True, labelrotation=45)
    figure.supxlabel("tokens per text")
    figure.supylabel("Pearson × 100")
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), frameon=False, loc="outside right upper")
    write_figure(figure, path)


def _draw_lengths(
    axes: Axes, argument: str, results: dict[str, dict[int | None, dict[str, Any]]], *, cut_where_read: bool
) -> set[int]:
    """Draw a line for each model, and return the numbers of tokens that it has points at."""
    _nonempty(argument, results)
    ticks: set[int] = set()
    for index, (model, by_length) in enumerate(results.items()):
        defined = {length: figures for length, figures in by_length.items() if not figures.get("undefined")}
        columns = {
            key: _column(argument, model, list(defined.values()), key)
            for key in ("pearson", "pearson_low", "pearson_high", "mean_tokens")
        }
        as_read = [
            length in (None, "null") or bool(cut_where_read and figures.get("truncated"))
            for length, figures in defined.items()
        ]
        tokens = [
            mean if read else float(length)  # type: ignore[arg-type]
            for length, read, mean in zip(defined, as_read, columns["mean_tokens"], strict=True)
        ]
        ticks.update(round(count) for count in tokens)
        pairs = [figures.get("n") for figures in defined.values()]
        points = sorted(
            zip(tokens, columns["pearson"], columns["pearson_low"], columns["pearson_high"], pairs, strict=True)
        )
        apart = _beside(index, len(results))
        # One line for each set of pairs: figures on other pairs are no continuation.
        for number, same in enumerate(dict.fromkeys(pairs)):
            part = [point for point in points if point[4] == same]
            axes.errorbar(
                [x * apart for x, *_ in part],
                [100 * value for _, value, *_ in part],
                yerr=[
                    [100 * (value - low) for _, value, low, *_ in part],
                    [100 * (high - value) for _, value, _, high, _ in part],
                ],
                label=model if number == 0 else None,
                capsize=3,
                **_line(index),
            )
    return ticks


def new_figure(path: str | Path, size: tuple[float, float] = (8, 4.8)) -> tuple[Figure, Axes]:
    """
    Start a figure that can be saved at ``path``.

    Args:
        path: A ``.svg`` or ``.png`` file.
        size: Width and height in inches.

    Raises:
        ValueError: If the suffix is none of ``.svg`` and ``.png``.
        ImportError: If matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise ValueError(f"path={str(path)!r} must end in {' or '.join(_SUFFIXES)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "st-linear[quickstart]"') from error
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    return figure, axes


def length_axis(axes: Axes, lengths: Iterable[int], label: str = "") -> None:
    """
    Lay numbers of tokens out by powers of two.

    Args:
        axes: The axes.
        lengths: Numbers of tokens to be named below the axis, those left out whose names would run into one another.
        label: Of the axis.
    """
    axes.set_xscale("log", base=2)
    axes.set_xticks(_apart(sorted(set(lengths))))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.minorticks_off()
    axes.set_xlabel(label)


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)


def _beside(index: int, lines: int) -> float:
    """A factor on the lengths of a line among some: a little apart, bars at the same length stay legible."""
    return 2 ** (0.06 * (index - (lines - 1) / 2))


def _line(index: int) -> dict[str, Any]:
    return {
        "color": _COLORS[index % len(_COLORS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        # Broken lines show what lies below, where two models agree.
        "linestyle": ("-", "--", "-.", ":")[index % 4],
        "markersize": 4.5,
        "linewidth": 1.6,
    }


def _nonempty(argument: str, lines: dict[str, Any]) -> None:
    if not lines:
        raise ValueError(f"{argument} is empty: nothing to draw")
    for name, points in lines.items():
        if not points:
            raise ValueError(f"{argument}[{name!r}] is empty: nothing to draw")


def _column(argument: str, name: str, points: Sequence[dict[str, Any]], key: str) -> list[float]:
    values = [point.get(key) for point in points]
    for value in values:
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{argument}[{name!r}]: {key} is {value!r} in one of its points; a number is needed")
    return [float(value) for value in values if value is not None]


def _apart(ticks: Sequence[int]) -> list[int]:
    """Leave out ticks whose labels would run into the one before."""
    kept: list[int] = []
    for tick in ticks:
        if not kept or tick >= 1.3 * kept[-1]:
            kept.append(tick)
    return kept


def _save(figure: Figure, axes: Axes, path: str | Path) -> None:
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    write_figure(figure, path)


def write_figure(figure: Figure, path: str | Path, dpi: int = 150) -> None:
    """
    Write a figure, atomically; the same figures give the same picture.

    Args:
        figure: The figure.
        path: A ``.svg`` or ``.png`` file.
        dpi: Pixels per inch of a ``.png``.
    """
    import matplotlib

    suffix = Path(path).suffix.lower()[1:]
    metadata = {"Date": None} if suffix == "svg" else None
    with atomic_path(path) as temporary, matplotlib.rc_context({"svg.hashsalt": Path(path).stem}):
        figure.savefig(temporary, format=suffix, dpi=dpi, metadata=metadata)


def plot_speed(speed: dict[str, dict[str, dict[str, float]]], path: str | Path, *, baseline: str) -> None:
    """
    Plot speed relative to a baseline, with its intervals, one line per model; the baseline is the line at 1.

    Args:
        speed: By model and length (or part of a benchmark), the ``median``, ``low`` and ``high`` of the ratio. Where
            all are numbers of tokens they lie on a logarithmic axis; names stand side by side.
        path: A ``.svg`` or ``.png`` file, written atomically.
        baseline: Name of the baseline.

    Raises:
        ValueError: If there is nothing to draw, a figure is missing, or the suffix is another.
        ImportError: If matplotlib is not installed.
    """
    figure, axes = new_figure(path)
    _nonempty("speed", speed)
    places = list(dict.fromkeys(place for points in speed.values() for place in points))
    numbers = all(place.isdigit() for place in places)
    axes.axhline(1, color="0.6", linewidth=1)
    for index, (model, points) in enumerate(speed.items()):
        median, low, high = (_column("speed", model, list(points.values()), key) for key in ("median", "low", "high"))
        # A little apart, so that bars at the same length stay legible.
        step = index - (len(speed) - 1) / 2
        x = [float(place) * 2 ** (0.04 * step) if numbers else places.index(place) + 0.06 * step for place in points]
        bars = [[m - b for m, b in zip(median, low)], [t - m for m, t in zip(median, high)]]
        style = _line(index) if numbers else {**_line(index), "linestyle": "none"}
        axes.errorbar(x, median, yerr=bars, label=model, capsize=3, **style)
    if numbers:
        length_axis(axes, map(int, places), "tokens per text")
    else:
        axes.set_xticks(range(len(places)), places)
        axes.margins(x=0.1)
    ends = [bar for points in speed.values() for point in points.values() for bar in (point["low"], point["high"])]
    if max(ends) > 4 * min(ends):
        # Over a smaller range, powers of two would leave the axis with a single label.
        axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.minorticks_off()
    axes.set_ylabel(f"speed relative to {baseline}")
    axes.set_title("Speed: the higher, the better (bars: 95 % intervals)", loc="left")
    _save(figure, axes, path)
