"""The study's config, its counts of operations, its statistics and its report."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refused, slow
from scipy.stats import ttest_rel
from test_cli import one_line_error, run  # noqa: F401  # the fixture
from test_recipe import write_pairs
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

import st_linear
from st_linear.models import load
from st_linear.records import read_json, write_json
from st_linear.study import cells, statistics
from st_linear.study.config import Cell, Study, read_study
from st_linear.study.inputs import TEACHER_COLUMN, prepare
from st_linear.study.operations import TRAINING, Operations, near_pairs
from st_linear.study.report import write_report
from st_linear.study.statistics import Records, area_under, compare, convergence, fit_line, mean, summarise

MINIMAL = """\
name: a study
grid:
  - attention: [softmax, hedgehog@64]
    length: [32, 64]
budget:
  examples: 64
"""
CURVE = [
    {"step": 0, "examples": 0, "tokens": 0, "seconds": 0.0, "operations": 0.0, "pearson": 0.4, "spearman": 0.4},
    {"step": 10, "examples": 100, "tokens": 5000, "seconds": 2.0, "operations": 1e9, "pearson": 0.8, "spearman": 0.8},
    {"step": 20, "examples": 200, "tokens": 10000, "seconds": 4.0, "operations": 2e9, "pearson": 0.8, "spearman": 0.8},
]


def written(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


class TestConfig:
    def test_the_cells(self, tmp_path: Path) -> None:
        study = read_study(written(tmp_path, MINIMAL))
        assert [cell.folder for cell in study.cells()] == [
            "00032-repeat-softmax-seed-0",
            "00032-repeat-hedgehog@64-seed-0",
            "00064-repeat-softmax-seed-0",
            "00064-repeat-hedgehog@64-seed-0",
        ]
        assert study.lengths() == (32, 64)
        assert study.settings(3).max_seq_length == 512

    def test_the_control_knows_no_transfer_and_no_cell_comes_twice(self, tmp_path: Path) -> None:
        text = MINIMAL.replace("    length: [32, 64]", "    length: 32\n    transfer: [on, off]")
        cells = read_study(written(tmp_path, text)).cells()
        assert [(cell.attention, cell.transfer) for cell in cells] == [
            ("softmax", False),
            ("hedgehog@64", False),
            ("hedgehog@64", True),
        ]
        assert cells[2].student_name == "hedgehog@64 + transfer"
        assert cells[2].student().transfer == "maps"
        assert cells[1].student().transfer == "none"

    def test_grids_are_put_together(self, tmp_path: Path) -> None:
        text = MINIMAL.replace("budget:", "  - attention: softmax\n    length: [64, 1024]\n    seed: [0, 1]\nbudget:")
        cells = read_study(written(tmp_path, text)).cells()
        assert len(cells) == len(set(cells)) == 7

    def test_a_format_of_their_own(self, tmp_path: Path) -> None:
        text = MINIMAL.replace(
            "budget:", "  - attention: elu\n    length: 64\n    seed: [1, 2]\n    half: on\nbudget:"
        )
        study = read_study(written(tmp_path, text))
        *others, first, second = study.cells()
        assert {study.settings(cell.seed, cell.half).half for cell in others} == {False}
        assert first.folder == "00064-repeat-elu-seed-1-bfloat16"
        assert second.name == "elu, 64 tokens, repeat, seed 2, bfloat16"
        assert study.settings(second.seed, second.half).half
        off = {**json.loads(json.dumps(study.model_dump(mode="json"))), "training": {"half": True}}
        assert [c.half for c in Study.model_validate(off).cells()][-3:] == [None, True, True]

    @pytest.mark.parametrize(
        ("old", "new", "line", "message"),
        [
            ("hedgehog@64", "hedgehg", 3, "grid.0.attention.1: unknown student 'hedgehg'; write MAP[:features]"),
            ("length: [32, 64]", "length: [32, 2]", 4, "grid.0.length.1: Input should be greater than or equal to 4"),
            ("[32, 64]", "[32, 32]", 4, "grid.0.length: 32 stands there twice"),
            ("[32, 64]", "[]", 4, "grid.0.length: "),
            ("[32, 64]", "long", 4, "grid.0.length.0: Input should be a valid integer"),
            ("length", "lenght", 3, "grid.0.length: is missing (and 1 more)"),
            ("name: a study\n", "", 1, "name: is missing"),
            ("examples: 64", "examples: 8", 1, "budget.examples makes no step of training.batch_size=32 pairs"),
            ("examples: 64", "examples: 64\n  tokens: 3", 5, "budget: give one of examples, tokens and operations"),
            ("examples: 64", "pairs: 64", 6, "budget.pairs: unknown key; the keys there: examples, tokens"),
            (
                "budget:",
                "training:\n  alpha: 2\nbudget:",
                6,
                "training.alpha: Input should be less than or equal to 1",
            ),
            ("budget:", "protocols: x\nbudget:", 5, "protocols: unknown key; the keys there: name, base, data"),
            ("budget:", "name: b\nbudget:", 5, "name stands there twice"),
            ("budget:", "\tbudget:", 5, "no YAML: "),
            ("[32, 64]", "[32, 64", 5, "no YAML: "),
            ("budget:", "teacher: {model: a, scores: b}\nbudget:", 5, "teacher: give a model or scores, not both"),
            ("budget:", "data: here\nbudget:", 5, "data: must have keys (source, train, dev"),
            (
                "budget:",
                "training:\n  teacher_activation: identity\nbudget:",
                1,
                "a cosine can't match logits: teacher_activation identity needs objective cosent",
            ),
            (
                "[32, 64]",
                "32\n    seed: [" + ", ".join(map(str, range(5001))) + "]",
                1,
                "the grid has 10,002 cells, more",
            ),
            ("[32, 64]", "32\n    pairs_at_once: 5", 1, "pairs_at_once=5 must divide training.batch_size=32"),
            (
                "budget:",
                "  - attention: softmax\n    length: 64\n    pairs_at_once: 8\nbudget:",
                1,
                "two grids have the cell 'softmax, 64 tokens, repeat, seed 0', with different pairs_at_once",
            ),
            (
                "budget:",
                "    pairs_at_once: 8\ntraining: {objective: cosent}\nbudget:",
                1,
                "cosent compares all pairs of a step: it can't have pairs_at_once=8",
            ),
            (
                "budget:",
                "  - attention: softmax\n    length: 64\n    half: on\nbudget:",
                1,
                "two grids have the cell 'softmax, 64 tokens, repeat, seed 0', with different half",
            ),
            ("[32, 64]", "32\n    protocol: random", 5, "grid.0.protocol.0: unknown protocol 'random'"),
        ],
    )
    def test_errors_name_the_line(self, tmp_path: Path, old: str, new: str, line: int, message: str) -> None:
        assert old in MINIMAL
        path = written(tmp_path, MINIMAL.replace(old, new, 1))
        with pytest.raises(ValueError, match=re.escape(message)) as info:
            read_study(path)
        assert re.match(rf"{re.escape(str(path))}, line \d+: ", str(info.value))
        assert f"line {line}: " in str(info.value)
        assert "\n" not in str(info.value)

    def test_what_is_no_mapping(self, tmp_path: Path) -> None:
        for text in ("", "- 3\n"):
            with refused("line 1: the file: must have keys (name, base, data, teacher, grid"):
                read_study(written(tmp_path, text))

    def test_what_is_no_text(self, tmp_path: Path) -> None:
        path = tmp_path / "study.yaml"
        path.write_bytes(b"\xff\xfe\x00")
        with refused("is no text in UTF-8"):
            read_study(path)

    def test_it_survives_json(self, tmp_path: Path) -> None:
        study = read_study(written(tmp_path, MINIMAL))
        assert Study.model_validate(json.loads(json.dumps(study.model_dump(mode="json")))) == study

    @pytest.mark.parametrize("path", ["examples/study.yaml", "docs/study/cpu.yaml"])
    def test_those_that_come_with_the_project(self, path: str) -> None:
        study = read_study(Path(__file__).parent.parent / path)
        assert {cell.attention for cell in study.cells()} >= {"softmax", "elu"}


class TestInputs:
    @pytest.fixture
    def study(self, bert: str, tmp_path: Path) -> Callable[..., Study]:
        pairs = write_pairs(tmp_path / "pairs")

        def make(**changed: Any) -> Study:
            values = {
                "name": "a",
                "base": bert,
                "data": {"source": str(pairs), "train": 10},
                "teacher": {"scores": str(pairs / "teacher")},
                "grid": {"attention": "softmax", "length": 16},
                "budget": {"examples": 8},
                "training": {"batch_size": 8},
            }
            return Study.model_validate(values | changed)

        return make

    def test_a_subset_with_its_own_scores(self, study: Callable[..., Study], tmp_path: Path) -> None:
        inputs = prepare(study(), tmp_path / "out")
        whole = prepare(study(data={"source": str(tmp_path / "pairs")}), tmp_path / "out")
        scores = dict(zip(whole.pairs.train["sentence1"], whole.pairs.train[TEACHER_COLUMN]))
        assert len(inputs.pairs.train) == 10
        for sentence, score in zip(inputs.pairs.train["sentence1"], inputs.pairs.train[TEACHER_COLUMN]):
            assert scores[sentence] == score
        assert inputs.described["of"]["train"] == 20

    def test_without_a_teacher(self, study: Callable[..., Study], tmp_path: Path) -> None:
        inputs = prepare(study(training={"batch_size": 8, "alpha": 0}), tmp_path / "out")
        assert TEACHER_COLUMN not in inputs.pairs.train.column_names
        assert inputs.described["teacher"] is None

    def test_sentences_that_do_not_fit(self, study: Callable[..., Study], tmp_path: Path) -> None:
        with refused("train: texts[0] has 8 tokens, more than length=6; data.most_tokens leaves long sentences out"):
            prepare(study(grid={"attention": "softmax", "length": 6}), tmp_path / "out")
        with refused("data.most_tokens=5 leaves 0 pairs of train; at least 4 are needed"):
            prepare(study(data={"source": str(tmp_path / "pairs"), "most_tokens": 5}), tmp_path / "out")

    def test_too_few_pairs_for_a_batch(self, study: Callable[..., Study], tmp_path: Path) -> None:
        with refused("10 training pairs make no batch of batch_size=16: lower it"):
            prepare(study(training={"batch_size": 16}, budget={"examples": 16}), tmp_path / "out")


class TestOperations:
    @pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "albert", "distilbert", "nomic-bert"])
    def test_softmax_is_what_pytorch_counts(self, encoder_folder: Callable[[str], str], name: str) -> None:
        folder = encoder_folder(name)
        operations = Operations.of(st_linear.convert(folder, feature_map="softmax"))
        model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
        # Sliding windows count the pairs inside them, which eager attention computes and then masks.
        tokens = 5
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=torch.full((1, tokens), 7))
        assert operations.forward(tokens) == pytest.approx(counter.get_total_flops(), rel=0.01)

    def test_linear_attention_by_hand(self, bert: str) -> None:
        heads, size, layers, features, tokens = 4, 8, 2, 16, 50
        operations = Operations.of(
            st_linear.convert(bert, feature_map="favor", feature_map_kwargs={"num_features": features}, window=0)
        )
        mapped = 2 * 2 * size * features
        attention = layers * heads * tokens * (4 * size * features + 2 * features + mapped)
        assert operations.forward(tokens) - operations.common(tokens) == attention

    def test_near_far_is_softmax_up_to_two_windows_and_linear_in_the_end(self, bert: str) -> None:
        near, exact = (
            Operations.of(st_linear.convert(bert, feature_map=name, window=window))
            for name, window in (("elu", 4), ("softmax", 0))
        )
        assert near.forward(8) == exact.forward(8)
        assert near.forward(9) > near.forward(8)
        growth = near.forward(4000) - near.forward(2000)
        assert growth == pytest.approx(near.forward(6000) - near.forward(4000))

    @pytest.mark.parametrize(("tokens", "window"), [(1, 4), (7, 4), (8, 4), (13, 4), (64, 8), (65, 8)])
    def test_near_pairs(self, tokens: int, window: int) -> None:
        blocks = np.arange(tokens) // window
        assert near_pairs(tokens, window) == int((abs(blocks[:, None] - blocks) <= 1).sum())

    def test_training_is_three_forward_passes(self, bert: str) -> None:
        operations = Operations.of(st_linear.convert(bert, feature_map="elu"))
        assert operations.training([5, 5, 9]) == TRAINING * (2 * operations.forward(5) + operations.forward(9))

    def test_the_model_stays_as_it_was(self, bert: str) -> None:
        model = st_linear.convert(bert, feature_map="hedgehog").train()
        Operations.of(model)
        assert model[0].training
        assert not any(module._forward_hooks for module in model.modules())


class TestStatistics:
    def test_area(self) -> None:
        assert area_under(CURVE) == pytest.approx(0.7)

    def test_convergence(self) -> None:
        found = convergence(CURVE, CURVE[:2])
        assert list(found) == ["own", "control", "gain"]
        assert found["own"]["90"] == found["control"]["90"]
        assert found["own"]["90"]["examples"] == pytest.approx(80)
        assert found["gain"]["95"]["examples"] == pytest.approx(95)
        assert convergence(CURVE, None)["control"] == {"90": None, "95": None, "99": None}
        fallen = [{**point, "pearson": 1 - point["pearson"]} for point in CURVE]
        assert convergence(fallen, None)["gain"]["90"] is None

    def test_a_mean_needs_every_seed(self) -> None:
        assert mean([1.0, None, 2.0]) == {"mean": None, "low": None, "high": None, "n": 3, "reached": 2}
        assert mean([]) is None
        of_two = mean([1.0, 3.0])
        assert of_two["mean"] == 2
        assert of_two["high"] == pytest.approx(2 + 12.7062)

    def test_comparisons_are_paired_by_seed(self) -> None:
        own, control = {0: 0.80, 1: 0.83, 2: 0.79, 7: 0.1}, {0: 0.84, 1: 0.86, 2: 0.84, 3: 0.9}
        compared = compare(own, control)
        assert compared["n"] == 3
        assert compared["mean"] == pytest.approx(-0.04)
        test = ttest_rel([0.80, 0.83, 0.79], [0.84, 0.86, 0.84])
        assert compared["p"] == pytest.approx(test.pvalue)
        interval = test.confidence_interval()
        assert (compared["low"], compared["high"]) == pytest.approx((interval.low, interval.high))
        # Hedges' correction of three seeds.
        assert compared["effect"] == pytest.approx((1 - 3 / 7) * -0.04 / 0.01)

    def test_what_can_not_be_compared(self) -> None:
        assert compare({0: 0.5}, {1: 0.5}) is None
        alone = compare({0: 0.5}, {0: 0.6})
        assert (alone["low"], alone["p"], alone["effect"]) == (None, None, None)
        same = compare({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6})
        assert (same["mean"], same["p"], same["effect"]) == (0, None, None)

    def test_lines(self) -> None:
        fitted = fit_line([1, 2, 3, 4], [2.1, 3.9, 6.1, 7.9])
        assert fitted["slope"] == pytest.approx(1.96)
        assert fitted["low"] < 1.96 < fitted["high"]
        assert fit_line([1, 1, 1], [1, 2, 3]) is None
        assert fit_line([1, 2], [1, 2]) is None


def made_record(cell: Cell, study: Study) -> dict[str, Any]:
    """A record as cells write them, its figures a function of the cell."""
    final = 0.8 - 0.01 * math.log2(cell.length) - (0 if cell.is_control else 0.02) + 0.001 * cell.seed
    curve = [
        {**point, "pearson": 0.5 + (final - 0.5) * share, "spearman": 0.5, "seconds": point["seconds"] * cell.length}
        for point, share in zip(CURVE, (0, 0.9, 1))
    ]
    read = {
        **{f"{metric}{bound}": final for metric in ("pearson", "spearman") for bound in ("", "_low", "_high")},
        "n": 10,
        "mean_tokens": cell.length - 2.0,
        "truncated": 0.0,
        "mean_pairwise_cosine": 0.2,
        "tokens_per_second": 1000.0 + cell.seed,
        "memory_before_mib": 100.0,
        "peak_memory_mib": 150.0,
    }
    return {
        "cell": vars(cell),
        "study": study.common(),
        "inputs": {
            "base": "tiny",
            "data": "pairs | more",
            "digest": "0",
            "pairs": {"train": 20, "dev": 6, "test": 10},
            "of": {"train": 20, "dev": 8, "test": 10},
            "teacher": {"name": "a teacher", "figures": {"dev": {"pearson": 0.9}, "test": {"pearson": 0.88}}},
        },
        "budget": {"steps": 20, "examples": 200.0, "tokens": 1e4, "operations": 2e9},
        "transfer": {"kind": "maps", "texts": 8, "tokens": 99, "operations": 1e8, "seconds": 1.0}
        if cell.transfer
        else None,
        "curve": curve,
        "training": {
            "seconds": 4.0,
            "tokens_per_second": 2500.0,
            "memory_before_mib": 100.0,
            "peak_memory_mib": 300.0 + cell.length,
            "resumed_at": None,
        },
        "final": {"natural": read, str(cell.length): read, "256": read},
        "environment": st_linear.records.environment(),
    }


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with records of 3 students × 2 lengths × 3 seeds, one failed and one missing, and its report."""
    folder = tmp_path_factory.mktemp("reported")
    study = Study.model_validate(
        {
            "name": "A <study>",
            "grid": {
                "attention": ["softmax", "elu", "hedgehog@64"],
                "length": [64, 128],
                "seed": [0, 1, 2],
                "transfer": True,
            },
            "budget": {"examples": 200},
            "evaluation": {"lengths": [256]},
        }
    )
    write_json(folder / "study.json", {"study": study.model_dump(mode="json")})
    cells = study.cells()
    for cell in cells[:-1]:
        record = made_record(cell, study)
        if cell == cells[-2]:
            record = {key: record[key] for key in ("cell", "study", "inputs", "environment")}
            record["failure"] = {"error": "MemoryError", "message": "no `room`", "out_of_memory": True}
        write_json(folder / "cells" / cell.folder / "record.json", record)
    write_report(folder)
    return folder


