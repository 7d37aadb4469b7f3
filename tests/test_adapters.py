"""An adapter brings its settings with it, and fits the encoder that it was trained for alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, refused, slow
from sentence_transformers import SentenceTransformer
from torch.testing import assert_close

from st_linear import LinearTransformer, adapters, convert, load
from st_linear.adapters import CONFIG_NAME, Adapter, bundled_adapters, export_adapter, fingerprint
from st_linear.conversion import linear_attentions, split_state_dict
from st_linear.data import load_pairs, passages, training_sentences

OWN: dict[str, Any] = {"feature_map": "learned_favor", "feature_map_kwargs": {"num_features": 12}, "window": 8}
RECORD = {"texts": "some", "fidelity": {"512": {"cosine": 0.99}}}


def learned(model: SentenceTransformer) -> dict[str, torch.Tensor]:
    return split_state_dict(model[0].model)[1]


@pytest.fixture(scope="module")
def adapter(bert: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a conversion whose maps have moved."""
    model = convert(bert, max_seq_length=100, **OWN)
    with torch.no_grad():
        for attention in linear_attentions(model).values():
            for parameter in attention.parameters():
                parameter += torch.linspace(-0.2, 0.2, parameter.numel()).view_as(parameter)
    model[0].training_record = RECORD
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture
def bundled(adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name under which that adapter is bundled."""
    folder = tmp_path / "bundled" / "tiny-bert"
    folder.mkdir(parents=True)
    for name in (CONFIG_NAME, adapters.WEIGHTS_NAME):
        shutil.copy(Path(adapter) / name, folder / name)
    monkeypatch.setattr(adapters, "_BUNDLED", folder.parent)
    return folder.name


class TestSettings:
    def test_those_left_open_are_the_adapters(self, bert: str, adapter: str) -> None:
        model = convert(bert, adapter=adapter)
        assert {name: getattr(model[0], name) for name in OWN} == OWN
        assert_close(learned(model), learned(load(adapter)), rtol=0, atol=0)

    def test_length_and_positions_are_the_callers(self, bert: str, adapter: str) -> None:
        model = convert(bert, adapter=adapter, max_seq_length=300, position_extension="interpolate")
        assert model.max_seq_length == 300

    def test_how_long_a_text_is_exact_is_the_callers_to_say(self, bert: str, adapter: str, tmp_path: Path) -> None:
        assert Adapter.load(adapter).settings["exact_up_to"] is None
        model = convert(bert, adapter=adapter, exact_up_to=40)
        export_adapter(model[0], tmp_path)
        limits = [convert(bert, adapter=str(tmp_path), exact_up_to=limit)[0].exact_up_to for limit in (None, 16, 64)]
        assert (model[0].exact_up_to, *limits) == (40, 40, 16, 64)

    def test_those_given_may_agree(self, bert: str, adapter: str) -> None:
        encoder = LinearTransformer(bert, adapter=adapter, exact_layers=(), **OWN)
        assert_close(split_state_dict(encoder.model)[1], learned(load(adapter)), rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"feature_map": "favor"}, "made with feature_map='learned_favor', got 'favor'"),
            ({"window": 0}, "made with window=8, got 0"),
            ({"exact_layers": [1]}, "made with exact_layers=[], got [1]"),
            ({"feature_map_kwargs": {"num_features": 4}}, "made with feature_map_kwargs={'num_features': 12}, got"),
        ],
    )
    def test_those_given_must_agree(self, bert: str, adapter: str, given: dict[str, Any], message: str) -> None:
        with refused(message):
            convert(bert, adapter=adapter, **given)


class TestBase:
    def test_another_encoder_is_refused(self, save_encoder: Callable[..., str], adapter: str) -> None:
        config = FAMILIES["bert"]()
        config.initializer_range = 0.2
        with refused("was trained for another encoder"):
            convert(save_encoder(config), adapter=adapter)

    def test_an_encoder_of_another_size_is_refused(self, encoder_folder: Callable[[str], str], adapter: str) -> None:
        with refused("was trained for another encoder"):
            convert(encoder_folder("distilbert"), adapter=adapter)

    def test_one_that_was_trained_on_is_another(self, bert: str, adapter: str, tmp_path: Path) -> None:
        model = load(adapter)
        with torch.no_grad():
            model[0].model.encoder.layer[1].output.dense.weight.mul_(1.02)
        model.save_pretrained(str(tmp_path))
        with refused("was trained for another encoder"):
            convert(bert, adapter=str(tmp_path))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_number_formats_do_not_matter(self, bert: str, adapter: str, dtype: str) -> None:
        encoder = LinearTransformer(bert, adapter=adapter, model_kwargs={"dtype": dtype})
        assert encoder.feature_map == "learned_favor"

    @pytest.mark.parametrize("name", FAMILIES)
    def test_conversion_leaves_the_fingerprint(self, encoder_folder: Callable[[str], str], name: str) -> None:
        first, second = (convert(encoder_folder(name), max_seq_length=length) for length in (64, 400))
        samples = fingerprint(first[0].model)
        assert len(samples) >= 8 * 5
        assert fingerprint(second[0].model) == samples

    def test_names_are_kept(self, bert: str, adapter: str, tmp_path: Path) -> None:
        base = {"name": bert, "revision": None}
        assert Adapter.load(adapter).base == base
        load(adapter).save_pretrained(str(tmp_path / "again"))
        convert(bert, adapter=adapter).save_pretrained(str(tmp_path / "adapted"))
        assert Adapter.load(str(tmp_path / "again")).base == Adapter.load(str(tmp_path / "adapted")).base == base


class TestBundled:
    def test_is_the_default(self, bert: str, bundled: str, adapter: str) -> None:
        for model in (convert(bert), convert(SentenceTransformer(bert)), convert(bert, window=8)):
            assert_close(learned(model), learned(load(adapter)), rtol=0, atol=0)
            assert model[0].training_record == RECORD

    def test_has_a_name(self, bert: str, bundled: str, adapter: str) -> None:
        assert bundled_adapters() == [bundled]
        assert_close(learned(convert(bert, adapter=bundled)), learned(load(adapter)), rtol=0, atol=0)

    @pytest.mark.parametrize("given", [{"window": 0}, {"feature_map": "favor"}, {"exact_layers": [0]}])
    def test_other_settings_do_without(self, bert: str, bundled: str, given: dict[str, Any]) -> None:
        model = convert(bert, **given)
        assert model[0].training_record == {}
        assert model[0].feature_map == "favor"

    def test_none_turns_it_off(self, bert: str, bundled: str) -> None:
        model = convert(bert, adapter="none", **OWN)
        assert_close(learned(model), learned(convert(bert, adapter="none", **OWN)), rtol=0, atol=0)
        assert model[0].training_record == {}

    def test_other_encoders_do_without(self, encoder_folder: Callable[[str], str], bundled: str) -> None:
        assert convert(encoder_folder("roberta"))[0].feature_map == "favor"

    def test_saved_models_keep_their_own(self, bert: str, bundled: str, tmp_path: Path) -> None:
        model = convert(bert, adapter="none", **OWN)
        model.save_pretrained(str(tmp_path / "saved"))
        assert_close(learned(load(str(tmp_path / "saved"))), learned(model), rtol=0, atol=0)


@pytest.fixture(scope="module")
def adapted_minilm(minilm: str) -> SentenceTransformer:
    return convert(minilm)


class TestAllMiniLM:
    """The adapter that comes with st_linear, on the model that it is for."""

    def test_is_the_default_and_small(self, adapted_minilm: SentenceTransformer) -> None:
        assert bundled_adapters() == ["all-MiniLM-L6-v2"]
        adapter = Adapter.load("all-MiniLM-L6-v2")
        assert adapted_minilm[0].training_record == adapter.training
        encoder = adapted_minilm[0]
        assert (encoder.feature_map, encoder.window, encoder.exact_up_to) == ("learned_favor", 128, 512)
        assert sum(path.stat().st_size for path in Path(adapter.weights).parent.iterdir()) <= 2 * 2**20

    def test_texts_that_the_original_reads_keep_their_vectors(
        self, adapted_minilm: SentenceTransformer, minilm: str
    ) -> None:
        original = SentenceTransformer(minilm)
        original.max_seq_length = 512
        texts = ["A plane is taking off.", *("The bridge was closed after the storm. " * n for n in (25, 60, 63))]
        counts = [len(ids) for ids in original.tokenizer(texts)["input_ids"]]
        assert 2 * 128 < counts[2] < counts[3] <= 512
        assert_close(adapted_minilm.encode(texts), original.encode(texts), rtol=0, atol=1e-5)

    @pytest.mark.parametrize(("length", "least"), [(512, 0.98), slow(2048, 0.95)])
    def test_long_texts_come_close(self, minilm: str, length: int, least: float) -> None:
        adapted_minilm = convert(minilm, exact_up_to=256)
        sentences = training_sentences(load_pairs("sample", "train"))
        texts = passages(" ".join(sentences), adapted_minilm.tokenizer, length)[:3]
        softmax = convert(minilm, feature_map="softmax")
        vectors = (torch.from_numpy(x.encode(texts)) for x in (adapted_minilm, softmax))
        assert torch.nn.functional.cosine_similarity(*vectors).min() > least


class TestExport:
    def test_matrices_are_rounded_and_the_rest_is_not(self, bert: str, adapter: str, tmp_path: Path) -> None:
        model = load(adapter)
        export_adapter(model[0], tmp_path / "alone")
        exported = learned(convert(bert, adapter=str(tmp_path / "alone")))
        for name, tensor in learned(model).items():
            matrix = name.endswith("_weight")
            expected = tensor.half().float() if matrix else tensor
            assert_close(exported[name], expected, rtol=0, atol=0)
            assert matrix == (tensor.ndim == 3 and 1 not in tensor.shape)
        sizes = [(tmp_path / name / adapters.WEIGHTS_NAME).stat().st_size for name in ("alone", adapter)]
        assert sizes[0] < 0.7 * sizes[1]

    def test_softmax_has_none(self, bert: str, tmp_path: Path) -> None:
        with refused("the model has no linear attention, and so no adapter: convert it first"):
            export_adapter(convert(bert, feature_map="softmax")[0], tmp_path)


class TestFiles:
    def test_the_record_is_saved_and_loaded(self, bert: str, adapter: str, tmp_path: Path) -> None:
        assert load(adapter)[0].training_record == RECORD
        convert(bert, adapter=adapter).save_pretrained(str(tmp_path))
        assert Adapter.load(str(tmp_path)).training == RECORD

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda text: text.replace('"version": 1', '"version": 2'),
                "has version 2, this st_linear reads version 1",
            ),
            (lambda text: "[]", "has version None, this st_linear reads version 1"),
            (lambda text: text[:50], f"{CONFIG_NAME} is damaged"),
            (lambda text: json.dumps({"version": 1}), f"{CONFIG_NAME} is damaged"),
        ],
    )
    def test_what_cannot_be_read_is_refused(
        self, bert: str, adapter: str, tmp_path: Path, change: Callable[[str], str], message: str
    ) -> None:
        shutil.copytree(adapter, tmp_path / "adapter")
        config = tmp_path / "adapter" / CONFIG_NAME
        config.write_text(change(config.read_text()))
        with refused(message):
            convert(bert, adapter=str(tmp_path / "adapter"))

    def test_both_files_are_needed(self, bert: str, adapter: str, bundled: str, tmp_path: Path) -> None:
        shutil.copytree(adapter, tmp_path / "adapter")
        (tmp_path / "adapter" / CONFIG_NAME).unlink()
        with refused(f"holds no {CONFIG_NAME}"):
            convert(bert, adapter=str(tmp_path / "adapter"))
        with refused("holds no linear_attention.safetensors: pass the folder or hub id of an adapter, or tiny-bert"):
            convert(bert, adapter=bert)
