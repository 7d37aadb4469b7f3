from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refused
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from torch.testing import assert_close

import st_linear
from st_linear import DistillationLoss, LinearTransformer, PairScoreEvaluator, PairScorer, convert
from st_linear.pair_head import DSEHead, find_dse_head


@pytest.fixture(scope="module")
def pairs(text: Callable[..., str]) -> list[tuple[str, str]]:
    """Pairs of mixed lengths in which texts come back, on either side."""
    texts = [text(length, seed=1) for length in (3, 9, 20, 70)]
    return [(first, second) for first in texts for second in texts]


@pytest.fixture(scope="module")
def model(bert: str) -> SentenceTransformer:
    """A converted model with a DSE head, to be read and not changed."""
    return with_head(bert)


@pytest.fixture(scope="module")
def saved(model: SentenceTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that model, to be read and not written to."""
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def gold(pairs: list[tuple[str, str]]) -> list[float]:
    return [(7 * index % 16) / 15 for index in range(len(pairs))]


def with_head(bert: str, **options: Any) -> SentenceTransformer:
    model = convert(bert, window=8, max_seq_length=128, feature_map_kwargs={"num_features": 16})
    torch.manual_seed(0)
    DistillationLoss(model, alpha=0, head="dse", **options)
    return model


def plain_score(head: DSEHead, u: Tensor, v: Tensor) -> Tensor:
    """The paper's formula for one pair, from the head's weights."""
    first, _, second = head.mlp
    features = torch.cat([u, v, u * v, torch.where(u > v, u - v, v - u)])
    hidden = (first.weight @ features + first.bias).clamp(min=0)
    return 1 / (1 + torch.exp(-(second.weight[0] @ hidden + second.bias[0])))


class TestHead:
    def test_it_is_the_formula(self) -> None:
        torch.manual_seed(0)
        head = DSEHead(5, 7)
        u, v = torch.randn(2, 6, 5)
        expected = torch.stack([plain_score(head, left, right) for left, right in zip(u, v)])
        assert_close(head.logits(u, v).sigmoid(), expected)
        assert head.mlp[0].weight.shape == (7, 20)

    def test_the_hidden_layer_is_as_wide_as_the_embedding(self) -> None:
        assert DSEHead(5).get_config_dict() == {"embedding_dimension": 5, "hidden_dimension": 5}

    def test_it_is_appended_once(self, bert: str) -> None:
        model = with_head(bert)
        assert [type(module) for module in model] == [LinearTransformer, Pooling, DSEHead]
        head = model[-1]
        DistillationLoss(model, alpha=0, head="dse")
        assert [type(module) for module in model] == [LinearTransformer, Pooling, DSEHead]
        assert find_dse_head(model) is head

    def test_a_cosine_loss_appends_none(self, bert: str) -> None:
        model = convert(bert, window=8)
        DistillationLoss(model)
        assert find_dse_head(model) is None

    def test_it_leaves_the_embeddings_alone(
        self, bert: str, model: SentenceTransformer, pairs: list[tuple[str, str]]
    ) -> None:
        plain = convert(bert, window=8, max_seq_length=128, feature_map_kwargs={"num_features": 16})
        texts = [text for text, _ in pairs]
        assert_close(model.encode(texts, convert_to_tensor=True), plain.encode(texts, convert_to_tensor=True))
        assert model.get_embedding_dimension() == plain.get_embedding_dimension()

    def test_it_takes_the_dtype_of_the_model(self, bert: str) -> None:
        model = convert(bert, window=8).to(torch.float64)
        DistillationLoss(model, alpha=0, head="dse")
        assert {parameter.dtype for parameter in model[-1].parameters()} == {torch.float64}


class TestSaving:
    def test_class_path(self, saved: Path) -> None:
        modules = json.loads((saved / "modules.json").read_text())
        assert modules[-1] == {
            "idx": 2,
            "name": "2",
            "path": "2_DSEHead",
            "type": "st_linear.pair_head.DSEHead",
        }

    def test_the_folder_holds_settings_and_safetensors(self, saved: Path, model: SentenceTransformer) -> None:
        assert sorted(path.name for path in (saved / "2_DSEHead").iterdir()) == ["config.json", "model.safetensors"]
        settings = json.loads((saved / "2_DSEHead" / "config.json").read_text())
        assert settings == {"embedding_dimension": 32, "hidden_dimension": 32}
        assert_close(load_file(saved / "2_DSEHead" / "model.safetensors"), dict(model[-1].state_dict()))

    @pytest.mark.parametrize(
        "load",
        [st_linear.load, lambda folder: SentenceTransformer(folder, trust_remote_code=True)],
        ids=["st_linear.load", "SentenceTransformer"],
    )
    def test_a_loaded_model_gives_the_same_scores(
        self, load: Callable[[str], Any], saved: Path, model: SentenceTransformer, pairs: list[tuple[str, str]]
    ) -> None:
        loaded = load(str(saved))
        assert [type(module) for module in loaded] == [LinearTransformer, Pooling, DSEHead]
        scores = PairScorer(loaded).predict(pairs)
        assert len(set(scores.tolist())) > len(pairs) / 2
        np.testing.assert_allclose(scores, PairScorer(model).predict(pairs), rtol=0, atol=1e-6)

    def test_a_hidden_layer_of_another_size_is_kept(self, tmp_path: Path, bert: str) -> None:
        model = convert(bert, window=8)
        model.append(DSEHead(32, 5))
        DistillationLoss(model, alpha=0, head="dse")
        model.save_pretrained(str(tmp_path))
        assert st_linear.load(str(tmp_path))[-1].mlp[0].weight.shape == (5, 128)


class TestPairScorer:
    def test_each_pair_is_scored_by_the_formula(
        self, model: SentenceTransformer, pairs: list[tuple[str, str]]
    ) -> None:
        scores = PairScorer(model).predict(pairs)
        assert scores.shape == (len(pairs),)
        assert scores.dtype == np.float32
        for (left, right), score in zip(pairs, scores):
            u, v = (model.encode(text, convert_to_tensor=True) for text in (left, right))
            assert_close(torch.tensor(score), plain_score(model[-1], u, v).detach())

    def test_each_text_is_encoded_once(
        self, model: SentenceTransformer, pairs: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[str] = []
        encode = model.encode

        def count(texts: list[str], **options: Any) -> Any:
            seen.extend(texts)
            return encode(texts, **options)

        monkeypatch.setattr(model, "encode", count)
        PairScorer(model).predict(pairs)
        assert len(pairs) == 16
        assert sorted(seen) == sorted({text for pair in pairs for text in pair})

    def test_batches_change_nothing(self, model: SentenceTransformer, pairs: list[tuple[str, str]]) -> None:
        # Five thousand pairs go through the head in two parts.
        many = (pairs * 313)[:5000]
        few, scores = PairScorer(model).predict(pairs, batch_size=2), PairScorer(model).predict(many)
        assert len(scores) == 5000
        np.testing.assert_allclose(scores, np.tile(few, 313)[:5000], rtol=0, atol=1e-6)

    def test_order_of_a_pair_matters(self, model: SentenceTransformer, pairs: list[tuple[str, str]]) -> None:
        scores = PairScorer(model).predict(pairs)
        turned = PairScorer(model).predict([(right, left) for left, right in pairs])
        assert abs(scores - turned).max() > 1e-3

    def test_no_pairs_give_no_scores(self, model: SentenceTransformer) -> None:
        assert PairScorer(model).predict([]).shape == (0,)

    def test_one_pair_gives_one_score(self, model: SentenceTransformer, pairs: list[tuple[str, str]]) -> None:
        assert PairScorer(model).predict(pairs[0]) == pytest.approx(PairScorer(model).predict(pairs)[0], abs=1e-6)

    @pytest.mark.parametrize("wrong", [["a", "b", "c"], [("a",)], [("a", "b", "c")]])
    def test_what_is_no_pair_is_refused(self, model: SentenceTransformer, wrong: Any) -> None:
        with pytest.raises(ValueError, match="must hold pairs of texts"):
            PairScorer(model).predict(wrong)

    def test_tensors_on_demand(self, model: SentenceTransformer, pairs: list[tuple[str, str]]) -> None:
        scores = PairScorer(model).predict(pairs, convert_to_numpy=False)
        assert isinstance(scores, Tensor)
        np.testing.assert_array_equal(scores.numpy(), PairScorer(model).predict(pairs))

    def test_the_model_stays_trainable(self, bert: str, pairs: list[tuple[str, str]]) -> None:
        model = with_head(bert)
        PairScorer(model).predict(pairs)
        DistillationLoss(model, alpha=0, head="dse")(
            [model.preprocess([text]) for text in pairs[1]], torch.tensor([1.0])
        ).backward()
        assert model[-1].mlp[0].weight.grad.abs().sum() > 0

    def test_the_head_reads_whole_embeddings(self, bert: str, pairs: list[tuple[str, str]]) -> None:
        expected = PairScorer(with_head(bert)).predict(pairs)
        torch.manual_seed(0)
        model = convert(bert, window=8, max_seq_length=128, feature_map_kwargs={"num_features": 16})
        model.truncate_dim = 8
        torch.manual_seed(0)
        loss = DistillationLoss(model, alpha=0, head="dse")
        assert torch.isfinite(loss([model.preprocess([text]) for text in pairs[1]], torch.tensor([1.0])))
        np.testing.assert_allclose(PairScorer(model).predict(pairs), expected, rtol=0, atol=1e-6)
        assert model.encode(pairs[0][0]).shape == (8,)

    def test_prompts_are_put_before_the_texts(self, bert: str, pairs: list[tuple[str, str]]) -> None:
        model = with_head(bert)
        model.prompts = {"query": "ba be "}
        expected = PairScorer(model).predict([("ba be " + left, "ba be " + right) for left, right in pairs])
        np.testing.assert_allclose(PairScorer(model).predict(pairs, prompt_name="query"), expected, rtol=0, atol=1e-6)

    def test_a_model_without_a_head_is_refused(self, bert: str) -> None:
        with refused("the model has no DSE head: train it with DistillationLoss(model, head='dse')"):
            PairScorer(convert(bert, window=8))


class TestPairScoreEvaluator:
    def test_it_correlates_the_scores_with_gold(
        self, model: SentenceTransformer, pairs: list[tuple[str, str]], gold: list[float]
    ) -> None:
        scores = PairScorer(model).predict(pairs)
        metrics = PairScoreEvaluator(pairs, gold)(model)
        assert metrics == {
            "pearson": pytest.approx(pearsonr(gold, scores)[0], abs=1e-6),
            "spearman": pytest.approx(spearmanr(gold, scores)[0], abs=1e-6),
        }
        assert PairScoreEvaluator(pairs, scores)(model)["pearson"] == pytest.approx(1)

    def test_the_name_is_a_prefix_before_the_first_call_and_after_it(
        self, model: SentenceTransformer, pairs: list[tuple[str, str]], gold: list[float]
    ) -> None:
        evaluator = PairScoreEvaluator(pairs, gold, name="dev")
        before = evaluator.primary_metric
        for _ in range(2):
            assert evaluator(model).keys() == {"dev_pearson", "dev_spearman"}
            assert evaluator.primary_metric == before == "dev_spearman"

    def test_it_appends_to_a_csv_file(
        self, model: SentenceTransformer, pairs: list[tuple[str, str]], gold: list[float], tmp_path: Path
    ) -> None:
        evaluator = PairScoreEvaluator(pairs, gold, name="dev")
        for step in (1, 2):
            metrics = evaluator(model, output_path=str(tmp_path), epoch=0, steps=step)
        header, *rows = (tmp_path / "PairScoreEvaluator_dev_results.csv").read_text().splitlines()
        assert header == "epoch,steps,Pearson_Correlation,Spearman_Correlation"
        assert [row.split(",")[:2] for row in rows] == [["0", "1"], ["0", "2"]]
        assert float(rows[1].split(",")[3]) == pytest.approx(metrics["dev_spearman"])

    def test_the_model_card_tells_its_figures(
        self, bert: str, pairs: list[tuple[str, str]], gold: list[float], tmp_path: Path
    ) -> None:
        model = with_head(bert)
        evaluator = PairScoreEvaluator(pairs, gold, name="dev")
        metrics = evaluator(model)
        model.save_pretrained(str(tmp_path))
        card = (tmp_path / "README.md").read_text()
        assert "PairScoreEvaluator" in card
        assert f"{metrics['dev_pearson']:.4f}" in card

    def test_a_model_without_a_head_is_refused(
        self, bert: str, pairs: list[tuple[str, str]], gold: list[float]
    ) -> None:
        with refused("the model has no DSE head"):
            PairScoreEvaluator(pairs, gold)(convert(bert, window=8))

    def test_an_unknown_option_is_refused(self, pairs: list[tuple[str, str]], gold: list[float]) -> None:
        with pytest.raises(TypeError, match="batchsize"):
            PairScoreEvaluator(pairs, gold, batchsize=4)

    def test_it_is_quiet(
        self,
        model: SentenceTransformer,
        pairs: list[tuple[str, str]],
        gold: list[float],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert logging.getLogger("sentence_transformers").getEffectiveLevel() > logging.INFO
        PairScoreEvaluator(pairs, gold)(model)
        assert capsys.readouterr() == ("", "")
