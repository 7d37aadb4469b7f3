"""Sentence pairs brought to a length in tokens, in several ways that each ask something else of a model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.resources import files
from typing import Any

from datasets import Dataset

from st_linear.data import repeat_to_length, token_counts

TRUNCATED_TO = 512
"""Tokens that ``truncate`` leaves of a text."""

PAIRS_PER_DOCUMENT = 4
"""Pairs of which ``document`` makes one."""

_FIRST_TRIAL = 8

_PLACES = ("start", "middle", "end", "random")

_Protocol = Callable[[Dataset, Any, int, int], Dataset]


def lengthen(pairs: Dataset, tokenizer: Any, length: int, protocol: str = "repeat", *, seed: int = 0) -> Dataset:
    """
    Bring pairs to a length by a protocol.

    - ``repeat``: each sentence again and again. Asks whether a vector survives length itself; a model that reads only
      the beginning loses nothing.
    - ``filler-same-start`` … ``-middle``, ``-end``, ``-random``: neutral sentences around each sentence, the same for
      both of a pair; the sentence stands at that place. Asks whether a model finds what differs in what does not.
      Vectors that follow the filler alone make all pairs equal.
    - ``filler-different-start`` …: other sentences for either. Asks whether a model finds what matters among what does
      not. Filler that weighs more than the sentence makes all pairs alike in being different.
    - ``document``: four pairs become a pair of documents, the sentences of either in an order of its own and again
      and again, and the label is the mean of the four. Asks for the meaning of all of a text; which pairs are
      combined depends on the length where long sentences would not fit.
    - ``truncate``: the control: the documents, cut at 512 tokens.

    Args:
        pairs: Columns ``sentence1``, ``sentence2`` and ``score``, the score in 0–1.
        tokenizer: A transformers tokenizer, or a ``tokenizers.Tokenizer`` without special tokens.
        length: The most tokens that a text may come to, special tokens included.
        protocol: One of :func:`protocol_names`.
        seed: Of what is drawn. Texts are a function of it, of the pairs and of the other arguments, and of nothing
            else; filler of a greater length begins with that of a smaller one.

    Returns:
        As many pairs, in the same columns. No text is longer than ``length``; one more sentence, or one more
        repetition, would make it so. (``truncate`` cuts between tokens.)

    Raises:
        ValueError: If the protocol is none of the choices, a column is missing, or ``length`` has no room for a
            sentence.

    Example:
        >>> from st_linear.data import load_pairs
        >>> from st_linear.recipe import packaged_base
        >>> from transformers import AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained(packaged_base())
        >>> pairs = load_pairs("sample", "dev").select(range(2))
        >>> text = lengthen(pairs, tokenizer, 64, "filler-same-end")["sentence1"][0]
        >>> text.endswith(pairs["sentence1"][0]), len(tokenizer(text)["input_ids"]) <= 64
        (True, True)
    """
    check_protocol(protocol)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"length={length!r} must be a positive integer, in tokens")
    for column in ("sentence1", "sentence2", "score"):
        if column not in pairs.column_names:
            raise ValueError(f"the pairs have no column {column!r}; their columns: {', '.join(pairs.column_names)}")
    return _PROTOCOLS[protocol](pairs, tokenizer, length, seed)


def check_protocol(protocol: str) -> None:
    """Raise a ValueError unless there is such a protocol."""
    if protocol not in _PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; choose one of: {', '.join(protocol_names())}")


def protocol_names() -> list[str]:
    """The protocols that :func:`lengthen` knows."""
    return list(_PROTOCOLS)


def _repeated(pairs: Dataset, tokenizer: Any, length: int, seed: int) -> Dataset:
    count = len(pairs)
    texts = repeat_to_length([*pairs["sentence1"], *pairs["sentence2"]], tokenizer, length)
    return _dataset(texts[:count], texts[count:], pairs["score"])


def _filled(pairs: Dataset, tokenizer: Any, length: int, seed: int, *, same: bool, place: str) -> Dataset:
    columns = []
    for side, column in enumerate(("sentence1", "sentence2")):
        pool = _filler("first" if same or side == 0 else "second")
        texts = []
        for row, sentence in enumerate(pairs[column]):
            draw = random.Random(f"{seed} {row} {0 if same else side}")
            order = draw.sample(pool, len(pool))
            # Drawn once for a pair: where the sentence stands must not tell its sides apart.
            where = {"start": 0.0, "middle": 0.5, "end": 1.0}.get(place, random.Random(f"{seed} {row} place").random())
            texts.append(partial(_surrounded, sentence, order, where))
        columns.append(_longest([(text, None) for text in texts], tokenizer, length))
    return _dataset(columns[0], columns[1], pairs["score"])


def _surrounded(sentence: str, filler: Sequence[str], where: float, count: int) -> str:
    """A sentence among ``count`` others, ``where`` of them before it."""
    others = [filler[index % len(filler)] for index in range(count)]
    before = round(where * count)
    return " ".join([*others[:before], sentence, *others[before:]])


def _documents(pairs: Dataset, tokenizer: Any, length: int, seed: int) -> Dataset:
    special = token_counts([""], tokenizer)[0]
    room = (length - special) // PAIRS_PER_DOCUMENT
    # One more for what a tokenizer may make of the space between two sentences.
    costs = [
        max(pair) - special + 1
        for pair in zip(*(token_counts(pairs[column], tokenizer) for column in ("sentence1", "sentence2")))
    ]
    rows = sorted((row for row, cost in enumerate(costs) if cost <= room), key=lambda row: (pairs["score"][row], row))
    if len(rows) < PAIRS_PER_DOCUMENT:
        raise ValueError(
            f"length={length} has no room for documents of {PAIRS_PER_DOCUMENT} pairs: {len(rows)} of {len(pairs)} "
            "are short enough"
        )
    scores = {row: float(score) for row, score in enumerate(pairs["score"])}
    low, high = scores[rows[0]], scores[rows[-1]]
    near = max(PAIRS_PER_DOCUMENT, len(rows) // 10)
    columns: tuple[list[Any], list[Any]] = ([], [])
    labels = []
    for number in range(len(pairs)):
        draw = random.Random(f"{seed} {number}")
        # Labels are spread evenly from the lowest to the highest, in random order.
        target = low + (high - low) * (number + draw.random()) / len(pairs)
        chosen = draw.sample(sorted(rows, key=lambda row: (abs(scores[row] - target), row))[:near], PAIRS_PER_DOCUMENT)
        labels.append(sum(scores[row] for row in chosen) / PAIRS_PER_DOCUMENT)
        for side, column in enumerate(("sentence1", "sentence2")):
            order = draw.sample(chosen, PAIRS_PER_DOCUMENT)
            columns[side].append([pairs[column][row] for row in order])
    texts = [
        _longest([(partial(_cycled, some), PAIRS_PER_DOCUMENT) for some in column], tokenizer, length)
        for column in columns
    ]
    return _dataset(texts[0], texts[1], labels)


def _cycled(sentences: Sequence[str], count: int) -> str:
    return " ".join(sentences[index % len(sentences)] for index in range(count))


def _truncated(pairs: Dataset, tokenizer: Any, length: int, seed: int) -> Dataset:
    documents = _documents(pairs, tokenizer, length, seed)
    if length <= TRUNCATED_TO:
        return documents
    columns = [[_cut(text, tokenizer) for text in documents[column]] for column in ("sentence1", "sentence2")]
    return _dataset(columns[0], columns[1], documents["score"])


def _cut(text: str, tokenizer: Any) -> str:
    special = token_counts([""], tokenizer)[0]
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
    offsets = encoding["offset_mapping"][: TRUNCATED_TO - special]
    return text[: offsets[-1][1]]


def _longest(texts: Sequence[tuple[Callable[[int], str], int | None]], tokenizer: Any, length: int) -> list[str]:
    """Of each text by its number of sentences, the longest within ``length`` tokens; see :func:`lengthen`.

    Each comes with the number that it has at least; None = none but the sentence it is about.
    """
    most = [least or 0 for _, least in texts]
    counts = token_counts([make(number) for (make, _), number in zip(texts, most)], tokenizer)
    for row, count in enumerate(counts):
        if count > length:
            raise ValueError(
                f"length={length} has no room for a text of {count} tokens: {texts[row][0](most[row])[:60]!r}"
            )
    too_many: list[int | None] = [None] * len(texts)
    tokens_each = [1.0] * len(texts)
    trial = [number + _FIRST_TRIAL for number in most]
    # All rows at once, as tokenizers are fast on batches; each trial is where those before it say the end should be.
    active = list(range(len(texts)))
    fitting = list(counts)
    while active:
        counts = token_counts([texts[row][0](trial[row]) for row in active], tokenizer)
        for row, count in zip(active, counts):
            tokens_each[row] = max(1.0, (count - fitting[row]) / (trial[row] - most[row]))
            if count <= length:
                most[row], fitting[row] = trial[row], count
            else:
                too_many[row] = trial[row]
            guess = most[row] + max(1, int((length - fitting[row]) / tokens_each[row]))
            bound = too_many[row]
            trial[row] = guess if bound is None else min(guess, bound - 1)
        active = [row for row in active if too_many[row] != most[row] + 1]
    return [make(number) for (make, _), number in zip(texts, most)]


@cache
def _filler(name: str) -> list[str]:
    return (files("st_linear") / "filler" / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def _dataset(first: Sequence[str], second: Sequence[str], scores: Sequence[float]) -> Dataset:
    return Dataset.from_dict({"sentence1": list(first), "sentence2": list(second), "score": list(scores)})


_PROTOCOLS: dict[str, _Protocol] = {
    "repeat": _repeated,
    **{
        f"filler-{kind}-{place}": partial(_filled, same=kind == "same", place=place)
        for kind in ("same", "different")
        for place in _PLACES
    },
    "document": _documents,
    "truncate": _truncated,
}
