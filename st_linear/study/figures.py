"""Figures of a study, small enough for a phone: a panel each, as SVG and PNG, legible on light and on dark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_linear.evaluation import Mean
from st_linear.plots import length_axis, new_figure, write_figure
from st_linear.study.statistics import Group, Records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#1b2c3d"
"""Of text and axes; a page that shows the SVG inside itself puts its own colour in its place."""
PAPER = "#fefefe"
"""Of the background; likewise."""

# After Okabe and Ito (2008), moved towards the middle so that each can be seen on white and on black.
_COLORS = ("#808080", "#2f8fd0", "#e06c1f", "#1fa67a", "#c76aa8", "#b8960c", "#7d6be0", "#d0484f")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_SIZE = (4.4, 3.5)
_TIMES = {
    "control": ("softmax's final Pearson", "Time to 95 % of softmax"),
    "gain": ("the student's own way, from its start to its end,", "Time to 95 % of its own way"),
}
_Points = list[tuple[float, dict[str, Any]]]


@dataclass(frozen=True)
class Panel:
    """A figure that was drawn: the stem of its files, and what it shows."""

    name: str
    section: str
    caption: str


def draw_all(records: Records, summary: dict[str, Any], folder: Path) -> list[Panel]:
    """Draw every figure of the report.

    Args:
        records: The study.
        summary: Its :func:`~st_linear.study.statistics.summarise`.
        folder: Where to.

    Returns:
        The panels, in the order of the report.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    artist = _Artist(records, summary, folder)
    panels = []
    for protocol in records.values("protocol"):
        by = f", {protocol}" if len(records.values("protocol")) > 1 else ""
        panels.append(artist.pearson_by_length(protocol, by))
        lengths = list(dict.fromkeys(group.length for group in records.groups(protocol=protocol)))
        panels += [artist.learning(protocol, length, by) for length in lengths]
        panels += [artist.time_to_95(protocol, by, basis) for basis in _TIMES]
        panels += [artist.reading(protocol, length, by) for length in lengths if artist.reads_others(protocol, length)]
        panels += artist.costs(protocol, by)
        panels.append(artist.speed_against_quality(protocol, by))
    return panels


