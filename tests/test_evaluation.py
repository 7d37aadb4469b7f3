from __future__ import annotations

import csv
import logging
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from sentence_transformers.util import cos_sim, pairwise_cos_sim
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel, BertTokenizerFast

from st_linear import convert
from st_linear.data import load_pairs, repeat_to_length, token_counts
from st_linear.evaluation import Correlation, LengthSimilarityEvaluator, Mean, correlation, report_correlation
from st_linear.protocols import lengthen

WORDS = ["cat", "dog", "bird", "sits", "runs", "sings", "red", "blue", "old", "new", "a", "the"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (path / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(path / "vocab.txt"), model_max_length=64).save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        initializer_range=1.0,
    )
    BertModel(config).save_pretrained(path)
    return path


def build(folder: Path) -> SentenceTransformer:
    encoder = Transformer(str(folder))
    pooling = Pooling(encoder.get_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[encoder, pooling], device="cpu")


@pytest.fixture
def model(folder: Path) -> SentenceTransformer:
    return build(folder)


@pytest.fixture(scope="module")
def pairs() -> tuple[list[str], list[str], list[float]]:
    generator = np.random.default_rng(0)
    one, two = ([" ".join(generator.choice(WORDS, generator.integers(2, 7))) for _ in range(12)] for _ in range(2))
    return one, two, generator.random(12).tolist()


def test_correlation_of_hand_made_numbers() -> None:
    found = correlation([1, 2, 3, 4, 5], [1, 3, 2, 5, 4])
    assert found.n == 5
    assert found.pearson == pytest.approx(0.8)
    assert found.spearman == pytest.approx(0.8)
    z = math.atanh(0.8)
    assert found.pearson_low == pytest.approx(math.tanh(z - 1.959964 / math.sqrt(2)), abs=1e-6)
    assert found.pearson_high == pytest.approx(math.tanh(z + 1.959964 / math.sqrt(2)), abs=1e-6)
    wider = 1.959964 * math.sqrt(1.32 / 2)
    assert found.spearman_low == pytest.approx(math.tanh(z - wider), abs=1e-6)
    assert found.spearman_high == pytest.approx(math.tanh(z + wider), abs=1e-6)


def test_correlation_takes_tensors_and_gives_plain_numbers() -> None:
    found = correlation(torch.tensor([0.1, 0.9, 0.4, 0.3]), np.array([0, 5, 1, 2]))
    assert [type(value) for value in found.as_dict().values()] == [float] * 6 + [int]


@pytest.mark.parametrize("sign", [1, -1])
def test_perfect_ranks_have_a_point_as_interval(sign: int) -> None:
    found = correlation([1, 2, 3, 4], [sign * value for value in (1, 4, 9, 16)])
    assert (found.spearman_low, found.spearman, found.spearman_high) == pytest.approx((sign, sign, sign))
    assert abs(found.pearson) < 1


def test_spearman_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    draws = generator.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], size=(400, 200))
    true_rank = 6 / math.pi * math.asin(0.4)
    found = [correlation(draw[:, 0], draw[:, 1]) for draw in draws]
    assert 0.91 <= np.mean([one.spearman_low <= true_rank <= one.spearman_high for one in found]) <= 0.99
    assert 0.91 <= np.mean([one.pearson_low <= 0.8 <= one.pearson_high for one in found]) <= 0.99


