from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, refused
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Module
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from st_linear import DistillationLoss, add_teacher_scores, convert
from st_linear.teachers import (
    is_score_folder,
    load_teacher,
    read_groups,
    read_teacher_scores,
    score_pairs,
    train_teacher,
)


@pytest.fixture(scope="module")
def folder(save_encoder: Callable[..., str]) -> str:
    """A CrossEncoder with one label, to be read and not written to."""
    config = FAMILIES["bert"]()
    config.num_labels = 1
    return save_encoder(config, BertForSequenceClassification)


@pytest.fixture
def teacher(folder: str) -> CrossEncoder:
    return CrossEncoder(folder, device="cpu")


@pytest.fixture(scope="module")
def dataset(text: Callable[..., str]) -> Dataset:
    return Dataset.from_dict(
        {
            "sentence1": [text(length, seed=1) for length in range(4, 14)],
            "sentence2": [text(length, seed=2) for length in range(13, 3, -1)],
            "score": [index / 9 for index in range(10)],
        }
    )


class Shifted(Module):
    """Embeddings less a vector."""

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        return {**features, "sentence_embedding": features["sentence_embedding"] - self.shift}

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None: ...


def scores_of(teacher: CrossEncoder, dataset: Dataset, activation: nn.Module) -> np.ndarray:
    """One pair at a time, past the code under test."""
    pairs = zip(dataset["sentence1"], dataset["sentence2"])
    return np.array([teacher.predict(pair, activation_fn=activation) for pair in pairs])