class _Artist:
    def __init__(self, records: Records, summary: dict[str, Any], folder: Path) -> None:
        self.records = records
        self.folder = folder
        self.groups = summary["groups"]
        self.students = sorted(dict.fromkeys(g["student"] for g in self.groups), key=lambda s: (s != "softmax", s))

    def of(self, protocol: str, **chosen: Any) -> list[dict[str, Any]]:
        return [
            g
            for g in self.groups
            if g["protocol"] == protocol and all(g[key] == value for key, value in chosen.items())
        ]

    def pearson_by_length(self, protocol: str, by: str) -> Panel:
        def draw(axes: Axes) -> None:
            for student in self.students:
                groups = self.of(protocol, student=student)
                points = [(g["length"], _scaled(g["read"][str(g["length"])]["pearson"], 100)) for g in groups]
                self._line(axes, student, points)
            length_axis(axes, [g["length"] for g in self.of(protocol)], "tokens of the training texts")
            axes.set_ylabel("Pearson × 100 on test")

        caption = "Final Pearson on test, read at the training length; bars are 95 % intervals over seeds."
        return self._save(f"pearson-{protocol}", "quality", f"Quality by length{by}", caption, draw)

    def learning(self, protocol: str, length: int, by: str) -> Panel:
        def draw(axes: Axes) -> None:
            for student in self.students:
                for group in self.records.groups(protocol=protocol, length=length, student=student):
                    x, mean, low, high = _mean_curve(self.records, group)
                    axes.plot(x, mean, label=student, **self._style(student))
                    if low is not None and high is not None:
                        axes.fill_between(x, low, high, color=self._style(student)["color"], alpha=0.15, linewidth=0)
            axes.set_xlabel("training pairs seen")
            axes.set_ylabel("Pearson × 100 on dev")

        caption = f"Learning at {length:,} tokens: means over seeds, with 95 % intervals; up and left is better."
        return self._save(f"learning-{protocol}-{length}", "convergence", f"{length:,} tokens{by}", caption, draw)

    def time_to_95(self, protocol: str, by: str, basis: str) -> Panel:
        def draw(axes: Axes) -> None:
            for student in self.students:
                points = []
                for group in self.of(protocol, student=student):
                    amount = group["convergence"][basis]["95"]["seconds"]
                    if amount is not None and amount["mean"] is not None:
                        points.append((group["length"], amount))
                self._line(axes, student, points)
            length_axis(axes, [g["length"] for g in self.of(protocol)], "tokens of the training texts")
            axes.set_yscale("symlog", linthresh=1)
            # Room below 0, which is a point like any other here, and above the highest.
            axes.set_ylim(-0.3, max(1.5, 1.5 * axes.get_ylim()[1]))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 0 else "")
            axes.set_ylabel("seconds of training")

        what, title = _TIMES[basis]
        caption = f"Training time to 95 % of {what} on dev; no point: not every seed reached it."
        if basis == "control":
            caption += " 0: it was there before training."
        return self._save(f"time-to-95-{basis}-{protocol}", "convergence", f"{title}{by}", caption, draw)

    def reads_others(self, protocol: str, length: int) -> bool:
        return any(set(g["read"]) - {"natural", str(length)} for g in self.of(protocol, length=length))

    def reading(self, protocol: str, length: int, by: str) -> Panel:
        places: set[int] = set()

        def draw(axes: Axes) -> None:
            for student in self.students:
                for group in self.of(protocol, student=student, length=length):
                    points = [
                        (int(place), _scaled(figures["pearson"], 100))
                        for place, figures in group["read"].items()
                        if place != "natural" and figures is not None
                    ]
                    places.update(int(place) for place, _ in points)
                    self._line(axes, student, sorted(points, key=lambda point: point[0]))
            length_axis(axes, places, "tokens of the texts that are read")
            axes.set_ylabel("Pearson × 100 on test")

        caption = f"Trained at {length:,} tokens, read at others; bars are 95 % intervals over seeds."
        return self._save(f"reading-{protocol}-{length}", "reading", f"Trained at {length:,}{by}", caption, draw)

    def costs(self, protocol: str, by: str) -> list[Panel]:
        return [
            self._cost(protocol, by, "training", "tokens_per_second", "tokens a second", "Training speed"),
            self._cost(protocol, by, "training", "memory_mib", "MiB beyond what was held", "Training memory"),
            self._cost(protocol, by, "encoding", "tokens_per_second", "tokens a second", "Encoding speed"),
            self._cost(protocol, by, "encoding", "memory_mib", "MiB beyond what was held", "Encoding memory"),
        ]

    def _cost(self, protocol: str, by: str, what: str, key: str, unit: str, title: str) -> Panel:
        places: set[int] = set()

        def draw(axes: Axes) -> None:
            for student in self.students:
                points = self._cost_points(protocol, student, what, key)
                places.update(round(place) for place, _ in points)
                self._line(axes, student, points)
            of = "training texts" if what == "training" else "texts that are read"
            length_axis(axes, places, f"tokens of the {of}")
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.set_ylabel(unit)

        caption = f"{title}; bars are 95 % intervals over cells. Memory is the peak, of the device where there is one."
        name = f"{what}-{'speed' if key == 'tokens_per_second' else 'memory'}-{protocol}"
        return self._save(name, "costs", f"{title}{by}", caption, draw)

    def _cost_points(self, protocol: str, student: str, what: str, key: str) -> _Points:
        groups = self.of(protocol, student=student)
        if what == "training":
            return [(g["length"], g["training"][key]) for g in groups if g["training"][key] is not None]
        # All that read at a length do the same work, whatever they were trained at.
        by_place: dict[int, list[float]] = {}
        for group in groups:
            for place, figures in group["read"].items():
                if place != "natural" and figures is not None and figures[key] is not None:
                    by_place.setdefault(int(place), []).append(figures[key]["mean"])
        return [(place, vars(Mean.of(values))) for place, values in sorted(by_place.items())]

    def speed_against_quality(self, protocol: str, by: str) -> Panel:
        def draw(axes: Axes) -> None:
            for student in self.students:
                read = {g["length"]: g["read"][str(g["length"])] for g in self.of(protocol, student=student)}
                timed = {length: figures for length, figures in read.items() if figures["tokens_per_second"]}
                if not timed:
                    continue
                x = [figures["tokens_per_second"]["mean"] for figures in timed.values()]
                y = [100 * figures["pearson"]["mean"] for figures in timed.values()]
                axes.plot(x, y, label=student, **self._style(student))
                for length, right, up in zip(timed, x, y):
                    axes.annotate(
                        f"{length:,}", (right, up), (3, 3), textcoords="offset points", fontsize=7, color=INK
                    )
            axes.margins(0.12)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.set_xlabel("tokens encoded a second")
            axes.set_ylabel("Pearson × 100 on test")

        caption = "Speed against quality, by training length in tokens; the further up and right, the better."
        return self._save(f"speed-quality-{protocol}", "costs", f"Speed and quality{by}", caption, draw)

    def _style(self, student: str) -> dict[str, Any]:
        index = self.students.index(student)
        return {
            "color": _COLORS[index % len(_COLORS)],
            "marker": _MARKERS[index % len(_MARKERS)],
            # Broken lines show what lies below, where two students agree.
            "linestyle": ("-", "--", "-.", ":")[index % 4],
            "markersize": 4,
            "linewidth": 1.5,
        }

    def _line(self, axes: Axes, student: str, points: _Points) -> None:
        if not points:
            return
        # A little apart, so that bars at the same length stay legible.
        apart = 2 ** (0.05 * (self.students.index(student) - (len(self.students) - 1) / 2))
        means = [figures["mean"] for _, figures in points]
        # One seed has no interval.
        bars = [
            [0.0 if f["low"] is None else f["mean"] - f["low"] for _, f in points],
            [0.0 if f["high"] is None else f["high"] - f["mean"] for _, f in points],
        ]
        x = [place * apart for place, _ in points]
        axes.errorbar(x, means, yerr=bars, label=student, capsize=2, elinewidth=1, **self._style(student))

    def _save(self, name: str, section: str, title: str, caption: str, draw: Callable[[Axes], None]) -> Panel:
        import matplotlib

        parameters: Any = {"svg.fonttype": "none", "font.size": 9, "axes.titlesize": 10}
        parameters |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
        parameters |= {"axes.edgecolor": INK, "grid.color": INK, "grid.alpha": 0.15}
        with matplotlib.rc_context(parameters):
            figure, axes = new_figure(f"{name}.svg", _SIZE)
            axes.grid(axis="y", color=INK, alpha=0.15)
            axes.patch.set_visible(False)
            figure.patch.set_facecolor(PAPER)
            draw(axes)
            axes.set_title(title, loc="left")
            handles, labels = axes.get_legend_handles_labels()
            if handles:
                figure.legend(
                    handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8, handlelength=2.6
                )
            for suffix in ("svg", "png"):
                write_figure(figure, self.folder / f"{name}.{suffix}", dpi=200)
        return Panel(name, section, caption)


def _mean_curve(
    records: Records, group: Group
) -> tuple[list[float], list[float], list[float] | None, list[float] | None]:
    """Examples, and mean Pearson × 100 over seeds with its interval: all seeds are measured at the same steps."""
    curves = [record["curve"] for record in records.finished[group].values()]
    means = [Mean.of([100 * point["pearson"] for point in points]) for points in zip(*curves)]
    x = [point["examples"] for point in curves[0]]
    if len(curves) == 1:
        return x, [m.mean for m in means], None, None
    return x, [m.mean for m in means], [m.low or 0.0 for m in means], [m.high or 0.0 for m in means]


def _scaled(figures: dict[str, Any], factor: float) -> dict[str, Any]:
    return {key: None if figures[key] is None else factor * figures[key] for key in ("mean", "low", "high")}
