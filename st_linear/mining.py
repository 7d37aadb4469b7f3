"""Pairs and groups of sentences without labels, for a teacher to score."""

from __future__ import annotations

import random
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import TypeVar

import bm25s
import numpy as np
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import semantic_search

from st_linear.data import training_sentences

_BINS = 10

Key = TypeVar("Key", bound=Hashable)


def mine_pairs(
    dataset: Dataset,
    model: SentenceTransformer,
    count: int,
    *,
    exclude: Collection[str] = (),
    neighbours: int = 20,
    seed: int = 0,
    show_progress_bar: bool = True,
) -> Dataset:
    """
    Find pairs of a dataset's sentences that it has no score for and that are worth one.

    Candidates are each sentence's nearest others, by cosine and by BM25: random pairs teach little, as nearly all of
    them have nothing in common. Pairs are drawn from ten equal parts of the candidates' range of cosines, as many from
    each as from every other while it has some, so that their scores are spread.

    Args:
        dataset: Pairs as :func:`~st_linear.data.load_pairs` returns them. None of them is mined.
        model: Whose cosine says what is near; the encoder to be distilled into is a good choice.
        count: How many pairs, at most: there may be fewer candidates.
        exclude: Sentences that no pair may hold, such as those of dev and test.
        neighbours: Nearest others of a sentence that are candidates, by cosine and again by BM25.
        seed: Of the draw.
        show_progress_bar: Show progress.

    Returns:
        A dataset with the columns ``sentence1`` and ``sentence2``, in random order, each pair once.

    Raises:
        ValueError: If ``count`` or ``neighbours`` is not positive, or there is no candidate.

    References:
        - Augmented SBERT: https://arxiv.org/abs/2010.08240

    Example:
        ::

            mined = mine_pairs(train, model, 10_000, exclude=training_sentences(dev) + training_sentences(test))
            mined = add_teacher_scores(mined, "cross-encoder/stsb-roberta-large")
    """
    for name, value in (("count", count), ("neighbours", neighbours)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value!r}")
    forbidden = set(exclude)
    sentences = [sentence for sentence in training_sentences(dataset) if sentence not in forbidden]
    known = {frozenset(pair) for pair in zip(dataset["sentence1"], dataset["sentence2"])}
    cosines = _near(sentences, model, min(neighbours, len(sentences) - 1), show_progress_bar)
    candidates = {
        pair: cosine
        for pair, cosine in sorted(cosines.items())
        if frozenset(sentences[index] for index in pair) not in known
    }
    if not candidates:
        raise ValueError(f"no pair of the {len(sentences)} sentences that may be mined is without a score")
    chosen = spread(candidates, count, random.Random(seed))
    first, second = ([sentences[pair[side]] for pair in chosen] for side in (0, 1))
    return Dataset.from_dict({"sentence1": first, "sentence2": second})


