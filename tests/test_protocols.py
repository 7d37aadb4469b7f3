from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from conftest import refused, slow
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from st_linear.data import load_pairs, token_counts
from st_linear.protocols import (
    PAIRS_PER_DOCUMENT,
    TRUNCATED_TO,
    _filler,
    _most_sentences,
    _surrounded,
    lengthen,
    protocol_names,
)
from st_linear.records import digest

# Of the eight kinds of filler, which are one function's, two; the others run with -m slow.
FEW = ("repeat", "filler-same-random", "filler-different-end", "document", "truncate")
PROTOCOLS = [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in protocol_names()]
FILLERS = [name for name in protocol_names() if name.startswith("filler")]


@pytest.fixture(scope="module")
def tokenizer(minilm: str) -> Any:
    return AutoTokenizer.from_pretrained(minilm)


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    return load_pairs("sample", "dev").select(range(0, 96, 3))


def both(pairs: Dataset) -> list[str]:
    return [*pairs["sentence1"], *pairs["sentence2"]]


def test_the_choices() -> None:
    assert protocol_names() == [
        "repeat",
        *(
            f"filler-{kind}-{place}"
            for kind in ("same", "different")
            for place in ("start", "middle", "end", "random")
        ),
        "document",
        "truncate",
    ]


@pytest.mark.parametrize("length", [128, 600, slow(1024)])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_text_is_longer_and_one_more_sentence_would_make_it_so(
    pairs: Dataset, tokenizer: Any, protocol: str, length: int
) -> None:
    made = lengthen(pairs, tokenizer, length, protocol)
    assert made.column_names == ["sentence1", "sentence2", "score"]
    assert len(made) == len(pairs)
    counts = token_counts(both(made), tokenizer)
    bound = min(length, TRUNCATED_TO) if protocol == "truncate" else length
    assert max(counts) <= bound
    if protocol == "truncate" and length > TRUNCATED_TO:
        assert min(counts) >= TRUNCATED_TO - 3
        return
    if protocol == "repeat":
        more = [f"{text} {sentence}" for text, sentence in zip(both(made), both(pairs))]
    elif protocol.startswith("filler"):
        sentences = [*both(pairs), *_filler("first"), *_filler("second")]
        longest = max(token_counts(sentences, tokenizer)) - 2
        # With the same filler the shorter of a pair may lack what the two sentences differ by, too.
        assert min(counts) > bound - (2 if "same" in protocol else 1) * longest
        return
    else:
        sentences = sorted(both(pairs), key=len, reverse=True)
        more = [f"{text} {next_sentence(text, sentences)}" for text in both(made)]
    assert min(token_counts(more, tokenizer)) > bound


def next_sentence(document: str, sentences: list[str]) -> str:
    """What a document of sentences, longest first, would go on with: it goes around, once at least."""
    cycle, rest = [], document
    while rest:
        sentence = next(s for s in sentences if rest.startswith(s))
        cycle.append(sentence)
        rest = rest[len(sentence) :].lstrip()
    return cycle[len(cycle) % PAIRS_PER_DOCUMENT]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_bare_tokenizer_makes_the_same_texts(pairs: Dataset, tokenizer: Any, protocol: str) -> None:
    bare = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bare.no_truncation()
    bare.no_padding()
    some = pairs.select(range(12))
    # It knows of no special tokens, of which the other one adds two.
    length = 510 if protocol == "truncate" else 600
    ours, theirs = (lengthen(some, each, size, protocol) for each, size in ((tokenizer, length + 2), (bare, length)))
    assert ours["score"] == theirs["score"]
    assert token_counts(both(ours), bare) == token_counts(both(theirs), bare)


@pytest.mark.parametrize("where", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [30, 77, 400])
def test_the_search_finds_what_trying_all_finds(pairs: Dataset, tokenizer: Any, length: int, where: float) -> None:
    makers = [partial(_surrounded, sentence, _filler("first"), where) for sentence in pairs["sentence1"][:6]]
    expected = []
    for make in makers:
        counts = token_counts([make(number) for number in range(60)], tokenizer)
        assert counts[-1] > length
        expected.append(max(number for number, count in enumerate(counts) if count <= length))
    assert _most_sentences(makers, tokenizer, length, least=0) == expected


@pytest.mark.parametrize("protocol", FILLERS)
def test_the_sentence_stands_in_its_place(pairs: Dataset, tokenizer: Any, protocol: str) -> None:
    made = lengthen(pairs, tokenizer, 512, protocol)
    places = []
    for sentence, text in zip(both(pairs), both(made)):
        before, _, after = text.partition(sentence)
        places.append(len(before) / len(before + after))
    place = protocol.rpartition("-")[2]
    low, high = {"start": (0, 0), "end": (1, 1), "middle": (0.35, 0.65), "random": (0, 1)}[place]
    assert low <= min(places) <= max(places) <= high
    if place == "random":
        assert 0.3 < mean(places) < 0.7
        assert max(places) - min(places) > 0.8


