"""Attention transfer brings a conversion close to its encoder, resumes, and says what it did."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, WORDS, refused, slow
from sentence_transformers import SentenceTransformer
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import TrainerCallback

from st_linear import convert, evaluation, load, transfer
from st_linear.conversion import AttentionCall, split_state_dict
from st_linear.data import token_counts
from st_linear.evaluation import FidelityEvaluator
from st_linear.transfer import TransferSettings, check_fidelity, cut_passages

SETTINGS = TransferSettings(steps=12, lengths=(48, 96), tokens_per_step=384, evaluations=3, half=False)
CONVERSION: dict[str, Any] = {
    "feature_map": "learned_favor",
    "feature_map_kwargs": {"num_features": 16},
    "window": 8,
    "max_seq_length": 200,
}


@pytest.fixture(scope="module")
def book() -> dict[str, str]:
    draw = random.Random(0)
    return {"book.txt": "\n".join(" ".join(draw.choices(WORDS, k=20)) for _ in range(200))}


@pytest.fixture
def model(bert: str) -> SentenceTransformer:
    return convert(bert, **CONVERSION)


def run(model: SentenceTransformer, book: dict[str, str], folder: Path, **changes: Any) -> dict[str, Any]:
    settings = replace(SETTINGS, **changes)
    return transfer.transfer(model, book, folder, settings=settings, show_progress_bar=False)


class TestTransfer:
    def test_vectors_come_closer_and_the_encoder_stays(self, bert: str, book: dict[str, str], tmp_path: Path) -> None:
        # With 16 features it is luck how good the start is that a seed draws, as much as twelve steps teach.
        conversion = {**CONVERSION, "feature_map_kwargs": {"num_features": 64}}
        model = convert(bert, **conversion)
        record = run(model, book, tmp_path / "training")
        before, after = record["held_out"]["before"], record["held_out"]["after"]
        assert set(before) == set(after) == {"48", "96"}
        for length in before:
            assert 1 - after[length]["cosine"] < 0.6 * (1 - before[length]["cosine"])
        plain, _ = split_state_dict(model[0].model)
        assert_close(plain, split_state_dict(convert(bert, **conversion)[0].model)[0], rtol=0, atol=0)
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert record["steps"] == 12
        assert record["texts"] == {"book.txt": len(book["book.txt"])}

    def test_the_record_goes_with_the_model(
        self, model: SentenceTransformer, book: dict[str, str], tmp_path: Path
    ) -> None:
        record = run(model, book, tmp_path / "training", steps=2, evaluations=1)
        model.save_pretrained(str(tmp_path / "saved"))
        assert load(str(tmp_path / "saved"))[0].training_record == record

    @pytest.mark.parametrize("target", ["hidden", "attention"])
    def test_other_maps_and_targets(self, bert: str, book: dict[str, str], tmp_path: Path, target: Any) -> None:
        model = convert(bert, feature_map="hedgehog", window=8, max_seq_length=200)
        record = run(model, book, tmp_path / "training", target=target)
        assert record["held_out"]["after"]["96"]["cosine"] > record["held_out"]["before"]["96"]["cosine"]

    def test_an_interrupted_one_goes_on(
        self, bert: str, book: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = convert(bert, **CONVERSION)
        run(whole, book, tmp_path / "whole")

        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
                if state.global_step == 6:
                    raise KeyboardInterrupt

        seen: list[int] = []

        class Watch(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
                seen.append(state.global_step)

        trainer = transfer.SentenceTransformerTrainer
        for callback in (Stop, Watch):
            monkeypatch.setattr(
                transfer,
                "SentenceTransformerTrainer",
                lambda *args, callbacks, callback=callback, **options: trainer(
                    *args, callbacks=[*callbacks, callback()], **options
                ),
            )
            resumed = convert(bert, **CONVERSION)
            try:
                run(resumed, book, tmp_path / "broken")
            except KeyboardInterrupt:
                assert callback is Stop
        assert seen == list(range(5, 13))
        assert_close(split_state_dict(resumed[0].model), split_state_dict(whole[0].model), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("other", ["settings", "encoder"])
    def test_another_training_starts_anew(
        self, bert: str, save_encoder: Callable[..., str], book: dict[str, str], tmp_path: Path, other: str
    ) -> None:
        run(convert(bert, **CONVERSION), book, tmp_path / "training", steps=2, evaluations=1)
        config = FAMILIES["bert"]()
        config.initializer_range = 0.2
        base = save_encoder(config) if other == "encoder" else bert
        model = convert(base, **CONVERSION)
        changes = {"learning_rate": 1e-3} if other == "settings" else {}
        record = run(model, book, tmp_path / "training", steps=2, evaluations=1, **changes)
        assert (record["steps"], record["resumed_at"]) == (2, 0)
        plain, _ = split_state_dict(model[0].model)
        assert_close(plain, split_state_dict(convert(base, **CONVERSION)[0].model)[0], rtol=0, atol=0)

    def test_it_takes_nobodys_files(self, model: SentenceTransformer, book: dict[str, str], tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("")
        with refused(f"{tmp_path} holds files, and no checkpoints of an attention transfer"):
            run(model, book, tmp_path)
        assert (tmp_path / "mine").is_file()

    def test_a_checkpoint_that_was_cut_short_is_passed_over(
        self, model: SentenceTransformer, book: dict[str, str], tmp_path: Path
    ) -> None:
        run(model, book, tmp_path / "training", steps=4, evaluations=1)
        (tmp_path / "training" / "checkpoint-9").mkdir()
        assert run(model, book, tmp_path / "training", steps=4, evaluations=1)["resumed_at"] == 4

    def test_half_precision_is_for_the_training_alone(
        self, model: SentenceTransformer, book: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dtypes: dict[str, set[torch.dtype]] = {"softmax": set(), "linear": set()}
        for name, seen in dtypes.items():
            method = getattr(AttentionCall, name)
            monkeypatch.setattr(
                AttentionCall, name, lambda call, seen=seen, method=method: seen.add(call.query.dtype) or method(call)
            )
        run(model, book, tmp_path / "training", steps=2, evaluations=1, half=True)
        assert dtypes == {"softmax": {torch.float32}, "linear": {torch.float32, torch.bfloat16}}
        dtypes["linear"].clear()
        model.encode(["ba be " * 40])
        assert dtypes["linear"] == {torch.float32}

    def test_what_was_frozen_stays_so(self, model: SentenceTransformer, book: dict[str, str], tmp_path: Path) -> None:
        model[0].model.embeddings.requires_grad_(False)
        learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        run(model, book, tmp_path / "training", steps=1, evaluations=1)
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == learns

    def test_without_a_progress_bar_it_says_nothing(
        self, model: SentenceTransformer, book: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run(model, book, tmp_path / "training", steps=1, evaluations=1)
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize(
        ("family", "options"),
        [
            slow("roberta", {}),
            slow("albert", {}),
            ("modernbert", {}),
            slow("nomic-bert", {}),
            ("bert", {"window": 0}),
            slow("bert", {"exact_layers": [1]}),
        ],
    )
    def test_other_encoders_and_settings(
        self,
        encoder_folder: Callable[[str], str],
        book: dict[str, str],
        tmp_path: Path,
        family: str,
        options: dict[str, Any],
    ) -> None:
        model = convert(encoder_folder(family), **{**CONVERSION, **options})
        record = run(model, book, tmp_path / "training", steps=12)
        before, after = (record["held_out"][when]["96"]["cosine"] for when in ("before", "after"))
        assert after > before

    def test_held_out_text_is_not_trained_on(self, model: SentenceTransformer, book: dict[str, str]) -> None:
        training, held_out = transfer._passages(book, model, SETTINGS.lengths)
        for length in SETTINGS.lengths:
            assert max(token_counts(training[length] + held_out[length], model.tokenizer)) == length
            # Of random words, four in a row stand in one place.
            trained = " ".join(text for some in training.values() for text in some)
            assert not any(" ".join(text.split()[4:16]) in trained for text in held_out[length])

    def test_every_length_is_trained_on_as_often(self) -> None:
        groups = transfer._batches({48: ["x"] * 100, 96: ["x"] * 10}, 192)
        assert sum(group.stop <= 100 for group in groups) == sum(group.start >= 100 for group in groups) == 25
        assert {index for group in groups for index in group} == set(range(110))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"lengths": (31, 48)}, "lengths must be at least four windows, 32 tokens, got 31"),
            ({"lengths": (48, 400)}, "lengths must be at most max_seq_length=200, got 400"),
            ({"lengths": ()}, "lengths is empty: name at least one"),
            ({"steps": 0}, "steps must be positive, got 0"),
            ({"target": "weights"}, "unknown target 'weights'; choose one of: attention, hidden"),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, model: SentenceTransformer, book: dict[str, str], tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        with refused(message):
            run(model, book, tmp_path / "training", **changes)

    def test_lengths_at_which_attention_is_exact_are_refused(
        self, bert: str, book: dict[str, str], tmp_path: Path
    ) -> None:
        model = convert(bert, **CONVERSION, exact_up_to=64)
        with refused("lengths must be longer than exact_up_to=64 by a window, got 48: attention is exact up to there"):
            run(model, book, tmp_path / "training")

    def test_too_little_text_is_refused(self, model: SentenceTransformer, tmp_path: Path) -> None:
        with refused("the texts come to 4 passages of 96 tokens: at least 8 are needed"):
            run(model, {"a": " ".join(WORDS[:1] * 400)}, tmp_path / "training")


class TestCalibrate:
    @pytest.fixture
    def passes(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Tokens of each pass through an encoder's attention: of the queries of its first layer that is seen."""
        seen: list[int] = []
        plain = AttentionCall.softmax
        layers: list[Any] = []

        def count(call: AttentionCall) -> Any:
            layers.append(call.module)
            if call.module is layers[0]:
                seen.append(call.query.shape[2])
            return plain(call)

        monkeypatch.setattr(AttentionCall, "softmax", count)
        return seen

    @torch.no_grad()
    def test_vectors_of_texts_of_any_length_come_closer(self, family: str) -> None:
        draw = random.Random(0)
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 40))) for _ in range(64)]
        exact = torch.as_tensor(convert(family, feature_map="softmax", max_seq_length=200).encode(texts))
        linear = convert(family, feature_map="learned_favor", window=0, max_seq_length=200)
        before = F.cosine_similarity(exact, torch.as_tensor(linear.encode(texts))).mean()
        linear.train()
        transfer.calibrate(linear[0], texts)  # type: ignore[arg-type]
        assert linear.training
        after = F.cosine_similarity(exact, torch.as_tensor(linear.eval().encode(texts))).mean()
        assert 1 - after < 1 - before

    @pytest.mark.parametrize("window", [0, 8])
    def test_pairs_are_of_far_tokens(self, window: int) -> None:
        # A sum tells both tokens: queries are thousands of their index, keys are hundredths.
        length = 40
        index = torch.arange(length, dtype=torch.float32).reshape(1, -1, 1)
        generator = torch.Generator().manual_seed(0)
        sums = transfer._attended_sums(1000 * index, index / 100, 500, window, generator)
        assert sums.shape == (1, 500, 1)
        rows = (sums[0, :, 0] / 1000).round()
        keys = ((sums[0, :, 0].double() - 1000 * rows) * 100).round()
        assert set(rows.int().tolist()) == set(range(length))
        far = (rows // window - keys // window).abs() > 1 if window else torch.ones(500, dtype=torch.bool)
        assert far.all()

    @torch.no_grad()
    def test_texts_without_far_tokens_are_passed_over(self, bert: str) -> None:
        made = []
        for short in ([], ["bus"] * 10):
            linear = convert(bert, **CONVERSION, seed=0)
            transfer.calibrate(linear[0], [*short, " ".join(WORDS * 10)], seed=1)  # type: ignore[arg-type]
            made.append(split_state_dict(linear[0].model)[1])
        assert_close(*made, rtol=0, atol=0)

    def test_only_such_texts_are_refused(self, model: SentenceTransformer) -> None:
        with refused(
            "feature_map='learned_favor' is calibrated on texts of more than 24 tokens, and the longest of 2 has 4"
        ):
            transfer.calibrate(model[0], ["bus", "the bus"])  # type: ignore[arg-type]

    def test_as_many_are_read_as_tell_enough(self, model: SentenceTransformer, passes: list[int]) -> None:
        # 200 tokens each: 41 come to 8,200, which is closer to 8,192 than 40 are.
        transfer.calibrate(model[0], [" ".join(WORDS * 20)] * 100)  # type: ignore[arg-type]
        assert passes == [200] * 41

    def test_other_maps_are_left_alone(self, bert: str, passes: list[int]) -> None:
        transfer.calibrate(convert(bert, feature_map="hedgehog", window=0)[0], ["the bus"])  # type: ignore[arg-type]
        assert passes == []


class TestFidelity:
    def test_figures(self, bert: str, text: Callable[..., str]) -> None:
        texts = [text(60, seed) for seed in range(12)]
        model, reference = convert(bert, window=8, max_seq_length=64), SentenceTransformer(bert)
        evaluator = FidelityEvaluator({60: texts, 30: texts}, reference, neighbours=3, name="far")
        metrics = evaluator(model)
        assert evaluator.primary_metric == "far_cosine"
        assert metrics["far_cosine"] == pytest.approx((metrics["far_cosine_60"] + metrics["far_cosine_30"]) / 2)
        own, other = (x.encode(texts, convert_to_tensor=True) for x in (model, reference))
        cosines = F.cosine_similarity(own, other)
        figures = evaluator.results[60]
        assert figures["n"] == 12
        assert figures["cosine"] == pytest.approx(cosines.mean().item(), abs=1e-5)
        assert figures["cosine_p5"] == pytest.approx(cosines.quantile(0.05).item(), abs=1e-5)
        tokens = [x.encode(texts, output_value="token_embeddings") for x in (model, reference)]
        by_token = torch.cat([F.cosine_similarity(a, b) for a, b in zip(*tokens)])
        assert figures["token_cosine"] == pytest.approx(by_token.mean().item(), abs=1e-5)
        shared = []
        for index in range(12):
            nearest = []
            for vectors in (own, other):
                similarity = F.cosine_similarity(vectors[index], vectors)
                similarity[index] = -2
                nearest.append(set(similarity.topk(3).indices.tolist()))
            shared.append(len(nearest[0] & nearest[1]) / 3)
        assert figures["neighbours_3"] == pytest.approx(sum(shared) / 12)

    def test_tokens_of_some_texts_are_enough(
        self, bert: str, text: Callable[..., str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        texts = [text(40 + seed, seed) for seed in range(7)]
        model, reference = convert(bert, window=8, max_seq_length=64), SentenceTransformer(bert)
        whole = FidelityEvaluator({50: texts}, reference)
        whole(model)
        monkeypatch.setattr(evaluation, "_TEXTS_FOR_TOKENS", 3)
        some = FidelityEvaluator({50: texts}, reference)
        some(model)
        for key in ("cosine", "cosine_p5"):
            assert some.results[50][key] == pytest.approx(whole.results[50][key], abs=1e-5)
        few = FidelityEvaluator({50: [texts[index] for index in (0, 2, 4)]}, reference)
        few(model)
        assert some.results[50]["token_cosine"] == pytest.approx(few.results[50]["token_cosine"], abs=1e-5)

    def test_a_model_is_like_itself(self, model: SentenceTransformer, text: Callable[..., str]) -> None:
        evaluator = FidelityEvaluator({90: [text(90, seed) for seed in range(5)]}, model)
        assert evaluator(model)["cosine"] == pytest.approx(1, abs=1e-5)
        assert "neighbours_10_90" not in evaluator(model)
        assert model.max_seq_length == 200

    def test_nothing_to_measure_is_refused(self, model: SentenceTransformer, text: Callable[..., str]) -> None:
        for texts in ({}, {64: []}):
            with refused("texts holds none"):
                FidelityEvaluator(texts, model)

    def test_other_texts(self, model: SentenceTransformer, book: dict[str, str]) -> None:
        record = check_fidelity(model, cut_passages(book, model, (40, 80), most=6))
        assert set(record["figures"]) == {"40", "80"}
        assert record["figures"]["40"]["n"] == 6
        assert 0 < record["figures"]["80"]["cosine"] < 1
        with refused("the texts come to less than one passage of 190 tokens"):
            cut_passages({"a": "ba be"}, model, (190,), most=6)
        with refused("lengths must be at most max_seq_length=200, got 201"):
            cut_passages(book, model, (201,), most=6)

    def test_a_model_that_reads_less_is_refused(self, bert: str, model: SentenceTransformer) -> None:
        with refused("texts of 90 tokens are longer than the model reads, max_seq_length=64"):
            FidelityEvaluator({90: ["ba"]}, SentenceTransformer(bert))
