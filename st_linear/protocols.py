"""Sentence pairs brought to a length in tokens, in several ways that each ask something else of a model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.resources import files
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer

from st_linear.data import check_length, repeat_to_length, token_counts

TRUNCATED_TO = 512
"""Tokens that ``truncate`` leaves of a text."""

PAIRS_PER_DOCUMENT = 4
"""Pairs of which ``document`` makes one."""

_FIRST_TRIAL = 8

_PLACES = {"start": 0.0, "middle": 0.5, "end": 1.0, "random": None}
"""Share of the filler that comes before the sentence; None = drawn."""

_Protocol = Callable[[Dataset, Any, int, int], Dataset]


def lengthen(pairs: Dataset, tokenizer: Any, length: int, protocol: str = "repeat", *, seed: int = 0) -> Dataset:
    """
    Bring pairs to a length by a protocol.

    - ``repeat``: each sentence again and again. Asks whether a vector survives length itself; a model that reads only
      the beginning loses nothing.
    - ``filler-same-start`` … ``-middle``, ``-end``, ``-random``: neutral sentences around each sentence, the same, and
      as many, for both of a pair; the sentence stands at that place. Asks whether a model finds what differs in what
      does not. Vectors that follow the filler alone make all pairs equal.
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
        As many pairs; numbers in other columns are treated as the score is, other columns are left out. No text is
        longer than ``length``; one more sentence, or one more repetition, would make it so, or with the same filler,
        the other of its pair. (``truncate`` cuts between tokens.)

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
    check_length(length)
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
    return _dataset(texts[:count], texts[count:], pairs)


def _filled(pairs: Dataset, tokenizer: Any, length: int, seed: int, *, same: bool, place: float | None) -> Dataset:
    columns: list[list[Callable[[int], str]]] = []
    for side, column in enumerate(("sentence1", "sentence2")):
        pool = _filler("first" if same or side == 0 else "second")
        texts: list[Callable[[int], str]] = []
        for row, sentence in enumerate(pairs[column]):
            draw = random.Random(f"{seed} {row} {0 if same else side}")
            order = draw.sample(pool, len(pool))
            # Drawn once for a pair: where the sentence stands must not tell its sides apart.
            where = random.Random(f"{seed} {row} place").random() if place is None else place
            texts.append(partial(_surrounded, sentence, order, where))
        columns.append(texts)
    numbers = [_most_sentences(texts, tokenizer, length, least=0) for texts in columns]
    if same:
        # One sentence of filler more on a side would tell the two apart as much as what is asked about.
        numbers = [[min(both) for both in zip(*numbers)]] * 2
    first, second = ([make(n) for make, n in zip(texts, some)] for texts, some in zip(columns, numbers))
    return _dataset(first, second, pairs)


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
    scores = [float(score) for score in pairs["score"]]
    rows = sorted((row for row, cost in enumerate(costs) if cost <= room), key=lambda row: (scores[row], row))
    if len(rows) < PAIRS_PER_DOCUMENT:
        raise ValueError(
            f"length={length} has no room for documents of {PAIRS_PER_DOCUMENT} pairs: {len(rows)} of {len(pairs)} "
            "are short enough"
        )
    sentences = [list(pairs[column]) for column in ("sentence1", "sentence2")]
    low, high = scores[rows[0]], scores[rows[-1]]
    near = max(PAIRS_PER_DOCUMENT, len(rows) // 10)
    columns: tuple[list[Callable[[int], str]], list[Callable[[int], str]]] = ([], [])
    combined = []
    for number in range(len(pairs)):
        draw = random.Random(f"{seed} {number}")
        # Labels are spread evenly from the lowest to the highest, in random order.
        target = low + (high - low) * (number + draw.random()) / len(pairs)
        chosen = draw.sample(sorted(rows, key=lambda row: (abs(scores[row] - target), row))[:near], PAIRS_PER_DOCUMENT)
        combined.append(chosen)
        for side, column in zip(sentences, columns):
            order = draw.sample(chosen, PAIRS_PER_DOCUMENT)
            column.append(partial(_cycled, [side[row] for row in order]))
    first, second = (
        [make(n) for make, n in zip(some, _most_sentences(some, tokenizer, length, least=PAIRS_PER_DOCUMENT))]
        for some in columns
    )
    labels = {
        column: [sum(float(values[row]) for row in chosen) / PAIRS_PER_DOCUMENT for chosen in combined]
        for column, values in _labels(pairs).items()
    }
    return Dataset.from_dict({"sentence1": first, "sentence2": second, **labels})


def _cycled(sentences: Sequence[str], count: int) -> str:
    return " ".join(sentences[index % len(sentences)] for index in range(count))


def _truncated(pairs: Dataset, tokenizer: Any, length: int, seed: int) -> Dataset:
    documents = _documents(pairs, tokenizer, length, seed)
    if length <= TRUNCATED_TO:
        return documents
    room = TRUNCATED_TO - token_counts([""], tokenizer)[0]
    first, second = ([_cut(text, tokenizer, room) for text in documents[c]] for c in ("sentence1", "sentence2"))
    return _dataset(first, second, documents)


def _cut(text: str, tokenizer: Any, room: int) -> str:
    if isinstance(tokenizer, Tokenizer):
        offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    else:
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "truncation": False}
        offsets = tokenizer(text, verbose=False, **options)["offset_mapping"]
    return text[: offsets[:room][-1][1]]


