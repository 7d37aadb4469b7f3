from __future__ import annotations

import copy
import json
import logging
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from torch import Tensor
from transformers import AutoModel, BertForSequenceClassification

import st_linear
from st_linear import LinearTransformer, convert
from st_linear.conversion import linear_attentions, split_state_dict
from st_linear.transformer import WEIGHTS_NAME, join_packed

SETTINGS: dict[str, Any] = {
    "window": 8,
    "max_seq_length": 200,
    "feature_map_kwargs": {"num_features": 16},
}


def encode(model: SentenceTransformer, texts: list[str], **kwargs: Any) -> Tensor:
    return model.encode(texts, convert_to_tensor=True, **kwargs)


@pytest.fixture(scope="module")
def texts(text: Callable[..., str]) -> list[str]:
    """Shorter than two windows, beyond them, beyond the trained positions, and empty."""
    return [text(150), text(9), text(60), "", text(16)]


@pytest.fixture(scope="module")
def base(bert: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved SentenceTransformer with CLS pooling, normalisation and prompts."""
    encoder = Transformer(bert)
    model = SentenceTransformer(
        modules=[encoder, Pooling(encoder.get_embedding_dimension(), "cls"), Normalize()],
        prompts={"query": "ba be ", "document": "bi "},
        default_prompt_name="document",
        similarity_fn_name="dot",
    )
    folder = str(tmp_path_factory.mktemp("base"))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(base: str) -> SentenceTransformer:
    """A converted model, to be read and not changed."""
    return convert(base, **SETTINGS)


@pytest.fixture(scope="module")
def saved(model: SentenceTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that model, to be read and not written to."""
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "damaged"))


class TestModules:
    def test_with_pooling_nothing_is_added(self, bert: str, texts: list[str]) -> None:
        encoder = LinearTransformer(bert, **SETTINGS)
        model = SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension(), "max")])
        assert [type(module) for module in model] == [LinearTransformer, Pooling]
        assert model[1].pooling_mode == "max"
        tokens = model.encode(texts, output_value="token_embeddings")
        torch.testing.assert_close(encode(model, texts), torch.stack([rows.amax(dim=0) for rows in tokens]))

    def test_alone_it_pools_by_the_mean(self, bert: str, texts: list[str], tmp_path: Path) -> None:
        encoder = LinearTransformer(bert, **SETTINGS)
        model = SentenceTransformer(modules=[encoder])
        assert [type(module) for module in model] == [LinearTransformer, Pooling]
        tokens = model.encode(texts, output_value="token_embeddings")
        torch.testing.assert_close(encode(model, texts), torch.stack([rows.mean(dim=0) for rows in tokens]))
        model.save_pretrained(str(tmp_path))
        assert (tmp_path / "1_Pooling" / "config.json").is_file()
        loaded = st_linear.load(str(tmp_path))
        assert [type(module) for module in loaded] == [LinearTransformer, Pooling]

    def test_alone_it_pools_as_its_folder_declares(self, base: str) -> None:
        model = SentenceTransformer(modules=[LinearTransformer(base, **SETTINGS)])
        assert [type(module) for module in model] == [LinearTransformer, Pooling]
        assert model[1].pooling_mode == "cls"

    def test_prompts_normalisation_and_similarity_are_kept(self, base: str, model: SentenceTransformer) -> None:
        original = SentenceTransformer(base)
        assert [type(module) for module in model] == [LinearTransformer, Pooling, Normalize]
        assert model.prompts == original.prompts == {"query": "ba be ", "document": "bi "}
        assert model.default_prompt_name == "document"
        assert model.similarity_fn_name == "dot"
        assert model[1].pooling_mode == "cls"

    def test_a_model_of_any_origin_converts_alike(self, base: str, texts: list[str]) -> None:
        expected = encode(convert(base, **SETTINGS), texts)
        torch.testing.assert_close(encode(convert(Path(base), **SETTINGS), texts), expected)
        torch.testing.assert_close(encode(convert(SentenceTransformer(base), **SETTINGS), texts), expected)

    def test_the_loaded_model_is_left_as_it_was(self, base: str, text: Callable[..., str]) -> None:
        original = SentenceTransformer(base)
        expected = encode(original, [text(60)])
        converted = convert(original, **SETTINGS)
        with torch.no_grad():
            for parameter in converted.parameters():
                parameter.zero_()
        assert type(original[0]) is Transformer
        assert original.max_seq_length == 64
        torch.testing.assert_close(encode(original, [text(60)]), expected, rtol=0, atol=0)

    def test_a_converted_model_is_converted_anew(
        self, base: str, model: SentenceTransformer, texts: list[str]
    ) -> None:
        again = convert(model, **{**SETTINGS, "feature_map": "softmax", "feature_map_kwargs": None})
        expected = convert(base, **{**SETTINGS, "feature_map": "softmax", "feature_map_kwargs": None})
        torch.testing.assert_close(encode(again, texts), encode(expected, texts))


