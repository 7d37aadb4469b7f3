"""Two cheap references that long texts are read by beside every model: BM25, and a mean of static embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import bm25s
import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer


class BM25:
    r"""
    Similarity of two texts by the words they share, rare ones counting more.

    BM25 scores a document for a query. Here each text of a pair is the query for the other, and each score is set
    against that of the query for itself: :math:`\tfrac12 (s_{ab} / s_{aa} + s_{ba} / s_{bb})`. How rare a word is,
    all texts of all pairs say.

    References:
        - The Probabilistic Relevance Framework: BM25 and Beyond: https://doi.org/10.1561/1500000019
        - BM25S: Orders of magnitude faster lexical search via eager sparse scoring: https://arxiv.org/abs/2407.03618

    Example:
        >>> BM25().similarities(["a plane takes off", "a dog"], ["an air plane takes off", "a bird"]).round(2).tolist()
        [0.68, 0.0]
    """

    def similarities(self, first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        """
        Compare the two texts of each pair.

        Args:
            first: One text per pair.
            second: The other.

        Returns:
            One number per pair: 0 without a common word, about 1 for equal texts.
        """
        tokens = bm25s.tokenize([*first, *second], stopwords=None, return_ids=False, show_progress=False)
        index = bm25s.BM25()
        index.index(tokens, show_progress=False)
        count = len(first)
        similarities = np.zeros(count)
        for row in range(count):
            for own, other in ((row, row + count), (row + count, row)):
                if tokens[own]:
                    scores = index.get_scores(tokens[own])
                    similarities[row] += scores[other] / scores[own] / 2
        return similarities


def static_embeddings(model: SentenceTransformer) -> SentenceTransformer:
    """
    The mean of a model's input embeddings, without a single layer of it.

    Args:
        model: A model that begins with an encoder.

    Returns:
        A model of Sentence Transformers' ``StaticEmbedding`` that reads texts of any length.

    Raises:
        ValueError: If the model has no encoder, or no fast tokenizer.
    """
    encoder = model[0]
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    if not isinstance(encoder, Transformer) or backend is None:
        raise ValueError(f"no static embeddings in a model that begins with {type(encoder).__name__}")
    # A copy, as the encoder's own must go on cutting.
    tokenizer = Tokenizer.from_str(backend.to_str())
    tokenizer.no_truncation()
    weights = encoder.auto_model.get_input_embeddings().weight.detach().float().cpu().numpy()
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu")