def _most_sentences(texts: Sequence[Callable[[int], str]], tokenizer: Any, length: int, *, least: int) -> list[int]:
    """For each text by its number of sentences, how many keep it within ``length`` tokens; ``least`` must."""
    most = [least] * len(texts)
    fitting = token_counts([make(least) for make in texts], tokenizer)
    for make, count in zip(texts, fitting):
        if count > length:
            raise ValueError(f"length={length} has no room for a text of {count} tokens: {make(least)[:60]!r}")
    too_many: list[int | None] = [None] * len(texts)
    trial = [least + _FIRST_TRIAL] * len(texts)
    # All rows at once, as tokenizers are fast on batches; each trial is where those before it say the end should be.
    active = list(range(len(texts)))
    while active:
        counts = token_counts([texts[row](trial[row]) for row in active], tokenizer)
        for row, count in zip(active, counts):
            tokens_each = max(1.0, (count - fitting[row]) / (trial[row] - most[row]))
            if count == fitting[row]:
                raise ValueError(f"texts of no tokens make none longer: {texts[row](trial[row])[-60:]!r}")
            if count <= length:
                most[row], fitting[row] = trial[row], count
            else:
                too_many[row] = trial[row]
            guess = most[row] + max(1, int((length - fitting[row]) / tokens_each))
            bound = too_many[row]
            trial[row] = guess if bound is None else min(guess, bound - 1)
        active = [row for row in active if too_many[row] != most[row] + 1]
    return most


@cache
def _filler(name: str) -> list[str]:
    return (files("st_linear") / "filler" / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def _dataset(first: Sequence[str], second: Sequence[str], pairs: Dataset) -> Dataset:
    """Other texts with the labels of ``pairs``, row by row."""
    return Dataset.from_dict({"sentence1": list(first), "sentence2": list(second), **_labels(pairs)})


def _labels(pairs: Dataset) -> dict[str, list[float]]:
    """The columns of numbers, by name."""
    columns = {name: list(pairs[name]) for name in pairs.column_names if name not in ("sentence1", "sentence2")}
    return {name: some for name, some in columns.items() if all(isinstance(value, (int, float)) for value in some)}


_PROTOCOLS: dict[str, _Protocol] = {
    "repeat": _repeated,
    **{
        f"filler-{kind}-{place}": partial(_filled, same=kind == "same", place=share)
        for kind in ("same", "different")
        for place, share in _PLACES.items()
    },
    "document": _documents,
    "truncate": _truncated,
}