def test_confidence_level_widens_the_intervals() -> None:
    narrow, wide = (correlation([1, 2, 3, 4, 5], [1, 3, 2, 5, 4], confidence_level=level) for level in (0.5, 0.99))
    assert wide.pearson_low < narrow.pearson_low < narrow.pearson_high < wide.pearson_high
    assert wide.spearman_low < narrow.spearman_low < narrow.spearman_high < wide.spearman_high


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([1, 2, 3], [1, 2, 3], "predictions has 3 values; a correlation with an interval needs at least 4"),
        ([1, 2, 3, 4], [1, 2, 3], "labels has 3 values"),
        ([1, 2, 3, 4], [1, 2, 3, 4, 5], "predictions has 4 values, labels 5; they must be as many"),
        ([1, 2, math.nan, 4], [1, 2, 3, 4], "1 of 4 predictions are not finite"),
        ([1, 2, 3, 4], [math.inf, 2, 3, 4], r"labels\[0\] is inf; every value must be finite"),
        ([7, 7, 7, 7], [1, 2, 3, 4], "all 4 predictions are 7"),
        ([1, 1 + 1e-12, 1 - 1e-12, 1], [1, 2, 3, 4], "all 4 predictions are 1"),
        ([0, 0, 0, 0], [1, 2, 3, 4], "all 4 predictions are 0"),
        ([1, 2, 3, 4], [0.5] * 4, "labels are all 0.5; a correlation with a constant is not defined"),
        ([[1, 2, 3, 4]], [1, 2, 3, 4], r"predictions has shape \(1, 4\); one number per pair is needed"),
    ],
)
def test_correlation_refuses(predictions: list, labels: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        correlation(predictions, labels)


def test_predictions_that_differ_by_more_than_rounding_correlate() -> None:
    assert correlation([1, 1 + 2e-7, 1 + 3e-7, 1 + 1e-7], [1, 3, 4, 2]).spearman == pytest.approx(1)


@pytest.mark.parametrize("level", [0, 1, 95])
def test_confidence_level_is_a_probability(level: float) -> None:
    with pytest.raises(ValueError, match=f"confidence_level={level} must be between 0 and 1"):
        correlation([1, 2, 3, 4], [1, 3, 2, 4], confidence_level=level)


def test_report_correlation() -> None:
    found = Correlation(0.82741, 0.80996, 0.84336, 0.8, 0.7, 0.9, 1379)
    assert report_correlation("pearson", found) == "82.74 [81.0, 84.3]"
    assert report_correlation("spearman", found) == "80.00 [70.0, 90.0]"
    with pytest.raises(ValueError, match="metric='kendall' is none of pearson, spearman"):
        report_correlation("kendall", found)


def test_natural_length_equals_the_parent(model: SentenceTransformer, pairs: tuple) -> None:
    ours = LengthSimilarityEvaluator(*pairs, name="sts")
    parent = EmbeddingSimilarityEvaluator(*pairs, name="sts", similarity_fn_names=["cosine"])
    assert ours(model) == pytest.approx(parent(model), abs=1e-6)
    assert ours.primary_metric == parent.primary_metric == "sts_spearman_cosine"
    counts = token_counts([*pairs[0], *pairs[1]], model.tokenizer)
    assert ours.results["natural"][None]["mean_tokens"] == pytest.approx(np.mean(counts))
    assert ours.results["natural"][None]["truncated"] == 0
    assert ours.results["natural"][None]["n"] == 12


def test_lengths_are_reached_and_truncation_is_told(model: SentenceTransformer, pairs: tuple) -> None:
    evaluator = LengthSimilarityEvaluator(*pairs, lengths=(None, 32, 128), primary_length=32, main_metric="pearson")
    metrics = evaluator(model)
    assert list(metrics) == [
        f"{length}{metric}_cosine"
        for length in ("", "repeat_32_", "repeat_128_")
        for metric in ("pearson", "spearman")
    ]
    assert evaluator.primary_metric == "repeat_32_pearson_cosine"
    assert 25 < evaluator.results["repeat"][32]["mean_tokens"] <= 32
    assert evaluator.results["repeat"][32]["truncated"] == 0
    assert evaluator.results["repeat"][128]["truncated"] == 1
    assert evaluator.results["repeat"][128]["mean_tokens"] == 64
    for figures in (*evaluator.results["natural"].values(), *evaluator.results["repeat"].values()):
        assert figures["seconds"] > 0
        tokens = figures["mean_tokens"] * 24
        assert figures["tokens_per_second"] * figures["seconds"] == pytest.approx(tokens)
    left, right = (
        model.encode(repeat_to_length(side, model.tokenizer, 32), convert_to_tensor=True) for side in pairs[:2]
    )
    expected = correlation(pairwise_cos_sim(left, right).numpy(), pairs[2])
    assert metrics["repeat_32_pearson_cosine"] == pytest.approx(expected.pearson, abs=1e-5)


def test_names_prefix_metrics_and_files(model: SentenceTransformer, pairs: tuple, tmp_path: Path) -> None:
    evaluator = LengthSimilarityEvaluator(*pairs, lengths=(32, None), name="sts")
    assert evaluator.primary_metric == "sts_repeat_32_spearman_cosine"
    first = evaluator(model, output_path=str(tmp_path / "eval"), epoch=1, steps=10)
    assert evaluator.primary_metric in first
    evaluator(model, output_path=str(tmp_path / "eval"))
    with open(tmp_path / "eval" / "length_similarity_evaluation_sts_results.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["epoch"], row["steps"], row["protocol"], row["length"]) for row in rows] == [
        ("1", "10", "natural", "natural"),
        ("1", "10", "repeat", "32"),
        ("-1", "-1", "natural", "natural"),
        ("-1", "-1", "repeat", "32"),
    ]
    assert float(rows[1]["cosine_pearson"]) == first["sts_repeat_32_pearson_cosine"]
    assert float(rows[0]["cosine_spearman"]) == first["sts_spearman_cosine"]
    assert float(rows[0]["truncated"]) == 0
    assert model.model_card_data.eval_results_dict[evaluator].keys() == first.keys()
    assert evaluator.get_config_dict() == {"lengths": [32, None], "protocols": ["repeat"], "seed": 0}


def test_no_csv_where_none_is_wanted(model: SentenceTransformer, pairs: tuple, tmp_path: Path) -> None:
    LengthSimilarityEvaluator(*pairs, write_csv=False)(model, output_path=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_batches_shrink_with_length(model: SentenceTransformer, pairs: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model.max_seq_length = 4096
    asked: list[int] = []

    def encode(texts: list[str], batch_size: int, **_: object) -> np.ndarray:
        asked.append(batch_size)
        return np.random.default_rng(0).random((len(texts), 4), dtype=np.float32)

    monkeypatch.setattr(model, "encode", encode)
    LengthSimilarityEvaluator(*pairs, lengths=(None, 256, 1024, 8192), batch_size=8)(model)
    assert asked[0] == asked[1] == 8
    assert asked[2:] == [2, 1]


def test_a_default_prompt_counts_as_part_of_the_length(model: SentenceTransformer, pairs: tuple) -> None:
    model.prompts = {"query": "the old red bird sings "}
    model.default_prompt_name = "query"
    evaluator = LengthSimilarityEvaluator(*pairs, lengths=(64,))
    evaluator(model)
    assert evaluator.results["repeat"][64]["truncated"] == 0
    assert evaluator.results["repeat"][64]["mean_tokens"] > 56


def test_static_embeddings_can_be_evaluated(folder: Path, pairs: tuple) -> None:
    torch.manual_seed(0)
    static = StaticEmbedding(Tokenizer.from_file(str(folder / "tokenizer.json")), embedding_dim=8)
    evaluator = LengthSimilarityEvaluator(*pairs, lengths=(None, 128))
    evaluator(SentenceTransformer(modules=[static], device="cpu"))
    assert evaluator.results["repeat"][128]["truncated"] == 0
    assert 120 < evaluator.results["repeat"][128]["mean_tokens"] <= 128


def test_texts_are_made_once_per_tokenizer(
    folder: Path, model: SentenceTransformer, pairs: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = LengthSimilarityEvaluator(*pairs, lengths=(32,))
    first = evaluator(model)
    monkeypatch.setattr("st_linear.evaluation.lengthen", None)
    assert evaluator(model) == first
    with pytest.raises(TypeError):
        evaluator(build(folder))


def test_progress_bars_and_logging(
    model: SentenceTransformer, pairs: tuple, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="st_linear.evaluation"):
        LengthSimilarityEvaluator(*pairs, lengths=(None, 32), name="sts")(model)
    assert "Lengths" not in capsys.readouterr().err
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "sts, natural length",
        "sts, repeat at 32 tokens",
    ]
    LengthSimilarityEvaluator(*pairs, lengths=(None, 32), show_progress_bar=True)(model)
    assert "Lengths: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scores": [1.0]}, "sentences1, sentences2 and scores have 12, 12 and 1 entries; they must be as many"),
        ({"lengths": ()}, r"lengths=\(\) must hold at least one length, and each only once"),
        ({"lengths": (64, 64)}, r"lengths=\(64, 64\) must hold at least one length, and each only once"),
        ({"lengths": (0,)}, r"lengths=\(0,\): 0 is neither None \(natural\) nor a positive integer"),
        ({"lengths": (None, 2.5)}, "2.5 is neither None"),
        ({"lengths": (64,), "primary_length": 32}, r"primary_length=32 is none of lengths=\(64,\)"),
        (
            {"protocols": ("repeat",), "primary_protocol": "document"},
            "primary_protocol='document' is none of protocols=",
        ),
        ({"protocols": ()}, r"protocols=\(\) must hold at least one name, and each only once"),
        ({"protocols": ("repeat", "repeat")}, "must hold at least one name, and each only once"),
        ({"protocols": "repeat"}, r"protocols='repeat' must be a sequence of names: \('repeat',\)"),
        ({"protocols": ("x",)}, "unknown protocol 'x'; choose one of: repeat, "),
        ({"scores": [0.5] * 12}, "scores are all 0.5; a correlation with a constant is not defined"),
        ({"scores": [0.5, math.nan] * 6}, r"scores\[1\] is nan; every value must be finite"),
        ({"main_metric": "kendall"}, "main_metric='kendall' is none of pearson, spearman"),
        ({"batch_size": 0}, "batch_size=0 must be a positive integer"),
    ],
)
def test_settings_are_checked(pairs: tuple, settings: dict, message: str) -> None:
    columns = dict(zip(("sentences1", "sentences2", "scores"), pairs))
    with pytest.raises(ValueError, match=message):
        LengthSimilarityEvaluator(**{**columns, **settings})


