"""Sentence pairs with similarity scores (STS-B and its like), and their texts at a chosen length in tokens."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub.utils import logging as hub_logging
from tokenizers import Tokenizer

SPLITS = ("train", "dev", "test")

_FILE_NAMES = {"train": ("train",), "dev": ("dev", "validation"), "test": ("test",)}
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_SENTENCE_COLUMNS = (("sentence1", "sentence2"), ("text1", "text2"), ("sentence_a", "sentence_b"))
_SCORE_COLUMNS = ("score", "label", "similarity_score")
_GLUE = ("glue/stsb", "nyu-mll/glue/stsb", "nyu-mll/glue")
_STSB = "sentence-transformers/stsb"
# Below this many rows, a file whose scores are all at most 1 may be what it says.
_ROWS_TO_TELL_SCALE = 20
_BATCH_CHARACTERS = 2_000_000

_Table = tuple[list[str], Sequence[Sequence[Any]]]


def load_pairs(
    source: str | Path = "sample", split: str = "train", *, score_range: tuple[float, float] = (0.0, 5.0)
) -> datasets.Dataset:
    """
    Load sentence pairs with similarity scores.

    Args:
        source: One of

            - ``"sample"``: the pairs packaged with st_linear (a folder of that name is ``"./sample"``);
            - a local folder with ``train``, ``dev`` (or ``validation``) and ``test`` files, each ``.csv``, ``.tsv``,
              ``.jsonl`` or ``.parquet``. Without a header the columns are sentence1, sentence2, score; with one they
              are sentence1/sentence2, text1/text2 or sentence_A/sentence_B, and score, label or similarity_score
              (the first of these there is; case does not matter). Quotes mean nothing in a ``.tsv``, as in GLUE's;
            - a Hugging Face Hub dataset with such columns, e.g. ``"sentence-transformers/stsb"`` or ``"glue/stsb"``.
        split: ``"train"``, ``"dev"`` (or ``"validation"``) or ``"test"``.
        score_range: The lowest and the highest score that the source's scale allows. The sample, ``glue/stsb`` and
            ``sentence-transformers/stsb`` have a known scale, for which this is not used.

    Returns:
        A dataset with the columns ``sentence1``, ``sentence2`` and ``score``, the score mapped from ``score_range``
        to 0–1, Sentence Transformers' convention.

    Raises:
        FileNotFoundError: If the folder, the split's file or the hub dataset can't be reached.
        ValueError: If an argument is none of the choices, a file can't be read, a column is missing, a sentence is
            empty, or a score is no number or outside ``score_range``.

    References:
        - SemEval-2017 Task 1: Semantic Textual Similarity: https://arxiv.org/abs/1708.00055
        - GLUE: https://arxiv.org/abs/1804.07461

    Example:
        >>> from st_linear.data import load_pairs
        >>> pairs = load_pairs("sample", "dev")
        >>> pairs.column_names
        ['sentence1', 'sentence2', 'score']
        >>> 0 <= min(pairs["score"]) and max(pairs["score"]) <= 1
        True
    """
    split = _split(split)
    low, high = _score_range(score_range)
    if source == "sample":
        file = files("st_linear") / "sample" / f"{split}.csv"
        return _pairs(f"the bundled sample's {split}.csv", _read(file.name, file.read_bytes(), file.name), 0.0, 5.0)
    folder = _as_folder(source)
    if folder is not None:
        path = _split_file(folder, split)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path} can't be read: {error}") from error
        return _pairs(str(path), _read(str(path), content, path.name), low, high)
    if source in _GLUE:
        if split == "test":
            raise ValueError(
                f"split='test' of source={source!r} has hidden labels (all -1); use source={_STSB!r}, the same pairs "
                "with their labels"
            )
        low, high = 0.0, 5.0
    elif source == _STSB:
        low, high = 0.0, 1.0
    return _pairs(f"{source} ({split})", _load_hub(str(source), split), low, high)


def source_name(source: str | Path) -> str:
    """
    Name a source of pairs for people and for records.

    Args:
        source: What :func:`load_pairs` takes.

    Returns:
        What the sample is, the path of a folder as given, or the id of a hub dataset.

    Raises:
        FileNotFoundError: If ``source`` is written as a path and there is no such folder.
        ValueError: If ``source`` is empty or a file.
    """
    if source == "sample":
        return "bundled sample (672 pairs written for st_linear; not STS-B)"
    _as_folder(source)
    return f"./{source}" if str(source) == "sample" else str(source)


def training_sentences(dataset: datasets.Dataset) -> list[str]:
    """
    List the distinct sentences of both columns.

    Args:
        dataset: Pairs as :func:`load_pairs` returns them.

    Returns:
        Each sentence once, in order of first appearance, row by row.

    Raises:
        ValueError: If the dataset has no column ``sentence1`` or ``sentence2``.
    """
    missing = {"sentence1", "sentence2"}.difference(dataset.column_names)
    if missing:
        raise ValueError(
            f"dataset has no column {', '.join(sorted(missing))}; its columns: {', '.join(dataset.column_names)}"
        )
    return list(dict.fromkeys(chain.from_iterable(zip(dataset["sentence1"], dataset["sentence2"], strict=True))))


def token_counts(texts: Sequence[str], tokenizer: Any) -> list[int]:
    """
    Count the tokens of each text, special tokens included and nothing truncated.

    Args:
        texts: The texts.
        tokenizer: A transformers tokenizer; or a ``tokenizers.Tokenizer``, such as that of Sentence Transformers'
            ``StaticEmbedding``, and then without special tokens, as that module reads its texts.

    Returns:
        One count per text.

    Raises:
        ValueError: If ``tokenizer`` is neither.
    """
    counts: list[int] = []
    for batch in _batches(texts):
        if isinstance(tokenizer, Tokenizer):
            # A truncating tokenizer hands the rest over as overflow.
            encodings = tokenizer.encode_batch(batch, add_special_tokens=False)
            counts += [sum(len(part.ids) for part in (encoding, *encoding.overflowing)) for encoding in encodings]
        elif callable(tokenizer):
            encoded = tokenizer(
                batch,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            counts += [len(ids) for ids in encoded["input_ids"]]
        else:
            raise ValueError(
                f"tokenizer={type(tokenizer).__name__} can't count tokens; pass a transformers tokenizer or a "
                "tokenizers.Tokenizer"
            )
    return counts


def evenly_spaced(rows: Sequence[Any], count: int) -> list[Any]:
    """
    Choose some of many.

    Args:
        rows: What to choose from.
        count: How many, at most.

    Returns:
        ``count`` of them at equal distances, the same each time; all of them where there are no more.
    """
    count = min(count, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def load_texts(source: str | Path) -> dict[str, str]:
    """
    Read plain texts.

    Args:
        source: A ``.txt`` file in UTF-8, or a folder of some.

    Returns:
        The texts by file name, in order of name.

    Raises:
        FileNotFoundError: If there is no such file or folder, or no ``.txt`` file in it.
        ValueError: If a file is not UTF-8.
    """
    path = Path(source).expanduser()
    paths = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not paths or not all(path.is_file() for path in paths):
        raise FileNotFoundError(f"{source} is no .txt file, and no folder that holds one")
    texts = {}
    for path in paths:
        try:
            texts[path.name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error})") from error
    return texts


def passages(text: str, tokenizer: Any, length: int) -> list[str]:
    """
    Cut a text into passages of at most ``length`` tokens, between words.

    Args:
        text: The text.
        tokenizer: A fast transformers tokenizer.
        length: The most tokens that a passage may come to, special tokens included.

    Returns:
        The passages, one behind the other, as many as are full: what is left at the end is not among them. A passage
        is shorter than ``length`` by less than its last word.

    Raises:
        ValueError: If ``length`` leaves no room for text.
    """
    room = length - tokenizer.num_special_tokens_to_add()
    if room < 1:
        raise ValueError(f"length={length} leaves no room for text beside the special tokens")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
    offsets, words = encoding["offset_mapping"], encoding.word_ids()
    cut: list[str] = []
    start = 0
    while start + room <= len(words):
        stop = start + room
        while start < stop < len(words) and words[stop] == words[stop - 1]:
            stop -= 1
        # A word that fills the passage alone is cut.
        stop = stop if stop > start else start + room
        cut.append(text[offsets[start][0] : offsets[stop - 1][1]])
        start = stop
    return cut


def check_length(length: int) -> None:
    """Raise a ValueError unless ``length`` is a positive integer."""
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"length={length!r} must be a positive integer, in tokens")


def repeat_to_length(texts: Sequence[str], tokenizer: Any, length: int) -> list[str]:
    """
    Repeat each text, whole and joined by spaces, as often as fits in ``length`` tokens.

    This is the ``repeat`` protocol of STS-B beyond 512 tokens: the meaning stays, the length grows. The achieved
    lengths lie within one repetition below ``length``.

    Args:
        texts: The texts, none longer than ``length``.
        tokenizer: What :func:`token_counts` takes.
        length: The most tokens that a text may come to, special tokens included.

    Returns:
        One text per text, in order. Time is linear in the number of tokens returned.

    Raises:
        ValueError: If ``length`` is not a positive integer, or a text is longer than it or has no tokens.
    """
    check_length(length)
    distinct = list(dict.fromkeys(texts))
    once = token_counts(distinct, tokenizer)
    twice = token_counts([_repeat(text, 2) for text in distinct], tokenizer)
    copies: list[int] = []
    for text, single, double in zip(distinct, once, twice, strict=True):
        if single > length:
            raise ValueError(f"texts[{list(texts).index(text)}] has {single} tokens, more than length={length}")
        if double <= single:
            raise ValueError(f"texts[{list(texts).index(text)}] ({text[:20]!r}) has no tokens to repeat")
        copies.append(1 + (length - single) // (double - single))
    repeated = {text: _repeat(text, number) for text, number in zip(distinct, copies, strict=True)}
    achieved = token_counts(list(repeated.values()), tokenizer)
    for text, number, single, double, count in zip(distinct, copies, once, twice, achieved, strict=True):
        # As predicted: every repetition costs the same, so no more fit. Some tokenizers merge across repetitions.
        if count != single + (number - 1) * (double - single):
            repeated[text] = _repeat_by_search(text, tokenizer, length)
    return [repeated[text] for text in texts]


def _repeat(text: str, copies: int) -> str:
    return " ".join([text] * copies)


def _repeat_by_search(text: str, tokenizer: Any, length: int) -> str:
    def fits(copies: int) -> bool:
        return token_counts([_repeat(text, copies)], tokenizer)[0] <= length

    most, too_many = 1, 2
    while too_many <= length and fits(too_many):
        most, too_many = too_many, too_many * 2
    while too_many - most > 1:
        middle = (most + too_many) // 2
        most, too_many = (middle, too_many) if fits(middle) else (most, middle)
    return _repeat(text, most)


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _split(split: str) -> str:
    for name, synonyms in _FILE_NAMES.items():
        if split in synonyms:
            return name
    raise ValueError(f"split={split!r} is none of {', '.join(SPLITS)} (validation is dev)")


def _score_range(score_range: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(bound) for bound in score_range)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"score_range={score_range!r} must be two numbers, the lower first, e.g. (0, 5)")
    return low, high


def _as_folder(source: str | Path) -> Path | None:
    """The folder that ``source`` names, or None where it can only be a hub id."""
    if not isinstance(source, Path) and (not isinstance(source, str) or not source.strip()):
        raise ValueError(f"source={source!r} must be 'sample', a folder or a Hugging Face Hub id")
    if source in _GLUE:
        return None
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"source={str(source)!r} is a file; pass the folder that holds the train, dev and test files")
    text = str(source)
    written_as_path = isinstance(source, Path) or text.startswith((".", "~", "/")) or "\\" in text
    if written_as_path or text.count("/") > 1 or path.suffix in _SUFFIXES:
        raise FileNotFoundError(
            f"source={text!r}: there is no such folder; pass one with train, dev and test files, a hub id or 'sample'"
        )
    return None


def _split_file(folder: Path, split: str) -> Path:
    stems = _FILE_NAMES[split]
    wanted = [folder / f"{stem}{suffix}" for stem in stems for suffix in _SUFFIXES]
    found = [path for path in wanted if path.is_file()]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"source={str(folder)!r} holds more than one file for split={split!r} ({names}); keep one")
    if not found:
        present = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in _SUFFIXES)) or "none"
        raise FileNotFoundError(
            f"source={str(folder)!r} has no {'|'.join(stems)} file for split={split!r} "
            f"({', '.join(_SUFFIXES)}); data files there: {present}"
        )
    return found[0]


def _read(origin: str, content: bytes, file_name: str) -> _Table:
    suffix = Path(file_name).suffix
    try:
        if suffix == ".parquet":
            return _read_parquet(content)
        text = content.decode("utf-8-sig")
        if suffix == ".jsonl":
            return _read_jsonl(text)
        return _read_delimited(text, tab=suffix == ".tsv")
    except (ValueError, OSError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{origin} can't be read as {suffix[1:]} in UTF-8: {reason}") from error


def _read_parquet(content: bytes) -> _Table:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(io.BytesIO(content))
    return list(table.column_names), list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def _read_jsonl(text: str) -> _Table:
    records: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"line {number} is not an object")
        records.append(record)
    columns = list(dict.fromkeys(chain.from_iterable(records)))
    return columns, [[record.get(column) for column in columns] for record in records]


def _read_delimited(text: str, tab: bool) -> _Table:
    # GLUE's .tsv has lone quotes in its texts; a .csv read without strict ends at the first quote left open.
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tab else {"strict": True}
    rows: list[list[str]] = []
    limit = csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), **options)
        for row in filter(None, reader):
            rows.append(row)
            if len(row) != len(rows[0]):
                raise ValueError(f"line {reader.line_num}: {len(row)} cells, where the first line has {len(rows[0])}")
    finally:
        csv.field_size_limit(limit)
    if not rows:
        return ["sentence1", "sentence2", "score"], []
    first = rows[0]
    if len(first) == 3 and _number(first[2]) is not None:
        return ["sentence1", "sentence2", "score"], rows
    return first, rows[1:]


def _load_hub(source: str, split: str) -> _Table:
    name, config = ("nyu-mll/glue", "stsb") if source in _GLUE else (source, None)
    verbosity = hub_logging.get_verbosity()
    # Without a network the hub client warns of every retry; the one line below says all that matters.
    hub_logging.set_verbosity_error()
    try:
        splits = datasets.load_dataset(name, config)
    except Exception as error:  # The hub, its cache and the dataset's builder each have errors of their own.
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"source={source!r} is no local folder and can't be loaded from the Hugging Face Hub ({reason}); pass a "
            "local folder or 'sample'"
        ) from error
    finally:
        hub_logging.set_verbosity(verbosity)
    for key in _FILE_NAMES[split]:
        if key in splits:
            columns = list(splits[key].column_names)
            return columns, list(zip(*(splits[key][column] for column in columns), strict=True))
    raise ValueError(f"source={source!r} has no split {split!r}; its splits: {', '.join(splits)}")


def _pairs(origin: str, table: _Table, low: float, high: float) -> datasets.Dataset:
    columns, rows = table
    first, second, score = _columns(origin, columns)
    if not rows:
        raise ValueError(f"{origin} holds no pairs")
    values = [_checked_score(origin, row[score], number, low, high) for number, row in enumerate(rows, start=1)]
    for number, row in enumerate(rows, start=1):
        for index in (first, second):
            if not isinstance(row[index], str) or not row[index].strip():
                raise ValueError(f"{origin}, row {number}: {columns[index]} is {row[index]!r}, not a text")
    if low == 0 and high > 1 and len(values) >= _ROWS_TO_TELL_SCALE and max(values) <= 1:
        raise ValueError(
            f"{origin}: no score is above 1 although score_range=({low:g}, {high:g}); if the scale is 0 to 1 pass "
            "score_range=(0, 1)"
        )
    return datasets.Dataset.from_dict(
        {
            "sentence1": [row[first] for row in rows],
            "sentence2": [row[second] for row in rows],
            "score": [(value - low) / (high - low) for value in values],
        }
    )


def _columns(origin: str, columns: list[str]) -> tuple[int, int, int]:
    listed = ", ".join(column[:30] for column in columns) or "none"
    if len(columns) == 1:
        raise ValueError(f"{origin} has one column ({listed}); sentence1, sentence2 and score are needed")
    names = [column.strip().casefold() for column in columns]
    pair = next((pair for pair in _SENTENCE_COLUMNS if set(pair).issubset(names)), None)
    if pair is None:
        raise ValueError(
            f"{origin} has no pair of sentence columns (sentence1/sentence2, text1/text2 or sentence_A/sentence_B); "
            f"its columns: {listed}"
        )
    score = next((name for name in _SCORE_COLUMNS if name in names), None)
    if score is None:
        raise ValueError(f"{origin} has no score column ({', '.join(_SCORE_COLUMNS)}); its columns: {listed}")
    return names.index(pair[0]), names.index(pair[1]), names.index(score)


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError):
        return None


def _checked_score(origin: str, value: Any, row: int, low: float, high: float) -> float:
    score = _number(value)
    if score is None:
        raise ValueError(f"{origin}, row {row}: score {value!r} is not a number")
    if math.isnan(score):
        raise ValueError(f"{origin}, row {row}: score is NaN")
    if not low <= score <= high:
        raise ValueError(f"{origin}, row {row}: score {score:g} is outside score_range=({low:g}, {high:g})")
    return score