@pytest.fixture(params=[False, slow(True)], ids=["undrawn", "drawn"])
def drawing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are files without a picture, or drawn, which is most of a report's time."""
    if request.param:
        return

    def write_figure(figure: Any, path: Path, dpi: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')

    monkeypatch.setattr("st_linear.study.figures.write_figure", write_figure)


class TestReport:
    def test_the_figures(self, reported: Path) -> None:
        names = {path.name for path in (reported / "report/figures").iterdir()}
        stems = {path.rpartition(".")[0] for path in names}
        assert names == {f"{stem}.{suffix}" for stem in stems for suffix in ("svg", "png")}
        assert stems == {
            "pearson-repeat",
            "learning-repeat-64",
            "learning-repeat-128",
            "time-to-95-control-repeat",
            "time-to-95-gain-repeat",
            "reading-repeat-64",
            "reading-repeat-128",
            *(f"{what}-{key}-repeat" for what in ("training", "encoding") for key in ("speed", "memory")),
            "speed-quality-repeat",
        }
        for path in (reported / "report/figures").glob("*.svg"):
            ET.parse(path)

    def test_the_page_needs_no_other_file(self, reported: Path) -> None:
        page = (reported / "report/report.html").read_text(encoding="utf-8")
        assert page.count("<figure>") == len(list((reported / "report/figures").glob("*.svg")))
        assert not re.search(r'(src|href)="(?!#)', page)
        assert "<link" not in page
        assert "<script" not in page
        assert "<title>A &lt;study&gt;</title>" in page
        assert "prefers-color-scheme" in page or "color-scheme: light dark" in page
        assert 'name="viewport"' in page

    def test_ids_in_the_page_are_different_and_what_refers_to_them_finds_them(self, reported: Path) -> None:
        page = (reported / "report/report.html").read_text(encoding="utf-8")
        ids = re.findall(r'\bid="([^"]+)"', page)
        assert len(ids) == len(set(ids))
        assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)) <= {(i, "") for i in ids} | {
            ("", i) for i in ids
        }

    def test_figures_take_the_colours_of_the_page(self, reported: Path) -> None:
        page = (reported / "report/report.html").read_text(encoding="utf-8")
        assert "currentColor" in page
        assert "#1b2c3d" not in page
        assert "#fefefe" not in page

    def test_markdown_has_the_same_figures_and_tables(self, reported: Path) -> None:
        text = (reported / "report/report.md").read_text(encoding="utf-8")
        page = (reported / "report/report.html").read_text(encoding="utf-8")
        assert text.startswith("# A <study>\n")
        assert text.count("![") == page.count("<figure>")
        assert text.count("| --- |") <= text.count("| ---")
        assert len(re.findall(r"^\| ---", text, re.MULTILINE)) == page.count("<table>")
        for target in re.findall(r"\]\((figures/[^)]+)\)", text):
            assert (reported / "report" / target).is_file()

    def test_every_setting_is_in_the_methods(self, reported: Path) -> None:
        text = (reported / "report/report.md").read_text(encoding="utf-8")
        for setting in ("training.batch_size: 32", "budget.examples: 200", "evaluation.lengths: 256", "a teacher"):
            assert setting in text

    @pytest.mark.usefixtures("drawing")
    def test_times_are_of_one_machine_and_format(self, reported: Path, tmp_path: Path) -> None:
        folder = tmp_path / "copy"
        shutil.copytree(reported, folder)
        for path in folder.glob("cells/*/record.json"):
            record = read_json(path)
            if record["cell"]["attention"] == "softmax" and record["cell"]["seed"] == 2:
                record["cell"]["half"] = True
            elif record["cell"]["attention"] == "elu":
                record["environment"]["device"] = "another"
            elif "training" in record:
                continue
            record.get("training", {})["seconds"] = 1e9
            write_json(path, record)
        write_report(folder)
        before, after = (read_json(f / "report/summary.json") for f in (reported, folder))
        for old, new in zip(before["groups"], after["groups"]):
            assert new["read"][str(new["length"])]["pearson"] == old["read"][str(old["length"])]["pearson"]
            assert new["convergence"]["own"]["95"]["steps"] == old["convergence"]["own"]["95"]["steps"]
            times = (new["training"]["seconds"], new["convergence"]["own"]["95"]["seconds"])
            if new["attention"] == "elu":
                assert times == (None, None)
            else:
                assert {figures["n"] for figures in times} == {
                    2 if new["attention"] == "softmax" else len(new["seeds"])
                }
                assert new["training"]["seconds"]["mean"] == old["training"]["seconds"]["mean"]
        cells = before["timed"]["cells"]
        assert (
            cells - after["timed"]["cells"]
            == sum(len(g["seeds"]) for g in before["groups"] if g["attention"] == "elu") + 2
        )
        of = f"those of the {after['timed']['cells']} of {cells} cells that ran in one place"
        text = (folder / "report/report.md").read_text(encoding="utf-8")
        assert of in text
        assert "| softmax | repeat | 64 | 0, 1, 2 | 2: bfloat16 |" in text
        assert "that ran in one place" not in (reported / "report/report.md").read_text(encoding="utf-8")

    def test_two_records_of_one_cell(self, reported: Path, tmp_path: Path) -> None:
        folder = tmp_path / "copy"
        shutil.copytree(reported, folder)
        record = read_json(folder / "cells/00064-repeat-softmax-seed-0/record.json")
        record["cell"]["half"] = False
        write_json(folder / "cells/again/record.json", record)
        with refused("has two records of one cell"):
            write_report(folder)

    def test_failures_and_gaps_are_told(self, reported: Path) -> None:
        text = (reported / "report/report.md").read_text(encoding="utf-8")
        assert "16 cells are finished, 1 failed, 1 are still to be run." in text
        assert "`no room`" in text

    def test_claims_carry_intervals(self, reported: Path) -> None:
        text = (reported / "report/report.md").read_text(encoding="utf-8")
        short = text[text.index("## In short") : text.index("## Quality")]
        assert "**elu + transfer**, final Pearson against softmax" in short
        for line in short.splitlines():
            if line.startswith("- "):
                assert "[" in line

    def test_what_the_summary_says(self, reported: Path) -> None:
        summary = read_json(reported / "report/summary.json")
        elu = next(g for g in summary["groups"] if g["student"] == "elu + transfer" and g["length"] == 64)
        assert elu["against_control"]["pearson"]["mean"] == pytest.approx(-0.02)
        assert elu["read"]["64"]["pearson"]["n"] == 3
        law = summary["laws"]["repeat"]["softmax"]["pearson"]
        assert law["slope"] == pytest.approx(-0.01)
        assert elu["convergence"]["own"]["99"]["seconds"]["n"] == 3
        assert elu["transfer_cost"]["operations"]["mean"] == 1e8

    @pytest.mark.slow
    def test_the_same_records_give_the_same_report(self, reported: Path, tmp_path: Path) -> None:
        shutil.copytree(reported, tmp_path / "copy", ignore=shutil.ignore_patterns("report"))
        write_report(tmp_path / "copy")
        for name in ("report.html", "report.md", "summary.json"):
            assert (tmp_path / "copy/report" / name).read_bytes() == (reported / "report" / name).read_bytes()

    @pytest.mark.usefixtures("drawing")
    def test_one_seed_and_no_control(self, reported: Path, tmp_path: Path) -> None:
        shutil.copytree(
            reported, tmp_path / "copy", ignore=shutil.ignore_patterns("report", "*softmax*", "*seed-[12]")
        )
        write_report(tmp_path / "copy")
        assert "There is nothing to compare yet" in (tmp_path / "copy/report/report.md").read_text(encoding="utf-8")

    def test_a_length_that_could_not_be_read(self, reported: Path) -> None:
        records = copy.deepcopy(Records.read(reported))
        for seeds in records.finished.values():
            for record in seeds.values():
                record["final"]["256"] = {"failure": "out of memory", "memory_before_mib": 1, "peak_memory_mib": 1}
        assert all(group["read"]["256"] is None for group in summarise(records)["groups"])

    def test_nothing_to_report(self, reported: Path, tmp_path: Path) -> None:
        with refused("holds no study: study.json is missing", FileNotFoundError):
            write_report(tmp_path)
        shutil.copy(reported / "study.json", tmp_path)
        with refused("has no finished cell: nothing to report"):
            write_report(tmp_path)

    def test_p_values_are_adjusted_for_their_number(self, reported: Path) -> None:
        groups = [{"against_control": {"pearson": {"p": p}}} for p in (0.01, 0.04)]
        statistics._adjust(groups)
        assert [g["against_control"]["pearson"]["p_adjusted"] for g in groups] == pytest.approx([0.02, 0.04])


