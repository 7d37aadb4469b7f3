"""Folders and files that nobody vouches for: refused in one line, before their code runs or memory is taken.

``pytest -m slow tests/test_untrusted.py`` reads 10,000 mutated inputs; the fast suite the first of each kind.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import resource
import shutil
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, refused, slow
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, WordEmbeddings
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from test_recipe import write_pairs

import st_linear
from st_linear import convert
from st_linear.adapters import CONFIG_NAME, WEIGHTS_NAME, Adapter, export_adapter
from st_linear.data import load_pairs
from st_linear.pair_head import DSEHead
from st_linear.study.config import read_study
from st_linear.teachers import load_teacher, read_mined_pairs, read_teacher_scores
from st_linear.untrusted import guarded

NESTED = "[" * 100_000 + "]" * 100_000
LINE_OF_A_MEGABYTE = "bo di " * 170_000


@pytest.fixture(scope="session")
def plain(bert: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of Sentence Transformers' own, with a dense layer."""
    folder = tmp_path_factory.mktemp("plain")
    encoder = Transformer(bert)
    SentenceTransformer(modules=[encoder, Pooling(32, "mean"), Dense(32, 16)]).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def linear(bert: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model with a DSE head."""
    folder = tmp_path_factory.mktemp("linear")
    model = convert(SentenceTransformer(bert), feature_map="hedgehog", window=8, max_seq_length=200)
    model.append(DSEHead(32))
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def adapter(linear: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    export_adapter(st_linear.load(str(linear))[0], folder)
    return folder


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A function that copies a folder, to be changed."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **values}), encoding="utf-8")


class TestCode:
    """What would run code from elsewhere."""

    KERNEL = "the attention implementation 'some/kernel' may be code from the hub"

    @pytest.mark.parametrize("folder", ["plain", "linear"])
    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("config.json", {"attn_implementation": "some/kernel"}),
            ("config.json", {"_attn_implementation": "some/kernel"}),
            ("sentence_bert_config.json", {"config_kwargs": {"attn_implementation": "some/kernel"}}),
        ],
    )
    def test_kernels_from_the_hub(
        self, folder: str, name: str, values: Any, copied: Any, request: pytest.FixtureRequest
    ) -> None:
        path = copied(request.getfixturevalue(folder))
        change(path / name, **values)
        with refused(self.KERNEL):
            st_linear.load(str(path))

    @pytest.mark.parametrize("key", ["model_kwargs", "model_args"])
    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({"attn_implementation": "some/kernel"}, KERNEL),
            ({"attn_implementation": {"": "some/kernel"}}, KERNEL),
            ({"attn_implementation": "flash_attention_2"}, "'flash_attention_2' may be code from the hub"),
            ({"attn_implementation": "paged|eager"}, "'paged|eager' may be code from the hub"),
            ({"allow_all_kernels": True}, "its files ask for allow_all_kernels=True, which st_linear.load takes from"),
            ({"use_kernels": True}, "its files ask for use_kernels=True"),
            ({"kernel_config": {}}, "its files ask for kernel_config={}"),
            ({"weights_only": False}, "its files ask for weights_only=False"),
            ({"quantization_config": {"a": 1}}, "its files ask for quantization_config={'a': 1}"),
        ],
    )
    def test_what_only_the_caller_may_ask_for(
        self, key: str, asked: Any, message: str, plain: Path, copied: Any
    ) -> None:
        path = copied(plain)
        change(path / "sentence_bert_config.json", **{key: asked})
        with refused(message):
            st_linear.load(str(path))
        with refused(message):
            convert(str(path))

    def test_the_caller_may(self, plain: Path) -> None:
        model = st_linear.load(str(plain), model_kwargs={"weights_only": True, "attn_implementation": "eager"})
        assert model[0].model.config._attn_implementation == "eager"

    def test_files_may_choose_among_what_transformers_has(self, plain: Path, copied: Any) -> None:
        path = copied(plain)
        change(path / "sentence_bert_config.json", model_kwargs={"attn_implementation": "eager", "dtype": "float16"})
        model = st_linear.load(str(path))[0].model
        assert (model.config._attn_implementation, model.dtype) == ("eager", torch.float16)

    def test_pickles(self, plain: Path, copied: Any) -> None:
        path = copied(plain)
        marker = path / "code ran"

        class Evil:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(marker),)

        (path / "model.safetensors").unlink()
        with (path / "pytorch_model.bin").open("wb") as file:
            pickle.dump({"embeddings.word_embeddings.weight": Evil()}, file)
        with refused("can't be loaded: "):
            st_linear.load(str(path))
        with zipfile.ZipFile(path / "pytorch_model.bin", "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"a": Evil()}))
            archive.writestr("archive/version", "3\n")
        with refused("can't be loaded: "):
            st_linear.load(str(path))
        assert not marker.exists()

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("model.safetensors.index.json", {"weight_map": {"a": "../outside/model.safetensors"}}),
            ("sentence_bert_config.json", {"tokenizer_name_or_path": "/etc"}),
            ("sentence_bert_config.json", {"tokenizer_name_or_path": "../outside"}),
        ],
    )
    def test_names_that_lead_out(self, name: str, values: Any, plain: Path, copied: Any) -> None:
        path = copied(plain)
        if not (path / name).exists():
            (path / name).write_text("{}")
        change(path / name, **values)
        with refused(f"{path / name}: {next(iter(values))} names "):
            st_linear.load(str(path))

    def test_a_tokenizer_that_is_not_there(self, plain: Path, copied: Any) -> None:
        path = copied(plain)
        change(path / "sentence_bert_config.json", tokenizer_name_or_path="some/repo")
        with refused(f"{path} can't be loaded", OSError):
            st_linear.load(str(path))

    @pytest.mark.parametrize("name", ["torch.utils.collect_env.main", "torch.nn.init.zeros_", "torch.nn.Nothing"])
    def test_activations_of_teachers(self, name: str, bert: str, tmp_path: Path) -> None:
        CrossEncoder(bert, num_labels=1).save_pretrained(str(tmp_path))
        for file, values in (
            ("config_sentence_transformers.json", {"activation_fn": name}),
            ("config.json", {"sentence_transformers": {"activation_fn": name}}),
            ("config.json", {"sbert_ce_default_activation_function": name}),
        ):
            before = (tmp_path / file).read_text()
            change(tmp_path / file, **values)
            with refused(f"={name!r} is no torch.nn.Module"):
                load_teacher(str(tmp_path))
            (tmp_path / file).write_text(before)
        load_teacher(str(tmp_path))

    @pytest.mark.parametrize("where", ["../outside", "/etc", "1_Pooling/../../outside"])
    def test_paths_that_lead_out(self, where: str, plain: Path, copied: Any) -> None:
        path = copied(plain)
        shutil.copytree(path / "1_Pooling", path.parent / "outside")
        modules = json.loads((path / "modules.json").read_text())
        modules[1]["path"] = where
        (path / "modules.json").write_text(json.dumps(modules))
        with pytest.raises(ValueError, match=r"(?i)relative|traversal|\.\."):
            st_linear.load(str(path))

    def test_teachers_are_watched_too(self, bert: str, tmp_path: Path) -> None:
        CrossEncoder(bert, num_labels=1).save_pretrained(str(tmp_path))
        load_teacher(str(tmp_path))
        change(tmp_path / "config.json", attn_implementation="some/kernel")
        with refused(self.KERNEL):
            load_teacher(str(tmp_path))

    def test_a_teacher_without_its_head_is_none(self, bert: str) -> None:
        with refused("lacks weights of the encoder: classifier.bias, classifier.weight"):
            load_teacher(bert)


HUGE = 10**10
MEMORY = [
    ("plain", "config.json", {"vocab_size": HUGE}),
    ("plain", "config.json", {"hidden_size": 4 * 10**6}),
    ("plain", "config.json", {"intermediate_size": HUGE}),
    ("plain", "config.json", {"max_position_embeddings": HUGE}),
    ("plain", "config.json", {"num_hidden_layers": 10**7}),
    ("plain", "config.json", {"num_labels": 10**9}),
    ("plain", "sentence_bert_config.json", {"config_kwargs": {"vocab_size": HUGE}}),
    ("plain", "sentence_bert_config.json", {"config_kwargs": {"num_labels": 10**9}}),
    ("plain", "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 10**9}),
    ("plain", "2_Dense/config.json", {"in_features": 10**6, "out_features": 10**6}),
    ("linear", "config.json", {"vocab_size": HUGE}),
    ("linear", "config.json", {"max_position_embeddings": HUGE}),
    ("linear", "config.json", {"num_hidden_layers": 10**7}),
    ("linear", "sentence_bert_config.json", {"max_seq_length": HUGE}),
    ("linear", "sentence_bert_config.json", {"max_seq_length": 30_000_000}),
    ("linear", "sentence_bert_config.json", {"feature_map_kwargs": {"num_features": 10**9}}),
    ("linear", "2_DSEHead/config.json", {"embedding_dimension": 10**6, "hidden_dimension": 10**6}),
]


class TestMemory:
    @pytest.mark.parametrize(("folder", "name", "values"), MEMORY)
    def test_no_more_than_the_files_hold(
        self, folder: str, name: str, values: Any, copied: Any, request: pytest.FixtureRequest
    ) -> None:
        path = copied(request.getfixturevalue(folder))
        change(path / name, **values)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        with refused(str(path)):
            st_linear.load(str(path))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "more than a GiB"
        assert time.perf_counter() - started < 60

    def test_an_adapter_with_more_features_than_tensors(self, adapter: Path, copied: Any) -> None:
        path = copied(adapter)
        config = json.loads((path / CONFIG_NAME).read_text())
        config["settings"]["feature_map_kwargs"] = {"num_features": 10**9}
        (path / CONFIG_NAME).write_text(json.dumps(config))
        with refused(f"{path}: {CONFIG_NAME} has num_features=1000000000, {WEIGHTS_NAME} at most"):
            Adapter.load(str(path))

    @pytest.mark.parametrize("name", ["modules.json", "config.json", "tokenizer.json", "1_Pooling/config.json"])
    def test_json_bombs(self, name: str, plain: Path, copied: Any) -> None:
        path = copied(plain)
        (path / name).write_text(NESTED)
        with refused(str(path)):
            st_linear.load(str(path))
        with (path / name).open("wb") as file:
            file.truncate(2**33)
        with refused(f"{path / name} has 8,192 MiB; a model's JSON has 64 at most"):
            st_linear.load(str(path))

    @pytest.mark.parametrize("compressed", [False, True])
    def test_pickles_that_unfold(self, compressed: bool, plain: Path, copied: Any) -> None:
        path = copied(plain)
        file = path / "2_Dense" / "pytorch_model.bin"
        (path / "2_Dense" / "model.safetensors").unlink()
        rows = torch.zeros(1, 1).expand(3 * 10**7, 32)
        torch.save({"linear.weight": torch.zeros(10**8) if compressed else rows}, file)
        if compressed:
            with zipfile.ZipFile(file) as archive:
                entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, content in entries.items():
                    archive.writestr(name, content)
        assert file.stat().st_size < 2**20
        with refused(f"{file} unfolds to "):
            st_linear.load(str(path))

    @pytest.mark.parametrize(
        "take",
        [
            lambda: torch.arange(20_000, dtype=torch.int32)[:, None] - torch.arange(20_000, dtype=torch.int32)[None],
            lambda: torch.cat([torch.ones(65_000)] * 4000),
            lambda: torch.arange(3e8),
            lambda: torch.ones(1).expand(10**9).clone(),
            lambda: torch.zeros(30_000, 30_000),
            lambda: [torch.zeros(10**7) for _ in range(100)],
        ],
    )
    def test_operations_of_any_kind_are_counted(self, take: Callable[[], Any], plain: Path) -> None:
        with refused(f"{plain} asks for "), guarded(str(plain)):
            take()

    def test_the_default_dtype_counts(self, plain: Path) -> None:
        """Under float16 both tensors would take no more than what is left to a model."""
        before = torch.get_default_dtype()
        try:
            with refused(f"{plain} asks for "), guarded(str(plain)):
                for dtype in (torch.float16, torch.float64):
                    torch.set_default_dtype(dtype)
                    torch.empty(50_000_000)
        finally:
            torch.set_default_dtype(before)

    def test_what_memory_is_needed_is_given(self, family: str, tmp_path: Path) -> None:
        """Encoders of every family at 8,192 tokens, many features, tables that were extended: none is refused."""
        model = convert(family, feature_map="favor", window=8, feature_map_kwargs={"num_features": 512})
        model.save_pretrained(str(tmp_path / "saved"))
        assert st_linear.load(str(tmp_path / "saved")).max_seq_length == 8192


class TestNobodyElseIsAsked:
    """Models and callers that are right are not refused."""

    def test_other_threads_load_as_ever(self, plain: Path) -> None:
        before = Transformer._load_model
        loaded: list[Any] = []

        def load() -> None:
            loaded.append(SentenceTransformer(str(plain), model_kwargs={"use_kernels": False}))

        with guarded(str(plain)):
            thread = threading.Thread(target=load)
            thread.start()
            thread.join()
        assert len(loaded) == 1
        threads = [threading.Thread(target=lambda: loaded.append(st_linear.load(str(plain)))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(loaded) == 5
        assert Transformer._load_model is before

    def test_buffers_and_files_that_are_not_loaded_may_hold_integers(self, plain: Path, copied: Any) -> None:
        path = copied(plain)
        tensors = load_file(path / "model.safetensors")
        tensors["embeddings.position_ids"] = torch.arange(64)[None]
        tensors["encoder.layer.0.attention.bias"] = torch.ones(2, 2, dtype=torch.bool)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "onnx").mkdir()
        (path / "onnx" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
        st_linear.load(str(path))

    def test_a_model_from_the_cache_of_the_hub(self, tmp_path: Path) -> None:
        """Its root has no config.json, and more weights than may be taken without a reason."""
        words = WordEmbeddings(WhitespaceTokenizer([f"w{i}" for i in range(300_000)]), torch.zeros(300_000, 300))
        folder = tmp_path / "models--me--words" / "snapshots" / ("0" * 40)
        SentenceTransformer(modules=[words, Pooling(300, "mean")]).save_pretrained(str(folder))
        (tmp_path / "models--me--words" / "refs").mkdir()
        (tmp_path / "models--me--words" / "refs" / "main").write_text("0" * 40)
        model = st_linear.load("me/words", cache_folder=str(tmp_path), local_files_only=True)
        assert model.encode("w1").shape == (300,)

    def test_a_caller_may_want_other_sizes(self, plain: Path) -> None:
        wanted = {"config_kwargs": {"vocab_size": 50}, "model_kwargs": {"ignore_mismatched_sizes": True}}
        assert st_linear.load(str(plain), **wanted)[0].model.config.vocab_size == 50
        with refused("embeddings.word_embeddings.weight has shape (45, 32), expected (50, 32) by the config"):
            st_linear.load(str(plain), config_kwargs={"vocab_size": 50})


class TestWeights:
    def test_of_teachers(self, bert: str, tmp_path: Path) -> None:
        CrossEncoder(bert, num_labels=1).save_pretrained(str(tmp_path))
        tensors = load_file(tmp_path / "model.safetensors")
        for value, message in (
            (torch.full((1, 32), torch.nan), "classifier.weight holds NaN"),
            (torch.ones(1, 32).long(), "holds I64"),
        ):
            save_file({**tensors, "classifier.weight": value}, tmp_path / "model.safetensors")
            with refused(message):
                load_teacher(str(tmp_path))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize(
        ("folder", "name"), [("plain", "model.safetensors"), ("linear", WEIGHTS_NAME), ("linear", "model.safetensors")]
    )
    def test_nan(self, value: float, folder: str, name: str, copied: Any, request: pytest.FixtureRequest) -> None:
        path = copied(request.getfixturevalue(folder))
        tensors = load_file(path / name)
        key = sorted(tensors)[-1]
        tensors[key].view(-1)[-1] = value
        save_file(tensors, path / name, metadata={"format": "pt"})
        with refused(f"{path}: 0.model."):
            st_linear.load(str(path))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    def test_other_number_formats(self, dtype: torch.dtype, linear: Path, copied: Any) -> None:
        path = copied(linear)
        tensors = load_file(path / "model.safetensors")
        key = "encoder.layer.0.output.dense.weight"
        tensors[key] = tensors[key].to(dtype)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        with refused(f"{key} holds "):
            st_linear.load(str(path))
        shutil.copy(linear / "model.safetensors", path)
        tensors = load_file(path / WEIGHTS_NAME)
        key = sorted(tensors)[0]
        tensors[key] = tensors[key].to(dtype)
        save_file(tensors, path / WEIGHTS_NAME, metadata={"format": "pt"})
        with refused(f"{WEIGHTS_NAME}: {key} holds {dtype}"):
            st_linear.load(str(path))


class TestData:
    """Texts that are strange and texts all the same."""

    TEXTS = (
        "control \x07\x1b[31m\x00 characters",
        "שלום עולם‏ \u202eright to left",
        "👩‍👩‍👧‍👦 emoji 🏳️‍🌈",
        "a\u0301 combining \u200b zero width",
        'quotes " and, commas',
        LINE_OF_A_MEGABYTE.strip(),
    )

    @pytest.mark.parametrize("suffix", ["jsonl", "csv"])
    def test_they_come_through(self, suffix: str, tmp_path: Path) -> None:
        texts = list(self.TEXTS)
        if suffix == "csv" and sys.version_info < (3, 11):  # whose csv module takes no NUL
            texts = [text.replace("\x00", "") for text in texts]
        rows = [{"sentence1": text, "sentence2": text[::-1].strip(), "score": 2.5} for text in texts]
        if suffix == "jsonl":
            lines = [json.dumps(row) for row in rows]
        else:
            quoted = [[f'"{str(value).replace(chr(34), chr(34) * 2)}"' for value in row.values()] for row in rows]
            lines = ["sentence1,sentence2,score", *(",".join(row) for row in quoted)]
        (tmp_path / f"train.{suffix}").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
        pairs = load_pairs(tmp_path)
        assert pairs["sentence1"][:] == texts

    def test_they_embed(self, linear: Path) -> None:
        vectors = st_linear.load(str(linear)).encode(list(self.TEXTS))
        assert torch.from_numpy(vectors).isfinite().all()

    def test_mixed_types_are_refused(self, tmp_path: Path) -> None:
        for value in (3, None, ["a"], {"a": 1}, True, ""):
            rows = [{"sentence1": "bo", "sentence2": value, "score": 1}]
            (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
            with refused("row 1: sentence2 is"):
                load_pairs(tmp_path)

    def test_a_megabyte_in_mined_pairs(self, tmp_path: Path) -> None:
        (tmp_path / "mined.csv").write_text(f"sentence1,sentence2,logit,score\n{LINE_OF_A_MEGABYTE},bo,0,0.5\n")
        assert read_mined_pairs(tmp_path)["sentence1"] == [LINE_OF_A_MEGABYTE]


class TestStudies:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("? [a, b]\n: 1\n", "line 1: keys must be words"),
            ("name: " + "[" * 3000, "is nested too deeply"),
            ("name: 2001-99-99", "is no YAML: month must be in 1..12"),
            ("name: !!python/object/apply:os.system [ls]", "line 1: no YAML: could not determine a constructor"),
            ("name: !!int a", "is no YAML: invalid literal"),
            ("name: " + "9" * 5000, "is no YAML: Exceeds the limit"),
            (
                "a: &a [x, x]\n"
                + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")),
                "holds more than 200,000 values",
            ),
            (
                "name: a\ngrid: {attention: elu, length: 16}\nbudget: {operations: .inf}",
                "Input should be a finite number",
            ),
            ("name: a\ngrid: {attention: elu, length: 100000000}", "less than or equal to 1048576"),
            ("name: a\ngrid: {attention: elu, length: 16, seed: 99999999999}", "less than 4294967296"),
        ],
    )
    def test_they_are_refused(self, text: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "study.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=r".") as info:
            read_study(path)
        assert message in str(info.value)
        assert str(info.value).startswith(str(path))
        assert "\n" not in str(info.value)


NASTY: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    0.5,
    1e308,
    10**12,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "x" * 100_000,
    "../../etc/passwd",
    "/etc/passwd",
    "some/kernel",
    "a\nb",
    "\u202e\x00",
    "sentence_transformers.SentenceTransformer",
    [],
    {},
    [[[]]],
    ["a", 1, None],
    {"a": {"b": [1]}},
)
TOKENS = (
    b"{",
    b"}",
    b"[",
    b'"',
    b",",
    b"\n",
    b"\r",
    b"\x00",
    b"\xff",
    b": ",
    b"- ",
    b"&a ",
    b"*a",
    b"!!",
    b"1e999",
    b"nan",
)


def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in entries:
        found.append((value, key))
        places(part, found)
    return found


def mutated_json(content: bytes, draw: random.Random) -> bytes:
    value = copy.deepcopy(json.loads(content))
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        found = places(value, [])
        if not found:
            break
        container, key = draw.choice(found)
        if draw.random() < 0.2:
            del container[key]
        elif draw.random() < 0.3:
            container[key] = copy.deepcopy(draw.choice([other[place] for other, place in found]))
        else:
            container[key] = copy.deepcopy(draw.choice(NASTY))
    return json.dumps(value).encode()


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(len(data) + 1)
        length = draw.choice((1, 1, 2, 8, 100))
        kind = draw.randrange(6)
        if kind == 0:
            del data[at : at + length]
        elif kind == 1:
            data[at:at] = data[at : at + length]
        elif kind == 2:
            data[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 3:
            data[at:at] = draw.choice(TOKENS)
        elif kind == 4:
            del data[at:]
        else:
            other = draw.randrange(len(data) + 1)
            data[at : at + length] = data[other : other + length]
    return bytes(data)


def attempt(read: Callable[[], Any]) -> str | None:
    """The message of a refusal, None where the input was taken; all else fails the test."""
    started = time.perf_counter()
    try:
        read()
        message = None
    except (ValueError, OSError, ImportError) as error:
        message = str(error)
        assert message
        assert "\n" not in message
    assert time.perf_counter() - started < 30
    return message


def mutants(path: Path, count: int, seed: int) -> Iterator[int]:
    """Write ``count`` mutations of a file, one after the other, in its place; at last the file as it was."""
    content = path.read_bytes()
    for number in range(count):
        draw = random.Random(f"{path.name} {seed} {number}")
        as_json = path.suffix == ".json" and draw.random() < 0.7
        path.write_bytes((mutated_json if as_json else mutated_bytes)(content, draw))
        yield number
    path.write_bytes(content)


STUDY = """\
name: a study
base: packaged
data: {source: sample, train: 40, most_tokens: 64}
teacher: {scores: teacher}
grid:
  - attention: [softmax, hedgehog@64, "favor:32"]
    length: [32, 64]
    seed: [0, 1]
    transfer: [on, off]
  - attention: elu
    length: 128
    protocol: filler-same-end
budget:
  examples: 64
training: {batch_size: 8, learning_rate: 1e-3, half: true}
evaluation: {shares: [0.25, 0.5], lengths: [40]}
"""

MODEL_FILES = {
    "plain": (
        "modules.json",
        "config.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "model.safetensors",
    ),
    "linear": (
        "modules.json",
        "config.json",
        "sentence_bert_config.json",
        WEIGHTS_NAME,
        CONFIG_NAME,
        "2_DSEHead/config.json",
        "2_DSEHead/model.safetensors",
    ),
}
# Kinds of inputs, and how many of each are read in all: 10,000.
COUNTS = {"models": 1_700, "adapters": 1_600, "studies": 3_000, "pairs": 2_700, "scores": 1_000}
FAST = 40


class TestFuzz:
    @pytest.fixture(params=[pytest.param(FAST, id="some"), slow(1, id="all")])
    def share(self, request: pytest.FixtureRequest) -> int:
        return request.param

    @staticmethod
    def read_all(files: list[Path], kind: str, share: int, read: Callable[[], Any]) -> None:
        """Read every mutation; some must be refused, as none of them would say that none was read."""
        each = COUNTS[kind] // share // len(files) + 1
        messages = [attempt(read) for file in files for _ in mutants(file, each, seed=0)]
        assert len(messages) * share >= COUNTS[kind]
        assert any(message is not None for message in messages)
        read()

    def test_models(self, share: int, plain: Path, linear: Path, tmp_path: Path) -> None:
        texts = list(WORDS[:3])
        for name, folder in (("plain", plain), ("linear", linear)):
            path = Path(shutil.copytree(folder, tmp_path / name))
            files = [path / file for file in MODEL_FILES[name]]
            self.read_all(files, "models", 2 * share, lambda path=path: st_linear.load(str(path)))
            assert st_linear.load(str(path)).encode(texts).shape[0] == 3

    def test_adapters(self, share: int, adapter: Path, bert: str, copied: Any) -> None:
        path = copied(adapter)
        base = SentenceTransformer(bert)
        self.read_all(
            [path / CONFIG_NAME, path / WEIGHTS_NAME], "adapters", share, lambda: convert(base, adapter=str(path))
        )

    def test_studies(self, share: int, tmp_path: Path) -> None:
        path = tmp_path / "study.yaml"
        path.write_text(STUDY)
        self.read_all([path], "studies", share, lambda: read_study(path).cells())

    def test_pairs(self, share: int, tmp_path: Path) -> None:
        files = []
        for suffix in ("csv", "tsv", "jsonl", "parquet"):
            folder = write_pairs(tmp_path / suffix)
            pairs = load_pairs(folder)
            (folder / "train.csv").unlink()
            file = folder / f"train.{suffix}"
            if suffix == "parquet":
                pairs.to_parquet(file)
            elif suffix == "jsonl":
                pairs.to_json(file)
            else:
                pairs.to_csv(file, sep="\t" if suffix == "tsv" else ",", index=False)
            files.append(file)
        for file in files:
            self.read_all(
                [file], "pairs", len(files) * share, lambda file=file: load_pairs(file.parent, score_range=(0, 1))
            )

    def test_scores(self, share: int, tmp_path: Path) -> None:
        folder = write_pairs(tmp_path / "pairs") / "teacher"
        self.read_all([folder / "train.csv"], "scores", 2 * share, lambda: read_teacher_scores(folder, "train"))
        self.read_all([folder / "mined.csv"], "scores", 2 * share, lambda: read_mined_pairs(folder))