class TestEncoding:
    def test_short_texts_get_the_original_vectors(self, base: str, model: SentenceTransformer, text: Callable) -> None:
        texts = [text(14), text(3), "", text(11)]
        original = SentenceTransformer(base)
        torch.testing.assert_close(encode(model, texts), encode(original, texts), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            model.encode_query(texts, convert_to_tensor=True),
            original.encode_query(texts, convert_to_tensor=True),
            rtol=0,
            atol=1e-5,
        )
        torch.testing.assert_close(
            model.encode_document(texts, convert_to_tensor=True),
            original.encode_document(texts, convert_to_tensor=True),
            rtol=0,
            atol=1e-5,
        )

    @pytest.mark.parametrize("include_prompt", [True, False])
    def test_packed_padded_and_alone_agree(self, bert: str, include_prompt: bool, texts: list[str]) -> None:
        encoder = LinearTransformer(bert, **SETTINGS)
        model = SentenceTransformer(modules=[encoder, Pooling(32, "mean", include_prompt=include_prompt)])
        assert encoder.can_flatten_inputs
        packed = encode(model, texts, prompt="ba be ")
        encoder.unpad_inputs = False
        assert not encoder.can_flatten_inputs
        padded = encode(model, texts, prompt="ba be ")
        alone = encode(model, texts, prompt="ba be ", batch_size=1)
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)
        assert (packed - encode(model, texts)).abs().max() > 1e-2

    def test_order_and_company_do_not_matter(self, model: SentenceTransformer, texts: list[str]) -> None:
        expected = encode(model, texts)
        torch.testing.assert_close(encode(model, texts[::-1]).flip(0), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(encode(model, texts, batch_size=2), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.encode(texts[2], convert_to_tensor=True), expected[2], rtol=0, atol=1e-5)

    def test_token_embeddings_come_text_by_text(self, model: SentenceTransformer, texts: list[str]) -> None:
        tokens = model.encode(texts, output_value="token_embeddings", prompt="")
        assert [tuple(rows.shape) for rows in tokens] == [(n, 32) for n in (150, 9, 60, 2, 16)]
        vectors = torch.nn.functional.normalize(torch.stack([rows[0] for rows in tokens]))
        torch.testing.assert_close(encode(model, texts, prompt=""), vectors)

    def test_all_outputs_come_text_by_text(self, model: SentenceTransformer, texts: list[str]) -> None:
        outputs = model.encode(texts, output_value=None)
        expected = encode(model, texts)
        torch.testing.assert_close(torch.stack([output["sentence_embedding"] for output in outputs]), expected)
        assert all(output["token_embeddings"].shape[-1] == 32 for output in outputs)

    @pytest.mark.parametrize("value", [None, 3, 1.5, True, float("nan")])
    def test_what_is_no_text_is_refused(self, model: SentenceTransformer, value: Any, text: Callable) -> None:
        for inputs in (value, [value], [text(9), value]):
            with refused(f"one of the inputs is {value!r}, not a text: pass strings"):
                model.encode(inputs)

    @pytest.mark.parametrize("packed", [True, False])
    def test_empty_texts_embed(self, bert: str, packed: bool) -> None:
        model = SentenceTransformer(modules=[LinearTransformer(bert, **SETTINGS)])
        model[0].unpad_inputs = packed
        vectors = encode(model, ["", " ", "ba"])
        assert torch.isfinite(vectors).all()
        torch.testing.assert_close(vectors[0], vectors[1])
        assert (vectors[0] - vectors[2]).abs().max() > 1e-2
        assert model.encode([]).shape == (0,)

    @pytest.mark.slow
    def test_several_processes_agree_with_one(self, model: SentenceTransformer, texts: list[str]) -> None:
        pool = model.start_multi_process_pool(["cpu", "cpu"])
        try:
            vectors = model.encode(texts, pool=pool, chunk_size=2, convert_to_tensor=True)
        finally:
            model.stop_multi_process_pool(pool)
        torch.testing.assert_close(vectors, encode(model, texts), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, bert: str, dtype: torch.dtype, texts: list[str], tmp_path: Path) -> None:
        def pooled(encoder: LinearTransformer) -> SentenceTransformer:
            return SentenceTransformer(modules=[encoder, Pooling(32, "mean")])

        expected = encode(pooled(LinearTransformer(bert, **SETTINGS)), texts)
        model = pooled(LinearTransformer(bert, model_kwargs={"dtype": dtype}, **SETTINGS))
        vectors = encode(model, texts)
        assert vectors.dtype == dtype
        assert torch.cosine_similarity(vectors.float(), expected).min() > 0.99
        halved = pooled(LinearTransformer(bert, **SETTINGS)).to(dtype)
        torch.testing.assert_close(encode(halved, texts), vectors)

        model.save_pretrained(str(tmp_path))
        loaded = st_linear.load(str(tmp_path))
        assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype}
        torch.testing.assert_close(encode(loaded, texts), vectors, rtol=0, atol=0)

    def test_copies_are_equal_and_apart(self, model: SentenceTransformer, texts: list[str]) -> None:
        expected = encode(model, texts)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(encode(twin, texts), expected)
            twin[0].redraw(5)
            assert (encode(twin, texts) - expected).abs().max() > 1e-3
        torch.testing.assert_close(encode(model, texts), expected)