class TestCommands:
    @pytest.fixture
    def here(self, bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        write_pairs(tmp_path / "pairs")
        shutil.copytree(bert, tmp_path / "bert")
        monkeypatch.chdir(tmp_path)
        (tmp_path / "study.yaml").write_text(
            MINIMAL.replace("[32, 64]", "16").replace("64\n", "16\n")
            + "base: bert\ndata:\n  source: pairs\nteacher:\n  scores: pairs/teacher\ntraining:\n  batch_size: 8\n"
        )
        return tmp_path

    @pytest.mark.usefixtures("drawing")
    def test_run_and_report(self, run: Callable[..., tuple[int, str, str]], here: Path) -> None:  # noqa: F811
        code, out, err = run("study run study.yaml --engine inline --json")
        assert code == 0, err
        result = json.loads(out)
        assert result["folder"] == "runs/study"
        assert len(result["finished"]) == 2
        assert (result["failed"], result["unfinished"]) == ({}, [])
        assert Path(result["report"]).is_file()
        code, out, _ = run("study report runs/study --json")
        assert code == 0
        assert json.loads(out)["summary"]["name"] == "a study"

    def test_a_broken_config(self, run: Callable[..., tuple[int, str, str]], here: Path) -> None:  # noqa: F811
        (here / "study.yaml").write_text(MINIMAL.replace("examples", "example"))
        code, out, err = run("study run study.yaml")
        assert (code, out) == (2, "")
        assert one_line_error(err).startswith("Error: study.yaml, line 6: budget.example: unknown key")

    def test_no_such_config(self, run: Callable[..., tuple[int, str, str]], here: Path) -> None:  # noqa: F811
        code, _, err = run("study run nothing.yaml")
        assert code == 2
        assert "nothing.yaml" in one_line_error(err)

    def test_a_missing_extra_says_how_to_install_it(
        self,
        run: Callable[..., tuple[int, str, str]],  # noqa: F811
        here: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from st_linear import cli

        monkeypatch.setattr(cli, "find_spec", lambda name: None)
        code, _, err = run("study run study.yaml")
        assert (code, one_line_error(err)) == (2, 'Error: study needs pydantic: pip install "st-linear[study]"')

    def test_failed_cells_fail_the_command(
        self,
        run: Callable[..., tuple[int, str, str]],  # noqa: F811
        here: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fail(*args: Any) -> None:
            raise MemoryError

        monkeypatch.setattr(cells, "_evaluate", fail)
        code, out, err = run("study run study.yaml --engine inline --json")
        assert code == 1
        assert set(json.loads(out)["failed"].values()) == {"MemoryError"}
        assert err.count("Failed: ") == 2
        assert "Traceback" not in err

    def test_out_of_time(self, run: Callable[..., tuple[int, str, str]], here: Path) -> None:  # noqa: F811
        code, out, _ = run("study run study.yaml --engine inline --seconds 0 --json")
        result = json.loads(out)
        assert code == 0
        assert (len(result["unfinished"]), result["report"]) == (2, None)


def test_documents_carry_the_teachers_scores(bert: str, tmp_path: Path) -> None:
    pairs = st_linear.data.load_pairs(write_pairs(tmp_path / "pairs"), "train")
    pairs = pairs.add_column(TEACHER_COLUMN, [1 - score for score in pairs["score"]])
    made = st_linear.protocols.lengthen(pairs, load(bert).tokenizer, 40, "document")
    assert made.column_names == ["sentence1", "sentence2", "score", TEACHER_COLUMN]
    for gold, taught in zip(made["score"], made[TEACHER_COLUMN]):
        assert taught == pytest.approx(1 - gold)
