"""Exported encoders: equal to PyTorch at any batch and length, and nothing but what was exported is run."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, SMALL, refused
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from test_recipe import write_pairs
from transformers import BertConfig

import st_linear
from st_linear import LinearTransformer, cli
from st_linear.export import OLDEST_TORCH, _Graph, export
from st_linear.feature_maps import feature_map_names
from st_linear.grid import _fingerprint
from st_linear.runtimes import FILES, ExportedEncoder, arguments_for

pytestmark = pytest.mark.skipif(torch.__version__ < OLDEST_TORCH, reason=f"exporting needs torch {OLDEST_TORCH}")


def make(folder: str, **settings: Any) -> SentenceTransformer:
    encoder = LinearTransformer(folder, max_seq_length=200, seed=1, **{"window": 8, **settings})
    return SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension(), "mean")], device="cpu")


def largest_difference(model: SentenceTransformer, exported: SentenceTransformer, texts: list[str]) -> float:
    kwargs: dict[str, Any] = {"output_value": "token_embeddings", "convert_to_numpy": False}
    pairs = zip(model.encode(texts, **kwargs), exported.encode(texts, **kwargs))
    return torch.stack([(a - b).abs().max() for a, b in pairs]).max().item()


@pytest.fixture(scope="module")
def model(save_encoder: Callable[..., str]) -> SentenceTransformer:
    """Of one layer, purely linear: tracing takes ten seconds for each, and half a minute with a window."""
    return make(save_encoder(BertConfig(**{**SMALL, "num_hidden_layers": 1})), feature_map="favor", window=0)


@pytest.fixture(scope="module")
def exported(model: SentenceTransformer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with all formats, and the report. To be read and not written to."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    return folder, export(model, folder, list(FILES))


def test_report(exported: tuple[Path, dict[str, Any]]) -> None:
    folder, report = exported
    assert list(report) == list(FILES)
    for name, entry in report.items():
        assert Path(entry["file"]) == folder / FILES[name]
        assert entry["bytes"] >= Path(entry["file"]).stat().st_size > 0
        assert list(entry["largest_difference"]) == ["16", "200"]
        assert all(0 <= value < (1 if name == "onnx-int8" else 1e-4) for value in entry["largest_difference"].values())
    assert report["onnx-int8"]["bytes"] < report["onnx"]["bytes"]


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_any_batch_and_length(
    name: str, model: SentenceTransformer, exported: tuple[Path, Any], text: Callable[..., str]
) -> None:
    graph = st_linear.load(str(exported[0]), **arguments_for(name))
    for lengths in ([3], [200], [3, 17, 64, 200], [24] * 5, [199, 4]):
        texts = [text(length, seed) for seed, length in enumerate(lengths)]
        assert largest_difference(model, graph, texts) < 1e-4


@pytest.mark.parametrize("name", FILES)
def test_vectors_are_the_models(
    name: str, model: SentenceTransformer, exported: tuple[Path, Any], text: Callable[..., str]
) -> None:
    texts = [text(length) for length in (5, 30, 200)]
    trusted = SentenceTransformer(str(exported[0]), trust_remote_code=True, **arguments_for(name))
    vectors = trusted.encode(texts)
    np.testing.assert_array_equal(st_linear.load(str(exported[0]), **arguments_for(name)).encode(texts), vectors)
    similarity = model.similarity_pairwise(model.encode(texts), vectors)
    assert (similarity > (0.98 if name == "onnx-int8" else 1 - 1e-6)).all()
    assert model.encode(texts).dtype == vectors.dtype


def test_padding_changes_nothing(exported: tuple[Path, Any], text: Callable[..., str]) -> None:
    graph = st_linear.load(str(exported[0]), backend="onnx")
    alone, beside = graph.encode([text(30)]), graph.encode([text(30), text(200)])
    np.testing.assert_allclose(alone[0], beside[0], atol=1e-5)


def test_texts_are_cut_and_counted(exported: tuple[Path, Any], text: Callable[..., str]) -> None:
    graph = st_linear.load(str(exported[0]), backend="onnx")
    np.testing.assert_array_equal(graph.encode([text(300)]), graph.encode([" ".join(text(300).split()[:198])]))
    assert graph[0].num_truncated == 1


def test_pytorch_loads_the_folder_too(
    model: SentenceTransformer, exported: tuple[Path, Any], text: Callable[..., str]
) -> None:
    loaded = st_linear.load(str(exported[0]))
    np.testing.assert_array_equal(loaded.encode([text(100)]), model.encode([text(100)]))


def test_processes_start_sessions_of_their_own(exported: tuple[Path, Any], text: Callable[..., str]) -> None:
    graph = st_linear.load(str(exported[0]), backend="onnx")
    copied = pickle.loads(pickle.dumps(graph))
    np.testing.assert_array_equal(copied.encode([text(40)]), graph.encode([text(40)]))


def test_dimensions_have_names(exported: tuple[Path, Any]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(exported[0] / FILES["onnx"]))
    assert {entry.name: entry.shape for entry in session.get_inputs()} == {
        "input_ids": ["batch", "length"],
        "attention_mask": ["batch", "length"],
    }
    assert [entry.name for entry in session.get_outputs()] == ["last_hidden_state"]


def test_unknown_format(model: SentenceTransformer, tmp_path: Path) -> None:
    with refused("unknown format 'tflite'; choose among: onnx, onnx-int8, openvino"):
        export(model, tmp_path / "model", ["tflite"])


def test_a_model_that_was_not_converted(bert: str, tmp_path: Path) -> None:
    with refused("pass a converted one, loaded with backend='torch'"):
        export(SentenceTransformer(bert), tmp_path / "model")


def test_padding_on_the_left(bert: str, tmp_path: Path) -> None:
    model = make(bert)
    model.tokenizer.padding_side = "left"
    with refused("pads on the left"):
        export(model, tmp_path / "model")


@pytest.mark.parametrize(("name", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_extra(
    name: str,
    package: str,
    model: SentenceTransformer,
    exported: tuple[Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with refused(f'{package}: pip install "st-linear[{name}]"', ImportError):
        export(model, tmp_path / "model", [name])
    with refused(f'{package}: pip install "st-linear[{name}]"', ImportError):
        SentenceTransformer(str(exported[0]), backend=name, trust_remote_code=True)


def test_an_older_torch(model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.8.1+cu126"))
    with refused("exporting needs torch 2.9 or newer, not 2.8.1+cu126", ImportError):
        export(model, tmp_path / "model")


def test_a_graph_that_differs_is_not_saved(
    model: SentenceTransformer, exported: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make(str(exported[0]), feature_map="elu")
    other.save_pretrained(str(tmp_path / "model"))
    # Tracing takes long: this graph is another model's.
    monkeypatch.setattr(_Graph, "write", lambda self, file, digest: shutil.copy(exported[0] / FILES["onnx"], file))
    with refused("at 16 tokens, more than 0.0001"):
        export(other, tmp_path / "model")
    forward = ExportedEncoder.forward

    def not_a_number(self: ExportedEncoder, input_ids: torch.Tensor, **inputs: torch.Tensor) -> Any:
        output = forward(self, input_ids, **inputs)
        return type(output)(last_hidden_state=output.last_hidden_state * (1 if input_ids.shape[1] < 100 else math.nan))

    monkeypatch.setattr(ExportedEncoder, "forward", not_a_number)
    for name in ("onnx", "onnx-int8"):
        with refused(f"the {name} graph differs from PyTorch by nan at 200 tokens"):
            export(model, tmp_path / "model", [name])
    assert not (tmp_path / "model" / "onnx").exists()
    assert st_linear.load(str(tmp_path / "model"))[0].feature_map == "elu"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_no_graph(name: str, model: SentenceTransformer, tmp_path: Path) -> None:
    model.save_pretrained(str(tmp_path))
    with refused(f"holds no {FILES[name]}", FileNotFoundError):
        st_linear.load(str(tmp_path), backend=name)


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_other_weights_beside_it(name: str, exported: tuple[Path, Any], bert: str, tmp_path: Path) -> None:
    make(bert, feature_map="elu").save_pretrained(str(tmp_path))
    for file in FILES.values():
        shutil.copytree((exported[0] / file).parent, (tmp_path / file).parent, dirs_exist_ok=True)
    with refused("was exported from other weights"):
        st_linear.load(str(tmp_path), backend=name)


def test_a_graph_of_somebody_else(exported: tuple[Path, Any], tmp_path: Path) -> None:
    import onnx

    folder = tmp_path / "model"
    shutil.copytree(exported[0], folder)
    graph = onnx.load(folder / FILES["onnx"])
    del graph.metadata_props[:]
    onnx.save(graph, folder / FILES["onnx"])
    with refused("was not written by st_linear.export"):
        st_linear.load(str(folder), backend="onnx")


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_a_damaged_graph(name: str, exported: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported[0], folder)
    content = (folder / FILES[name]).read_bytes()
    (folder / FILES[name]).write_bytes(content[: len(content) // 2])
    with refused(f"can't be run with backend={name!r}"):
        st_linear.load(str(folder), backend=name)


def test_unknown_options(exported: tuple[Path, Any]) -> None:
    with refused("unknown option 'dtype' for backend='onnx'; choose among: file_name, provider, session_options"):
        st_linear.load(str(exported[0]), backend="onnx", model_kwargs={"dtype": "float16"})


def test_an_unknown_provider(exported: tuple[Path, Any]) -> None:
    with refused("unknown provider 'Abacus'; choose among: "):
        st_linear.load(str(exported[0]), backend="onnx", model_kwargs={"provider": "Abacus"})


def test_saving_what_was_exported(exported: tuple[Path, Any], tmp_path: Path) -> None:
    graph = st_linear.load(str(exported[0]), backend="onnx")
    with refused("can't be saved: load it with backend='torch'"):
        graph.save_pretrained(str(tmp_path))


def test_converting_on_another_backend(bert: str) -> None:
    with refused("LinearTransformer converts encoders on backend='torch' only, got 'onnx'"):
        LinearTransformer(bert, backend="onnx")


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(
    name: str, window: int, encoder_folder: Callable[[str], str], tmp_path: Path, text: Callable[..., str]
) -> None:
    model = make(encoder_folder(name), feature_map="hedgehog", window=window)
    export(model, tmp_path / "model", ["onnx", "openvino"])
    texts = [text(length) for length in (3, 60, 100, 200)]
    for backend in ("onnx", "openvino"):
        assert largest_difference(model, st_linear.load(str(tmp_path / "model"), backend=backend), texts) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("name", feature_map_names())
def test_maps(name: str, window: int, bert: str, tmp_path: Path, text: Callable[..., str]) -> None:
    model = make(bert, feature_map=name, window=window, exact_layers=[1])
    export(model, tmp_path / "model", ["onnx", "openvino"])
    texts = [text(length) for length in (3, 60, 200)]
    for backend in ("onnx", "openvino"):
        assert largest_difference(model, st_linear.load(str(tmp_path / "model"), backend=backend), texts) < 1e-4


@pytest.mark.slow
def test_texts_that_are_exact_beside_others_that_are_not(bert: str, tmp_path: Path, text: Callable[..., str]) -> None:
    model = make(bert, feature_map="hedgehog", exact_up_to=60)
    report = export(model, tmp_path / "model", ["onnx", "openvino"])
    assert list(report["onnx"]["largest_difference"]) == ["16", "75", "200"]
    texts = [text(length) for length in (3, 40, 60, 61, 200)]
    for backend in ("onnx", "openvino"):
        graph = st_linear.load(str(tmp_path / "model"), backend=backend)
        for batch in (texts, texts[:3], texts[2:3], texts[3:4]):
            assert largest_difference(model, graph, batch) < 1e-4


@pytest.mark.slow
def test_all_minilm(minilm: str, tmp_path: Path) -> None:
    report = export(st_linear.convert(minilm), tmp_path / "model", list(FILES))
    print(json.dumps(report, indent=2))
    for name in ("onnx", "openvino"):
        differences = report[name]["largest_difference"]
        assert list(differences) == ["16", "512", "640", "4096"]
        assert max(differences.values()) < 1e-4


def test_a_folder_does_not_say_how_its_graph_is_run(exported: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported[0], folder)
    config = json.loads((folder / "sentence_bert_config.json").read_text())
    ours = {"ov_config": {"CACHE_DIR": str(tmp_path / "cache")}, "file_name": "elsewhere.xml", "provider": "Abacus"}
    (folder / "sentence_bert_config.json").write_text(json.dumps({**config, "model_kwargs": ours}))
    for name in ("onnx", "openvino"):
        assert st_linear.load(str(folder), backend=name)[0].model.options == {}
    assert not (tmp_path / "cache").exists()


def test_a_folder_whose_settings_were_changed(exported: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported[0], folder)
    config = json.loads((folder / "sentence_bert_config.json").read_text())
    (folder / "sentence_bert_config.json").write_text(json.dumps({**config, "window": 4, "max_seq_length": 9999}))
    with refused("was made with window=0, this model has window=4"):
        st_linear.load(str(folder), backend="onnx")
    (folder / "sentence_bert_config.json").write_text(json.dumps({**config, "max_seq_length": 9999}))
    assert st_linear.load(str(folder), backend="onnx").max_seq_length == 200


def test_what_only_pytorch_can_do(exported: tuple[Path, Any], text: Callable[..., str]) -> None:
    graph = st_linear.load(str(exported[0]), backend="onnx")
    with refused("a model that runs on onnx can't be converted: load it with backend='torch'"):
        st_linear.convert(graph, feature_map="elu", window=0)
    with refused("a model that runs on onnx can't be redrawn"):
        graph[0].redraw(1)
    graph.train()
    with refused("a model that runs on onnx can't be trained"):
        graph(graph.preprocess([text(10)]))


def test_inputs_that_the_graph_does_not_take(exported: tuple[Path, Any], text: Callable[..., str]) -> None:
    graph = st_linear.load(str(exported[0]), backend="onnx")
    graph.tokenizer.padding_side = "left"
    with refused("exported encoders take padding on the right alone"):
        graph.encode([text(10), text(20)])
    graph.max_seq_length = 300
    with refused("the graph takes 200 tokens at most, got 250"):
        graph.encode([text(250)])


def test_threads_do_not_meet(model: SentenceTransformer, exported: tuple[Path, Any], text: Callable[..., str]) -> None:
    texts = [text(20 + length) for length in range(8)]
    expected = model.encode(texts)
    for name in ("onnx", "openvino"):
        graph = st_linear.load(str(exported[0]), backend=name)
        with ThreadPoolExecutor(4) as pool:
            vectors = list(pool.map(graph.encode, texts))
        np.testing.assert_allclose(np.stack(vectors), expected, atol=1e-5)


def test_figures_of_one_format_are_not_taken_for_anothers(exported: tuple[Path, Any]) -> None:
    prints = {_fingerprint(st_linear.load(str(exported[0]), **arguments_for(name))) for name in ("torch", *FILES)}
    assert len(prints) == 1 + len(FILES)


def test_evaluate_takes_formats(
    exported: tuple[Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_pairs(tmp_path / "pairs")
    monkeypatch.chdir(tmp_path)
    line = ["evaluate", str(exported[0]), "--data", "pairs", "--formats", "torch,onnx", "--json"]
    with pytest.raises(SystemExit) as info:
        cli.main(line)
    assert not info.value.code
    figures = json.loads(capfd.readouterr().out)["models"]
    assert list(figures) == [str(exported[0]), f"{exported[0]} (onnx)"]
    own, graph = (entry["natural"]["pearson"] for entry in figures.values())
    assert graph == pytest.approx(own, abs=1e-5)
    with pytest.raises(SystemExit) as info:
        cli.main([*line[:-2], "tflite"])
    assert info.value.code == 2
    assert "unknown format 'tflite'; choose among: torch, onnx, onnx-int8, openvino" in capfd.readouterr().err


def test_no_gradients_flow(exported: tuple[Path, Any], text: Callable[..., str]) -> None:
    graph = st_linear.load(str(exported[0]), backend="onnx")
    assert not list(graph.parameters())
    assert not graph(graph.preprocess([text(10)]))["sentence_embedding"].requires_grad
    assert graph.device == torch.device("cpu")