class TestLimit:
    @pytest.mark.parametrize("packed", [True, False])
    def test_truncation_is_counted_and_warned_of_once(
        self, bert: str, packed: bool, text: Callable[..., str], caplog: pytest.LogCaptureFixture
    ) -> None:
        model = SentenceTransformer(modules=[LinearTransformer(bert, window=8, max_seq_length=100, feature_map="elu")])
        model[0].unpad_inputs = packed
        with caplog.at_level(logging.WARNING, logger="st_linear.transformer"):
            encode(model, [text(100), text(20)])
            assert (model[0].num_truncated, caplog.messages) == (0, [])
            cut = encode(model, [text(101), text(130), text(100), text(9)])
            assert model[0].num_truncated == 2
            assert caplog.messages == [
                "2 of 4 texts in this batch are longer than max_seq_length=100 tokens and were cut; this is said "
                "once, num_truncated of the module goes on counting."
            ]
            # The prompt has two tokens.
            encode(model, [text(98), text(99), text(9)], prompt="ba be ")
            assert model[0].num_truncated == 3
            assert len(caplog.messages) == 1
        longest = " ".join(text(130).split()[:98])
        torch.testing.assert_close(cut[1], encode(model, [longest])[0], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("name", ["bert", "roberta", "gte"])
    @pytest.mark.parametrize(("method", "limit"), [("tile", 200), ("interpolate", 200), ("none", 64)])
    def test_it_survives_saving(
        self, name: str, method: Any, limit: int, encoder_folder: Callable[[str], str], text: Callable, tmp_path: Path
    ) -> None:
        settings = {**SETTINGS, "position_extension": method}
        model = SentenceTransformer(modules=[LinearTransformer(encoder_folder(name), **settings)])
        assert model.max_seq_length == limit
        expected = encode(model, [text(150), text(9)])
        assert model[0].num_truncated == (method == "none")
        model.save_pretrained(str(tmp_path))
        offset = 2 if name == "roberta" else 0
        config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
        assert config["max_position_embeddings"] == limit + offset
        assert (
            json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))["model_max_length"] == limit
        )
        loaded = st_linear.load(str(tmp_path))
        assert loaded.max_seq_length == limit
        torch.testing.assert_close(encode(loaded, [text(150), text(9)]), expected, rtol=0, atol=1e-6)

    def test_it_may_lie_below_the_trained_positions(self, bert: str) -> None:
        encoder = LinearTransformer(bert, **{**SETTINGS, "max_seq_length": 20})
        assert encoder.max_seq_length == 20
        assert encoder.model.config.max_position_embeddings == 64
        assert LinearTransformer(bert, **{**SETTINGS, "max_seq_length": None}).max_seq_length == 64


class TestTraining:
    @pytest.mark.parametrize("packed", [True, False])
    def test_a_step_moves_the_learned_maps(self, bert: str, packed: bool, texts: list[str]) -> None:
        encoder = LinearTransformer(bert, feature_map="hedgehog", window=8, max_seq_length=200)
        encoder.unpad_inputs = packed
        model = SentenceTransformer(modules=[encoder, Pooling(32, "mean")]).eval()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def loss() -> Tensor:
            return model(model.preprocess(texts))["sentence_embedding"].square().sum()

        first = loss()
        first.backward()
        optimizer.step()
        assert loss() < first
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        added = {name for name in before if ".linear_attention." in name}
        assert any(name.endswith("gain") for name in added)
        # Nothing in this loss depends on the pooler, and a key's bias cancels in what is left of it.
        assert added <= moved | {name for name in added if name.endswith("key_projection.bias")}
        assert all(torch.isfinite(p).all() for p in model.parameters())

    # Sentence Transformers 6.2 calls what transformers 5.23 renamed.
    @pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
    @pytest.mark.parametrize("name", ["bert", "modernbert"])
    def test_gradient_checkpointing_changes_nothing(
        self, name: str, encoder_folder: Callable[[str], str], texts: list[str]
    ) -> None:
        def gradients(checkpointing: bool) -> dict[str, Tensor]:
            encoder = LinearTransformer(encoder_folder(name), feature_map="hedgehog", window=8, max_seq_length=200)
            model = SentenceTransformer(modules=[encoder, Pooling(32, "mean")]).train()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            if checkpointing:
                model.gradient_checkpointing_enable()
            runs: list[None] = []
            inner = next(module for module in encoder.model.modules() if isinstance(module, torch.nn.Linear))
            inner.register_forward_hook(lambda *_: runs.append(None))
            model(model.preprocess(texts))["sentence_embedding"].square().sum().backward()
            assert len(runs) == 1 + checkpointing
            return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

        expected = gradients(False)
        assert any(".linear_attention." in name for name in expected)
        torch.testing.assert_close(gradients(True), expected)


class TestDataParallel:
    def test_it_is_refused_where_it_would_be_wrong(self, bert: str, texts: list[str]) -> None:
        encoder = LinearTransformer(bert, **SETTINGS).eval()
        with refused("DataParallel takes packed texts apart: use a process for each GPU"):
            encoder._replicate_for_data_parallel()(encoder.preprocess(texts))

    def test_padded_texts_are_taken_apart_by_rows(self, bert: str, texts: list[str]) -> None:
        encoder = LinearTransformer(bert, **SETTINGS).eval()
        encoder.unpad_inputs = False
        features = encoder.preprocess(texts)
        with torch.no_grad():
            whole = encoder(features)["token_embeddings"]
            for rows in (slice(0, 2), slice(2, None)):
                part = {name: value[rows] if isinstance(value, Tensor) else value for name, value in features.items()}
                torch.testing.assert_close(encoder(part)["token_embeddings"], whole[rows], rtol=0, atol=1e-5)


