from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer
from tokenizers.normalizers import Lowercase

from st_linear import convert
from st_linear.data import evenly_spaced, load_pairs
from st_linear.evaluation import LengthSimilarityEvaluator
from st_linear.grid import Grid, evaluate_grid
from st_linear.references import BM25

GRID = Grid((48, 96), ("repeat", "filler-different-random"), (4, 5), seed=2)


@pytest.fixture(scope="module")
def model(bert: str) -> SentenceTransformer:
    return convert(bert, feature_map="elu", window=8, max_seq_length=96)


def test_cells_are_what_the_evaluator_finds(model: SentenceTransformer) -> None:
    pairs = load_pairs("sample", "test").select(range(12))
    found = evaluate_grid(model, pairs, GRID, show_progress_bar=False)
    assert list(found) == ["natural", "repeat", "filler-different-random"]
    assert found["natural"]["n"] == len(pairs)
    assert {length: figures["n"] for length, figures in found["repeat"].items()} == {"48": 4, "96": 5}
    some = pairs.select(evenly_spaced(range(len(pairs)), 5))
    evaluator = LengthSimilarityEvaluator(
        some["sentence1"], some["sentence2"], some["score"], lengths=(96,), protocols=GRID.protocols, seed=2
    )
    evaluator(model)
    for protocol in GRID.protocols:
        expected = evaluator.results[protocol][96]["pearson"]
        assert found[protocol]["96"]["pearson"] == pytest.approx(expected, abs=1e-6)


def test_finished_cells_are_kept(model: SentenceTransformer, tmp_path: Path) -> None:
    pairs = load_pairs("sample", "test").select(range(12))
    first = evaluate_grid(model, pairs, GRID, folder=tmp_path, show_progress_bar=False)
    names = ["natural", *(f"{protocol}-{length}" for protocol in GRID.protocols for length in (48, 96))]
    assert sorted(path.name.rpartition("-")[0] for path in tmp_path.iterdir()) == sorted(names)
    next(tmp_path.glob("repeat-96-*.json")).unlink()
    again = evaluate_grid(model, pairs, GRID, folder=tmp_path, show_progress_bar=False)
    assert again["natural"] == first["natural"]
    assert again["repeat"]["48"] == first["repeat"]["48"]
    assert again["repeat"]["96"]["seconds"] != first["repeat"]["96"]["seconds"]
    assert again["repeat"]["96"]["pearson"] == pytest.approx(first["repeat"]["96"]["pearson"], abs=1e-6)
    assert again["natural"]["environment"]["st_linear"]


def test_another_grid_overwrites_nothing(model: SentenceTransformer, tmp_path: Path) -> None:
    pairs = load_pairs("sample", "test").select(range(12))

    def run(**changes: Any) -> dict[str, Any]:
        return evaluate_grid(model, pairs, replace(GRID, **changes), folder=tmp_path, show_progress_bar=False)

    first = run()
    assert run(pairs_at_length=(6,))["repeat"]["48"]["n"] == 6
    # What is repeated, and the natural length, know no seed.
    other = run(seed=3)
    assert other["natural"] == first["natural"]
    assert other["repeat"] == first["repeat"]
    assert other["filler-different-random"]["96"] != first["filler-different-random"]["96"]
    assert run() == first


@pytest.mark.parametrize("what", ["window", "weights", "pairs", "tokenizer", "truncate_dim", "prompt"])
def test_cells_of_something_else_are_measured(
    model: SentenceTransformer, bert: str, tmp_path: Path, what: str
) -> None:
    pairs = load_pairs("sample", "test").select(range(8))
    before = evaluate_grid(model, pairs, Grid(), folder=tmp_path, show_progress_bar=False)
    other = convert(bert, feature_map="elu", window=8, max_seq_length=96)
    if what == "window":
        other = convert(bert, feature_map="elu", window=4, max_seq_length=96)
    elif what == "weights":
        next(other.parameters()).data += 1e-3
    elif what == "pairs":
        pairs = load_pairs("sample", "test").select(range(1, 9))
    elif what == "tokenizer":
        other.tokenizer.backend_tokenizer.normalizer = Lowercase()
    elif what == "truncate_dim":
        other.truncate_dim = 16
    else:
        other.prompts, other.default_prompt_name = {"query": "query: "}, "query"
    after = evaluate_grid(other, pairs, Grid(), folder=tmp_path, show_progress_bar=False)
    assert after["natural"]["seconds"] != before["natural"]["seconds"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_reference_that_another_model_measures_is_measured_anew(
    model: SentenceTransformer, bert: str, tmp_path: Path
) -> None:
    other = convert(bert, feature_map="elu", window=8)
    other.prompts, other.default_prompt_name = {"query": "What is said in this text? "}, "query"
    pairs, grid = load_pairs("sample", "test").select(range(8)), Grid((64,), ("filler-different-end",), (8,))
    found = [
        evaluate_grid(BM25(), pairs, grid, measured_by=some, folder=tmp_path, show_progress_bar=False)
        for some in (model, other)
    ]
    figures = [grid["filler-different-end"]["64"] for grid in found]
    assert figures[0]["seconds"] != figures[1]["seconds"]
    assert figures[0]["pearson"] != figures[1]["pearson"]


def test_a_damaged_cell_is_no_result(model: SentenceTransformer, tmp_path: Path) -> None:
    pairs = load_pairs("sample", "test").select(range(8))
    evaluate_grid(BM25(), pairs, Grid(), measured_by=model, folder=tmp_path, show_progress_bar=False)
    next(tmp_path.iterdir()).write_text("{")
    with pytest.raises(ValueError, match=r"natural-\w+\.json is damaged: not JSON"):
        evaluate_grid(BM25(), pairs, Grid(), measured_by=model, folder=tmp_path, show_progress_bar=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocols": ("x",)}, "unknown protocol 'x'; choose one of: repeat, "),
        ({"pairs_at_length": (3,)}, "pairs_at_length must be at least 4, got 3"),
        ({"lengths": (8, 9, 10), "pairs_at_length": (5, 5)}, r"pairs_at_length=\(5, 5\) has 2 entries for 3 lengths"),
        ({"lengths": (8,), "protocols": ()}, r"protocols is empty: name one for lengths=\(8,\)"),
        ({"pairs_at_length": ()}, r"pairs_at_length=\(\) has 0 entries"),
    ],
)
def test_settings_are_checked(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**settings)


def test_a_grid_is_json() -> None:
    assert json.dumps(GRID.cells()[:3]) == '[["natural", null, null], ["repeat", 48, 4], ["repeat", 96, 5]]'
