from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from st_linear.plots import (
    plot_fidelity,
    plot_learning_curves,
    plot_pearson_by_length,
    plot_pearson_by_protocol,
    plot_speed,
)

CURVES = {
    "softmax": [{"examples": 0, "pearson": 0.5}, {"examples": 1000, "pearson": 0.8}],
    "favor": [{"examples": 500, "pearson": 0.7}],
}


def figures(pearson: float, tokens: float) -> dict[str, float]:
    return {"pearson": pearson, "pearson_low": pearson - 0.02, "pearson_high": pearson + 0.01, "mean_tokens": tokens}


RESULTS = {
    "softmax": {512: figures(0.8, 500), None: figures(0.83, 14.2), 2048: figures(0.7, 512)},
    "favor": {None: figures(0.82, 14.2), 512: figures(0.81, 500)},
}


FIDELITY = {
    "before": {"512": {"cosine": 0.8, "cosine_p5": 0.7}, "2048": {"cosine": 0.7, "cosine_p5": 0.5}},
    "after": {"512": {"cosine": 0.99, "cosine_p5": 0.98}},
}


@pytest.mark.parametrize("suffix", [".svg", ".png", ".PNG"])
@pytest.mark.parametrize(
    ("plot", "data"),
    [(plot_learning_curves, CURVES), (plot_pearson_by_length, RESULTS), (plot_fidelity, FIDELITY)],
)
def test_plots_are_written_whole(tmp_path: Path, plot, data, suffix: str) -> None:
    path = tmp_path / "plots" / f"plot{suffix}"
    plot(data, path)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    if suffix == ".svg":
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    else:
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_same_figures_give_the_same_picture(tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / str(number) / f"plot{suffix}" for number in range(2)]
    for path in paths:
        plot_pearson_by_length(RESULTS, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_pyplot_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    plot_learning_curves(CURVES, tmp_path / "a.svg")
    plot_pearson_by_length(RESULTS, tmp_path / "b.svg")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    from matplotlib.figure import Figure

    kept: list = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (kept.append(self), Path(path).touch()))
    return kept


def test_learning_curves_show_the_points(tmp_path: Path, drawn: list) -> None:
    plot_learning_curves(CURVES, tmp_path / "a.svg")
    (axes,) = drawn[0].axes
    assert {line.get_label(): line.get_xydata().tolist() for line in axes.lines} == {
        "softmax": [[0, 50], [1000, 80]],
        "favor": [[500, 70]],
    }


def test_lengths_are_sorted_natural_at_its_tokens_with_intervals(tmp_path: Path, drawn: list) -> None:
    plot_pearson_by_length({"softmax": RESULTS["softmax"]}, tmp_path / "a.svg")
    plot_pearson_by_length(
        {"softmax": {"null" if k is None else str(k): v for k, v in RESULTS["softmax"].items()}}, tmp_path / "b.svg"
    )
    for figure in drawn:
        (axes,) = figure.axes
        ((line, _, (bars,)),) = axes.containers
        assert line.get_xdata().tolist() == pytest.approx([14.2, 512, 2048])
        assert line.get_ydata().tolist() == pytest.approx([83, 80, 70])
        assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [
            pytest.approx([81, 84]),
            pytest.approx([78, 81]),
            pytest.approx([68, 71]),
        ]
        assert axes.get_xscale() == "log"
        assert axes.get_xticks().tolist() == [14, 512, 2048]


def test_panels_share_their_axes_and_leave_out_what_is_undefined(tmp_path: Path, drawn: list) -> None:
    nothing = {**figures(0.5, 512), "pearson": None, "undefined": "all 8 predictions are 1", "truncated": 1.0}
    cut = {**figures(0.4, 512), "truncated": 1.0}
    results = {
        "repeat": {"softmax": {128: figures(0.8, 128), 2048: cut}},
        "filler-same-end": {"softmax": {128: figures(0.3, 128), 2048: nothing}},
        "filler-same-start": {"softmax": {128: nothing, 2048: nothing}},
    }
    plot_pearson_by_protocol(results, tmp_path / "a.svg")
    panels = drawn[0].axes
    assert [axes.get_title(loc="left") for axes in panels] == list(results)
    # The length that was asked for, though it was cut.
    assert [len(axes.containers[0][0].get_xdata()) for axes in panels[:2]] == [2, 1]
    assert all(axes.get_xticks().tolist() == [128, 2048] for axes in panels)
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["softmax"]