def test_the_two_sides_share_their_filler_or_none_of_it(pairs: Dataset, tokenizer: Any) -> None:
    def filler(protocol: str) -> list[tuple[set[str], set[str]]]:
        made = lengthen(pairs, tokenizer, 256, protocol)
        everything = [*_filler("first"), *_filler("second")]
        return [
            tuple({part for part in everything if part in text} for text in texts)  # type: ignore[misc]
            for texts in zip(made["sentence1"], made["sentence2"])
        ]

    # The longer sentence leaves room for a few less.
    assert all(a <= b or b <= a for a, b in filler("filler-same-end"))
    assert not any(a & b for a, b in filler("filler-different-end"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_labels(pairs: Dataset, tokenizer: Any, protocol: str) -> None:
    made = lengthen(pairs, tokenizer, 256, protocol)
    if protocol not in ("document", "truncate"):
        assert made["score"] == pairs["score"]
        return
    by_sentence = {
        (column, sentence): score
        for column in ("sentence1", "sentence2")
        for sentence, score in zip(pairs[column], pairs["score"])
    }
    for row, score in enumerate(made["score"]):
        for column in ("sentence1", "sentence2"):
            inside = [s for (c, text), s in by_sentence.items() if c == column and text in made[column][row]]
            assert len(inside) == PAIRS_PER_DOCUMENT
            assert mean(inside) == pytest.approx(score)
    tenths = [sum(low / 5 <= score <= (low + 1) / 5 for score in made["score"]) for low in range(5)]
    assert min(tenths) >= len(made) / 10
    assert min(made["score"]) < 0.1
    assert max(made["score"]) > 0.9


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_seed_is_a_text_whatever_was_asked_before(pairs: Dataset, tokenizer: Any, protocol: str) -> None:
    pairs = pairs.select(range(12))
    first = lengthen(pairs, tokenizer, 200, protocol, seed=3)
    lengthen(pairs, tokenizer, 400, "filler-same-random", seed=4)
    assert lengthen(pairs, tokenizer, 200, protocol, seed=3).to_dict() == first.to_dict()
    drawn = "random" in protocol or "filler" in protocol or protocol in ("document", "truncate")
    assert (lengthen(pairs, tokenizer, 200, protocol, seed=5).to_dict() != first.to_dict()) == drawn


@pytest.mark.slow
def test_texts_are_the_same_in_another_process(pairs: Dataset, tokenizer: Any, minilm: str) -> None:
    code = f"""
from transformers import AutoTokenizer
from st_linear.data import load_pairs
from st_linear.protocols import lengthen, protocol_names
from st_linear.records import digest
pairs, tokenizer = load_pairs("sample", "dev").select(range(12)), AutoTokenizer.from_pretrained({minilm!r})
print(digest([lengthen(pairs, tokenizer, 128, name).to_dict() for name in protocol_names()]))
"""
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    dev = load_pairs("sample", "dev").select(range(12))
    assert there == digest([lengthen(dev, tokenizer, 128, name).to_dict() for name in protocol_names()])


def test_truncate_is_the_beginning_of_document(pairs: Dataset, tokenizer: Any) -> None:
    documents = lengthen(pairs, tokenizer, 1024, "document")
    cut = lengthen(pairs, tokenizer, 1024, "truncate")
    assert cut["score"] == documents["score"]
    assert all(whole.startswith(text) and whole != text for whole, text in zip(both(documents), both(cut)))


def test_bad_input(pairs: Dataset, tokenizer: Any) -> None:
    with refused("unknown protocol 'x'; choose one of: repeat, filler-same-start, "):
        lengthen(pairs, tokenizer, 128, "x")
    for length in (0, -1, 2.5, True):
        with refused(f"length={length!r} must be a positive integer, in tokens"):
            lengthen(pairs, tokenizer, length, "repeat")  # type: ignore[arg-type]
    for protocol in FILLERS:
        with refused("length=4 has no room for a text of"):
            lengthen(pairs, tokenizer, 4, protocol)
    with refused("length=16 has no room for documents of 4 pairs: 0 of 32 are short enough"):
        lengthen(pairs, tokenizer, 16, "document")
    with refused("the pairs have no column 'score'; their columns: sentence1, sentence2"):
        lengthen(pairs.remove_columns("score"), tokenizer, 128, "repeat")


def test_examples_in_the_docs_are_what_the_protocols_make(tokenizer: Any) -> None:
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    pairs = load_pairs("sample", "test").select(range(8))
    for protocol in ("repeat", *FILLERS, "document"):
        length = {"repeat": 32, "document": 64}.get(protocol, 48)
        texts = lengthen(pairs, tokenizer, length, protocol)
        assert f"| `{protocol}` | {texts['sentence1'][0]} | {texts['sentence2'][0]} |" in page


def test_both_of_a_pair_have_as_much_of_the_same_filler(pairs: Dataset, tokenizer: Any) -> None:
    for protocol in FILLERS:
        if "same" in protocol:
            made = lengthen(pairs, tokenizer, 300, protocol)
            for row, texts in zip(pairs, zip(made["sentence1"], made["sentence2"])):
                rests = [text.replace(row[column], "", 1) for text, column in zip(texts, ("sentence1", "sentence2"))]
                assert rests[0].split() == rests[1].split()


def test_labels_are_numbers_and_other_columns_are_left_out(pairs: Dataset, tokenizer: Any) -> None:
    some = pairs.select(range(12)).add_column("genre", ["news"] * 12).add_column("taught", [0.5] * 12)
    for protocol in ("repeat", "filler-same-end", "document", "truncate"):
        made = lengthen(some, tokenizer, 128, protocol)
        assert made.column_names == ["sentence1", "sentence2", "score", "taught"]
        assert made["taught"][:] == [0.5] * 12


def test_sentences_without_tokens_end_in_an_error(tokenizer: Any) -> None:
    nothing = Dataset.from_dict({"sentence1": ["\u200b"] * 4, "sentence2": ["\u200b"] * 4, "score": [0, 0.3, 0.6, 1]})
    with refused("texts of no tokens make none longer"):
        lengthen(nothing, tokenizer, 64, "document")