class TestSaving:
    def test_the_class_path_is_golden(self, saved: Path) -> None:
        first, *others = json.loads((saved / "modules.json").read_text(encoding="utf-8"))
        assert (first["type"], first["path"]) == ("st_linear.transformer.LinearTransformer", "")
        assert [module["type"].partition(".")[0] for module in others] == ["sentence_transformers"] * 2

    def test_files_are_safetensors_and_text(self, saved: Path) -> None:
        names = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
        assert {"config.json", "model.safetensors", WEIGHTS_NAME, "modules.json"} <= names
        assert {Path(name).suffix for name in names} == {".json", ".safetensors", ".md"}

    def test_settings_are_saved(self, saved: Path) -> None:
        settings = json.loads((saved / "sentence_bert_config.json").read_text(encoding="utf-8"))
        expected = {**SETTINGS, "feature_map": "favor", "exact_layers": [], "position_extension": "tile", "seed": 0}
        assert {name: settings[name] for name in expected} == expected

    def test_how_long_a_text_is_exact_is_saved(
        self, bert: str, texts: list[str], text: Callable, tmp_path: Path
    ) -> None:
        model, plain = (convert(bert, window=8, exact_up_to=limit, max_seq_length=200) for limit in (50, None))
        softmax = convert(bert, feature_map="softmax", max_seq_length=200)
        model.save_pretrained(str(tmp_path / "model"))
        plain.save_pretrained(str(tmp_path / "plain"))
        for loaded in (model, st_linear.load(str(tmp_path / "model"))):
            assert loaded[0].exact_up_to == 50
            vectors = loaded.encode([text(50), text(51), text(9)])
            expected = softmax.encode([text(50), text(51), text(9)])
            close = np.abs(vectors - expected).max(axis=1) < 1e-5
            assert close.tolist() == [True, False, True]
        # Folders that say nothing, as all did before there was a choice, mean two windows.
        assert "exact_up_to" not in json.loads((tmp_path / "plain" / "sentence_bert_config.json").read_text("utf-8"))
        assert st_linear.load(str(tmp_path / "plain"))[0].exact_up_to == 16

    def test_the_root_is_a_plain_transformers_checkpoint(self, family: str, text: Callable, tmp_path: Path) -> None:
        model = SentenceTransformer(modules=[LinearTransformer(family, **SETTINGS)])
        model.save_pretrained(str(tmp_path))
        plain, info = AutoModel.from_pretrained(str(tmp_path), output_loading_info=True)
        assert not any(info.values())
        assert plain.config._attn_implementation == "sdpa"
        original = AutoModel.from_pretrained(family).eval()
        inputs = model.tokenizer(text(60), return_tensors="pt")
        with torch.no_grad():
            expected = original(**inputs).last_hidden_state
            torch.testing.assert_close(plain.eval()(**inputs).last_hidden_state, expected, rtol=0, atol=1e-5)

    def test_a_fresh_process_gives_the_same_vectors(
        self, saved: Path, model: SentenceTransformer, encoder_folder: Callable, texts: list[str], tmp_path: Path
    ) -> None:
        models = {saved: model}
        for family, settings in (
            ("bert", {"feature_map": "softmax"}),
            ("roberta", {"feature_map": "elu", "window": 0}),
            ("modernbert", {"feature_map": "hedgehog", "window": 8, "exact_layers": [0]}),
        ):
            encoder = LinearTransformer(encoder_folder(family), max_seq_length=200, **settings)
            models[tmp_path / family] = SentenceTransformer(modules=[encoder])
            models[tmp_path / family].save_pretrained(str(tmp_path / family))
        script = (
            "import json, sys, torch, numpy as np\n"
            "from sentence_transformers import SentenceTransformer\n"
            "torch.set_num_threads(1)\n"
            "texts, folders, output = json.load(sys.stdin)\n"
            "vectors = [SentenceTransformer(f, trust_remote_code=True, device='cpu').encode(texts) for f in folders]\n"
            "import st_linear\n"
            "vectors += [st_linear.load(f, device='cpu').encode(texts) for f in folders]\n"
            "np.save(output, np.stack(vectors))\n"
        )
        output = tmp_path / "vectors.npy"
        arguments = json.dumps([texts, [str(folder) for folder in models], str(output)])
        subprocess.run([sys.executable, "-c", script], input=arguments, text=True, check=True, cwd=tmp_path)
        expected = np.stack([model.encode(texts) for model in models.values()] * 2)
        torch.testing.assert_close(torch.from_numpy(np.load(output)), torch.from_numpy(expected), rtol=0, atol=1e-6)

    def test_without_the_flag_the_message_is_that_of_sentence_transformers(self, saved: Path) -> None:
        with pytest.raises(ValueError, match="`trust_remote_code=True`"):
            SentenceTransformer(str(saved))

    def test_no_pickle_is_read_or_written(
        self, saved: Path, damaged: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError("pickle was used")

        for function in ("load", "save"):
            monkeypatch.setattr(torch, function, refuse)
        for function in ("load", "loads", "dump", "dumps", "Unpickler"):
            monkeypatch.setattr(pickle, function, refuse)
        st_linear.load(str(saved)).save(str(tmp_path / "again"), safe_serialization=False)
        assert (tmp_path / "again" / "model.safetensors").is_file()

        (damaged / "model.safetensors").rename(damaged / "pytorch_model.bin")
        for load in (st_linear.load, lambda folder: SentenceTransformer(folder, trust_remote_code=True)):
            with refused("no file named model.safetensors", OSError):
                load(str(damaged))

    def test_converting_anew_says_what_is_lost(self, base: str, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, logger="st_linear.transformer"):
            learned = convert(base, feature_map="hedgehog", window=8)
            assert caplog.messages == []
            convert(learned, feature_map="hedgehog", window=8)
        (message,) = caplog.messages
        assert "what its feature maps have learned is not carried over" in message

    def test_an_adapter_is_loaded(self, bert: str, base: str, texts: list[str], tmp_path: Path) -> None:
        settings = {"feature_map": "hedgehog", "window": 8, "max_seq_length": 200}
        trained = convert(base, **settings)
        for attention in linear_attentions(trained[0].model).values():
            for parameter in attention.parameters():
                torch.nn.init.normal_(parameter)
        trained.save_pretrained(str(tmp_path))
        expected = encode(trained, texts)
        assert (encode(convert(base, **settings), texts) - expected).abs().max() > 1e-3
        torch.testing.assert_close(encode(convert(base, adapter=str(tmp_path), **settings), texts), expected)
        encoder = LinearTransformer(bert, adapter=str(tmp_path), **settings)
        torch.testing.assert_close(split_state_dict(encoder.model)[1], split_state_dict(trained[0].model)[1])

        with refused("was made with window=8, got 4"):
            LinearTransformer(bert, adapter=str(tmp_path), **{**settings, "window": 4})
        with refused("was made with feature_map='hedgehog', got 't2r'"):
            convert(base, adapter=str(tmp_path), **{**settings, "feature_map": "t2r"})
        with refused(f"{bert} holds no {WEIGHTS_NAME}: pass the folder or hub id of an adapter"):
            convert(base, adapter=bert, **settings)


def edit(folder: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / name)
    with safe_open(folder / name, framework="pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, folder / name, metadata=metadata)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


WEIGHT = "encoder.layer.0.attention.self.query.weight"
GAIN = "encoder.layer.1.attention.self.linear_attention.gain"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "tensor missing": (
        lambda f: edit(f, "model.safetensors", lambda t: t.pop(WEIGHT)),
        f"lacks weights of the encoder: {WEIGHT}",
    ),
    "pooler missing": (
        lambda f: edit(f, "model.safetensors", lambda t: t.pop("pooler.dense.bias")),
        "model.safetensors lacks tensors: pooler.dense.bias",
    ),
    "tensor left over": (
        lambda f: edit(f, "model.safetensors", lambda t: t.update(foo=torch.ones(2))),
        "model.safetensors holds tensors that the model has no place for: foo",
    ),
    "wrong shape": (
        lambda f: edit(f, "model.safetensors", lambda t: t.update({WEIGHT: torch.ones(3, 3)})),
        f"{WEIGHT} has shape (3, 3), expected (32, 32)",
    ),
    "file cut": (lambda f: cut(f / "model.safetensors"), "model.safetensors is damaged"),
    "file is no safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"x" * 1000),
        "model.safetensors is damaged",
    ),
    "addition missing": (
        lambda f: edit(f, WEIGHTS_NAME, lambda t: t.pop(GAIN)),
        f"{WEIGHTS_NAME} lacks tensors: {GAIN}",
    ),
    "addition left over": (
        lambda f: edit(f, WEIGHTS_NAME, lambda t: t.update(foo=torch.ones(2))),
        f"{WEIGHTS_NAME} holds tensors that the model has no place for: foo",
    ),
    "addition of wrong shape": (
        lambda f: edit(f, WEIGHTS_NAME, lambda t: t.update({GAIN: torch.ones(3)})),
        f"{WEIGHTS_NAME}: {GAIN} has shape (3,), expected (4,)",
    ),
    "additions cut": (lambda f: cut(f / WEIGHTS_NAME), f"{WEIGHTS_NAME} is damaged"),
    "additions are no safetensors": (lambda f: (f / WEIGHTS_NAME).write_bytes(b""), f"{WEIGHTS_NAME} is damaged"),
    "additions missing": (lambda f: (f / WEIGHTS_NAME).unlink(), f"holds no {WEIGHTS_NAME}"),
    "settings missing": (
        lambda f: (f / "sentence_bert_config.json").unlink(),
        f"{WEIGHTS_NAME} was made with window=8, this model has window=64",
    ),
}
ONE_MODULE = '[{"idx": 0, "name": "0", "path": "", "type": "st_linear.transformer.LinearTransformer"}]'


