from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizerFast

from st_linear.data import (
    SPLITS,
    evenly_spaced,
    load_pairs,
    load_texts,
    passages,
    repeat_to_length,
    source_name,
    token_counts,
    training_sentences,
)

STSB = Path(os.environ.get("ST_LINEAR_STSB", Path(__file__).parents[1] / "../shared/data/stsb"))
HEADER = "sentence1,sentence2,score\n"


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str | bytes, name: str = "train.csv") -> Path:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return tmp_path

    return write


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizerFast:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "sat", "##s", "."]
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(vocabulary))
    return BertTokenizerFast(str(path), model_max_length=16)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, str | None]]]:
    def answer(**splits: dict[str, list] | None) -> list[tuple[str, str | None]]:
        asked: list[tuple[str, str | None]] = []

        def load_dataset(name: str, config: str | None = None) -> datasets.DatasetDict:
            asked.append((name, config))
            return datasets.DatasetDict({key: datasets.Dataset.from_dict(value) for key, value in splits.items()})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return answer


@pytest.mark.parametrize(("split", "rows"), [("train", 480), ("dev", 96), ("validation", 96), ("test", 96)])
def test_sample_has_its_rows_and_normalised_scores(split: str, rows: int) -> None:
    pairs = load_pairs("sample", split)
    assert pairs.column_names == ["sentence1", "sentence2", "score"]
    assert len(pairs) == rows
    assert all(0 <= score <= 1 for score in pairs["score"])
    assert max(pairs["score"]) > 0.5


def test_sample_is_the_default_and_its_name_tells_its_size_and_origin() -> None:
    assert load_pairs()[0] == load_pairs("sample", "train")[0]
    total = sum(len(load_pairs("sample", split)) for split in SPLITS)
    assert source_name("sample") == f"bundled sample ({total} pairs written for st_linear; not STS-B)"


@pytest.mark.skipif(not STSB.is_dir(), reason="set ST_LINEAR_STSB to a folder with STS-B")
def test_stsb_has_its_rows_and_range() -> None:
    for split, rows in (("train", 5749), ("dev", 1500), ("test", 1379)):
        pairs = load_pairs(STSB, split)
        assert len(pairs) == rows
        assert (min(pairs["score"]), max(pairs["score"])) == (0, 1)
    assert pairs[0] == {
        "sentence1": "A girl is styling her hair.",
        "sentence2": "A girl is brushing her hair.",
        "score": 0.5,
    }


@pytest.mark.parametrize(
    "text",
    [
        'a cat,"a dog, sitting",2.5\na,b,0\n',
        '\ufeffsentence1,sentence2,score\na cat,"a dog, sitting",2.5\na,b,0\n',
        'text1,text2,label\r\na cat,"a dog, sitting",2.5\r\n\r\na,b,0\r\n',
        'id,sentence_A,sentence_B,similarity_score\n7,a cat,"a dog, sitting",2.5\n8,a,b,0.0\n',
        'label,Sentence2,Sentence1, Score \n1,"a dog, sitting",a cat,2.5\n1,b,a,0\n',
    ],
    ids=["no header", "byte-order mark", "text1 and label", "SICK's names", "case, order and a label to pass over"],
)
def test_csv_headers(folder: Callable[..., Path], text: str) -> None:
    pairs = load_pairs(folder(text))
    assert pairs[:] == {"sentence1": ["a cat", "a"], "sentence2": ["a dog, sitting", "b"], "score": [0.5, 0.0]}


def test_glue_tsv_keeps_lone_quotes(folder: Callable[..., Path]) -> None:
    header = "index genre filename year old_index source1 source2 sentence1 sentence2 score".replace(" ", "\t")
    row = '0\tmain-news\theadlines\t2015\t1\tnone\tnone\t"Never, he said\tNA\t5.000'
    pairs = load_pairs(folder(f"{header}\n{row}\n{row}\n", "dev.tsv"), "validation")
    assert pairs["sentence1"][:] == ['"Never, he said'] * 2
    assert pairs["sentence2"][:] == ["NA"] * 2
    assert pairs["score"][:] == [1.0, 1.0]