def test_fidelity_falls_to_its_5th_percentile(tmp_path: Path, drawn: list) -> None:
    falling = {"before": dict(reversed(FIDELITY["before"].items()))}
    plot_fidelity(falling, tmp_path / "a.svg")
    axes = drawn[0].axes[0]
    assert axes.get_xticks().tolist() == [512, 2048]
    _, (lower, upper), _ = axes.containers[0]
    assert lower.get_ydata().tolist() == pytest.approx([0.7, 0.5])
    assert upper.get_ydata().tolist() == pytest.approx([0.8, 0.7])


def test_a_mean_below_the_5th_percentile_has_no_bar(tmp_path: Path) -> None:
    plot_fidelity({"one far off": {"512": {"cosine": 0.9, "cosine_p5": 1.0}}}, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").exists()


def test_many_lines_differ(tmp_path: Path, drawn: list) -> None:
    plot_learning_curves({f"student {index}": CURVES["favor"] for index in range(20)}, tmp_path / "a.svg")
    styles = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in drawn[0].axes[0].lines]
    assert len(set(styles)) == 20


@pytest.mark.parametrize("name", ["plot.pdf", "plot"])
@pytest.mark.parametrize("plot", [plot_learning_curves, plot_pearson_by_length])
def test_other_suffixes_are_refused(tmp_path: Path, plot, name: str) -> None:
    with pytest.raises(ValueError, match=r"path=.*plot.* must end in \.svg or \.png"):
        plot({}, tmp_path / name)


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    with pytest.raises(ValueError, match="curves is empty: nothing to draw"):
        plot_learning_curves({}, path)
    with pytest.raises(ValueError, match=r"curves\['favor'\] is empty: nothing to draw"):
        plot_learning_curves({"favor": []}, path)
    with pytest.raises(ValueError, match=r"results\['favor'\] is empty: nothing to draw"):
        plot_pearson_by_length({"favor": {}}, path)
    with pytest.raises(
        ValueError, match=r"curves\['favor'\]: pearson is None in one of its points; a number is needed"
    ):
        plot_learning_curves({"favor": [{"examples": 1}]}, path)
    with pytest.raises(ValueError, match=r"results\['favor'\]: pearson is nan in one of its points"):
        plot_pearson_by_length({"favor": {None: figures(float("nan"), 14)}}, path)
    assert not list(tmp_path.iterdir())


def test_a_missing_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "st-linear\[quickstart\]"'):
        plot_learning_curves(CURVES, tmp_path / "a.svg")


SPEED = {
    "hedgehog": {"128": {"median": 0.9, "low": 0.8, "high": 1.0}, "8192": {"median": 5, "low": 4, "high": 6}},
    "favor": {"128": {"median": 0.5, "low": 0.4, "high": 0.7}},
}


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_speed_is_written_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "plots" / f"speed{suffix}"
    plot_speed(SPEED, path, baseline="softmax")
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_speed_shows_the_points_and_their_intervals(tmp_path: Path, drawn: list) -> None:
    plot_speed(SPEED, tmp_path / "a.svg", baseline="softmax")
    (axes,) = drawn[0].axes
    assert axes.get_ylabel() == "speed relative to softmax"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xticks().tolist() == [128, 8192]
    hedgehog, favor = axes.containers
    line, _, (bars,) = hedgehog
    assert line.get_ydata().tolist() == [0.9, 5]
    assert line.get_xdata() == pytest.approx([128, 8192], rel=0.05)
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [
        pytest.approx([0.8, 1.0]),
        pytest.approx([4, 6]),
    ]
    assert favor[0].get_ydata().tolist() == [0.5]


def test_speed_of_named_parts_stands_side_by_side(tmp_path: Path, drawn: list) -> None:
    parts = {"sts-training": SPEED["favor"]["128"], "4096-training": SPEED["favor"]["128"]}
    plot_speed({"favor": parts}, tmp_path / "a.svg", baseline="softmax")
    (axes,) = drawn[0].axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "linear")
    assert [label.get_text() for label in axes.get_xticklabels()] == list(parts)
    assert axes.containers[0][0].get_linestyle() == "None"


def test_speed_without_figures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="speed is empty: nothing to draw"):
        plot_speed({}, tmp_path / "a.svg", baseline="softmax")
    with pytest.raises(ValueError, match=r"speed\['elu'\]: low is None in one of its points; a number is needed"):
        plot_speed({"elu": {"128": {"median": 1.0}}}, tmp_path / "a.svg", baseline="softmax")
    with pytest.raises(ValueError, match=r"path=.*a.pdf.* must end in \.svg or \.png"):
        plot_speed(SPEED, tmp_path / "a.pdf", baseline="softmax")
    assert not list(tmp_path.iterdir())