class TestDamagedFolders:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_both_ways_of_loading_refuse(self, damage: str, damaged: Path) -> None:
        apply, message = DAMAGES[damage]
        apply(damaged)
        with refused(message):
            st_linear.load(str(damaged))
        with refused(message):
            SentenceTransformer(str(damaged), trust_remote_code=True)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("modules.json", "[{", "modules.json is damaged"),
            ("modules.json", "\\", "modules.json is damaged"),
            ("modules.json", "[1]", "modules.json or config_sentence_transformers.json is damaged"),
            ("modules.json", ONE_MODULE.replace('"path"', '"pth"'), "is damaged ('path')"),
            ("modules.json", "[]", "An empty modules list was passed"),
            ("config_sentence_transformers.json", "{", "config_sentence_transformers.json is damaged"),
            ("config_sentence_transformers.json", "[1]", "config_sentence_transformers.json is damaged"),
            ("sentence_bert_config.json", "{", "a JSON file of the model is damaged"),
            ("1_Pooling/config.json", "{", "a JSON file of the model is damaged"),
        ],
    )
    def test_load_refuses_damaged_json(self, name: str, content: str, message: str, damaged: Path) -> None:
        (damaged / name).write_text(content, encoding="utf-8")
        with refused(message):
            st_linear.load(str(damaged))

    def test_load_refuses_text_that_is_none(self, damaged: Path) -> None:
        (damaged / "modules.json").write_bytes(b"\xff\xfe\x00")
        with refused("modules.json is damaged"):
            st_linear.load(str(damaged))

    def test_load_refuses_to_give_the_softmax_model_instead(self, damaged: Path) -> None:
        (damaged / "modules.json").unlink()
        with refused(f"holds {WEIGHTS_NAME} but no modules.json"):
            st_linear.load(str(damaged))

    def test_a_base_model_must_be_whole_too(self, damaged: Path) -> None:
        edit(damaged, "model.safetensors", lambda tensors: tensors.pop("pooler.dense.bias"))
        LinearTransformer(str(damaged), **SETTINGS)  # A pooler is not used.
        edit(damaged, "model.safetensors", lambda tensors: tensors.pop(WEIGHT))
        with refused(f"lacks weights of the encoder: {WEIGHT}"):
            LinearTransformer(str(damaged), **SETTINGS)
        cut(damaged / "model.safetensors")
        with refused("model.safetensors is damaged"):
            LinearTransformer(str(damaged), **SETTINGS)

    def test_load_refuses_any_encoder_that_lacks_weights(self, bert: str, tmp_path: Path) -> None:
        plain, saved = tmp_path / "plain", tmp_path / "saved"
        shutil.copytree(bert, plain)
        SentenceTransformer(bert).save_pretrained(str(saved))
        for folder in (plain, saved):
            st_linear.load(str(folder))
            edit(folder, "model.safetensors", lambda tensors: tensors.pop(WEIGHT))
            for attempt in (st_linear.load, st_linear.convert):
                with refused(f"{folder} lacks weights of the encoder: {WEIGHT}"):
                    attempt(str(folder))
        # Outside of it, Sentence Transformers loads as it always has.
        assert isinstance(SentenceTransformer(str(plain)), SentenceTransformer)

    @pytest.mark.parametrize("saved_by", ["sentence_transformers", "transformers"])
    def test_load_refuses_a_cross_encoder(self, saved_by: str, bert: str, tmp_path: Path) -> None:
        model = CrossEncoder(bert, num_labels=1)
        if saved_by == "sentence_transformers":
            model.save_pretrained(str(tmp_path))
        else:
            model.model.save_pretrained(tmp_path)
            model.tokenizer.save_pretrained(tmp_path)
        with refused("is a CrossEncoder, not a SentenceTransformer: it has no sentence embeddings"):
            st_linear.load(str(tmp_path))