def test_jsonl_and_parquet(folder: Callable[..., Path]) -> None:
    rows = [
        {"sentence1": "a\u2028b", "sentence2": "c", "score": 1},
        {"score": 5.0, "sentence1": "d", "sentence2": "e"},
    ]
    path = folder("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", "train.jsonl")
    datasets.Dataset.from_dict({"text1": ["a"], "text2": ["b"], "label": [2.5]}).to_parquet(path / "test.parquet")
    assert load_pairs(path)[:] == {"sentence1": ["a\u2028b", "d"], "sentence2": ["c", "e"], "score": [0.2, 1.0]}
    assert load_pairs(str(path), "test")[:] == {"sentence1": ["a"], "sentence2": ["b"], "score": [0.5]}


def test_dev_and_validation_name_one_split(folder: Callable[..., Path]) -> None:
    path = folder("a,b,1\n", "validation.csv")
    assert load_pairs(path, "dev")[:] == load_pairs(path, "validation")[:]


def test_score_range_maps_to_zero_and_one(folder: Callable[..., Path]) -> None:
    assert load_pairs(folder("a,b,-1\na,c,0\na,d,1\n"), score_range=(-1, 1))["score"][:] == [0, 0.5, 1]


def test_a_very_long_cell_is_read(folder: Callable[..., Path]) -> None:
    text = "word " * 40_000
    assert load_pairs(folder(f"{text},b,1\n"))["sentence1"][:] == [text]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "train.csv holds no pairs"),
        (HEADER, "train.csv holds no pairs"),
        ("only a text\nanother\n", r"has one column \(only a text\); sentence1, sentence2 and score are needed"),
        ("sentence1,sentence2,gold\na,b,1\n", r"has no score column .*; its columns: sentence1, sentence2, gold"),
        ("one,two,score\na,b,1\n", r"no pair of sentence columns .*; its columns: one, two, score"),
        (HEADER + "a,b,1\na,,1\n", "row 2: sentence2 is '', not a text"),
        (HEADER + "  ,b,1\n", "row 1: sentence1 is '  ', not a text"),
        (HEADER + "a,b,1\na,b,high\n", "row 2: score 'high' is not a number"),
        (HEADER + "a,b,\n", "row 1: score '' is not a number"),
        ("a,b,1\na,b,nan\n", "row 2: score is NaN"),
        ("a,b,1\na,b,5.5\n", r"row 2: score 5.5 is outside score_range=\(0, 5\)"),
        ("a,b,-1\n", r"row 1: score -1 is outside score_range=\(0, 5\)"),
        ("a,b,1\na,b,inf\n", "row 2: score inf is outside"),
        ("a,b,0.5\n" * 20, r"no score is above 1 .* pass score_range=\(0, 1\)"),
        ("a,b,1\na,b,c,1\n", "can't be read as csv in UTF-8: line 2: 4 cells, where the first line has 3"),
        ('a,b,1\na,"b,2\na,b,3\n', "can't be read as csv in UTF-8: unexpected end of data"),
        ("caf\xe9,b,1\n".encode("latin-1"), "can't be read as csv in UTF-8: 'utf-8' codec"),
    ],
)
def test_bad_csv_is_refused(folder: Callable[..., Path], text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_pairs(folder(text))
    assert "\n" not in str(caught.value)
    assert "train.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"sentence1": "a", "sentence2": "b", "score": 1}\n{"sentence1":\n', "can't be read as jsonl .* line 2: "),
        ("[1, 2]\n", "line 1 is not an object"),
        ('{"sentence1": "a", "sentence2": null, "score": 1}\n', "row 1: sentence2 is None, not a text"),
        ('{"sentence1": "a", "sentence2": 7, "score": 1}\n', "row 1: sentence2 is 7, not a text"),
        ('{"sentence1": "a", "sentence2": "b", "score": true}\n', "row 1: score True is not a number"),
        ('{"sentence1": "a", "sentence2": "b", "score": null}\n', "row 1: score None is not a number"),
    ],
)
def test_bad_jsonl_is_refused(folder: Callable[..., Path], text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pairs(folder(text, "train.jsonl"))


def test_a_damaged_parquet_is_refused(folder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"train\.parquet can't be read as parquet"):
        load_pairs(folder(b"PAR1 and no more", "train.parquet"))


def test_an_unreadable_file_is_refused(folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder("a,b,1\n")

    def denied(self: Path) -> bytes:
        raise PermissionError("denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(ValueError, match=r"train\.csv can't be read: denied"):
        load_pairs(path)


def test_nineteen_small_scores_may_be_what_they_say(folder: Callable[..., Path]) -> None:
    assert load_pairs(folder("a,b,0.5\n" * 19))["score"][0] == pytest.approx(0.1)
    assert load_pairs(folder("a,b,0.5\n" * 20), score_range=(0, 1))["score"][0] == 0.5


def test_missing_files_are_named(folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such folder; pass one with train"):
        load_pairs(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_pairs("./absent")
    path = folder("a,b,1\n")
    with pytest.raises(FileNotFoundError, match=r"no dev\|validation file for split='dev' .*there: train\.csv"):
        load_pairs(path, "dev")
    with pytest.raises(ValueError, match="is a file; pass the folder that holds"):
        load_pairs(path / "train.csv")
    folder("a,b,1\n", "train.tsv")
    with pytest.raises(ValueError, match=r"more than one file for split='train' \(train\.csv, train\.tsv\); keep one"):
        load_pairs(path)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"split='eval' is none of train, dev, test \(validation is dev\)"):
        load_pairs("sample", "eval")
    with pytest.raises(ValueError, match="source='' must be 'sample', a folder or a Hugging Face Hub id"):
        load_pairs("")
    for bad in ((5, 0), (0, float("nan")), (0,), "05x"):
        with pytest.raises(ValueError, match=r"score_range=.* must be two numbers, the lower first"):
            load_pairs("sample", score_range=bad)  # type: ignore[arg-type]


def test_hub_datasets(hub: Callable[..., list]) -> None:
    sentences = {"sentence1": ["a"] * 20, "sentence2": ["b"] * 20}
    asked = hub(validation={**sentences, "score": [0.25] * 20}, test={**sentences, "score": [1.0] * 20})
    assert load_pairs("sentence-transformers/stsb", "dev")["score"][0] == 0.25
    assert load_pairs("sentence-transformers/stsb", "test")["score"][0] == 1
    assert asked == [("sentence-transformers/stsb", None)] * 2
    with pytest.raises(ValueError, match="has no split 'train'; its splits: validation, test"):
        load_pairs("sentence-transformers/stsb")
    with pytest.raises(ValueError, match=r"no score is above 1 .* pass score_range=\(0, 1\)"):
        load_pairs("somebody/pairs", "dev")
    assert load_pairs("somebody/pairs", "dev", score_range=(0, 1))["score"][0] == 0.25


@pytest.mark.parametrize("source", ["glue/stsb", "nyu-mll/glue", "nyu-mll/glue/stsb"])
def test_glue(hub: Callable[..., list], source: str) -> None:
    asked = hub(train={"sentence1": ["a"], "sentence2": ["b"], "label": [2.5], "idx": [0]})
    assert load_pairs(source, score_range=(0, 1))["score"][:] == [0.5]
    assert asked == [("nyu-mll/glue", "stsb")]
    with pytest.raises(ValueError, match=r"hidden labels .* use source='sentence-transformers/stsb'"):
        load_pairs(source, "test")


def test_hub_out_of_reach_takes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str | None = None) -> None:
        raise ConnectionError(f"Couldn't reach\n'{name}'")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match=r"'some/pairs' .*Couldn't reach.*local folder or 'sample'$") as caught:
        load_pairs("some/pairs")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_source_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sample").mkdir()
    assert source_name("./sample") == "./sample"
    assert source_name(Path("sample")) == "./sample"
    assert source_name("glue/stsb") == "glue/stsb"
    assert source_name("sentence-transformers/stsb") == "sentence-transformers/stsb"


def test_training_sentences_are_distinct_and_in_order() -> None:
    pairs = datasets.Dataset.from_dict({"sentence1": ["b", "a", "b"], "sentence2": ["a", "c", "d"]})
    assert training_sentences(pairs) == ["b", "a", "c", "d"]
    with pytest.raises(ValueError, match="no column sentence2; its columns: sentence1"):
        training_sentences(pairs.remove_columns("sentence2"))


@pytest.mark.parametrize("length", [3, 4, 5, 11, 12, 64, 1000])
def test_repeat_to_length_is_whole_and_maximal(tokenizer: BertTokenizerFast, length: int) -> None:
    texts = ["cat", "a", "cat"] if length < 5 else ["a cats", "dog.", "a cats"]
    repeated = repeat_to_length(texts, tokenizer, length)
    assert repeated == repeat_to_length(texts, tokenizer, length)
    assert repeated[0] == repeated[2]
    for text, long in zip(texts, repeated):
        copies = len(long.split(" ")) // len(text.split(" "))
        assert long == " ".join([text] * copies)
        fits, too_long = token_counts([long, f"{long} {text}"], tokenizer)
        assert fits <= length < too_long


def test_a_text_of_just_the_length_stays(tokenizer: BertTokenizerFast) -> None:
    assert repeat_to_length(["a cats ."], tokenizer, 6) == ["a cats ."]
    with pytest.raises(ValueError, match=r"texts\[1\] has 6 tokens, more than length=5"):
        repeat_to_length(["a", "a cats ."], tokenizer, 5)


@pytest.mark.parametrize("drift", [-1, 1])
@pytest.mark.parametrize("length", [4, 7, 30, 100])
def test_repeat_to_length_where_repetitions_differ_in_cost(drift: int, length: int) -> None:
    def tokens(text: str) -> int:
        copies = len(text.split(" "))
        return 4 * copies + drift * (copies // 3)

    def uneven(batch: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[0] * tokens(text) for text in batch]}

    (long,) = repeat_to_length(["word"], uneven, length)
    assert tokens(long) <= length < tokens(f"{long} word word")


def test_repeat_to_length_refuses(tokenizer: BertTokenizerFast) -> None:
    for bad in (0, -1, 2.5, True, "64"):
        with pytest.raises(ValueError, match=r"length=.* must be a positive integer, in tokens"):
            repeat_to_length(["a"], tokenizer, bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"texts\[1\] \('\\u200b'\) has no tokens to repeat"):
        repeat_to_length(["a", "\u200b"], tokenizer, 8)
    with pytest.raises(ValueError, match="tokenizer=object can't count tokens"):
        repeat_to_length(["a"], object(), 8)


def test_token_counts_sees_past_truncation(tokenizer: BertTokenizerFast) -> None:
    text = "cat " * 50
    assert token_counts([text, "", "cats"], tokenizer) == [52, 2, 4]
    words = Tokenizer(models.WordLevel({"cat": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.enable_truncation(8)
    assert token_counts([text, "dog cat"], words) == [50, 2]
    assert token_counts([], words) == []


@pytest.mark.parametrize(
    ("rows", "count", "expected"),
    [(10, 4, [0, 2, 5, 7]), (10, 5, [0, 2, 4, 6, 8]), (10, 10, list(range(10))), (3, 7, [0, 1, 2]), (7, 1, [0])],
)
def test_evenly_spaced(rows: int, count: int, expected: list[int]) -> None:
    assert evenly_spaced(range(rows), count) == expected


class TestTexts:
    def test_a_file_and_a_folder(self, tmp_path: Path) -> None:
        for name, text in (("b.txt", "second\n"), ("a.txt", "première"), ("notes.md", "no")):
            (tmp_path / name).write_text(text, encoding="utf-8")
        assert load_texts(tmp_path) == {"a.txt": "première", "b.txt": "second\n"}
        assert list(load_texts(str(tmp_path))) == ["a.txt", "b.txt"]
        assert load_texts(tmp_path / "b.txt") == {"b.txt": "second\n"}

    def test_what_is_none_is_refused(self, tmp_path: Path) -> None:
        for source in (tmp_path, tmp_path / "missing.txt"):
            with pytest.raises(FileNotFoundError, match=r"is no \.txt file, and no folder that holds one"):
                load_texts(source)
        (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
        with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
            load_texts(tmp_path)


class TestPassages:
    def test_they_are_full_and_follow_each_other(self, tokenizer: BertTokenizerFast) -> None:
        words = ["a", "cat", "dog", "sat"] * 9
        cut = passages(" ".join(words), tokenizer, 7)
        assert token_counts(cut, tokenizer) == [7] * 7
        assert " ".join(cut).split() == words[:35]

    def test_words_stay_whole(self, tokenizer: BertTokenizerFast) -> None:
        # Two tokens a word, three of room: a word a passage.
        cut = passages("cats dogs cats dogs cats", tokenizer, 5)
        assert cut == ["cats", "dogs", "cats", "dogs"]

    def test_a_word_longer_than_a_passage_is_cut(self, tokenizer: BertTokenizerFast) -> None:
        assert passages("cats cats", tokenizer, 3) == ["cat", "s", "cat", "s"]

    def test_too_short_a_text_gives_none(self, tokenizer: BertTokenizerFast) -> None:
        assert passages("a cat", tokenizer, 5) == []
        assert passages("", tokenizer, 5) == []

    def test_special_tokens_alone_are_refused(self, tokenizer: BertTokenizerFast) -> None:
        with pytest.raises(ValueError, match="length=2 leaves no room for text beside the special tokens"):
            passages("a cat", tokenizer, 2)