def test_a_text_longer_than_a_length_is_refused(model: SentenceTransformer, pairs: tuple) -> None:
    with pytest.raises(ValueError, match="tokens, more than length=4"):
        LengthSimilarityEvaluator(*pairs, lengths=(4,))(model)


def trainer_of(
    model: SentenceTransformer,
    columns: dict[str, Any],
    evaluator: LengthSimilarityEvaluator,
    output: Path,
    metric: str,
    every: int,
    **arguments: Any,
) -> SentenceTransformerTrainer:
    """One that evaluates and saves every so many steps, and loads the best checkpoint by a metric."""
    return SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(output),
            eval_strategy="steps",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            load_best_model_at_end=True,
            metric_for_best_model=metric,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=datasets.Dataset.from_dict(columns),
        loss=CosineSimilarityLoss(model),
        evaluator=evaluator,
    )


def test_the_trainer_selects_by_it(model: SentenceTransformer, pairs: tuple, tmp_path: Path) -> None:
    columns = dict(zip(("sentence1", "sentence2", "score"), pairs))
    evaluator = LengthSimilarityEvaluator(*pairs, lengths=(None, 32), main_metric="pearson", name="sts")
    metric = "eval_sts_pearson_cosine"
    trainer = trainer_of(model, columns, evaluator, tmp_path, metric, 1, max_steps=2, per_device_train_batch_size=4)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_sts_repeat_32_spearman_cosine" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    assert trainer.state.best_metric == max(entry[metric] for entry in logged)
    assert len((tmp_path / "eval" / "length_similarity_evaluation_sts_results.csv").read_text().splitlines()) == 5


