from __future__ import annotations

import json
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from st_linear import convert, load
from st_linear.data import evenly_spaced, load_pairs
from st_linear.evaluation import LengthSimilarityEvaluator
from st_linear.grid import Grid, evaluate_grid
from st_linear.references import BM25

GRID = Grid((48, 96), ("repeat", "filler-different-random"), (6, 8), seed=2)


@pytest.fixture(scope="module")
def model(minilm: str) -> SentenceTransformer:
    return convert(minilm, window=8, max_seq_length=96)


def test_cells_are_what_the_evaluator_finds(model: SentenceTransformer) -> None:
    pairs = load_pairs("sample", "test")
    found = evaluate_grid(model, pairs, GRID, show_progress_bar=False)
    assert list(found) == ["natural", "repeat", "filler-different-random"]
    assert found["natural"]["n"] == len(pairs)
    assert {length: figures["n"] for length, figures in found["repeat"].items()} == {"48": 6, "96": 8}
    some = pairs.select(evenly_spaced(range(len(pairs)), 8))
    evaluator = LengthSimilarityEvaluator(
        some["sentence1"], some["sentence2"], some["score"], lengths=(96,), protocols=GRID.protocols, seed=2
    )
    evaluator(model)
    for protocol in GRID.protocols:
        expected = evaluator.results[protocol][96]["pearson"]
        assert found[protocol]["96"]["pearson"] == pytest.approx(expected, abs=1e-6)


def test_finished_cells_are_kept(model: SentenceTransformer, minilm: str, tmp_path: Path) -> None:
    pairs = load_pairs("sample", "test")
    first = evaluate_grid(model, pairs, GRID, folder=tmp_path, show_progress_bar=False)
    assert {path.name for path in tmp_path.iterdir()} == {
        "natural.json",
        *(f"{protocol}-{length}.json" for protocol in GRID.protocols for length in (48, 96)),
    }
    (tmp_path / "repeat-96.json").unlink()
    again = evaluate_grid(model, pairs, GRID, folder=tmp_path, show_progress_bar=False)
    assert again["natural"] == first["natural"]
    assert again["repeat"]["48"] == first["repeat"]["48"]
    assert again["repeat"]["96"]["seconds"] != first["repeat"]["96"]["seconds"]
    assert again["repeat"]["96"]["pearson"] == pytest.approx(first["repeat"]["96"]["pearson"], abs=1e-6)


@pytest.mark.parametrize("what", ["another model", "other weights", "other pairs", "another seed"])
def test_cells_of_something_else_are_measured_again(
    model: SentenceTransformer, minilm: str, tmp_path: Path, what: str
) -> None:
    pairs = load_pairs("sample", "test").select(range(8))
    grid = Grid((), seed=0)
    before = evaluate_grid(model, pairs, grid, folder=tmp_path, show_progress_bar=False)
    other = model
    if what == "another model":
        other = convert(minilm, window=4, max_seq_length=96)
    elif what == "other weights":
        other = load(minilm)
    elif what == "other pairs":
        pairs = load_pairs("sample", "test").select(range(1, 9))
    else:
        grid = Grid((), seed=1)
    after = evaluate_grid(other, pairs, grid, folder=tmp_path, show_progress_bar=False)
    assert after["natural"]["seconds"] != before["natural"]["seconds"]


def test_a_damaged_cell_is_no_result(tmp_path: Path) -> None:
    pairs = load_pairs("sample", "test").select(range(8))
    tmp_path.joinpath("natural.json").write_text("{")
    with pytest.raises(ValueError, match=r"natural\.json is damaged: not JSON"):
        evaluate_grid(BM25(), pairs, Grid(), tokenizer=str.split, folder=tmp_path, show_progress_bar=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocols": ("x",)}, "unknown protocol 'x'; choose one of: repeat, "),
        ({"pairs_at_length": (3,)}, "pairs_at_length must be at least 4, got 3"),
        ({"lengths": (8, 9, 10), "pairs_at_length": (5, 5)}, r"pairs_at_length=\(5, 5\) has 2 entries for 3 lengths"),
        ({"pairs_at_length": ()}, r"pairs_at_length=\(\) has 0 entries"),
    ],
)
def test_settings_are_checked(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**settings)


def test_a_grid_is_json() -> None:
    assert json.dumps(GRID.cells()[:3]) == '[["natural", null, null], ["repeat", 48, 6], ["repeat", 96, 8]]'
