from __future__ import annotations

import json
import logging
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import FAMILIES, WORDS
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling
from test_recipe import write_pairs
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging as transformers_logging

import st_linear
from st_linear import cli, models, recipe
from st_linear.protocols import protocol_names
from st_linear.records import read_json
from st_linear.settings import Settings

COMMANDS = [command.callback.__name__ for command in cli.app.registered_commands if command.callback]
FIGURES = ("pearson", "pearson_low", "pearson_high", "spearman", "spearman_low", "spearman_high")
QUICKSTART = ["quickstart", "--data", "pairs", "--teacher-scores", "pairs/teacher", "--epochs", "1", "--lengths", "24"]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """A function that runs a command line, and gives its exit code, standard output and standard error."""
    loggers = {name: logging.getLogger(name).level for name in ("sentence_transformers", "transformers")}

    def call(line: str, *more: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as info:
            cli.main([*line.split(), *more])
        return info.value.code or 0, *capfd.readouterr()

    yield call
    transformers_logging.enable_progress_bar()
    for name, level in loggers.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def place(bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: ``pairs`` with ``pairs/teacher``, and the encoder ``bert``."""
    write_pairs(tmp_path / "pairs")
    shutil.copytree(bert, tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Done(NamedTuple):
    folder: Path
    code: int
    out: str
    err: str
    warnings: list[str]


@pytest.fixture(scope="module")
def finished() -> list[Done]:
    """What :func:`quickstart` has done."""
    return []


@pytest.fixture
def quickstart(
    finished: list[Done],
    run: Callable[..., tuple[int, str, str]],
    bert: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Done:
    """A folder after ``quickstart --json``, which the first test that asks for it runs."""
    if not finished:
        folder = tmp_path_factory.mktemp("quickstart")
        write_pairs(folder / "pairs")
        shutil.copytree(bert, folder / "bert")
        monkeypatch.chdir(folder)
        with warnings.catch_warnings(record=True) as caught:
            done = run(" ".join(QUICKSTART), "--base", "bert", "--output", "out", "--json")
        finished.append(Done(folder, *done, [str(warning.message) for warning in caught]))
    return finished[0]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def one_line_error(err: str) -> str:
    """The last line on standard error, which alone tells of an error."""
    *before, last = err.replace("\r", "\n").strip().split("\n")
    assert last.startswith("Error: ")
    assert not any("Error" in line or "Traceback" in line for line in before)
    return last


class TestHelp:
    def test_without_a_command_it_lists_them(self, run: Callable[..., tuple[int, str, str]]) -> None:
        assert run("--help") == run("")
        code, out, err = run("")
        assert (code, err) == (0, "")
        for command in COMMANDS:
            assert command in out

    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_has_an_example(self, run: Callable[..., tuple[int, str, str]], command: str) -> None:
        code, out, err = run(f"{command} --help")
        assert (code, err) == (0, "")
        assert f"Example: st-linear {command} " in out
        assert "--json" in out


class TestConvert:
    def test_table(self, run: Callable[..., tuple[int, str, str]], place: Path) -> None:
        code, out, err = run("convert bert out --feature-map elu --window 6 --max-seq-length 200")
        assert code == 0
        assert "Converted bert" in out
        assert 'st_linear.load("out")' in err
        assert "trust_remote_code=True" in err
        model = st_linear.load("out")
        assert (model[0].feature_map, model[0].window, model.max_seq_length) == ("elu", 6, 200)

    def test_json(self, run: Callable[..., tuple[int, str, str]], place: Path) -> None:
        code, out, _ = run("convert bert deep/er/out --num-features 16 --json")
        assert code == 0
        result = json.loads(out)
        assert (result["feature_map"], result["window"], result["max_seq_length"]) == ("favor", 64, 8192)
        assert result["converted_layers"] == 2
        model = st_linear.load(result["output"])
        assert result["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert model[0].feature_map_kwargs == result["feature_map_kwargs"] == {"num_features": 16}

    def test_it_takes_nobodys_files(self, run: Callable[..., tuple[int, str, str]], place: Path) -> None:
        before = files(place)
        code, _, err = run("convert bert pairs")
        assert code == 2
        assert one_line_error(err) == "Error: pairs holds files and no model of st_linear's: name another folder"
        assert files(place) == before


class TestExport:
    @pytest.mark.slow
    def test_json_of_graphs(self, run: Callable[..., tuple[int, str, str]], place: Path) -> None:
        assert run("convert bert out --feature-map elu --window 6 --max-seq-length 200")[0] == 0
        code, out, err = run("export out out --json")
        assert code == 0
        result = json.loads(out)
        assert list(result) == ["onnx"]
        assert all(value < 1e-4 for value in result["onnx"]["largest_difference"].values())
        assert """st_linear.load("out", backend='onnx', model_kwargs={'file_name': 'onnx/model.onnx'})""" in err
        text = " ".join(WORDS * 3)
        assert (
            abs(st_linear.load("out", backend="onnx").encode(text) - st_linear.load("out").encode(text)).max() < 1e-5
        )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--formats tflite", "unknown format 'tflite'; choose among: onnx, onnx-int8, openvino"),
            ("--formats ,", "--formats is empty: name one, onnx say"),
        ],
    )
    def test_refusals(self, options: str, message: str, run: Callable[..., tuple[int, str, str]], place: Path) -> None:
        code, _, err = run(f"export bert out {options}")
        assert code == 2
        assert one_line_error(err) == f"Error: {message}"


class TestTrainedConversion:
    LINE = (
        "convert bert out --texts book.txt --steps 6 --train-lengths 48,96 --window 8 --num-features 12 "
        "--exact-up-to 16 --check-texts book.txt --check-lengths 40 --check-passages 5"
    )

    @pytest.fixture(autouse=True)
    def book(self, place: Path) -> None:
        draw = random.Random(0)
        (place / "book.txt").write_text("\n".join(" ".join(draw.choices(WORDS, k=20)) for _ in range(150)))

    def test_texts_up_to_512_tokens_are_exact_by_default(
        self, run: Callable[..., tuple[int, str, str]], place: Path
    ) -> None:
        code, _, err = run(self.LINE.replace("--exact-up-to 16 ", ""))
        assert code == 2
        assert one_line_error(err) == (
            "Error: lengths must be longer than exact_up_to=512 by a window, got 48: attention is exact up to there, "
            "and has nothing to learn"
        )

    def test_json_and_the_adapter_that_it_makes(self, run: Callable[..., tuple[int, str, str]], place: Path) -> None:
        before = files(place)
        code, out, _ = run(f"{self.LINE} --json --export-adapter small --plot fidelity.svg")
        assert code == 0
        result = json.loads(out)
        assert (result["feature_map"], result["window"], result["exact_up_to"]) == ("learned_favor", 8, 16)
        assert result["training"]["steps"] == 6
        assert result["training"]["settings"]["lengths"] == [48, 96]
        assert result["fidelity"]["figures"]["40"]["n"] == 5
        assert {path.split("/")[0] for path in files(place) - before} == {"out", "small", "fidelity.svg"}
        drawn = (place / "fidelity.svg").read_text(encoding="utf-8")
        for title in ("held-out texts, before", "held-out texts, after", "other texts"):
            assert f"<!-- {title} -->" in drawn
        assert sorted(path.name for path in (place / "small").iterdir()) == [
            "adapter.json",
            "linear_attention.safetensors",
        ]
        trained = st_linear.load("out")
        assert trained[0].training_record == result["training"]
        adapted = st_linear.convert("bert", adapter="out")
        text = " ".join(WORDS * 5)
        assert abs(adapted.encode(text) - trained.encode(text)).max() < 1e-6
        rounded = st_linear.convert("bert", adapter="small")
        assert abs(rounded.encode(text) - trained.encode(text)).max() < 1e-3
        assert rounded[0].training_record == trained[0].training_record
        assert abs(st_linear.convert("bert", window=8).encode(text) - trained.encode(text)).max() > 1e-4

    def test_table(self, run: Callable[..., tuple[int, str, str]]) -> None:
        code, out, _ = run(self.LINE)
        assert code == 0
        for title in (
            "held-out texts, before, 48 tokens",
            "held-out texts, after, 96 tokens",
            "other texts, 40 tokens",
        ):
            assert title in out

    def test_an_adapter_is_brought_or_trained(self, run: Callable[..., tuple[int, str, str]]) -> None:
        code, _, err = run(f"{self.LINE} --adapter bert")
        assert (code, one_line_error(err)) == (
            2,
            "Error: --texts trains a conversion, --adapter bert brings one: pass either",
        )


class TestEvaluate:
    def test_table_and_plot(self, run: Callable[..., tuple[int, str, str]], place: Path) -> None:
        assert run("convert bert converted --window 4")[0] == 0
        line = "evaluate bert converted --data pairs --lengths 16,40,16 --pairs-at-length 5 --plot plots/lengths.svg"
        code, out, _ = run(line)
        assert code == 0
        rows = [[cell.strip() for cell in line.split("│")[1:7]] for line in out.splitlines() if line.startswith("│")]
        rows = [[name, *cells] for name, _, *cells in rows]
        figures = [["natural", "10"], ["16", "5"], ["40", "5"]]
        assert [[name, length, pairs] for name, length, _, _, pairs in rows] == [
            [name, *row] for name in ("bert", "converted") for row in figures
        ]
        assert all(int(read) <= int(length) and cut == "0%" for _, length, read, cut, _ in rows if length != "natural")
        assert (place / "plots" / "lengths.svg").read_text().startswith("<?xml")

    def test_json_is_what_the_evaluator_finds(self, run: Callable[..., tuple[int, str, str]], place: Path) -> None:
        code, out, _ = run("evaluate bert --data pairs --split dev --json")
        assert code == 0
        result = json.loads(out)
        assert (result["data"], result["split"]) == ("pairs", "dev")
        pairs = recipe.load_pairs("pairs", "dev")
        expected = recipe.evaluate_model(st_linear.load("bert"), pairs, Settings(lengths=()))["natural"]
        found = result["models"]["bert"]["natural"]
        assert found["n"] == 8
        assert found["pearson"] == pytest.approx(expected["pearson"], abs=1e-6)

    def test_constant_predictions_are_told_of(
        self, run: Callable[..., tuple[int, str, str]], place: Path, bert: str
    ) -> None:
        constant = Dense(32, 32, init_weight=torch.zeros(32, 32), init_bias=torch.ones(32))
        SentenceTransformer(modules=[Transformer(bert), Pooling(32, "mean"), constant]).save_pretrained("constant")
        code, out, _ = run("evaluate constant --data pairs --json")
        assert code == 0
        figures = json.loads(out)["models"]["constant"]["natural"]
        assert (figures["pearson"], figures["undefined"]) == (None, "all 10 predictions are 1")
        code, out, _ = run("evaluate constant --data pairs")
        assert code == 0
        assert "undefined: all 10 predictions are 1" in " ".join(out.replace("│", " ").split())

    def test_a_grid_with_references(self, run: Callable[..., tuple[int, str, str]], place: Path) -> None:
        line = "evaluate bert --data pairs --lengths 24,40 --pairs-at-length 6,5 --protocols repeat,filler-same-end"
        code, out, _ = run(f"{line} --references --output grid --plot panels.png --json")
        assert code == 0
        result = json.loads(out)
        assert read_json("grid/record.json") == result
        assert list(result["models"]) == ["bert", "bm25", "static bert"]
        for grid in result["models"].values():
            assert list(grid) == ["natural", "repeat", "filler-same-end"]
            assert {length: figures["n"] for length, figures in grid["repeat"].items()} == {"24": 6, "40": 5}
        rows = [row.split(" | ") for row in (place / "grid" / "table.md").read_text().splitlines()]
        assert rows[0] == ["| protocol", "length", "pairs", "bert", "bm25", "static bert |"]
        assert [row[0][2:] for row in rows[2:]] == ["–", *["repeat"] * 2, *["filler-same-end"] * 2]
        svg = (place / "grid" / "pearson.svg").read_text()
        assert svg.startswith("<?xml")
        assert (place / "panels.png").read_bytes().startswith(b"\x89PNG")
        assert len(list((place / "grid" / "cells").glob("*/*.json"))) == 15
        again = json.loads(run(f"{line} --references --output grid --json")[1])
        assert again["models"] == result["models"]

    def test_all_protocols(self, run: Callable[..., tuple[int, str, str]], place: Path) -> None:
        # Documents of four of these sentences are longer than the filler's.
        code, out, _ = run("evaluate bert --data pairs --lengths 64 --pairs-at-length 8 --protocols all --json")
        assert code == 0
        assert list(json.loads(out)["models"]["bert"]) == ["natural", *protocol_names()]


class TestDistill:
    def test_with_cached_scores(self, run: Callable[..., tuple[int, str, str]], place: Path) -> None:
        line = "distill bert out --data pairs --teacher-scores pairs/teacher --transfer none --epochs 1"
        line += " --students softmax,hedgehog@4 --seeds 0,1 --mine 9"
        code, out, err = run(f"{line} --batch-size 8 --head dse --objective cosent --json")
        assert code == 0
        result = json.loads(out)
        assert read_json("out/record.json") == result
        assert {name: len(made) for name, made in result["students"].items()} == {"softmax": 2, "hedgehog@4": 2}
        for seed in (0, 1):
            assert read_json(f"out/hedgehog@4/seed-{seed}/record.json") == result["students"]["hedgehog@4"][seed]
        assert result["base"] == "bert"
        assert result["teacher"]["name"] == "cached scores in pairs/teacher"
        record = result["students"]["hedgehog@4"][1]
        settings = record["settings"]
        assert (settings["head"], settings["objective"], settings["batch_size"]) == ("dse", "cosent", 8)
        assert (settings["seed"], settings["mined"], record["teacher"]["mined"]["pairs"]) == (1, 9, 9)
        assert (place / "out" / "learning.svg").read_text().startswith("<?xml")
        assert st_linear.load("out/hedgehog@4/seed-0/model")[0].window == 4
        assert "Mined: 9 pairs" in err
        assert "dev Pearson: teacher" in err

    def test_texts_for_transfer(self, run: Callable[..., tuple[int, str, str]], place: Path) -> None:
        (place / "book.txt").write_text(" ".join(WORDS * 10), encoding="utf-8")
        line = "distill bert out --data pairs --teacher-scores pairs/teacher --epochs 1 --evaluations 1"
        line += " --transfer-texts book.txt --transfer-epochs 0.5"
        code, out, _ = run(f"{line} --students softmax,hedgehog --json")
        assert code == 0
        students = {name: made[0] for name, made in json.loads(out)["students"].items()}
        assert students["softmax"]["transfer_texts"] == {}
        assert list(students["hedgehog"]["transfer_texts"]) == ["book.txt"]
        assert students["hedgehog"]["settings"]["transfer_epochs"] == 0.5
        code, _, err = run(f"{line} --students softmax")
        assert code == 2
        assert "--transfer-texts book.txt has no use: no student is transferred to" in one_line_error(err)

    def test_a_name_says_its_transfer(self, run: Callable[..., tuple[int, str, str]], place: Path) -> None:
        line = "distill bert out --data pairs --epochs 1 --evaluations 1 --alpha 0 --transfer none"
        code, out, _ = run(f"{line} --students softmax,hedgehog,hedgehog+all --json")
        assert code == 0
        result = json.loads(out)
        transfers = {name: made[0]["student"]["transfer"] for name, made in result["students"].items()}
        assert transfers == {"softmax": "none", "hedgehog": "none", "hedgehog+all": "all"}
        assert result["steps_to_control"].keys() == transfers.keys()
        for wrong, message in (
            ("hedgehog+some", "unknown transfer 'some'; choose one of: none, maps, all, after"),
            ("softmax+", "unknown transfer ''; choose one of: none, maps, all, after"),
            ("softmax+all", "feature_map='softmax' is what transfer='all' aims at: pass transfer='none'"),
            ("heghog+all", "unknown student 'heghog+all'; write MAP[:features][@window][+TRANSFER]"),
            ("softmax --transfer some", "unknown transfer 'some'; choose one of: none, maps, all, after"),
        ):
            code, _, err = run(f"distill bert out --data pairs --students {wrong}")
            assert code == 2
            assert message in one_line_error(err)

    def test_what_is_transferred_to_after_distillation_begins_with_the_control(
        self, run: Callable[..., tuple[int, str, str]], place: Path
    ) -> None:
        line = "distill bert out --data pairs --epochs 1 --evaluations 1 --alpha 0 --seeds 3 --json --students"
        code, out, _ = run(f"{line} hedgehog+after")
        assert code == 0
        result = json.loads(out)
        assert list(result["students"]) == ["hedgehog+after"]
        control = read_json(place / "out" / "softmax" / "seed-3" / "record.json")
        code, out, _ = run(f"{line} softmax,hedgehog+after")
        assert code == 0
        assert json.loads(out)["students"] == {"softmax": [control], **result["students"]}

    def test_gold_alone_asks_no_teacher(self, run: Callable[..., tuple[int, str, str]], place: Path) -> None:
        code, out, err = run("distill bert out --data pairs --transfer none --epochs 1 --alpha 0")
        assert code == 0
        assert "untrained" in out
        assert "eacher:" not in err
        assert "│ teacher" not in out
        code, _, err = run("distill bert out --data pairs --transfer none --epochs 1 --alpha 0 --teacher nowhere")
        assert code == 0
        assert "Teacher: nowhere is not asked, as --alpha 0 leaves it out" in err

    def test_a_teacher_is_trained_and_a_weak_one_warned_of(
        self, run: Callable[..., tuple[int, str, str]], place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # What it costs is covered with the recipe; here it is the words that count.
        contrary = recipe.Teacher("weak", {s: [0.5] * n for s, n in {"train": 20, "dev": 8, "test": 10}.items()})
        contrary.figures = {s: dict.fromkeys(FIGURES, -0.5) | {"n": 8} for s in ("dev", "test")}
        monkeypatch.setattr(recipe, "prepare_teacher", lambda *args, **kwargs: contrary)
        code, _, err = run("distill bert out --data pairs --transfer none --epochs 1")
        assert code == 0
        assert "Teacher: none given, so one is trained here" in err
        assert "Warning: dev Pearson: teacher -50.00, hedgehog@64" in err


class TestQuickstart:
    def test_standard_output_is_one_json_object(self, quickstart: Done) -> None:
        assert quickstart.code == 0, quickstart.err
        result = json.loads(quickstart.out)
        assert result == read_json(quickstart.folder / "out" / "record.json")
        assert list(result["students"]) == ["softmax student", "near/far student", "linear student"]
        assert (result["data"], result["base"]) == ("pairs", "bert")

    def test_progress_is_shown(self, quickstart: Done) -> None:
        err = quickstart.err
        for line in ("Data: pairs", "Base model: bert", "softmax student", "100%", "Lengths:"):
            assert line in err
        assert "Warning" not in err
        assert not quickstart.warnings

    @pytest.mark.slow
    def test_as_a_process(self, place: Path) -> None:
        command = [sys.executable, "-m", "st_linear.cli", *QUICKSTART, "--base", "bert", "--output", "out", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == read_json("out/record.json")
        assert "Warning" not in done.stderr

    def test_results(self, quickstart: Done) -> None:
        out = quickstart.folder / "out"
        assert {path.name for path in out.iterdir()} == {
            *("record.json", "table.md", "learning.svg", "lengths.svg"),
            *("softmax", "near-far", "linear"),
        }
        for name in ("learning.svg", "lengths.svg"):
            drawn = (out / name).read_text()
            assert drawn.startswith("<?xml")
        for folder, feature_map, window in (
            ("softmax", "softmax", 0),
            ("near-far", "hedgehog", 64),
            ("linear", "hedgehog", 0),
        ):
            encoder = st_linear.load(str(out / folder / "model"))[0]
            assert (encoder.feature_map, encoder.window) == (feature_map, window)

    def test_table(self, quickstart: Done) -> None:
        out = quickstart.folder / "out"
        header, _, *rows = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in (out / "table.md").read_text().split("\n")
        ][:-1]
        assert header == ["model", "length", "tokens read", "cut", "pairs", "Pearson", "Spearman"]
        students = read_json(out / "record.json")["students"]
        assert rows[0][2:4] == ["–", "–"]
        assert [[*row[:2], row[4]] for row in rows] == [
            ["teacher", "natural", "10"],
            *(
                row
                for name in students
                for row in ([f"{name}, untrained", "natural", "10"], [name, "natural", "10"], [name, "24", "10"])
            ),
        ]
        linear = students["linear student"]["final"]["24"]
        assert rows[-1][5].startswith(f"{100 * linear['pearson']:.2f} [")

    def test_again_it_shows_the_same_and_trains_nothing(
        self,
        quickstart: Done,
        run: Callable[..., tuple[int, str, str]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        folder = quickstart.folder

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("trained again")

        monkeypatch.chdir(folder)
        monkeypatch.setattr(recipe.SentenceTransformerTrainer, "train", refuse)
        before = (folder / "out" / "table.md").read_text()
        code, out, _ = run(" ".join(QUICKSTART), "--base", "bert", "--output", "out", "--json")
        assert code == 0
        assert json.loads(out)["students"] == json.loads(quickstart.out)["students"]
        assert (folder / "out" / "table.md").read_text() == before
        code, _, err = run(" ".join(QUICKSTART), "--base", "bert", "--output", "out", "--seed", "1")
        assert (code, one_line_error(err)) == (1, "Error: trained again")


class TestErrors:
    """Each bad input is one line on standard error and exit code 2, and leaves no file behind."""

    DISTILL = "distill bert out --data pairs --teacher-scores pairs/teacher"

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("nosuch", "No such command 'nosuch'"),
            ("convert", "Missing argument 'model'"),
            ("convert bert out --nosuch 1", "No such option: --nosuch"),
            ("convert bert out --window x", "Invalid value for '--window'"),
            ("convert bert out --feature-map x", "unknown feature_map 'x'; choose one of: softmax, elu, "),
            ("convert bert out --window -1", "window must be a number of tokens >= 0 (0 = purely linear), got -1"),
            ("convert bert out --max-seq-length 0", "max_seq_length must be a positive number of tokens, got 0"),
            ("convert bert out --position-extension x", "'x'; choose one of: tile, interpolate, none"),
            ("convert bert out --feature-map elu --num-features 8", "'elu' has no option 'num_features'"),
            ("convert bert out --adapter bert", "bert holds no linear_attention.safetensors"),
            ("convert bert out --texts nosuch", "nosuch is no .txt file, and no folder that holds one"),
            ("convert bert out --texts bert", "bert is no .txt file, and no folder that holds one"),
            ("convert bert out --check-texts bert", "bert is no .txt file, and no folder that holds one"),
            ("convert bert out --steps 0", "steps must be positive, got 0"),
            ("convert bert out --steps 9", "--steps 9 says nothing without --texts"),
            ("convert bert out --train-lengths 256", "--train-lengths 256 says nothing without --texts"),
            ("convert bert out --target hidden", "--target hidden says nothing without --texts"),
            ("convert bert out --check-lengths 99", "--check-lengths 99 says nothing without --check-texts"),
            ("convert bert out --check-passages 9", "--check-passages 9 says nothing without --check-texts"),
            ("convert bert out --plot a.svg", "--plot a.svg says nothing without --texts or --check-texts"),
            ("convert bert out --check-texts bert --plot a.gif", "path='a.gif' must end in .svg or .png"),
            ("convert nosuch out", "no folder 'nosuch' here, and none on the Hugging Face Hub"),
            ("convert no/such out", "no folder 'no/such' here, and none on the Hugging Face Hub"),
            ("convert bert bert/config.json", "bert/config.json is a file"),
            ("convert bert bert/config.json/out", "bert/config.json is a file"),
            ("evaluate bert --data ./nosuch", "source='./nosuch': there is no such folder"),
            (
                "evaluate bert --data no/such",
                "source='no/such' is no local folder and can't be loaded from the Hugging",
            ),
            ("evaluate bert --data bert", "source='bert' has no test file for split='test'"),
            ("evaluate bert --data pairs --split x", "split='x' is none of train, dev, test"),
            ("evaluate bert nosuch --data pairs", "no folder 'nosuch' here"),
            ("evaluate bert --data pairs --lengths 7", "texts[0] has 8 tokens, more than length=7"),
            ("evaluate bert --data pairs --lengths a,8", "must be numbers of tokens, comma-separated, got 'a,8'"),
            ("evaluate bert --data pairs --lengths -5", "--lengths must be positive, got -5"),
            ("evaluate bert --data pairs --lengths 0", "--lengths must be positive, got 0"),
            ("evaluate bert --data pairs --pairs-at-length 3", "pairs_at_length must be at least 4, got 3"),
            ("evaluate bert --data pairs --lengths 24 --protocols x", "unknown protocol 'x'; choose one of: repeat, "),
            ("evaluate bert --data pairs --lengths 24 --protocols ,", "protocols is empty: name one for lengths="),
            ("evaluate bert --data pairs --protocols document", "--protocols document says nothing without --lengths"),
            ("evaluate bert --data pairs --lengths 24,40 --pairs-at-length 5,5,5", "has 3 entries for 2 lengths"),
            ("evaluate bert --data pairs --pairs-at-length few", "--pairs-at-length must be whole numbers"),
            ("evaluate pairs --data pairs", "'pairs' holds no model: neither modules.json nor config.json"),
            ("evaluate bert --data pairs --output bert/config.json", "bert/config.json"),
            ("evaluate bert --data pairs --plot x.pdf", "path='x.pdf' must end in .svg or .png"),
            (f"{DISTILL} --transfer x", "unknown transfer 'x'; choose one of: none, maps, all, after"),
            (f"{DISTILL} --head x", "unknown head 'x'; choose one of: cosine, dse"),
            (f"{DISTILL} --objective x", "unknown objective 'x'; choose one of: mse, cosent"),
            (
                f"{DISTILL} --students x",
                "unknown student 'x'; write MAP[:features][@window][+TRANSFER], MAP being one of softmax",
            ),
            (f"{DISTILL} --students hedgehog@-1", "unknown student 'hedgehog@-1'; write MAP[:features][@window]"),
            (f"{DISTILL} --students elu:8", "'elu' has no option 'num_features'"),
            (f"{DISTILL} --students ,", "--students is empty: name one"),
            (f"{DISTILL} --seeds ,", "--seeds is empty: name one at least"),
            (f"{DISTILL} --seeds a", "--seeds must be whole numbers, comma-separated, got 'a'"),
            (f"{DISTILL} --groups -1", "groups must be a number of groups, 0 or more, got -1"),
            (f"{DISTILL} --groups 5 --alpha 0", "groups have no scores but the teacher's"),
            (f"{DISTILL} --groups 5 --head dse", "groups have scores in 0..1, for the cosine: pass head='cosine'"),
            (f"{DISTILL} --mine -1", "mined must be a number of pairs, 0 or more, got -1"),
            (f"{DISTILL} --mine 5 --alpha 0", "mined pairs have no scores but the teacher's"),
            (f"{DISTILL} --alpha 2", "alpha must lie in 0..1, got 2.0"),
            (f"{DISTILL} --epochs 0", "epochs must be positive, got 0.0"),
            (f"{DISTILL} --epochs -1", "epochs must be positive, got -1.0"),
            (f"{DISTILL} --batch-size 0", "batch_size must be positive, got 0"),
            (f"{DISTILL} --lengths 40,7", "texts[0] has 8 tokens, more than length=7"),
            (f"{DISTILL} --teacher x", "pass a teacher or a folder of teacher scores, not both"),
            ("distill bert out --data pairs --teacher no/such", "no folder 'no/such' here, and no such CrossEncoder"),
            ("distill bert out --data pairs --teacher-scores x", "x is no folder of teacher scores"),
            ("distill nosuch out --data pairs", "no folder 'nosuch' here, and none on the Hugging Face Hub"),
            (
                "distill bert bert/config.json --data pairs --teacher-scores pairs/teacher",
                "bert/config.json is a file",
            ),
            ("quickstart --data ./nosuch --output out", "source='./nosuch': there is no such folder"),
            ("quickstart --base no/such --data pairs --output out", "no folder 'no/such' here"),
            ("quickstart --base bert --data pairs --epochs 0 --output out", "epochs must be positive, got 0.0"),
            ("quickstart --base bert --data pairs --output bert/config.json", "bert/config.json is a file"),
        ],
    )
    def test_bad_arguments(
        self, run: Callable[..., tuple[int, str, str]], place: Path, line: str, message: str
    ) -> None:
        before = files(place)
        code, out, err = run(line)
        assert (code, out) == (2, "")
        assert message in one_line_error(err)
        assert files(place) == before

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("sentence1,sentence2,score\n", "train.csv holds no pairs"),
            ("sentence1\nba\n", "has one column (sentence1)"),
            ("ba,be,6\n", "row 1: score 6 is outside score_range=(0, 5)"),
            ("ba,be,-1\n", "row 1: score -1 is outside score_range=(0, 5)"),
            ("ba,be,0\nba,be,nan\n", "row 2: score is NaN"),
            ("sentence1,sentence2,score\nba,be,x\n", "row 1: score 'x' is not a number"),
            ("sentence1,sentence2,score\nba,be\n", "line 2: 2 cells, where the first line has 3"),
            (b"\xff\xfe\x00", "train.csv can't be read as csv in UTF-8"),
            ('"ba,be,1\n', "train.csv can't be read as csv in UTF-8"),
        ],
    )
    def test_bad_data(
        self, run: Callable[..., tuple[int, str, str]], place: Path, content: str | bytes, message: str
    ) -> None:
        (place / "pairs" / "train.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        before = files(place)
        code, out, err = run(self.DISTILL)
        assert (code, out) == (2, "")
        assert message in one_line_error(err)
        assert files(place) == before

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ("A cat,A dog,1\nA bird,A hen,2\nA cow,An ox,3\n", "scores has 3 values; a correlation"),
            ("A cat,A dog,2\n" * 5, "scores are all 0.4; a correlation with a constant is not defined"),
        ],
    )
    def test_scores_that_nothing_correlates_with(
        self, run: Callable[..., tuple[int, str, str]], place: Path, rows: str, message: str
    ) -> None:
        (place / "pairs" / "test.csv").write_text(f"sentence1,sentence2,score\n{rows}")
        code, out, err = run("evaluate bert --data pairs")
        assert (code, out) == (2, "")
        assert message in one_line_error(err)

    def test_a_score_of_zero_is_one(self, run: Callable[..., tuple[int, str, str]], place: Path) -> None:
        rows = [line.split(",") for line in (place / "pairs" / "test.csv").read_text().splitlines()[1:]]
        assert sum(float(row[2]) == 0 for row in rows) == 2
        code, out, _ = run("evaluate bert --data pairs --json")
        assert code == 0
        assert json.loads(out)["models"]["bert"]["natural"]["n"] == len(rows)

    @pytest.mark.parametrize("damage", ["missing tensor", "cut weights", "cut config", "no modules"])
    def test_a_damaged_model(self, run: Callable[..., tuple[int, str, str]], place: Path, damage: str) -> None:
        assert run("convert bert model")[0] == 0
        if damage == "missing tensor":
            tensors = load_file("model/linear_attention.safetensors")
            tensors.popitem()
            save_file(tensors, "model/linear_attention.safetensors")
        elif damage == "no modules":
            (place / "model" / "modules.json").unlink()
        else:
            file = place / "model" / ("model.safetensors" if damage == "cut weights" else "config.json")
            file.write_bytes(file.read_bytes()[:100])
        code, out, err = run("evaluate model --data pairs")
        assert (code, out) == (2, "")
        assert "model" in one_line_error(err)

    def test_a_model_that_asks_for_too_much(self, run: Callable[..., tuple[int, str, str]], place: Path) -> None:
        config = json.loads((place / "bert" / "config.json").read_text())
        (place / "bert" / "config.json").write_text(json.dumps({**config, "vocab_size": 10**10}))
        code, out, err = run("evaluate bert --data pairs")
        assert (code, out) == (2, "")
        assert "bert asks for" in one_line_error(err)

    @pytest.mark.parametrize("line", ["evaluate bert --data pairs", "distill bert out --data pairs --teacher bert"])
    def test_a_damaged_base_or_teacher(self, run: Callable[..., tuple[int, str, str]], place: Path, line: str) -> None:
        (place / "bert" / "model.safetensors").write_bytes(b"damaged")
        before = files(place)
        code, out, err = run(line)
        assert (code, out) == (2, "")
        one_line_error(err)
        assert files(place) == before

    def test_a_teacher_with_several_labels(
        self, run: Callable[..., tuple[int, str, str]], place: Path, save_encoder: Callable[..., str]
    ) -> None:
        config = BertConfig(**{**FAMILIES["bert"]().to_dict(), "num_labels": 2})
        teacher = save_encoder(config, BertForSequenceClassification)
        assert CrossEncoder(teacher).num_labels == 2
        before = files(place)
        code, _, err = run("distill bert out --data pairs --teacher", teacher)
        assert code == 2
        assert "the teacher has 2 labels, distillation needs one score per pair" in one_line_error(err)
        assert files(place) == before

    @pytest.mark.parametrize("score", ["nan", "x", "inf"])
    def test_bad_teacher_scores(self, run: Callable[..., tuple[int, str, str]], place: Path, score: str) -> None:
        file = place / "pairs" / "teacher" / "train.csv"
        file.write_text(f"logit,score\n0,{score}\n")
        before = files(place)
        code, _, err = run(self.DISTILL)
        assert code == 2
        assert str(file.relative_to(place)) in one_line_error(err)
        assert files(place) == before

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (PermissionError(13, "Permission denied", "out"), 2),
            (FileExistsError(17, "File exists", "out"), 2),
            (OSError(28, "No space left on device", "out"), 1),
        ],
    )
    def test_an_output_folder_that_turns_out_not_to_take_the_model(
        self,
        run: Callable[..., tuple[int, str, str]],
        place: Path,
        monkeypatch: pytest.MonkeyPatch,
        error: OSError,
        expected: int,
    ) -> None:
        # Tests may run as root, who may write anywhere.
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(SentenceTransformer, "save_pretrained", refuse)
        code, out, err = run("convert bert out")
        assert (code, out) == (expected, "")
        assert one_line_error(err) == f"Error: {error}"
        assert not (place / "out").exists()

    def test_a_read_only_folder_is_found_out_first(
        self, run: Callable[..., tuple[int, str, str]], place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(models.os, "access", lambda path, mode: False)
        code, _, err = run(self.DISTILL)
        assert (code, one_line_error(err)) == (2, "Error: out/model can't be written: . is read-only")


class TestFailure:
    @pytest.fixture(autouse=True)
    def _failure(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("the disk\nis on fire [/red]")

        monkeypatch.setattr(models, "save_model", fail)

    def test_a_failure_is_one_line_too(self, run: Callable[..., tuple[int, str, str]]) -> None:
        code, out, err = run("convert bert out")
        assert (code, out) == (1, "")
        assert one_line_error(err) == "Error: the disk is on fire [/red]"

    @pytest.mark.parametrize(
        "line", ["--debug convert bert out", "convert bert --debug out", "convert bert out --debug"]
    )
    def test_debug_shows_the_traceback(self, run: Callable[..., tuple[int, str, str]], line: str) -> None:
        code, out, err = run(line)
        assert (code, out) == (1, "")
        assert "Traceback (most recent call last)" in err
        assert "in fail" in err
        assert err.endswith("Error: the disk is on fire [/red]\n")

    def test_debug_does_not_change_the_exit_code(self, run: Callable[..., tuple[int, str, str]]) -> None:
        code, _, err = run("--debug convert bert out --window -1")
        assert code == 2
        assert "Traceback (most recent call last)" in err


class TestBench:
    ATTENTION = "bench attention --models sdpa,elu,hedgehog@8 --heads 2 --head-dim 8 --rounds 6"
    ENCODER = "--base bert --models softmax,hedgehog@4 --rounds 6"

    def test_table_and_files(self, run: Callable[..., tuple[int, str, str]], place: Path) -> None:
        code, out, err = run(f"{self.ATTENTION} --lengths 16,32 --output out/bench")
        assert code == 0
        assert "attention · 2 heads of 8 · float32 · cpu" in out
        assert "hedgehog@8" in out
        assert "attention.json, attention.md and attention.svg are in out/bench" in err
        names = {"attention.json", "attention.md", "attention.svg"}
        assert files(place / "out") == {"bench", *(f"bench/{name}" for name in names)}
        assert [result["name"] for result in read_json("out/bench/attention.json")["results"]] == ["16", "32"]

    def test_a_run_goes_on(self, run: Callable[..., tuple[int, str, str]], place: Path) -> None:
        assert run(f"{self.ATTENTION} --lengths 16 --output out")[0] == 0
        before = read_json("out/attention.json")["results"]
        code, out, err = run(f"{self.ATTENTION} --lengths 16,32 --output out --json")
        assert code == 0
        assert "out/attention.json holds 16: not measured again" in err
        record = json.loads(out)
        assert record == read_json("out/attention.json")
        assert (record["results"][0], record["results"][1]["name"]) == (before[0], "32")

    @pytest.mark.parametrize(
        ("line", "names"),
        [
            (f"{ATTENTION} --lengths 16 --backward --across-lengths --baseline elu", ["16"]),
            (f"bench encoder {ENCODER} --lengths 16 --batch-tokens 64 --limit softmax=8", ["16"]),
            (f"bench training {ENCODER} --lengths 16 --attention-dropout 0 --dtype bfloat16", ["16"]),
            (
                f"bench mixed {ENCODER} --data pairs --parts sts-forward,long-training --lengths 24 --batch-size 8 "
                "--batch-tokens 50",
                ["sts-forward", "24-training"],
            ),
        ],
        ids=["attention", "encoder", "training", "mixed"],
    )
    def test_json(self, run: Callable[..., tuple[int, str, str]], place: Path, line: str, names: list[str]) -> None:
        before = files(place)
        code, out, _ = run(f"{line} --json")
        assert code == 0
        record = json.loads(out)
        assert record["level"] == line.split()[1]
        assert [result["name"] for result in record["results"]] == names
        assert record["environment"]["threads"] == torch.get_num_threads()
        assert files(place) == before

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("bench nosuch", "unknown level 'nosuch'; choose among: attention, encoder, training, mixed"),
            ("bench attention --models x", "unknown model 'x'; choose among: sdpa, flash, performer, plain, "),
            (
                "bench encoder --models x",
                "unknown model 'x'; choose among: softmax, no-attention, no-attention-whole, ",
            ),
            ("bench attention --base bert", "base is no option of level 'attention', but of: encoder, "),
            ("bench encoder --baseline x", "unknown baseline 'x'; choose among: softmax, no-attention, "),
            ("bench encoder --limit softmax", "--limit must be NAME=TOKENS, comma-separated, got 'softmax'"),
            ("bench encoder --limit x=9", "unknown model in limits 'x'; choose among: softmax, "),
            ("bench encoder --lengths a", "--lengths must be numbers of tokens, comma-separated, got 'a'"),
            ("bench encoder --rounds 2", "rounds must be at least 6, where a median's 95 % interval begins, got 2"),
            ("bench encoder --dtype x", "unknown dtype 'x'; choose among: float32, bfloat16, float16"),
            ("bench encoder --device x", "unknown device 'x'; choose one of: cpu, cuda"),
            ("bench mixed --parts x", "unknown part 'x'; choose among: sts-forward, sts-training, "),
            ("bench mixed --base bert --data ./nosuch", "source='./nosuch': there is no such folder"),
            ("bench encoder --base no/such --lengths 16", "no folder 'no/such' here"),
        ],
    )
    def test_bad_arguments(
        self, run: Callable[..., tuple[int, str, str]], place: Path, line: str, message: str
    ) -> None:
        before = files(place)
        code, out, err = run(line)
        assert (code, out) == (2, "")
        assert message in one_line_error(err)
        assert files(place) == before

    def test_a_record_of_another_run_is_left_alone(
        self, run: Callable[..., tuple[int, str, str]], place: Path
    ) -> None:
        (place / "out").mkdir()
        (place / "out" / "attention.json").write_text("{}")
        code, out, err = run(f"{self.ATTENTION} --lengths 16 --output out")
        assert (code, out) == (2, "")
        assert "out/attention.json is no record of a benchmark: name another folder" in one_line_error(err)
        assert files(place / "out") == {"attention.json"}