def test_the_trainer_keeps_the_best_checkpoint_by_pearson_at_a_length(
    model: SentenceTransformer, pairs: tuple, tmp_path: Path
) -> None:
    evaluator = LengthSimilarityEvaluator(
        *pairs, lengths=(None, 32, 48), protocols=("repeat", "filler-same-end"), main_metric="pearson", name="sts"
    )
    columns = dict(zip(("sentence1", "sentence2", "score"), pairs))
    # Learning the opposite of the labels, the first checkpoint is the best.
    wrong = {**columns, "score": [1 - score for score in columns["score"]]}
    key = "eval_sts_filler-same-end_48_pearson_cosine"
    trainer = trainer_of(
        model, wrong, evaluator, tmp_path, key, 2, max_steps=6, per_device_train_batch_size=12, learning_rate=3e-2
    )
    trainer.train()
    logged = {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}
    best = max(logged, key=logged.__getitem__)
    assert len(logged) == 3
    assert logged[best] > logged[6]
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert evaluator(trainer.model)[key.removeprefix("eval_")] == pytest.approx(logged[best], abs=1e-5)


def test_a_grid_holds_each_protocol_at_each_length(model: SentenceTransformer, pairs: tuple) -> None:
    protocols = ("repeat", "filler-same-end")
    grid = LengthSimilarityEvaluator(*pairs, lengths=(32, None, 48), protocols=protocols, primary_length=48)
    metrics = grid(model)
    assert {name: list(by_length) for name, by_length in grid.results.items()} == {
        "natural": [None],
        **{protocol: [32, 48] for protocol in protocols},
    }
    assert grid.primary_metric == "repeat_48_spearman_cosine"
    assert len(metrics) == 10
    for protocol in protocols:
        alone = LengthSimilarityEvaluator(*pairs, lengths=(48,), protocols=(protocol,))(model)
        assert alone == pytest.approx({key: metrics[key] for key in alone}, abs=1e-6)


