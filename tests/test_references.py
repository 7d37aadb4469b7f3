from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from st_linear import load
from st_linear.data import load_pairs
from st_linear.evaluation import LengthSimilarityEvaluator, correlation
from st_linear.references import BM25, static_embeddings


def test_bm25_of_equal_other_and_wordless_texts() -> None:
    first = ["a red cat sleeps", "the dog runs home", "birds sing", "?!", "a red cat sleeps"]
    second = ["a red cat sleeps", "prices rose again", "birds of prey", "?!", "a blue cat sleeps"]
    found = BM25().similarities(first, second)
    assert found[0] == pytest.approx(1)
    assert found[1] == found[3] == 0
    assert 0 < found[2] < found[4] < 1


def test_bm25_knows_no_sides_and_counts_rare_words_more() -> None:
    first, second = ["the cat", "the dog", "the zebra"], ["the zebra", "the cat", "a zebra"]
    assert BM25().similarities(first, second) == pytest.approx(BM25().similarities(second, first))
    common, _, rare = BM25().similarities(["the cow", "the dog", "zebra cow"], ["the cat", "the hen", "zebra cat"])
    assert rare > common


def test_bm25_correlates_with_scores() -> None:
    pairs = load_pairs("sample", "test")
    found = correlation(BM25().similarities(pairs["sentence1"], pairs["sentence2"]), pairs["score"])
    assert found.pearson > 0.3


def test_static_embeddings_are_the_mean_of_the_input_embeddings(minilm: str) -> None:
    model = load(minilm)
    static = static_embeddings(model)
    text = "Cats sleep. " * 400
    ids = model.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    expected = model[0].auto_model.get_input_embeddings()(torch.tensor(ids)).mean(0)
    np.testing.assert_allclose(static.encode(text), expected.detach().numpy(), atol=1e-5)
    # The encoder goes on cutting.
    assert len(model.tokenizer(text, truncation=True)["input_ids"]) == model.max_seq_length


def test_static_embeddings_need_an_encoder(minilm: str) -> None:
    static = static_embeddings(load(minilm))
    assert isinstance(static[0], StaticEmbedding)
    with pytest.raises(ValueError, match="no static embeddings in a model that begins with StaticEmbedding"):
        static_embeddings(SentenceTransformer(modules=[static[0]]))


def test_references_read_the_texts_of_a_model(minilm: str) -> None:
    model = load(minilm)
    model.prompts, model.default_prompt_name = {"query": "What is said in this text? "}, "query"
    pairs = load_pairs("sample", "test").select(range(10))
    columns = (pairs["sentence1"], pairs["sentence2"], pairs["score"])
    evaluator = LengthSimilarityEvaluator(*columns, lengths=(None, 96), measured_by=model, write_csv=False)
    tokens = []
    for some in (model, static_embeddings(model), BM25()):
        evaluator(some)
        figures = evaluator.results["repeat"][96]
        assert figures["undefined"] is None
        tokens.append(figures["mean_tokens"])
        assert figures["truncated"] == 0
    assert len(set(tokens)) == 1
    assert figures["mean_pairwise_cosine"] is None
    with pytest.raises(ValueError, match="BM25 has no tokenizer to measure lengths with: pass measured_by"):
        LengthSimilarityEvaluator(*columns)(BM25())