class TestForeignCode:
    """Code that lies in a folder writes a file when it runs; ``load`` must leave no such file."""

    @pytest.fixture
    def marker(self, tmp_path: Path) -> Path:
        return tmp_path / "code ran"

    @pytest.fixture
    def evil(self, damaged: Path, marker: Path) -> Path:
        code = (
            f"open({str(marker)!r}, 'w').close()\n"
            "from sentence_transformers.sentence_transformer.modules import Pooling\n"
            "from transformers import BertConfig, BertModel, BertTokenizerFast\n"
            "class EvilPooling(Pooling): pass\n"
            "class EvilConfig(BertConfig): model_type = 'evil'\n"
            "class EvilModel(BertModel): config_class = EvilConfig\n"
            "class EvilTokenizer(BertTokenizerFast): pass\n"
        )
        for name in ("evil", "transformer", "__init__", "conftest", "modeling"):
            (damaged / f"{name}.py").write_text(code, encoding="utf-8")
        (damaged / "st_linear").mkdir()
        for name in ("__init__", "transformer"):
            (damaged / "st_linear" / f"{name}.py").write_text(code, encoding="utf-8")
        return damaged

    @staticmethod
    def rewrite(file: Path, change: Callable[[Any], object]) -> None:
        content = json.loads(file.read_text(encoding="utf-8"))
        change(content)
        file.write_text(json.dumps(content), encoding="utf-8")

    def test_the_trap_works(self, evil: Path, marker: Path) -> None:
        self.rewrite(evil / "modules.json", lambda modules: modules[1].update(type="evil.EvilPooling"))
        SentenceTransformer(str(evil), trust_remote_code=True)
        assert marker.exists()

    @pytest.mark.parametrize(
        "kind", ["evil.EvilPooling", "os.system", "st_linear.evil.Evil", "sentence_transformersx.A"]
    )
    def test_a_foreign_class_is_refused(self, kind: str, evil: Path, marker: Path) -> None:
        self.rewrite(evil / "modules.json", lambda modules: modules[1].update(type=kind))
        with refused(f"needs the class {kind}, which st_linear.load does not run"):
            st_linear.load(str(evil))
        with refused(f"needs the class {kind}"):
            convert(str(evil))
        assert not marker.exists()

    def test_auto_map_is_not_followed(
        self, evil: Path, marker: Path, model: SentenceTransformer, texts: list[str]
    ) -> None:
        auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
        self.rewrite(evil / "config.json", lambda config: config.update(auto_map=auto_map))
        tokenizer = {"auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}}
        self.rewrite(evil / "tokenizer_config.json", lambda config: config.update(tokenizer))
        trust = {"trust_remote_code": True}
        self.rewrite(
            evil / "sentence_bert_config.json",
            lambda config: config.update(
                model_kwargs=dict(trust), config_kwargs=dict(trust), processor_kwargs=dict(trust)
            ),
        )
        torch.testing.assert_close(encode(st_linear.load(str(evil)), texts), encode(model, texts))
        assert not marker.exists()

    def test_a_model_type_that_only_foreign_code_knows_is_refused(self, evil: Path, marker: Path) -> None:
        auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
        self.rewrite(evil / "config.json", lambda config: config.update(auto_map=auto_map, model_type="evil"))
        with pytest.raises(ValueError, match="trust_remote_code"):
            st_linear.load(str(evil))
        assert not marker.exists()

    def test_the_flag_is_refused(self, saved: Path) -> None:
        with refused("st_linear.load runs no remote code"):
            st_linear.load(str(saved), trust_remote_code=True)


class TestErrors:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"feature_map": "performer"}, "unknown feature_map 'performer'; choose one of: softmax, elu"),
            ({"feature_map_kwargs": {"nf": 1}}, "feature map 'favor' has no option 'nf'; its options: num_features"),
            ({"window": -1}, "window must be a number of tokens >= 0 (0 = purely linear), got -1"),
            ({"window": 1.5}, "window must be a number of tokens >= 0 (0 = purely linear), got 1.5"),
            ({"window": True}, "window must be a number of tokens >= 0 (0 = purely linear), got True"),
            ({"exact_up_to": 100}, "exact_up_to must be at least two windows, 128 tokens, got 100"),
            ({"exact_up_to": 512.0}, "exact_up_to must be a number of tokens, got 512.0"),
            ({"exact_up_to": "512"}, "exact_up_to must be a number of tokens, got '512'"),
            ({"exact_up_to": True}, "exact_up_to must be a number of tokens, got True"),
            ({"exact_up_to": 10**30}, f"exact_up_to must be a number of tokens, got {10**30}"),
            (
                {"exact_up_to": 512, "window": 0},
                "exact_up_to=512 asks for a window: window=0 is linear at every length",
            ),
            ({"exact_layers": [2]}, "exact_layers must lie in 0..1, got 2"),
            ({"exact_layers": 1}, "exact_layers must be a list of layer indices, got 1"),
            ({"max_seq_length": 0}, "max_seq_length must be a positive number of tokens, got 0"),
            ({"max_seq_length": True}, "max_seq_length must be a positive number of tokens, got True"),
            ({"max_seq_length": 9.5}, "max_seq_length must be a positive number of tokens, got 9.5"),
            ({"position_extension": "x"}, "unknown position_extension 'x'; choose one of: tile, interpolate, none"),
            ({"seed": "x"}, "seed must be an integer, got 'x'"),
        ],
        ids=str,
    )
    def test_bad_settings_are_refused(self, settings: dict[str, Any], message: str, base: str) -> None:
        with refused(message):
            LinearTransformer(base, **settings)
        with refused(message):
            convert(base, **settings)

    def test_settings_are_checked_before_a_model_is_loaded(self) -> None:
        with refused("window must be"):
            LinearTransformer("no/such-model", window=-1)

    @pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2"])
    def test_an_attention_implementation_is_refused(self, implementation: str, bert: str) -> None:
        with refused(f"attn_implementation={implementation!r} can't be combined with LinearTransformer"):
            LinearTransformer(bert, model_kwargs={"attn_implementation": implementation})

    def test_another_backend_is_refused(self, bert: str) -> None:
        with refused("LinearTransformer converts encoders on backend='torch' only, got 'onnx'"):
            LinearTransformer(bert, backend="onnx")

    def test_an_unknown_setting_is_refused(self, base: str) -> None:
        with refused("unknown setting 'windw'; choose among: feature_map, feature_map_kwargs, window, exact_up_to, "):
            convert(base, windw=8)

    @pytest.mark.parametrize("function", [st_linear.load, convert, LinearTransformer])
    @pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "no-such-organisation/no-such-model"])
    def test_a_missing_model_is_refused(self, function: Callable[..., Any], path: str) -> None:
        with refused(path, FileNotFoundError):
            function(path)

    def test_a_folder_without_a_model_is_refused(self, tmp_path: Path) -> None:
        for function in (st_linear.load, convert):
            with refused("holds no model: neither modules.json nor config.json is there", FileNotFoundError):
                function(str(tmp_path))
            with refused("'' holds no model", FileNotFoundError):
                function("")

    def test_a_cross_encoder_is_refused(self, bert: str, tmp_path: Path) -> None:
        cross_encoder = CrossEncoder(bert, num_labels=1)
        cross_encoder.save_pretrained(str(tmp_path))
        for function in (st_linear.load, convert):
            with refused("is a CrossEncoder, not a SentenceTransformer"):
                function(str(tmp_path))
        with refused("can't convert a CrossEncoder: pass a SentenceTransformer, a folder or a hub id"):
            convert(cross_encoder)  # type: ignore[arg-type]

    def test_only_models_that_begin_with_a_transformer_convert(self) -> None:
        with refused("can't convert a model that begins with Normalize: its first module must be a Transformer"):
            convert(SentenceTransformer(modules=[Normalize()]))
        with refused("can't convert a NoneType"):
            convert(None)  # type: ignore[arg-type]

    def test_an_encoder_that_is_not_supported_is_refused(self, save_encoder: Callable[..., str]) -> None:
        config = FAMILIES["bert"]()
        config.is_decoder = True
        with refused("BertModel can't be converted: it is a causal decoder. Supported: BERT, "):
            convert(save_encoder(config))

    def test_a_head_is_left_behind(self, save_encoder: Callable[..., str]) -> None:
        folder = save_encoder(FAMILIES["bert"](), BertForSequenceClassification)
        assert type(LinearTransformer(folder, **SETTINGS).model).__name__ == "BertModel"