def test_undefined_predictions_are_told_of_and_give_no_number(
    model: SentenceTransformer, pairs: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = LengthSimilarityEvaluator(*pairs, name="sts")
    for value, reason in ((1.0, "all 12 predictions are 1"), (math.nan, "12 of 12 predictions are not finite")):
        monkeypatch.setattr(
            model, "encode", lambda texts, value=value, **_: np.full((len(texts), 4), value, "float32")
        )
        metrics = evaluator(model, output_path=str(tmp_path))
        assert all(math.isnan(metric) for metric in metrics.values())
        figures = evaluator.results["natural"][None]
        assert figures["undefined"] == reason
        assert {figures[field] for field in ("pearson", "pearson_low", "spearman", "spearman_high")} == {None}
        assert figures["n"] == 12
    assert figures["mean_pairwise_cosine"] is None
    rows = (tmp_path / "length_similarity_evaluation_sts_results.csv").read_text().splitlines()[1:]
    assert all(row.split(",")[4:6] == ["", ""] for row in rows)


def test_a_sentence_that_is_cut_off_leaves_a_constant(minilm: str) -> None:
    model = convert(minilm, feature_map="softmax", max_seq_length=64)
    some = load_pairs("sample", "dev").select(range(8))
    columns = (some["sentence1"], some["sentence2"], some["score"])
    evaluator = LengthSimilarityEvaluator(*columns, lengths=(128,), protocols=("filler-same-end",), write_csv=False)
    evaluator(model)
    assert evaluator.results["filler-same-end"][128]["undefined"] == "all 8 predictions are 1"
    evaluator(convert(minilm, feature_map="softmax", max_seq_length=128))
    assert evaluator.results["filler-same-end"][128]["undefined"] is None


def test_a_mean_over_seeds_has_students_interval() -> None:
    mean = Mean.of([1.0, 2.0, 3.0])
    # t(2) at 97.5 % is 4.3027, and the standard error 1/√3.
    assert (mean.mean, mean.n) == (2.0, 3)
    assert [mean.low, mean.high] == pytest.approx([2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5], abs=1e-4)
    with pytest.raises(ValueError, match="values is empty"):
        Mean.of([])


def test_the_protocol_says_which_texts_and_labels(minilm: str) -> None:
    model = convert(minilm, feature_map="softmax")
    pairs = load_pairs("sample", "dev").select(range(12))
    columns = (pairs["sentence1"], pairs["sentence2"], pairs["score"])
    evaluator = LengthSimilarityEvaluator(
        *columns, lengths=(None, 96), protocols=("document",), seed=3, write_csv=False
    )
    evaluator(model)
    made = lengthen(pairs, model.tokenizer, 96, "document", seed=3)
    embeddings = [model.encode(made[column]) for column in ("sentence1", "sentence2")]
    expected = correlation(pairwise_cos_sim(*embeddings).numpy(), made["score"])
    assert evaluator.results["document"][96]["pearson"] == pytest.approx(expected.pearson, abs=1e-5)
    similarity = cos_sim(np.concatenate(embeddings), np.concatenate(embeddings)).numpy()
    others = similarity[~np.eye(24, dtype=bool)]
    assert evaluator.results["document"][96]["mean_pairwise_cosine"] == pytest.approx(others.mean(), abs=1e-5)
    assert evaluator.get_config_dict() == {"lengths": [None, 96], "protocols": ["document"], "seed": 3}
