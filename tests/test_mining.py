from __future__ import annotations

from itertools import chain

import pytest
from conftest import WORDS, refused
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import pairwise_cos_sim

from st_linear import convert, mine_groups, mine_pairs
from st_linear.data import training_sentences


@pytest.fixture(scope="module")
def model(bert: str) -> SentenceTransformer:
    return convert(bert, feature_map="softmax")


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Pairs of sentences of four words; each shares some with the one before it."""
    sentences = [" ".join(WORDS[(row + step) % len(WORDS)] for step in (0, 1, 2, 7)) for row in range(40)]
    return Dataset.from_dict({"sentence1": sentences[::2], "sentence2": sentences[1::2], "score": [0.5] * 20})


def mine(dataset: Dataset, model: SentenceTransformer, count: int, **options: object) -> list[tuple[str, str]]:
    mined = mine_pairs(dataset, model, count, neighbours=6, show_progress_bar=False, **options)  # type: ignore[arg-type]
    assert mined.column_names == ["sentence1", "sentence2"]
    return list(zip(mined["sentence1"], mined["sentence2"]))


def test_pairs_are_new_and_each_is_there_once(dataset: Dataset, model: SentenceTransformer) -> None:
    pairs = mine(dataset, model, 60)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == 60
    assert all(first != second for first, second in pairs)
    assert not {frozenset(p) for p in pairs} & {frozenset(p) for p in zip(dataset["sentence1"], dataset["sentence2"])}
    assert set(chain.from_iterable(pairs)) <= set(training_sentences(dataset))


def test_excluded_sentences_are_in_none(dataset: Dataset, model: SentenceTransformer) -> None:
    unseen = dataset["sentence1"][:5]
    pairs = mine(dataset, model, 1000, exclude=unseen)
    assert pairs
    assert not set(unseen) & set(chain.from_iterable(pairs))


def test_there_may_be_fewer_than_asked(dataset: Dataset, model: SentenceTransformer) -> None:
    pairs = mine(dataset, model, 10**6)
    # Six nearest of forty by cosine and six by BM25, less those that are known or found twice.
    assert 6 * 40 / 2 - 20 <= len(pairs) <= 2 * 6 * 40


def test_a_seed_is_a_draw(dataset: Dataset, model: SentenceTransformer) -> None:
    assert mine(dataset, model, 30) == mine(dataset, model, 30)
    assert mine(dataset, model, 30) != mine(dataset, model, 30, seed=1)


def test_cosines_are_spread_evenly(dataset: Dataset, model: SentenceTransformer) -> None:
    def cosines(pairs: list[tuple[str, str]]) -> list[float]:
        first, second = (model.encode([pair[side] for pair in pairs]) for side in (0, 1))
        return pairwise_cos_sim(first, second).tolist()

    everything = cosines(mine(dataset, model, 10**6))
    low, high = min(everything), max(everything)
    cut = [low + (high - low) * share for share in (0.3, 0.7)]
    chosen = cosines(mine(dataset, model, 30))

    def thirds(values: list[float]) -> list[int]:
        return [sum(v < cut[0] for v in values), sum(v > cut[1] for v in values)]

    # Of the thirty, nine are from the lowest three tenths and nine from the highest, as far as there are any.
    assert [abs(a - min(9, b)) <= 1 for a, b in zip(thirds(chosen), thirds(everything))] == [True, True]


def test_what_can_not_be_mined_is_refused(dataset: Dataset, model: SentenceTransformer) -> None:
    with refused("count must be positive, got 0"):
        mine_pairs(dataset, model, 0)
    with refused("neighbours must be positive, got 0"):
        mine_pairs(dataset, model, 1, neighbours=0)
    pair = Dataset.from_dict({"sentence1": ["ba"], "sentence2": ["be"], "score": [1.0]})
    with refused("no pair of the 2 sentences that may be mined is without a score"):
        mine_pairs(pair, model, 1, show_progress_bar=False)
    with refused("no pair of the 1 sentences"):
        mine_pairs(pair, model, 1, exclude=["ba"], show_progress_bar=False)


@pytest.fixture(scope="module")
def sentences(dataset: Dataset) -> list[str]:
    return training_sentences(dataset)


def groups_of(sentences: list[str], model: SentenceTransformer, count: int, **options: object) -> list[list[str]]:
    options = {"size": 5, "neighbours": 6} | options
    groups = mine_groups(sentences, model, count, show_progress_bar=False, **options)  # type: ignore[arg-type]
    assert groups.column_names == [f"sentence{number}" for number in range(1, 6)]
    return [list(row.values()) for row in groups.to_list()]


def test_groups_are_near_sentences_and_a_random_one(sentences: list[str], model: SentenceTransformer) -> None:
    vectors = dict(zip(sentences, model.encode(sentences, normalize_embeddings=True)))
    groups = groups_of(sentences, model, 400)
    far = []
    for first, *near, other in groups:
        assert len({first, *near, other}) == 5
        ranked = sorted(sentences, key=lambda sentence: -float(vectors[sentence] @ vectors[first]))
        assert set(near) <= set(ranked[:7])
        far.append(ranked.index(other))
    # Of the rest, 36 of which one is drawn evenly, the middle is at rank 20 or so.
    assert 15 < sum(far) / len(far) < 25
    assert max(far) == 39


def test_sentences_take_turns(sentences: list[str], model: SentenceTransformer) -> None:
    first = [group[0] for group in groups_of([*sentences, sentences[0]], model, 80)]
    assert sorted(first) == sorted(2 * sentences)


def test_nearer_sentences_are_drawn_more_often(sentences: list[str], model: SentenceTransformer) -> None:
    vectors = dict(zip(sentences, model.encode(sentences, normalize_embeddings=True)))
    ranks = []
    for first, *near, _ in groups_of(sentences, model, 2000, size=5, neighbours=30):
        others = sorted(set(sentences) - {first}, key=lambda sentence: -float(vectors[sentence] @ vectors[first]))
        ranks += [others.index(sentence) for sentence in near]
    assert 1.6 < sum(rank < 10 for rank in ranks) / sum(rank >= 20 for rank in ranks) < 2.6


def test_groups_hold_no_excluded_sentence(sentences: list[str], model: SentenceTransformer) -> None:
    found = set(chain.from_iterable(groups_of(sentences, model, 200, exclude=sentences[:5])))
    assert found == set(sentences[5:])


def test_a_seed_is_a_draw_of_groups(sentences: list[str], model: SentenceTransformer) -> None:
    assert groups_of(sentences, model, 9) == groups_of(sentences, model, 9)
    assert groups_of(sentences, model, 9) != groups_of(sentences, model, 9, seed=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count must be positive, got 0"),
        ({"size": 2}, "size must be at least 3, got 2: mine_pairs finds pairs"),
        ({"neighbours": 5}, "neighbours must be at least 6 for groups of 8, got 5"),
        ({}, "neighbours=48 wants 50 sentences or more, got 40"),
    ],
)
def test_groups_that_can_not_be_are_refused(
    options: dict[str, int], message: str, sentences: list[str], model: SentenceTransformer
) -> None:
    with refused(message):
        mine_groups(sentences, model, **{"count": 1, **options})
