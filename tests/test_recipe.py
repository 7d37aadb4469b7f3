from __future__ import annotations

import csv
import json
import logging
import math
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, WORDS, refused
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import BertConfig, BertForSequenceClassification

import st_linear
from st_linear import evaluation, recipe, tables, training
from st_linear.data import token_counts, training_sentences
from st_linear.evaluation import METRICS, correlation
from st_linear.models import save_model
from st_linear.pair_head import PairScorer, find_dse_head
from st_linear.recipe import Pairs, Teacher, distil, prepare_teacher
from st_linear.records import read_json
from st_linear.settings import _POSITIVE_SETTINGS, CONTROL, Settings, Student, Transferred

ROWS = {"train": 20, "dev": 8, "test": 10}
# 3 steps an epoch, the last of 4 pairs.
SETTINGS = Settings(
    epochs=2,
    batch_size=8,
    evaluations=3,
    transfer_epochs=1,
    transfer_steps=2,
    lengths=(16, 40),
    pairs_at_length=6,
    max_seq_length=256,
)
STUDENT = Student("hedgehog", window=4, transfer="none")


def write_pairs(folder: Path, seed: int = 0) -> Path:
    """Pairs that share their first words, as many as their score says; ``teacher/`` has scores close to gold."""
    draw = random.Random(seed)
    (folder / "teacher").mkdir(parents=True)
    for split, rows in ROWS.items():
        pairs, scores = [["sentence1", "sentence2", "score"]], [["logit", "score"]]
        for row in range(rows):
            shared = row % 7
            first = draw.choices(WORDS, k=6)
            pairs.append([" ".join(first), " ".join(first[:shared] + draw.choices(WORDS, k=6 - shared)), shared * 0.8])
            scores.append([shared - 3, 0.05 + shared * 0.15])
        for path, table in ((folder, pairs), (folder / "teacher", scores)):
            with (path / f"{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows(table)
    mined = [["sentence1", "sentence2", "logit", "score"]]
    mined += [
        [f"bo di {word}", f"bo di {draw.choice(WORDS)}", row - 6, row / 12] for row, word in enumerate(WORDS[:12])
    ]
    with (folder / "teacher" / "mined.csv").open("w", newline="") as file:
        csv.writer(file).writerows(mined)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture(scope="module")
def pairs(folder: Path) -> Pairs:
    return Pairs.load(folder)


@pytest.fixture(scope="module")
def teacher(pairs: Pairs) -> Teacher:
    return Teacher("by hand", {split: [0.9 * score for score in getattr(pairs, split)["score"]] for split in ROWS})


@pytest.fixture(scope="module")
def save_teacher(save_encoder: Callable[..., str]) -> Callable[[int], str]:
    def save(num_labels: int) -> str:
        config = BertConfig(**{**FAMILIES["bert"]().to_dict(), "num_labels": num_labels})
        return save_encoder(config, BertForSequenceClassification)

    return save


@pytest.fixture
def make(bert: str, pairs: Pairs, teacher: Teacher, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Make a student in ``tmp_path``, as the module's settings say or otherwise."""

    def call(**changed: Any) -> dict[str, Any]:
        arguments = {"name": "a", "student": STUDENT, "base": bert, "pairs": pairs, "teacher": teacher}
        arguments |= {"output": tmp_path, "settings": SETTINGS, "show_progress_bar": False}
        return distil(**(arguments | changed))

    return call


@pytest.fixture(scope="module")
def made(
    bert: str, pairs: Pairs, teacher: Teacher, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A finished student's folder and record, to be read and not written to."""
    output = tmp_path_factory.mktemp("made")
    return output, distil("a", STUDENT, bert, pairs, teacher, output, settings=SETTINGS, show_progress_bar=False)


class Crash(Exception):
    pass


def crash(*args: Any, **kwargs: Any) -> Any:
    raise Crash


def half_save(self: SentenceTransformer, path: str, *args: Any, **kwargs: Any) -> None:
    Path(path).mkdir()
    (Path(path) / "modules.json").write_text("[")
    raise Crash


class TestRecord:
    def test_a_student_is_a_model_and_a_record_and_nothing_else(self, made: tuple[Path, dict[str, Any]]) -> None:
        output, _ = made
        assert sorted(path.name for path in output.iterdir()) == ["model", "record.json"]

    def test_the_file_holds_what_was_returned(self, made: tuple[Path, dict[str, Any]]) -> None:
        output, record = made
        assert read_json(output / "record.json") == record

    def test_it_tells_what_was_run_and_where(self, made: tuple[Path, dict[str, Any]], bert: str, pairs: Pairs) -> None:
        _, record = made
        assert record["name"] == "a"
        assert (record["base"], record["data"]) == (bert, pairs.source)
        assert record["transferred"] is None
        assert record["teacher"]["mined"] is None
        assert record["student"] == {
            "feature_map": "hedgehog",
            "window": 4,
            "transfer": "none",
            "feature_map_kwargs": None,
            "exact_layers": [],
        }
        assert record["settings"]["lengths"] == [16, 40]
        assert (record["settings"]["alpha"], record["settings"]["epochs"]) == (0.5, 2)
        assert record["teacher"]["name"] == "by hand"
        assert record["environment"]["torch"] == str(torch.__version__)
        assert all(seconds >= 0 for seconds in record["seconds"].values())
        assert record["seconds"].keys() == {"transfer", "distillation"}
        assert record["peak_memory_mib"] > 0

    def test_the_models_card_tells_the_same(self, made: tuple[Path, dict[str, Any]], pairs: Pairs) -> None:
        output, record = made
        card = (output / "model" / "README.md").read_text(encoding="utf-8")
        assert f"Distilled on {pairs.source}, from the scores of by hand." in card
        for texts, length in (("as they are", "natural"), ("repeated to 40 tokens", "40")):
            figures = record["final"][length]
            row = [texts, str(figures["n"]), *(f"{100 * figures[metric]:.2f}" for metric in ("pearson", "spearman"))]
            assert f"| {' | '.join(row)} |" in card
        # The header has the final figures, and not those of each point of the curve.
        assert card.split("---")[1].count("type: pearson_cosine") == 1

    def test_the_curve_goes_from_the_first_step_to_the_last(self, made: tuple[Path, dict[str, Any]]) -> None:
        curve = made[1]["curve"]
        assert [point["step"] for point in curve] == [0, 2, 4, 6]
        # The third step of an epoch sees the 4 pairs that are left.
        assert [point["examples"] for point in curve] == [0, 16, 28, 40]
        assert curve[0]["seconds"] == 0
        assert all(b["seconds"] > a["seconds"] for a, b in pairwise(curve))

    def test_the_curve_counts_tokens(self, made: tuple[Path, dict[str, Any]], pairs: Pairs) -> None:
        tokenizer = st_linear.load(str(made[0] / "model")).tokenizer
        epoch = sum(sum(token_counts(pairs.train[column], tokenizer)) for column in ("sentence1", "sentence2"))
        assert made[1]["curve"][0]["tokens"] == 0
        assert made[1]["curve"][-1]["tokens"] == 2 * epoch

    def test_the_last_step_is_measured_once_where_evaluations_do_not_divide_the_steps(
        self, make: Callable[..., dict[str, Any]]
    ) -> None:
        record = make(settings=replace(SETTINGS, evaluations=1, epochs=1, lengths=()))
        assert [point["step"] for point in record["curve"]] == [0, 3]
        record = make(settings=replace(SETTINGS, evaluations=2, epochs=1, lengths=()))
        assert [point["step"] for point in record["curve"]] == [0, 2, 3]
        assert [point["examples"] for point in record["curve"]] == [0, 16, 20]

    def test_figures_by_length_have_intervals(self, made: tuple[Path, dict[str, Any]]) -> None:
        final = made[1]["final"]
        assert list(final) == ["natural", "16", "40"]
        assert [figures["n"] for figures in final.values()] == [10, 6, 6]
        for figures in (*final.values(), made[1]["untrained"]):
            for metric in ("pearson", "spearman"):
                assert -1 <= figures[f"{metric}_low"] < figures[metric] < figures[f"{metric}_high"] <= 1
        assert final["natural"]["mean_tokens"] == 8
        assert 8 < final["16"]["mean_tokens"] <= 16 < final["40"]["mean_tokens"] <= 40

    def test_the_untrained_figures_are_those_of_the_converted_base(
        self, made: tuple[Path, dict[str, Any]], bert: str, pairs: Pairs
    ) -> None:
        model = st_linear.convert(bert, feature_map="hedgehog", window=4, max_seq_length=256)
        figures = recipe.evaluate_model(model, pairs.test, Settings(lengths=()), show_progress_bar=False)["natural"]
        assert made[1]["untrained"]["pearson"] == pytest.approx(figures["pearson"], abs=1e-5)
        assert made[1]["final"]["natural"]["pearson"] != pytest.approx(figures["pearson"], abs=1e-5)


class TestStudents:
    @pytest.mark.parametrize(("head", "objective"), [("cosine", "cosent"), ("dse", "mse")])
    def test_the_saved_model_gives_the_recorded_figures(
        self, make: Callable[..., dict[str, Any]], pairs: Pairs, tmp_path: Path, head: Any, objective: Any
    ) -> None:
        lengths = SETTINGS.lengths if head == "cosine" else ()
        settings = replace(SETTINGS, head=head, objective=objective, epochs=1, lengths=lengths)
        record = make(settings=settings)
        model = st_linear.load(str(tmp_path / "model"))
        assert (find_dse_head(model) is not None) == (head == "dse")
        figures = recipe.evaluate_model(model, pairs.test, settings, show_progress_bar=False)
        assert figures.keys() == record["final"].keys()
        for length, found in figures.items():
            for key in ("pearson", "pearson_low", "spearman", "n", "mean_tokens"):
                assert found[key] == pytest.approx(record["final"][length][key], abs=1e-5)

    @pytest.mark.parametrize("constant", ["cosine", "dse"])
    def test_what_is_constant_hides_nothing_else(
        self,
        make: Callable[..., dict[str, Any]],
        pairs: Pairs,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        constant: str,
    ) -> None:
        settings = replace(SETTINGS, head="dse", epochs=1, lengths=())
        make(settings=settings)
        model = st_linear.load(str(tmp_path / "model"))
        if constant == "cosine":
            monkeypatch.setattr(evaluation, "pairwise_cos_sim", lambda x, y: torch.ones(len(x)))
        else:
            monkeypatch.setattr(PairScorer, "predict", lambda self, pairs, **kwargs: [0.5] * len(pairs))
        figures = recipe.evaluate_model(model, pairs.test, settings, show_progress_bar=False)["natural"]
        if constant == "cosine":
            assert figures["undefined"] is None
            assert figures["pearson"] is not None
        else:
            assert figures["undefined"] == f"all {len(pairs.test)} predictions are 0.5"
            assert figures["pearson"] is None

    def test_gold_alone(self, make: Callable[..., dict[str, Any]]) -> None:
        record = make(teacher=None)
        assert record["teacher"] is None
        assert record["settings"]["alpha"] == 0
        assert record["curve"][-1]["pearson"] != record["curve"][0]["pearson"]

    def test_a_teacher_changes_what_is_learnt(
        self, make: Callable[..., dict[str, Any]], teacher: Teacher, made: tuple[Path, dict[str, Any]]
    ) -> None:
        upside_down = Teacher("contrary", {s: [1 - score for score in v] for s, v in teacher.scores.items()})
        other = make(teacher=upside_down)
        assert other["curve"][0] == made[1]["curve"][0]
        assert other["curve"][-1]["pearson"] != pytest.approx(made[1]["curve"][-1]["pearson"], abs=1e-5)

    def test_the_control_is_softmax(self, make: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
        make(student=Student("softmax", window=0, transfer="none"))
        assert st_linear.load(str(tmp_path / "model"))[0].feature_map == "softmax"

    @pytest.mark.parametrize("transfer", ["none", "maps", "all"])
    def test_transfer_moves_what_it_says(self, bert: str, pairs: Pairs, tmp_path: Path, transfer: Any) -> None:
        model = st_linear.convert(bert, feature_map="hedgehog", window=0, max_seq_length=256)
        before = {name: tensor.clone() for name, tensor in model.named_parameters()}
        student = Student("hedgehog", window=0, transfer=transfer)
        settings = replace(SETTINGS, transfer_epochs=2)
        recipe.transfer_model(model, student, training_sentences(pairs.train), tmp_path, settings, False)
        moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
        maps = {name for name in before if ".linear_attention." in name}
        assert maps
        if transfer == "none":
            assert not moved
        elif transfer == "maps":
            assert moved == maps
        else:
            assert moved > maps
        assert all(parameter.requires_grad for parameter in model.parameters())

    @pytest.mark.parametrize(("transfer", "maps", "pooled"), [("maps", 0.5, 0), ("all", 0.3, 7)])
    def test_transfer_learns_at_the_rates_that_settings_say(
        self,
        bert: str,
        pairs: Pairs,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        transfer: Any,
        maps: float,
        pooled: float,
    ) -> None:
        trainers: list[Any] = []
        monkeypatch.setattr(recipe, "run_trainer", trainers.append)
        student = Student("hedgehog", window=0, transfer=transfer)
        model = st_linear.convert(bert, feature_map="hedgehog", window=0, max_seq_length=256)
        settings = replace(SETTINGS, maps_learning_rate=0.5, transfer_learning_rate=0.02, transfer_pooled=7)
        recipe.transfer_model(model, student, training_sentences(pairs.train), tmp_path, settings, False)
        arguments = trainers[0].args
        assert arguments.learning_rate_mapping == {r"linear_attention\.": pytest.approx(maps)}
        assert (arguments.learning_rate, arguments.lr_scheduler_type, arguments.adam_beta2) == (0.02, "cosine", 0.99)
        assert trainers[0].loss.pooled == pooled

    def test_nothing_to_transfer_is_refused(self, make: Callable[..., dict[str, Any]]) -> None:
        with refused(
            "transfer='all' has nothing to learn: attention is exact up to 128 tokens, and the longest text has"
        ):
            make(student=Student("hedgehog", window=64, transfer="all"))

    @pytest.mark.parametrize(("window", "transfer"), [(0, "all"), (2, "all"), (0, "maps"), (16, "maps")])
    def test_transfer_starts_where_attention_looks(
        self, bert: str, pairs: Pairs, tmp_path: Path, window: int, transfer: Any
    ) -> None:
        student = Student("learned_favor", window=window, transfer=transfer)
        model = st_linear.convert(bert, feature_map="learned_favor", window=window, max_seq_length=256, seed=1)
        as_drawn = model[0].model.encoder.layer[0].attention.self.linear_attention.feature_map.query_weight.clone()
        settings = replace(SETTINGS, maps_learning_rate=1e-12, transfer_steps=1)
        recipe.transfer_model(model, student, training_sentences(pairs.train), tmp_path, settings, False)
        feature_map: Any = model[0].model.encoder.layer[0].attention.self.linear_attention.feature_map
        assert feature_map.bias.abs().min() > 0  # a bias of FAVOR+ is nought
        assert (feature_map.query_weight - as_drawn).abs().max() > 0.1

    def test_transfer_is_part_of_the_recipe(self, make: Callable[..., dict[str, Any]]) -> None:
        settings = replace(SETTINGS, epochs=1, lengths=())
        untransferred = make(student=replace(STUDENT, window=0), settings=settings)
        record = make(student=replace(STUDENT, window=0, transfer="all"), settings=settings)
        assert record["untrained"]["pearson"] == pytest.approx(untransferred["untrained"]["pearson"], abs=1e-6)
        assert record["curve"][0]["pearson"] != pytest.approx(untransferred["curve"][0]["pearson"], abs=1e-6)
        assert untransferred["transferred"] is None
        assert record["transferred"]["pearson"] != pytest.approx(record["untrained"]["pearson"], abs=1e-6)
        assert record["transferred"]["n"] == 10

    def test_texts_are_transferred_on_besides_the_sentences(
        self, make: Callable[..., dict[str, Any]], pairs: Pairs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[list[str]] = []
        monkeypatch.setattr(recipe, "transfer_model", lambda model, student, sentences, *rest: read.append(sentences))
        student, settings = replace(STUDENT, transfer="all", window=0), replace(SETTINGS, epochs=1, lengths=())
        texts = {"a.txt": " ".join(WORDS * 10) + "\n\nbo di\n \nka lu\n", "b.txt": " ".join(reversed(WORDS * 10))}
        texts["blank.txt"] = "\n \n"
        record = make(student=student, settings=settings, texts=texts)
        sentences = training_sentences(pairs.train)
        assert read[0][: len(sentences)] == sentences
        added = read[0][len(sentences) :]
        assert max(len(passage.split()) for passage in added) <= 30
        assert set(" ".join(added).split()) == set(WORDS)
        assert {"bo di", "ka lu"} < set(added)
        assert "" not in added
        assert list(record["transfer_texts"]) == ["a.txt", "b.txt", "blank.txt"]
        assert make(student=student, settings=settings, texts=texts) == record
        assert make(student=student, settings=settings, texts={"a.txt": texts["b.txt"]}) != record
        untransferred = make(student=replace(student, transfer="none"), settings=settings, texts=texts)
        assert untransferred["transfer_texts"] == {}

    @pytest.mark.parametrize("head", ["cosine", "dse"])
    def test_after_distillation(
        self, make: Callable[..., dict[str, Any]], bert: str, pairs: Pairs, tmp_path: Path, head: Any
    ) -> None:
        settings = replace(SETTINGS, epochs=1, lengths=(), head=head, learning_rate=3e-3)
        control = make(student=CONTROL, settings=settings, output=tmp_path / "control")
        student = Student("learned_favor", window=0, transfer="after")
        record = make(student=student, settings=settings, control=tmp_path / "control", output=tmp_path / "after")
        bare = make(student=replace(student, transfer="none"), settings=settings, output=tmp_path / "bare")
        assert record["untrained"]["pearson"] == bare["untrained"]["pearson"]
        assert record["transferred"] is None
        (point,), last = record["curve"], control["curve"][-1]
        assert [point[unit] for unit in ("step", "examples")] == [last["step"], last["examples"]] == [3, 20]
        saved = st_linear.load(str(tmp_path / "after" / "model"))
        dev = recipe.evaluate_model(saved, pairs.dev, settings, show_progress_bar=False)["natural"]
        assert [point[metric] for metric in METRICS] == pytest.approx([dev[metric] for metric in METRICS], abs=1e-5)
        assert point["pearson"] != last["pearson"]
        assert read_json(tmp_path / "after" / "model" / "adapter.json")["base"]["name"] == bert
        assert record["seconds"]["distillation"] == control["seconds"]["distillation"]
        assert (
            make(student=student, settings=settings, control=tmp_path / "control", output=tmp_path / "after") == record
        )
        # Transfer aims at the control's vectors: they are nearer than those of the encoder that was distilled.
        after, distilled = (st_linear.load(str(tmp_path / name / "model")) for name in ("after", "control"))
        texts = training_sentences(pairs.train)
        vectors, aim, source = (
            m.encode(texts, convert_to_tensor=True) for m in (after, distilled, st_linear.load(bert))
        )
        near, far = (torch.cosine_similarity(vectors, other).mean() for other in (aim, source))
        assert near > far

    def test_after_distillation_maps_alone_learn(self, make: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
        settings = replace(SETTINGS, epochs=1, lengths=(), transfer_steps=2)
        make(student=CONTROL, settings=settings, output=tmp_path / "control")
        student = Student("hedgehog", window=8, transfer="after")
        record = make(student=student, settings=settings, control=tmp_path / "control", output=tmp_path / "after")
        control, after = (st_linear.load(str(tmp_path / name / "model")) for name in ("control", "after"))
        weights = dict(after[0].model.named_parameters())
        for name, parameter in control[0].model.named_parameters():
            assert torch.equal(parameter, weights[name]), name
        fresh = st_linear.convert(control, feature_map="hedgehog", window=8, seed=settings.seed)
        maps = [name for name in weights if "linear_attention" in name]
        assert maps
        assert all(not torch.equal(weights[n], p) for n, p in fresh[0].model.named_parameters() if n in maps)
        assert record["student"]["transfer"] == "after"

    def test_after_distillation_of_what(self, make: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
        student = Student("hedgehog", window=0, transfer="after")
        with refused("transfer='after' begins with the distilled softmax student: pass its folder as control"):
            make(student=student)
        with refused("control holds no finished student", FileNotFoundError):
            make(student=student, control=tmp_path / "control")
        make(student=CONTROL, settings=replace(SETTINGS, epochs=1), output=tmp_path / "control")
        with refused("control holds another student than transfer='after' needs: not the same settings"):
            make(student=student, control=tmp_path / "control")

    def test_half_precision_is_left_behind(self, make: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
        record = make(settings=replace(SETTINGS, half=True, lengths=()), student=replace(STUDENT, transfer="maps"))
        model = st_linear.load(str(tmp_path / "model"))
        assert next(model.parameters()).dtype == torch.float32
        figures = recipe.evaluate_model(
            model, recipe.load_pairs(record["data"], "test"), Settings(lengths=()), show_progress_bar=False
        )["natural"]
        # Measured under autocast, it would be as much as 1e-2 off.
        assert figures["pearson"] == pytest.approx(record["final"]["natural"]["pearson"], abs=1e-6)

    def test_a_student_reads_what_it_is_given_or_refuses(
        self, made: tuple[Path, dict[str, Any]], text: Callable[..., str], caplog: pytest.LogCaptureFixture
    ) -> None:
        model = st_linear.load(str(made[0] / "model"))
        with caplog.at_level(logging.WARNING, logger="st_linear"):
            for _ in range(2):
                assert model.encode([text(300), text(400), "", text(9)]).shape == (4, 32)
        (warning,) = (record.getMessage() for record in caplog.records if record.name.startswith("st_linear"))
        assert "2 of 4 texts in this batch are longer than max_seq_length=256" in warning
        for wrong in (None, 3, 2.5):
            with refused(f"one of the inputs is {wrong!r}"):
                model.encode(["ba", wrong])


class TestGroups:
    @pytest.fixture
    def grouped(self, folder: Path, tmp_path: Path) -> Path:
        """A folder of scores with six groups of four."""
        copied = Path(shutil.copytree(folder / "teacher", tmp_path / "teacher"))
        rows = [
            {f"sentence{n}": f"bo {WORDS[row]} {WORDS[row + n]}" for n in range(1, 5)} | {"score": [row / 9] * 6}
            for row in range(6)
        ]
        (copied / "groups.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        return copied

    def prepared(self, pairs: Pairs, bert: str, output: Path, count: int, **teacher: Any) -> Teacher:
        settings = replace(SETTINGS, groups=count)
        return prepare_teacher(pairs, bert, output, settings=settings, show_progress_bar=False, **teacher)

    def test_the_first_of_a_folder_are_taken(self, pairs: Pairs, bert: str, grouped: Path, tmp_path: Path) -> None:
        found = self.prepared(pairs, bert, tmp_path / "out", 4, teacher_scores=str(grouped)).groups
        assert found is not None
        assert found.to_list() == [json.loads(line) for line in (grouped / "groups.jsonl").open()][:4]
        everything = self.prepared(pairs, bert, tmp_path / "out", 40, teacher_scores=str(grouped)).groups
        assert everything is not None
        assert len(everything) == 6

    def test_they_are_trained_on_beside_the_pairs(
        self, make: Callable[..., dict[str, Any]], pairs: Pairs, bert: str, grouped: Path, tmp_path: Path
    ) -> None:
        taught = self.prepared(pairs, bert, tmp_path / "out", 6, teacher_scores=str(grouped))
        settings = replace(SETTINGS, epochs=2, lengths=(), evaluations=2)
        record = make(teacher=taught, settings=settings)
        # A step has batch_size pairs, or groups of as many sentences.
        per_epoch = -(-ROWS["train"] // SETTINGS.batch_size) + -(-6 // (SETTINGS.batch_size // 2))
        assert record["curve"][-1]["step"] == 2 * per_epoch
        # A group of four sentences counts as two pairs.
        assert record["curve"][-1]["examples"] == 2 * (ROWS["train"] + 6 * 2)
        assert record["teacher"]["groups"]["groups"] == 6
        assert 0 < record["curve"][1]["examples"] < record["curve"][-1]["examples"]

    def test_they_come_from_a_folder_alone(
        self, pairs: Pairs, bert: str, save_teacher: Callable[[int], str], tmp_path: Path
    ) -> None:
        with refused("groups=3 asks for a folder of teacher scores with groups.jsonl, got none"):
            self.prepared(pairs, bert, tmp_path, 3, teacher=save_teacher(1))

    def test_their_loss_is_the_teachers_without_dropout(
        self,
        make: Callable[..., dict[str, Any]],
        pairs: Pairs,
        bert: str,
        grouped: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        found: list[dict[str, Any]] = []
        run = training.run_trainer

        def look(trainer: Any, checkpoint: Path | None = None) -> None:
            found.append({name: loss.get_config_dict() for name, loss in trainer.loss.items()})
            run(trainer, checkpoint)

        monkeypatch.setattr(training, "run_trainer", look)
        taught = self.prepared(pairs, bert, tmp_path / "out", 6, teacher_scores=str(grouped))
        make(teacher=taught, settings=replace(SETTINGS, objective="cosent", alpha=0.3, lengths=()))
        (losses,) = found
        assert losses["pairs"] == losses["groups"] | {"alpha": 0.3, "dropout": True}
        assert losses["groups"] == losses["groups"] | {"alpha": 1, "dropout": False, "objective": "cosent"}

    def test_a_sentence_of_test_is_refused(self, pairs: Pairs, bert: str, grouped: Path, tmp_path: Path) -> None:
        row = {"sentence1": "bo", "sentence2": "bi", "sentence3": pairs.test["sentence2"][0], "score": [0.1, 0.2, 0.3]}
        (grouped / "groups.jsonl").write_text(json.dumps(row))
        with refused("the mined groups hold 1 sentences of dev or test"):
            self.prepared(pairs, bert, tmp_path / "out", 1, teacher_scores=str(grouped))


class TestMined:
    @pytest.mark.parametrize("activation", ["sigmoid", "identity"])
    def test_labels_of_mined_pairs_are_the_teachers_alone(
        self, pairs: Pairs, bert: str, folder: Path, activation: Any
    ) -> None:
        settings = replace(SETTINGS, mined=5, teacher_activation=activation, objective="cosent")
        taught = prepare_teacher(
            pairs,
            bert,
            folder / "out",
            teacher_scores=str(folder / "teacher"),
            settings=settings,
            show_progress_bar=False,
        )
        assert taught.mined is not None
        assert len(taught.mined) == 5
        rows = recipe._taught(pairs.train, taught, settings)
        assert len(rows) == ROWS["train"] + 5
        assert [label[0] for label in rows["score"][: ROWS["train"]]] == pairs.train["score"]
        for (gold, score), given in zip(rows["score"][ROWS["train"] :], taught.mined["score"]):
            assert score == given
            assert gold == pytest.approx(given if activation == "sigmoid" else 1 / (1 + math.exp(-given)))

    def test_scored_pairs_are_drawn_evenly_over_their_scores(self, pairs: Pairs, bert: str, tmp_path: Path) -> None:
        folder = write_pairs(tmp_path / "pairs")
        path = folder / "teacher" / "mined.csv"
        header, *rows = path.read_text().splitlines()
        low = [f"bo di,bo di {index},-9,{index / 1000}" for index in range(40)]
        path.write_text("\n".join([header, *low, *rows[-3:]]) + "\n")
        (taught, again) = (
            prepare_teacher(
                pairs,
                bert,
                folder / f"out-{seed}",
                teacher_scores=str(folder / "teacher"),
                settings=replace(SETTINGS, mined=6, seed=seed),
                show_progress_bar=False,
            ).mined
            for seed in (0, 1)
        )
        assert taught is not None
        assert again is not None
        assert taught.to_dict() == again.to_dict()
        assert sum(score > 0.5 for score in taught["score"]) == 3
        assert len(taught) == len(set(taught["sentence2"])) == 6

    def test_a_file_without_pairs_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "mined.csv").write_text("sentence1,sentence2,logit,score\n")
        with refused("mined.csv holds no pairs"):
            recipe.read_mined_pairs(tmp_path)

    def test_a_model_scores_what_is_mined(
        self, pairs: Pairs, bert: str, save_teacher: Callable[[int], str], tmp_path: Path
    ) -> None:
        settings = replace(SETTINGS, mined=7)
        taught = prepare_teacher(
            pairs, bert, tmp_path, teacher=save_teacher(1), settings=settings, show_progress_bar=False
        )
        assert taught.mined is not None
        assert len(taught.mined) == 7
        assert not pairs.unseen().intersection(training_sentences(taught.mined))

    def test_they_are_trained_on(self, make: Callable[..., dict[str, Any]], teacher: Teacher) -> None:
        mined = Dataset.from_dict({"sentence1": ["ba be"] * 9, "sentence2": ["ba bi"] * 9, "score": [0.1] * 9})
        record = make(teacher=replace(teacher, mined=mined), settings=replace(SETTINGS, epochs=1, lengths=()))
        assert record["curve"][-1]["examples"] == ROWS["train"] + 9
        assert record["teacher"]["mined"]["pairs"] == 9

    def test_a_sentence_of_test_is_refused(self, pairs: Pairs, bert: str, tmp_path: Path) -> None:
        folder = write_pairs(tmp_path / "leaky")
        line = f"{pairs.test['sentence1'][0]},bo,1,0.7\n"
        with (folder / "teacher" / "mined.csv").open("a") as file:
            file.write(line)
        with refused("the mined pairs hold 1 sentences of dev or test"):
            prepare_teacher(
                pairs,
                bert,
                tmp_path / "out",
                teacher_scores=str(folder / "teacher"),
                settings=replace(SETTINGS, mined=5),
                show_progress_bar=False,
            )


class TestSeeds:
    def record(self, feature_map: str, pearson: float, transferred: float | None = None) -> dict[str, Any]:
        def figures(value: float) -> dict[str, float]:
            return {"pearson": value, "spearman": value / 2}

        return {
            "student": {"feature_map": feature_map},
            "untrained": figures(0.5),
            "transferred": None if transferred is None else figures(transferred),
            "final": {"natural": figures(pearson)},
            "curve": [{"step": 0, "pearson": 0.5}, {"step": 4, "pearson": pearson}],
        }

    def test_differences_are_paired(self) -> None:
        students = {
            "softmax": [self.record("softmax", 0.80), self.record("softmax", 0.90)],
            "elu": [self.record("elu", 0.79, 0.6), self.record("elu", 0.89, 0.7)],
        }
        summary = recipe.over_seeds(students)
        assert summary["softmax"]["natural"]["minus_control"] is None
        assert summary["elu"]["natural"]["pearson"]["mean"] == pytest.approx(0.84)
        # t(1) at 97.5 % is 12.706, and the standard error of (0.79, 0.89) is 0.05.
        assert summary["elu"]["natural"]["pearson"]["low"] == pytest.approx(0.84 - 12.7062 * 0.05, abs=1e-4)
        difference = summary["elu"]["natural"]["minus_control"]
        assert [difference[key] for key in ("mean", "low", "high")] == pytest.approx([-0.01] * 3)
        assert summary["elu"]["transferred"]["minus_control"]["mean"] == pytest.approx(0.15)
        assert summary["elu"]["natural"]["spearman"]["mean"] == pytest.approx(0.42)

    def test_steps_to_the_control(self) -> None:
        # 95 % of 0.8 is 0.76: softmax is there after 26/30 of its four steps, elu after 26/29; 99 % is 0.792.
        students = {
            "softmax": [self.record("softmax", 0.8), self.record("softmax", 0.8)],
            "elu": [self.record("elu", 0.79), self.record("elu", 0.8)],
            "favor": [self.record("favor", 0.8), self.record("favor", 0.75)],
        }
        steps = recipe.steps_to_control(students)
        means = {
            (name, share): None if mean is None else mean["mean"]
            for name, by_share in steps.items()
            for share, mean in by_share.items()
        }
        assert means == {
            ("softmax", "95"): pytest.approx(4 * 26 / 30),
            ("softmax", "99"): pytest.approx(4 * 29.2 / 30),
            ("elu", "95"): pytest.approx(2 * (26 / 29 + 26 / 30)),
            ("elu", "99"): None,
            ("favor", "95"): None,
            ("favor", "99"): None,
        }
        assert recipe.steps_to_control({"elu": students["elu"]}) == {}

    def test_table(self) -> None:
        students = {"softmax": [self.record("softmax", 0.8)], "elu": [self.record("elu", 0.79, 0.6)]}
        result = {"data": "pairs", "teacher": {"figures": {"test": {"pearson": 0.9, "spearman": 0.89}}}}
        result |= {"summary": recipe.over_seeds(students), "steps_to_control": recipe.steps_to_control(students)}
        lines = tables.as_markdown(tables.distilled_over_seeds(result)).splitlines()
        assert "steps to 95 % of softmax's, on dev | steps to 99 % of softmax's, on dev |" in lines[0]
        assert lines[2:] == [
            "| teacher | – | – | 90.00 | 89.00 | – | – | – | – |",
            "| softmax | untrained | 1 | 50.00 | 25.00 | – | – | – | – |",
            "| softmax | natural | 1 | 80.00 | 40.00 | – | 88.9% | 3 | 4 |",
            "| elu | untrained | 1 | 50.00 | 25.00 | +0.00 | – | – | – |",
            "| elu | transferred | 1 | 60.00 | 30.00 | +10.00 | – | – | – |",
            "| elu | natural | 1 | 79.00 | 39.50 | -1.00 | 87.8% | 4 | never |",
        ]
        del students["softmax"]
        result |= {"teacher": None, "summary": recipe.over_seeds(students), "steps_to_control": {}}
        assert tables.as_markdown(tables.distilled_over_seeds(result)).splitlines()[-1] == (
            "| elu | natural | 1 | 79.00 | 39.50 | – | – |"
        )

    def test_one_seed_has_no_interval(self) -> None:
        (natural,) = (recipe.over_seeds({"elu": [self.record("elu", 0.8)]})["elu"][stage] for stage in ("natural",))
        assert natural["pearson"] == {"mean": 0.8, "low": None, "high": None, "n": 1}
        assert natural["minus_control"] is None

    def test_curves_are_averaged_point_by_point(self) -> None:
        curve = recipe.mean_curve([self.record("elu", 0.8), self.record("elu", 0.6)])
        assert curve == [{"step": 0, "pearson": 0.5}, {"step": 4, "pearson": pytest.approx(0.7)}]


class TestAgain:
    def test_a_finished_student_is_not_made_again(
        self, make: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record = make()
        monkeypatch.setattr(recipe, "convert", crash)
        assert make() == record

    @pytest.mark.parametrize("trains", ["none", "maps", "all"])
    def test_settings_of_another_transfer_have_no_say(self, trains: Transferred) -> None:
        of_maps: dict[str, Any] = {"transfer_steps": 9, "maps_learning_rate": 1.0}
        of_all: dict[str, Any] = {"transfer_epochs": 9.0, "transfer_learning_rate": 1.0, "transfer_pooled": 9.0}
        heard = {"none": {}, "maps": of_maps, "all": of_all}[trains]
        assert Settings(**of_maps, **of_all, seed=3).for_transfer(trains) == Settings(**heard, seed=3)

    def test_what_transfer_costs_has_no_say_without_it(
        self, made: tuple[Path, dict[str, Any]], make: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(recipe, "convert", crash)
        costly = replace(SETTINGS, transfer_epochs=9, transfer_learning_rate=1.0)
        assert make(output=made[0], settings=costly) == made[1]
        with pytest.raises(Crash):
            make(output=made[0], settings=costly, student=replace(STUDENT, transfer="maps"))

    @pytest.mark.parametrize(
        "changed",
        [
            {"name": "b"},
            {"student": replace(STUDENT, window=5)},
            {"settings": replace(SETTINGS, seed=1)},
            {"settings": replace(SETTINGS, lengths=(16,))},
            {"teacher": None},
        ],
        ids=str,
    )
    def test_any_other_student_is_made(
        self,
        made: tuple[Path, dict[str, Any]],
        make: Callable[..., dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch,
        changed: dict[str, Any],
    ) -> None:
        monkeypatch.setattr(recipe, "convert", crash)
        assert make(output=made[0]) == made[1]
        with pytest.raises(Crash):
            make(output=made[0], **changed)
        assert read_json(made[0] / "record.json") == made[1]

    def test_other_scores_of_teacher_or_data_count_as_a_change(
        self,
        made: tuple[Path, dict[str, Any]],
        make: Callable[..., dict[str, Any]],
        pairs: Pairs,
        teacher: Teacher,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(recipe, "convert", crash)
        other = {**teacher.scores, "train": [0.5, *teacher.scores["train"][1:]]}
        with pytest.raises(Crash):
            make(output=made[0], teacher=Teacher(teacher.name, other))
        edited = Pairs.load(write_pairs(tmp_path / "edited", seed=1))
        with pytest.raises(Crash):
            make(output=made[0], pairs=replace(edited, source=pairs.source))

    def test_a_record_without_its_model_counts_for_nothing(
        self, make: Callable[..., dict[str, Any]], tmp_path: Path
    ) -> None:
        make()
        (tmp_path / "model").rename(tmp_path / "elsewhere")
        make()
        st_linear.load(str(tmp_path / "model"))


class TestCrash:
    @pytest.mark.parametrize("where", ["train", "save", "record"])
    def test_nothing_half_written_is_left_and_the_next_call_finishes(
        self, make: Callable[..., dict[str, Any]], tmp_path: Path, where: str
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if where == "train":
                patch.setattr(recipe.SentenceTransformerTrainer, "training_step", crash)
            elif where == "save":
                patch.setattr(SentenceTransformer, "save_pretrained", half_save)
            else:
                patch.setattr(recipe, "write_json", crash)
            with pytest.raises(Crash):
                make()
        left = {path.name for path in tmp_path.iterdir()}
        assert left <= ({"trainer", "model"} if where == "record" else {"trainer"})
        if where == "record":
            st_linear.load(str(tmp_path / "model"))
        record = make()
        assert read_json(tmp_path / "record.json") == record
        assert {path.name for path in tmp_path.iterdir()} == {"model", "record.json"}

    def test_the_old_student_stays_until_a_new_one_is_trained(
        self, make: Callable[..., dict[str, Any]], tmp_path: Path
    ) -> None:
        record = make()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recipe.SentenceTransformerTrainer, "training_step", crash)
            with pytest.raises(Crash):
                make(name="b")
        assert read_json(tmp_path / "record.json") == record
        st_linear.load(str(tmp_path / "model"))

    def test_no_record_vouches_for_another_students_model(
        self, make: Callable[..., dict[str, Any]], tmp_path: Path
    ) -> None:
        make()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recipe, "write_json", crash)
            with pytest.raises(Crash):
                make(student=replace(STUDENT, window=5))
        assert st_linear.load(str(tmp_path / "model"))[0].window == 5
        make()
        assert st_linear.load(str(tmp_path / "model"))[0].window == 4


# Saves two models to one folder, in turn, until it is killed.
SAVE_FOR_EVER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import st_linear
from st_linear.models import save_model

folder = Path(sys.argv[1])
models = [st_linear.load(source) for source in sys.argv[2:]]
print("ready", flush=True)
while True:
    for model in models:
        save_model(model, folder)
"""


@pytest.fixture(scope="module")
def models(bert: str) -> dict[int, SentenceTransformer]:
    return {window: st_linear.convert(bert, feature_map="elu", window=window) for window in (4, 5)}


class TestSaveModel:
    def test_it_replaces_a_model(self, models: dict[int, SentenceTransformer], tmp_path: Path) -> None:
        for window, model in models.items():
            save_model(model, tmp_path / "model")
            assert st_linear.load(str(tmp_path / "model"))[0].window == window
            assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_a_crash_while_writing_leaves_the_old_one(
        self, models: dict[int, SentenceTransformer], tmp_path: Path
    ) -> None:
        save_model(models[4], tmp_path / "model")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SentenceTransformer, "save_pretrained", half_save)
            with pytest.raises(Crash):
                save_model(models[5], tmp_path / "model")
        assert st_linear.load(str(tmp_path / "model"))[0].window == 4
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    @pytest.mark.parametrize("kept", [0, 1])
    def test_a_crash_at_either_step_of_the_exchange_leaves_a_whole_model_or_none(
        self, models: dict[int, SentenceTransformer], tmp_path: Path, kept: int
    ) -> None:
        save_model(models[4], tmp_path / "model")
        rename = Path.rename
        calls: list[Path] = []

        def stop(self: Path, target: Path) -> Path:
            calls.append(self)
            if len(calls) > kept:
                raise Crash
            return rename(self, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(st_linear.models, "_exchange", lambda *_: False)
            patch.setattr(Path, "rename", stop)
            with pytest.raises(Crash):
                save_model(models[5], tmp_path / "model")
        assert (tmp_path / "model").exists() == (kept == 0)
        # Hidden or not, the old model is there, and whole.
        (left,) = tmp_path.iterdir()
        assert st_linear.load(str(left))[0].window == 4
        save_model(models[5], tmp_path / "model")
        assert st_linear.load(str(tmp_path / "model"))[0].window == 5
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    @pytest.mark.skipif(sys.platform != "linux", reason="two steps elsewhere")
    def test_the_exchange_has_one_step(self, models: dict[int, SentenceTransformer], tmp_path: Path) -> None:
        save_model(models[4], tmp_path / "model")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "rename", crash)
            save_model(models[5], tmp_path / "model")
        assert st_linear.load(str(tmp_path / "model"))[0].window == 5
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform != "linux", reason="two steps elsewhere")
    def test_killed_at_random_moments_it_leaves_the_old_model_or_the_new_one(
        self, models: dict[int, SentenceTransformer], tmp_path: Path
    ) -> None:
        folders = [tmp_path / name for name in ("model", "four", "five")]
        for folder, window in zip(folders, (4, 4, 5)):
            save_model(models[window], folder)
        draw, seen = random.Random(0), set()
        command = [sys.executable, "-c", SAVE_FOR_EVER, *map(str, folders)]
        for _ in range(30):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=tmp_path)
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(draw.uniform(0, 1))
            process.kill()
            process.communicate()
            seen.add(st_linear.load(str(tmp_path / "model"))[0].window)
        assert seen == {4, 5}
        save_model(models[4], tmp_path / "model")
        assert sorted(tmp_path.iterdir()) == sorted(folders)

    def test_it_takes_nobodys_files(self, models: dict[int, SentenceTransformer], tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("years of work")
        with refused(f"{tmp_path} holds files and no model of st_linear's"):
            save_model(models[4], tmp_path)
        with refused(f"{tmp_path / 'thesis.txt'} is a file"):
            save_model(models[4], tmp_path / "thesis.txt")
        with refused(f"{tmp_path / 'thesis.txt'} is a file"):
            save_model(models[4], tmp_path / "thesis.txt" / "model")
        assert [path.read_text() for path in tmp_path.iterdir()] == ["years of work"]

    def test_an_empty_folder_will_do(self, models: dict[int, SentenceTransformer], tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        save_model(models[4], tmp_path / "model")
        st_linear.load(str(tmp_path / "model"))

    def test_a_student_is_not_trained_for_a_folder_that_is_taken(
        self, make: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "thesis.txt").write_text("years of work")
        monkeypatch.setattr(recipe, "convert", crash)
        with refused(f"{tmp_path / 'model'} holds files and no model of st_linear's"):
            make()


class TestTeacher:
    @pytest.fixture
    def prepare(self, bert: str, pairs: Pairs, tmp_path: Path) -> Callable[..., Teacher]:
        def call(**given: Any) -> Teacher:
            arguments = {"pairs": pairs, "base": bert, "output": tmp_path, "settings": SETTINGS}
            return prepare_teacher(**(arguments | {"show_progress_bar": False} | given))

        return call

    def test_scores_from_a_folder(self, prepare: Callable[..., Teacher], folder: Path, pairs: Pairs) -> None:
        found = prepare(teacher_scores=str(folder / "teacher"))
        assert found.name == f"cached scores in {folder / 'teacher'}"
        assert found.scores["test"] == pytest.approx([0.05 + (row % 7) * 0.15 for row in range(10)])
        assert {split: len(scores) for split, scores in found.scores.items()} == ROWS
        assert found.figures["test"] == correlation(found.scores["test"], pairs.test["score"]).as_dict()
        assert found.figures.keys() == {"dev", "test"}

    def test_scores_of_a_cross_encoder(
        self, prepare: Callable[..., Teacher], save_teacher: Callable[[int], str], pairs: Pairs
    ) -> None:
        path = save_teacher(1)
        found = prepare(teacher=path)
        expected = CrossEncoder(path).predict(
            list(zip(pairs.dev["sentence1"], pairs.dev["sentence2"])), activation_fn=torch.nn.Sigmoid()
        )
        assert found.name == path
        assert found.scores["dev"] == pytest.approx(expected.tolist(), abs=1e-6)
        assert len(set(found.scores["dev"])) > 1

    def test_one_is_trained_here_and_then_kept(
        self, prepare: Callable[..., Teacher], bert: str, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = prepare()
        assert found.name == f"CrossEncoder trained here from {bert}"
        assert CrossEncoder(str(tmp_path / "teacher")).num_labels == 1
        monkeypatch.setattr(recipe, "train_teacher", crash)
        kept = prepare()
        assert (kept.name, kept.mined) == (found.name, found.mined)
        # Weights read from a file lie elsewhere in memory, where some processors sum in another order.
        for split, scores in found.scores.items():
            assert kept.scores[split] == pytest.approx(scores, abs=1e-6)
        for changed in (
            {"settings": replace(SETTINGS, seed=1)},
            {"pairs": replace(pairs, train=pairs.train.select(range(19)))},
        ):
            with pytest.raises(Crash):
                prepare(**changed)
            # A teacher that was about to be written over is not taken for the one it was.
            with pytest.raises(Crash):
                prepare()

    def test_what_is_refused(
        self, prepare: Callable[..., Teacher], folder: Path, pairs: Pairs, save_teacher: Callable[[int], str]
    ) -> None:
        scores = str(folder / "teacher")
        with refused("not both"):
            prepare(teacher="x", teacher_scores=scores)
        with refused(f"{scores} holds 20 scores for train, the data 19 pairs"):
            prepare(teacher_scores=scores, pairs=replace(pairs, train=pairs.train.select(range(19))))
        with refused("the teacher has 3 labels"):
            prepare(teacher=save_teacher(3))
        with refused("no folder of teacher scores", FileNotFoundError):
            prepare(teacher_scores=str(folder / "nosuch"))
        with refused("no folder 'no/such' here", FileNotFoundError):
            prepare(teacher="no/such")

    def test_what_can_be_refused_before_a_teacher_is_trained_is(
        self, prepare: Callable[..., Teacher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(recipe, "train_teacher", crash)
        with refused("no folder 'no/such' here", FileNotFoundError):
            prepare(base="no/such")
        with refused("has 8 tokens, more than length=7"):
            prepare(settings=replace(SETTINGS, lengths=(40, 7)))
        (tmp_path / "file").write_text("")
        with refused(f"{tmp_path / 'file'} is a file"):
            prepare(output=tmp_path / "file")
        with pytest.raises(Crash):
            prepare()


class TestLongTexts:
    def test_long_texts(self, bert: str, pairs: Pairs) -> None:
        model = st_linear.load(bert)
        sentences = training_sentences(pairs.train)
        texts = recipe.long_texts(model, sentences, 64, SETTINGS)
        assert len(texts) == 4 * SETTINGS.transfer_steps
        # A sentence's 8 tokens count its [CLS] and [SEP]; a text has only one pair of them.
        for count in token_counts(texts, model.tokenizer):
            assert 256 * 6 / 8 <= count <= 1024
        longest = max(texts, key=len).split()
        words = {tuple(sentence.split()) for sentence in sentences}
        assert {tuple(longest[i : i + 6]) for i in range(0, len(longest), 6)} <= words
        assert recipe.long_texts(model, sentences, 64, SETTINGS) == texts
        assert recipe.long_texts(model, sentences, 64, replace(SETTINGS, seed=1)) != texts


class TestSettings:
    @pytest.mark.parametrize("name", _POSITIVE_SETTINGS)
    @pytest.mark.parametrize("value", [0, -1, float("nan")])
    def test_positive(self, name: str, value: float) -> None:
        with refused(f"{name} must be positive, got {value!r}"):
            Settings(**{name: value})

    @pytest.mark.parametrize("value", [-1, float("nan")])
    def test_embeddings_count_or_not(self, value: float) -> None:
        assert Settings(transfer_pooled=0).transfer_pooled == 0
        with refused(f"transfer_pooled must be 0 or more, got {value!r}"):
            Settings(transfer_pooled=value)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"alpha": 2}, "alpha must lie in 0..1, got 2"),
            ({"alpha": float("nan")}, "alpha must lie in 0..1, got nan"),
            ({"head": "x"}, "unknown head 'x'; choose one of: cosine, dse"),
            ({"head": "dse", "lengths": (64,)}, "head='dse' is measured at natural length alone, got lengths=(64,)"),
            ({"objective": "x"}, "unknown objective 'x'; choose one of: mse, cosent"),
            ({"teacher_activation": "x"}, "unknown teacher_activation 'x'; choose one of: sigmoid, identity"),
            ({"pairs_at_length": 3}, "pairs_at_length must be at least 4, got 3"),
        ],
    )
    def test_refused(self, settings: dict[str, Any], message: str) -> None:
        with refused(message):
            Settings(**settings)

    @pytest.mark.parametrize(
        ("student", "message"),
        [
            ({"transfer": "x"}, "unknown transfer 'x'; choose one of: none, maps, all"),
            ({"feature_map": "x"}, "unknown feature_map 'x'; choose one of: softmax, elu,"),
            ({"feature_map": "softmax"}, "pass transfer='none'"),
            ({"window": -1}, "window must be a number of tokens >= 0 (0 = purely linear), got -1"),
            ({"feature_map": "elu", "feature_map_kwargs": {"size": 3}}, "'elu' has no option 'size'"),
        ],
    )
    def test_refused_students(self, student: dict[str, Any], message: str) -> None:
        with refused(message):
            Student(**student)
