from __future__ import annotations

from itertools import chain

import pytest
from conftest import WORDS, refused
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import pairwise_cos_sim

from st_linear import convert, mine_pairs
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