def count_calls(teacher: CrossEncoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pairs of each call of ``predict`` from now on."""
    calls: list[int] = []
    predict = teacher.predict

    def count(pairs: Any, **options: Any) -> Any:
        calls.append(len(pairs))
        return predict(pairs, **options)

    monkeypatch.setattr(teacher, "predict", count)
    return calls


def write_scores(folder: Path, content: str, split: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.csv").write_text(content, encoding="utf-8")
    return folder


class TestColumn:
    @pytest.mark.parametrize(("activation", "module"), [("sigmoid", nn.Sigmoid()), ("identity", nn.Identity())])
    def test_gold_and_teacher_stand_side_by_side(
        self, activation: Any, module: nn.Module, teacher: CrossEncoder, dataset: Dataset, tmp_path: Path
    ) -> None:
        scored = add_teacher_scores(dataset, teacher, activation=activation, cache_folder=tmp_path, batch_size=3)
        assert scored.column_names == ["sentence1", "sentence2", "score"]
        assert scored["sentence1"] == dataset["sentence1"]
        gold, taught = np.array(scored["score"]).T
        np.testing.assert_array_equal(gold, dataset["score"])
        np.testing.assert_allclose(taught, scores_of(teacher, dataset, module), rtol=1e-5, atol=1e-6)
        assert taught.std() > 0.05

    def test_sigmoid_is_that_of_identity(self, teacher: CrossEncoder, dataset: Dataset, tmp_path: Path) -> None:
        squashed, logits = (
            torch.tensor(score_pairs(dataset, teacher, activation=activation, cache_folder=tmp_path))
            for activation in ("sigmoid", "identity")
        )
        torch.testing.assert_close(logits.sigmoid(), squashed)
        assert (logits - squashed).abs().mean() > 0.1

    def test_the_activation_of_the_teacher_itself_does_not_count(
        self, folder: str, dataset: Dataset, tmp_path: Path
    ) -> None:
        odd = CrossEncoder(folder, device="cpu", activation_fn=nn.Tanh())
        scores = score_pairs(dataset, odd, cache_folder=tmp_path)
        np.testing.assert_allclose(scores, scores_of(odd, dataset, nn.Sigmoid()), rtol=1e-5, atol=1e-6)

    def test_unlabelled_pairs_get_the_teacher_alone(
        self, teacher: CrossEncoder, dataset: Dataset, tmp_path: Path
    ) -> None:
        scored = add_teacher_scores(dataset.remove_columns("score"), teacher, cache_folder=tmp_path)
        np.testing.assert_allclose(scored["score"], scores_of(teacher, dataset, nn.Sigmoid()), rtol=1e-5, atol=1e-6)

    def test_other_columns_stay(self, teacher: CrossEncoder, dataset: Dataset, tmp_path: Path) -> None:
        wide = dataset.add_column("genre", ["news"] * 10)
        assert add_teacher_scores(wide, teacher, cache_folder=tmp_path)["genre"] == ["news"] * 10

    def test_a_teacher_may_be_named_by_its_folder(
        self, folder: str, teacher: CrossEncoder, dataset: Dataset, tmp_path: Path
    ) -> None:
        expected = add_teacher_scores(dataset, teacher, cache_folder=tmp_path / "a")["score"]
        for name in (folder, Path(folder)):
            scored = add_teacher_scores(dataset, name, cache_folder=tmp_path / "b")
            np.testing.assert_allclose(scored["score"], expected, rtol=0, atol=1e-6)

    def test_the_loss_takes_what_comes_out(
        self, bert: str, teacher: CrossEncoder, dataset: Dataset, tmp_path: Path
    ) -> None:
        scored = add_teacher_scores(dataset, teacher, cache_folder=tmp_path)
        model = convert(bert, window=8)
        features = [model.preprocess(scored[column]) for column in ("sentence1", "sentence2")]
        loss = DistillationLoss(model)(features, torch.tensor(scored["score"]))
        assert torch.isfinite(loss)
        assert loss > 0

    @pytest.mark.parametrize("column", ["sentence1", "sentence2"])
    def test_a_missing_text_column_is_refused(
        self, column: str, teacher: CrossEncoder, dataset: Dataset, tmp_path: Path
    ) -> None:
        left = dataset.remove_columns(column)
        with refused(f"the dataset has no column {column!r}; its columns: {', '.join(left.column_names)}"):
            add_teacher_scores(left, teacher, cache_folder=tmp_path)

    def test_an_unknown_activation_is_refused(self, teacher: CrossEncoder, dataset: Dataset, tmp_path: Path) -> None:
        with refused("unknown activation 'tanh'; choose one of: sigmoid, identity"):
            add_teacher_scores(dataset, teacher, activation="tanh", cache_folder=tmp_path)

    def test_a_second_teacher_is_refused(self, teacher: CrossEncoder, dataset: Dataset, tmp_path: Path) -> None:
        scored = add_teacher_scores(dataset, teacher, cache_folder=tmp_path)
        with refused("column 'score' holds teacher scores already; pass the dataset with gold scores alone"):
            add_teacher_scores(scored, teacher, cache_folder=tmp_path)


@pytest.fixture
def encoder(bert: str) -> SentenceTransformer:
    return convert(bert, feature_map="softmax")


@pytest.fixture(scope="module")
def groups(text: Callable[..., str]) -> Dataset:
    """Seven rows of four texts, of which some come in several rows."""
    return Dataset.from_dict(
        {f"sentence{n}": [text(5 + (row + n) % 6, seed=(row + n) % 6) for row in range(7)] for n in range(1, 5)}
    )


class TestGroups:
    def test_all_pairs_are_scored(self, teacher: CrossEncoder, groups: Dataset, tmp_path: Path) -> None:
        scored = add_teacher_scores(groups, teacher, cache_folder=tmp_path)
        assert scored.column_names == [*groups.column_names, "score"]
        for row, scores in zip(groups.to_list(), scored["score"]):
            a, b, c, d = row.values()
            expected = teacher.predict([(a, b), (a, c), (a, d), (b, c), (b, d), (c, d)], activation_fn=nn.Sigmoid())
            np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)

    def test_gold_scores_are_refused(self, teacher: CrossEncoder, groups: Dataset, tmp_path: Path) -> None:
        with refused("groups of 4 sentences have no gold scores: drop the column 'score', or sentence3"):
            add_teacher_scores(groups.add_column("score", [0.5] * 7), teacher, cache_folder=tmp_path)

    def test_the_trainer_takes_what_comes_out(self, bert: str, groups: Dataset, tmp_path: Path) -> None:
        model = convert(bert, window=8)
        scored = add_teacher_scores(groups, model, cache_folder=tmp_path)
        before = model[0].model.embeddings.word_embeddings.weight.clone()  # type: ignore[union-attr]
        arguments = SentenceTransformerTrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none"
        )
        loss = DistillationLoss(model, alpha=1, dropout=False)
        trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=scored, loss=loss)
        # The teacher is the student, as it was.
        assert trainer.train().training_loss < 1e-4
        assert not torch.equal(before, model[0].model.embeddings.word_embeddings.weight)  # type: ignore[union-attr]


GROUP = {"sentence1": "ba", "sentence2": "be", "sentence3": "bi", "score": [0.1, 0, 1]}


class TestGroupFiles:
    def test_they_are_read_as_add_teacher_scores_makes_them(
        self, encoder: SentenceTransformer, groups: Dataset, tmp_path: Path
    ) -> None:
        scored = add_teacher_scores(groups, encoder, cache_folder=tmp_path / "cache")
        scored.to_json(tmp_path / "groups.jsonl")
        found = read_groups(tmp_path)
        assert found.remove_columns("score").to_list() == groups.to_list()
        np.testing.assert_allclose(found["score"], scored["score"], rtol=1e-9)

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ([], "{path} holds no groups"),
            ([GROUP, "{"], "{path}, line 2 is no group: sentence1 to sentenceK and score in JSON"),
            ([{**GROUP, "text": "bo"}], "{path}, line 1 is no group"),
            ([[1, 2]], "{path}, line 1 is no group"),
            (
                [GROUP, {**GROUP, "sentence4": "bo", "score": [0.1] * 6}],
                "{path}, line 2 has 4 sentences, those before it 3",
            ),
            (
                [{"sentence1": "ba", "sentence2": "be", "score": [0.5]}],
                "{path}, line 1 has 2 sentences: pairs belong in mined.csv",
            ),
            ([{**GROUP, "sentence2": " "}], "{path}, line 1: a sentence is ' ', not a text"),
            ([{**GROUP, "sentence2": None}], "{path}, line 1: a sentence is None, not a text"),
            ([{**GROUP, "score": [0.1, 0.2]}], "{path}, line 1: score must be a list of 3 numbers, one for each pair"),
            ([{**GROUP, "score": 0.5}], "{path}, line 1: score must be a list of 3 numbers, one for each pair"),
            ([{**GROUP, "score": [0.1, 1.5, 0]}], "{path}, line 1: a score is 1.5, not a number in 0..1"),
            ([{**GROUP, "score": [0.1, math.nan, 0]}], "{path}, line 1: a score is nan, not a number in 0..1"),
            ([{**GROUP, "score": [0.1, "1", 0]}], "{path}, line 1: a score is '1', not a number in 0..1"),
            ([{**GROUP, "score": [0.1, True, 0]}], "{path}, line 1: a score is True, not a number in 0..1"),
        ],
    )
    def test_bad_ones_are_refused(self, lines: list[Any], message: str, tmp_path: Path) -> None:
        path = tmp_path / "groups.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        with refused(message.format(path=path)):
            read_groups(tmp_path)

    def test_text_is_read_as_it_is(self, tmp_path: Path) -> None:
        odd = {**GROUP, "sentence2": "b\u2028e\u0085"}
        path = tmp_path / "groups.jsonl"
        path.write_text("\ufeff" + json.dumps(odd, ensure_ascii=False) + "\n", encoding="utf-8")
        assert read_groups(tmp_path).to_list() == [odd]
        path.write_bytes(b"\xff\xfe")
        with refused(f"{path} can't be read as UTF-8"):
            read_groups(tmp_path)

    def test_a_folder_of_scores_scores_no_groups(self, groups: Dataset, tmp_path: Path) -> None:
        write_scores(tmp_path / "scores", "logit,score\n0,0.5\n")
        with refused("scores is a folder of scores, whose groups have them already: call read_groups"):
            add_teacher_scores(groups, tmp_path / "scores")

    def test_a_folder_without_is_told(self, tmp_path: Path) -> None:
        message = f"no groups that a teacher has scored: {tmp_path / 'groups.jsonl'} is missing"
        with refused(message, FileNotFoundError):
            read_groups(tmp_path)


class TestBiEncoder:
    def test_its_scores_are_cosines_and_none_below_nought(
        self, encoder: SentenceTransformer, dataset: Dataset, tmp_path: Path
    ) -> None:
        with torch.no_grad():
            # Vectors of a random encoder all lie in one direction: have them point in all.
            mean = encoder.encode(dataset["sentence1"][:], convert_to_tensor=True).mean(0)
        turned = SentenceTransformer(modules=[*encoder, Shifted(mean)], device="cpu")
        scores = score_pairs(dataset, turned, cache_folder=tmp_path, batch_size=3)
        u, v = (turned.encode(dataset[column][:]) for column in ("sentence1", "sentence2"))
        cosines = (u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)
        assert min(cosines) < -0.05
        np.testing.assert_allclose(scores, np.maximum(cosines, 0), atol=1e-5)

    def test_each_sentence_is_read_once(
        self, encoder: SentenceTransformer, groups: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[int] = []
        encode = encoder.encode
        monkeypatch.setattr(
            encoder, "encode", lambda texts, **options: (read.append(len(texts)), encode(texts, **options))[1]
        )
        first = add_teacher_scores(groups, encoder, cache_folder=tmp_path)["score"]
        assert add_teacher_scores(groups, encoder, cache_folder=tmp_path)["score"] == first
        assert read == [6]

    def test_many_pairs_go_in_parts(
        self, encoder: SentenceTransformer, groups: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = score_pairs(groups, encoder, cache_folder=tmp_path / "a")
        monkeypatch.setattr("st_linear.teachers._PAIRS_AT_A_TIME", 4)
        assert score_pairs(groups, encoder, cache_folder=tmp_path / "b") == whole

    def test_scores_are_of_its_settings_too(self, bert: str, dataset: Dataset, tmp_path: Path) -> None:
        scores = [
            score_pairs(dataset, convert(bert, feature_map=feature_map, window=window), cache_folder=tmp_path)
            for feature_map, window in (("softmax", 0), ("elu", 0), ("elu", 2), ("elu", 0))
        ]
        assert scores[1] == scores[3]
        assert scores[0] != scores[1] != scores[2] != scores[0]

    def test_it_has_no_logits(self, encoder: SentenceTransformer, dataset: Dataset, tmp_path: Path) -> None:
        with refused("a SentenceTransformer has no logits: its scores are cosines; pass activation='sigmoid'"):
            add_teacher_scores(dataset, encoder, activation="identity", cache_folder=tmp_path)


class TestCache:
    def test_pairs_are_scored_once(
        self, teacher: CrossEncoder, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = count_calls(teacher, monkeypatch)
        first = add_teacher_scores(dataset, teacher, cache_folder=tmp_path)
        second = add_teacher_scores(dataset, teacher, cache_folder=tmp_path)
        assert calls == [10]
        assert first["score"] == second["score"]

    def test_what_the_key_does_not_hold_asks_no_second_time(
        self, folder: str, teacher: CrossEncoder, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        score_pairs(dataset, teacher, cache_folder=tmp_path)
        again = CrossEncoder(folder, device="cpu")
        calls = count_calls(again, monkeypatch)
        score_pairs(dataset.remove_columns("score"), again, cache_folder=tmp_path, batch_size=1)
        assert calls == []

    def test_another_activation_text_weight_or_length_asks_anew(
        self, folder: str, teacher: CrossEncoder, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = count_calls(teacher, monkeypatch)

        def scores(data: Dataset = dataset, **options: Any) -> list[float]:
            return score_pairs(data, teacher, cache_folder=tmp_path, **options)

        first = scores()
        assert scores(activation="identity") != first
        assert calls == [10, 10]

        texts = list(dataset["sentence2"])
        texts[3] += " ba"
        assert scores(dataset.remove_columns("sentence2").add_column("sentence2", texts)) != first
        assert calls == [10, 10, 10]
        swapped = dataset.rename_columns({"sentence1": "sentence2", "sentence2": "sentence1"})
        assert scores(swapped) != first
        assert calls == [10] * 4

        teacher.max_seq_length = 6
        assert scores() != first
        assert calls == [10] * 5
        teacher.max_seq_length = CrossEncoder(folder, device="cpu").max_seq_length

        with torch.no_grad():
            next(teacher.parameters())[7] += 1
        assert scores() != first
        assert calls == [10] * 6
        assert len(list(tmp_path.iterdir())) == 6

    def test_texts_that_read_alike_end_to_end_are_told_apart(
        self, teacher: CrossEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = count_calls(teacher, monkeypatch)
        for left, right in (("ba be", "bi"), ("ba", " bebi"), ("ba bebi", "")):
            pair = Dataset.from_dict({"sentence1": [left], "sentence2": [right]})
            score_pairs(pair, teacher, cache_folder=tmp_path)
        assert calls == [1, 1, 1]

    def test_a_teacher_that_fails_leaves_nothing(
        self, teacher: CrossEncoder, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(teacher, "predict", fail)
            with pytest.raises(KeyboardInterrupt):
                score_pairs(dataset, teacher, cache_folder=tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_a_write_that_fails_leaves_nothing(
        self, teacher: CrossEncoder, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: Any) -> None:
            raise OSError("no space left on device")

        calls = count_calls(teacher, monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            with pytest.raises(OSError, match="no space left"):
                score_pairs(dataset, teacher, cache_folder=tmp_path)
        assert list(tmp_path.iterdir()) == []
        score_pairs(dataset, teacher, cache_folder=tmp_path)
        assert calls == [10, 10]
        (file,) = tmp_path.iterdir()
        assert len(json.loads(file.read_text())["scores"]) == 10

    def test_a_teacher_that_answers_nan_is_refused(
        self, teacher: CrossEncoder, dataset: Dataset, tmp_path: Path
    ) -> None:
        with torch.no_grad():
            next(teacher.parameters()).fill_(torch.nan)
        with refused("the teacher gave NaN or inf for 10 of 10 pairs"):
            score_pairs(dataset, teacher, cache_folder=tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_a_damaged_file_is_told(self, teacher: CrossEncoder, dataset: Dataset, tmp_path: Path) -> None:
        score_pairs(dataset, teacher, cache_folder=tmp_path)
        (file,) = tmp_path.iterdir()
        file.write_text(file.read_text()[:50])
        with refused(f"{file} is damaged"):
            score_pairs(dataset, teacher, cache_folder=tmp_path)

    def test_it_lies_in_the_cache_of_the_user(
        self, teacher: CrossEncoder, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        score_pairs(dataset, teacher)
        assert len(list((tmp_path / "xdg" / "st_linear" / "teacher_scores").iterdir())) == 1
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        score_pairs(dataset, teacher)
        assert len(list((tmp_path / "home" / ".cache" / "st_linear" / "teacher_scores").iterdir())) == 1


class TestScoreFiles:
    SCORES = "logit,score\n" + "".join(f"{index - 5},{index / 10}\n" for index in range(10))

    @pytest.mark.parametrize(
        ("activation", "expected"),
        [("sigmoid", [index / 10 for index in range(10)]), ("identity", [index - 5.0 for index in range(10)])],
    )
    def test_they_become_the_column(
        self, activation: Any, expected: list[float], dataset: Dataset, tmp_path: Path
    ) -> None:
        folder = write_scores(tmp_path / "scores", self.SCORES)
        assert is_score_folder(folder)
        for name in (folder, str(folder)):
            scored = add_teacher_scores(dataset, name, activation=activation)
            assert scored["score"] == [list(row) for row in zip(dataset["score"], expected)]
        unlabelled = add_teacher_scores(dataset.remove_columns("score"), folder, activation=activation)
        assert unlabelled["score"] == expected

    def test_the_split_picks_the_file(self, dataset: Dataset, tmp_path: Path) -> None:
        folder = write_scores(tmp_path / "scores", self.SCORES)
        write_scores(folder, "logit,score\n" + "0,0.5\n" * 10, split="dev")
        assert add_teacher_scores(dataset.remove_columns("score"), folder, split="dev")["score"] == [0.5] * 10

    def test_a_model_with_a_csv_file_is_a_model(self, folder: str, tmp_path: Path) -> None:
        copied = Path(shutil.copytree(folder, tmp_path / "model"))
        write_scores(copied, self.SCORES)
        assert not is_score_folder(copied)
        assert not is_score_folder(tmp_path / "nothing")

    def test_a_wrong_count_is_refused(self, dataset: Dataset, tmp_path: Path) -> None:
        folder = write_scores(tmp_path / "scores", self.SCORES)
        with refused(f"{folder} holds 10 scores for train, the dataset 9 pairs"):
            add_teacher_scores(dataset.select(range(9)), folder)

    def test_a_missing_split_is_refused(self, dataset: Dataset, tmp_path: Path) -> None:
        folder = write_scores(tmp_path / "scores", self.SCORES)
        with refused(f"no teacher scores for test: {folder / 'test.csv'} is missing", FileNotFoundError):
            add_teacher_scores(dataset, folder, split="test")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("gold,score2\n1,2\n", " has no column 'score'; its columns: gold, score2"),
            ("", " has no column 'score'; its columns: "),
            ("logit,score\n1,0.5\n2,high\n", ", line 3: 'high' is no number"),
            ("logit,score\n1,0.5\n2\n", ", line 3: None is no number"),
            ("logit,score\n1,0.5\n2,\n", ", line 3: '' is no number"),
            ("logit,score\n1,nan\n", " holds NaN or inf scores"),
            ("logit,score\n1,inf\n", " holds NaN or inf scores"),
        ],
    )
    def test_a_bad_file_is_refused(self, content: str, message: str, tmp_path: Path) -> None:
        folder = write_scores(tmp_path / "scores", content)
        with refused(f"{folder / 'train.csv'}{message}"):
            read_teacher_scores(folder, "train")

    def test_the_column_that_is_not_read_may_be_missing(self, tmp_path: Path) -> None:
        folder = write_scores(tmp_path / "scores", "score\n0.25\n")
        assert read_teacher_scores(folder, "train") == [0.25]
        with refused("has no column 'logit'; its columns: score"):
            read_teacher_scores(folder, "train", activation="identity")


class TestLoadTeacher:
    def test_a_loaded_one_passes_through(self, teacher: CrossEncoder) -> None:
        assert load_teacher(teacher) is teacher

    def test_arguments_are_those_of_the_cross_encoder(self, folder: str) -> None:
        assert load_teacher(folder, device="cpu", max_length=17).max_seq_length == 17

    @pytest.mark.parametrize("name", ["missing/teacher", "/no/such/teacher"])
    def test_a_missing_one_is_told(self, name: str, tmp_path: Path, dataset: Dataset) -> None:
        message = f"no folder {name!r} here, and no such CrossEncoder could be had from the Hugging Face Hub"
        with refused(message, FileNotFoundError):
            load_teacher(name)
        with refused(message, FileNotFoundError):
            add_teacher_scores(dataset, name, cache_folder=tmp_path)

    def test_several_labels_are_refused(self, bert: str, dataset: Dataset, tmp_path: Path) -> None:
        several = CrossEncoder(bert, num_labels=3, device="cpu")
        several.save_pretrained(str(tmp_path / "several"))
        message = "the teacher has 3 labels, distillation needs one score per pair: pass a CrossEncoder with num_lab"
        for name in (several, str(tmp_path / "several")):
            with refused(message):
                load_teacher(name)
            with refused(message):
                add_teacher_scores(dataset, name, cache_folder=tmp_path / "cache")


class TestTrainTeacher:
    OPTIONS = {"batch_size": 5, "learning_rate": 1e-3, "show_progress_bar": False}

    def test_it_learns_and_is_saved(self, bert: str, dataset: Dataset, tmp_path: Path) -> None:
        gold, options = np.array(dataset["score"]), {**self.OPTIONS, "learning_rate": 3e-3, "max_length": 48}
        untrained = train_teacher(bert, dataset, tmp_path / "before", epochs=1, **{**options, "learning_rate": 0})
        before = np.square(scores_of(untrained, dataset, nn.Sigmoid()) - gold).mean()
        teacher = train_teacher(bert, dataset, tmp_path / "teacher", epochs=80, **options)
        scores = scores_of(teacher, dataset, nn.Sigmoid())
        assert np.square(scores - gold).mean() < 0.5 * before

        loaded = load_teacher(tmp_path / "teacher")
        assert loaded.num_labels == 1
        assert loaded.max_seq_length == teacher.max_seq_length == 48
        np.testing.assert_allclose(scores_of(loaded, dataset, nn.Sigmoid()), scores, rtol=0, atol=1e-6)
        # A reloaded teacher is the same teacher: its scores come from the cache.
        cached = score_pairs(dataset, teacher, cache_folder=tmp_path / "cache")
        assert score_pairs(dataset, loaded, cache_folder=tmp_path / "cache") == cached
        assert len(list((tmp_path / "cache").iterdir())) == 1

    def test_the_seed_decides(self, bert: str, dataset: Dataset, tmp_path: Path) -> None:
        wide = dataset.add_column("genre", ["news"] * 10)
        first, second, other = (
            scores_of(
                train_teacher(bert, data, tmp_path / str(index), epochs=1, seed=seed, **self.OPTIONS),
                dataset,
                nn.Sigmoid(),
            )
            for index, (data, seed) in enumerate(((dataset, 1), (wide, 1), (dataset, 2)))
        )
        np.testing.assert_allclose(first, second, rtol=0, atol=1e-6)
        assert abs(first - other).max() > 1e-3

    @pytest.mark.parametrize(("factor", "shift", "span"), [(5, 0, "0..5"), (1, -0.5, "-0.5..0.5"), (1, 2, "2..3")])
    def test_scores_out_of_range_are_refused(
        self, bert: str, dataset: Dataset, tmp_path: Path, factor: float, shift: float, span: str
    ) -> None:
        gold = [factor * score + shift for score in dataset["score"]]
        scaled = dataset.remove_columns("score").add_column("score", gold)
        with refused(f"gold scores must lie in 0..1, got {span}: divide STS-B's by 5"):
            train_teacher(bert, scaled, tmp_path / "teacher", **self.OPTIONS)
        assert not (tmp_path / "teacher").exists()

    def test_training_leaves_the_base_alone(self, folder: str, dataset: Dataset, tmp_path: Path) -> None:
        before = copy.deepcopy(CrossEncoder(folder, device="cpu").state_dict())
        train_teacher(folder, dataset, tmp_path, epochs=1, **self.OPTIONS)
        torch.testing.assert_close(CrossEncoder(folder, device="cpu").state_dict(), before, rtol=0, atol=0)