def mine_groups(
    sentences: Sequence[str],
    model: SentenceTransformer,
    count: int,
    *,
    size: int = 8,
    exclude: Collection[str] = (),
    neighbours: int = 48,
    seed: int = 0,
    show_progress_bar: bool = True,
) -> Dataset:
    """
    Draw groups of sentences that lie near one another, for a teacher to score all pairs of.

    A group of eight has 28 pairs, and as many sentences to read as four pairs. So the teacher had better be an
    encoder, which reads each sentence once; a CrossEncoder reads all pairs.

    A group is a sentence, ``size - 2`` of those nearest to it by cosine, drawn with weights of one by the square root
    of their rank, and one of all at random, so that pairs with nothing in common are among them too.

    Args:
        sentences: Any. Those that are there twice count once.
        model: Whose cosine says what is near.
        count: How many groups. Sentences take turns to be the first of one.
        size: Sentences of a group, at least 3.
        exclude: Sentences that no group may hold, such as those of dev and test.
        neighbours: Nearest others that are drawn from, at least ``size - 2``.
        seed: Of the draw.
        show_progress_bar: Show progress.

    Returns:
        A dataset with the columns ``sentence1`` to ``sentence{size}``.

    Raises:
        ValueError: If ``count`` is not positive, ``size`` or ``neighbours`` too small, or there are too few sentences.

    Example:
        ::

            groups = mine_groups(sentences, model, 20_000, exclude=training_sentences(dev) + training_sentences(test))
            groups = add_teacher_scores(groups, SentenceTransformer("sentence-transformers/all-mpnet-base-v2"))
            loss = DistillationLoss(model, alpha=1, dropout=False)
            SentenceTransformerTrainer(model=model, train_dataset=groups, loss=loss).train()
    """
    if count < 1:
        raise ValueError(f"count must be positive, got {count!r}")
    if size < 3:
        raise ValueError(f"size must be at least 3, got {size!r}: mine_pairs finds pairs")
    if neighbours < size - 2:
        raise ValueError(f"neighbours must be at least {size - 2} for groups of {size}, got {neighbours!r}")
    forbidden = set(exclude)
    kept = [sentence for sentence in dict.fromkeys(sentences) if sentence not in forbidden]
    if len(kept) < neighbours + 2:
        raise ValueError(f"neighbours={neighbours} wants {neighbours + 2} sentences or more, got {len(kept)}")
    embeddings = model.encode(
        kept, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=show_progress_bar
    )
    draw = np.random.default_rng(seed)
    weights = np.arange(1, neighbours + 1) ** -0.5
    order = draw.permutation(len(kept))[:count].tolist()
    hits = semantic_search(embeddings[order], embeddings, top_k=neighbours + 1)
    groups = []
    for turn in range(count):
        first = order[turn % len(order)]
        near = [hit["corpus_id"] for hit in hits[turn % len(order)] if hit["corpus_id"] != first][:neighbours]
        group = [first, *draw.choice(near, size - 2, replace=False, p=weights / weights.sum()).tolist()]
        while (other := int(draw.integers(len(kept)))) in group:
            pass
        groups.append([*group, other])
    columns = zip(*groups)
    return Dataset.from_dict({f"sentence{n}": [kept[row] for row in column] for n, column in enumerate(columns, 1)})


def _near(
    sentences: list[str], model: SentenceTransformer, neighbours: int, show_progress_bar: bool
) -> dict[tuple[int, int], float]:
    """Cosines of pairs of which one is among the nearest of the other, by cosine or BM25; the lower index first."""
    if neighbours < 1:
        return {}
    embeddings = model.encode(
        sentences, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=show_progress_bar
    )
    # A sentence is its own nearest neighbour, mostly.
    nearest = [
        [hit["corpus_id"] for hit in hits] for hits in semantic_search(embeddings, embeddings, top_k=neighbours + 1)
    ]
    tokens = bm25s.tokenize(sentences, stopwords=None, show_progress=False)
    index = bm25s.BM25()
    index.index(tokens, show_progress=False)
    lexical, scores = index.retrieve(tokens, k=neighbours + 1, show_progress=show_progress_bar)
    pairs = {(row, other) for row, others in enumerate(nearest) for other in others}
    pairs |= {(row, int(other)) for row, others in enumerate(lexical) for other in others[scores[row] > 0]}
    ordered = np.array(sorted({(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]}))
    vectors = embeddings.float().cpu().numpy()
    cosines = (vectors[ordered[:, 0]] * vectors[ordered[:, 1]]).sum(1)
    return {(int(a), int(b)): float(cosine) for (a, b), cosine in zip(ordered, cosines)}


def spread(candidates: Mapping[Key, float], count: int, draw: random.Random) -> list[Key]:
    """At most ``count`` of the candidates, evenly from equal parts of the range of their values, shuffled."""
    low, high = min(candidates.values()), max(candidates.values())
    width = (high - low) / _BINS or 1.0
    bins: list[list[Key]] = [[] for _ in range(_BINS)]
    for key, value in candidates.items():
        bins[min(_BINS - 1, int((value - low) / width))].append(key)
    for some in bins:
        draw.shuffle(some)
    chosen: list[Key] = []
    while len(chosen) < count and any(bins):
        for some in bins:
            if some and len(chosen) < count:
                chosen.append(some.pop())
    draw.shuffle(chosen)
    return chosen