class TestModelCard:
    def test_it_shows_both_ways_of_loading(self, model: SentenceTransformer, saved: Path, tmp_path: Path) -> None:
        st_linear.load(str(saved)).save_pretrained(str(tmp_path))
        for folder in (saved, tmp_path):
            card = (folder / "README.md").read_text(encoding="utf-8")
            assert 'model = SentenceTransformer("sentence_transformers_model_id", trust_remote_code=True)' in card
            assert 'model = st_linear.load("sentence_transformers_model_id")' in card
            assert 'SentenceTransformer("sentence_transformers_model_id")' not in card
            header = card.split("---")[1]
            for tag in ("sentence-transformers", "st_linear", "linear-attention", "custom_code"):
                assert header.count(f"- {tag}\n") == 1

    def test_it_says_how_the_model_attends(self, saved: Path) -> None:
        card = (saved / "README.md").read_text(encoding="utf-8")
        section = card.partition("### Attention\n")[2].partition("### Model Sources")[0]
        settings = st_linear.load(str(saved))[0].get_config_dict()
        assert f"- **Feature map:** `{settings['feature_map']}`" in section
        assert f"- **Window:** {settings['window']} tokens: exact within blocks" in section
        assert f"- **Exact:** texts of up to {2 * settings['window']} tokens" in section
        assert f"up to {settings['max_seq_length']:,} tokens" in section
        assert "### Full Model Architecture" in card
        assert "{{" not in card

    def test_what_the_base_states_is_inherited(self, encoder_folder: Callable[[str], str], tmp_path: Path) -> None:
        base = tmp_path / "base"
        SentenceTransformer(encoder_folder("bert")).save_pretrained(str(base))
        text = (base / "README.md").read_text(encoding="utf-8")
        (base / "README.md").write_text(text.replace("---\n", "---\nlicense: apache-2.0\nlanguage: en\n", 1))
        convert(str(base), window=0, feature_map="softmax").save_pretrained(str(tmp_path / "linear"))
        card = (tmp_path / "linear" / "README.md").read_text(encoding="utf-8")
        header = card.split("---")[1]
        assert "license: apache-2.0\n" in header
        assert "language:\n- en\n" in header or "language: en\n" in header
        assert "- **License:** apache-2.0" in card
        assert "- **Form:** exact softmax attention" in card
        # No path of the machine that it was made on.
        assert str(tmp_path) not in card
        assert "- **Encoder:** base\n" in card

    @pytest.mark.parametrize(
        "header", ["license: [", "- a list", "license: {a: 1}", "language: 3", "license:", "\x00"]
    )
    def test_a_bad_card_of_the_base_harms_nothing(
        self, encoder_folder: Callable[[str], str], tmp_path: Path, header: str
    ) -> None:
        base = tmp_path / "base"
        SentenceTransformer(encoder_folder("bert")).save_pretrained(str(base))
        (base / "README.md").write_text(f"---\n{header}\n---\n# A model\n", encoding="utf-8")
        card: Any = convert(str(base)).model_card_data
        assert card.license is None
        assert not card.language


@pytest.fixture(scope="module")
def converted_minilm(minilm: str) -> SentenceTransformer:
    return convert(minilm, window=64, max_seq_length=1024)


class TestMiniLM:
    """The model of the quick start, with its own weights."""

    SENTENCES = (
        "A plane is taking off.",
        "An air plane is taking off.",
        "A man is playing a large flute while a group of children in the park listens to him.",
        "Kittens.",
        "",
    )

    def test_texts_below_the_window_keep_their_vectors(
        self, minilm: str, converted_minilm: SentenceTransformer
    ) -> None:
        original = SentenceTransformer(minilm)
        sentences = [*self.SENTENCES, " ".join(self.SENTENCES * 2)]
        torch.testing.assert_close(encode(converted_minilm, sentences), encode(original, sentences), rtol=0, atol=1e-5)

    def test_features_are_a_function_of_the_seed(self, minilm: str, converted_minilm: SentenceTransformer) -> None:
        long = [" ".join(self.SENTENCES) * 8]
        expected = encode(converted_minilm, long)
        torch.testing.assert_close(encode(convert(minilm, window=64, max_seq_length=1024), long), expected)
        other = convert(minilm, window=64, max_seq_length=1024, seed=7)
        assert (encode(other, long) - expected).abs().max() > 1e-4
        other[0].redraw(0)
        torch.testing.assert_close(encode(other, long), expected)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_packed_batches_join(family: str, encoder_folder: Callable[[str], str], text: Callable[..., str]) -> None:
    model = convert(encoder_folder(family), **SETTINGS)
    texts = [text(length, seed=length) for length in (7, 3, 30, 4, 12)]
    batches = [model.preprocess(part) for part in (texts[:2], texts[2:3], texts[3:])]
    joined, expected = join_packed(batches), model.preprocess(texts)
    assert joined.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(joined[key], value, rtol=0, atol=0)
        else:
            assert joined[key] == value
