from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES, SMALL
from test_conversion import TensorShapes, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from st_linear import LinearTransformer, feed_forward
from st_linear.conversion import linearise
from st_linear.feed_forward import chunk_feed_forward, unchunk_feed_forward

# More than the rows of the tiny encoders' weights.
CHUNK = 40


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_forward, "CHUNK_ELEMENTS", CHUNK * SMALL["hidden_size"])


def run(model: nn.Module, batch: int = 2, length: int = 45) -> Tensor:
    ids = torch.arange(batch * length).view(batch, length) % 40 + 5
    return model(input_ids=ids).last_hidden_state


def most_rows(model: nn.Module, call: Callable[[], Tensor]) -> int:
    """Tokens at a time of what is as wide as the model's feed-forward modules."""
    width = getattr(model.config, "hidden_dim", None) or model.config.intermediate_size
    with TensorShapes() as seen:
        call()
    return max(math.prod(shape[:-1]) for shape in seen.shapes if len(shape) > 1 and shape[-1] == width)


class TestChunks:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_every_family_computes_the_same_some_tokens_at_a_time(self, name: str) -> None:
        model = tiny(name)
        with torch.no_grad():
            assert most_rows(model, lambda: run(model)) == 90
            expected = run(model)
            chunk_feed_forward(model)
            assert most_rows(model, lambda: run(model)) <= CHUNK
            torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie"])
    def test_so_does_what_comes_between_attention_and_them(self, name: str) -> None:
        module, rows = tiny(name).encoder.layer[0].attention.output, []
        inputs = torch.randn(2, 45, 32), torch.randn(2, 45, 32)
        module.dense.register_forward_pre_hook(lambda dense, args: rows.append(args[0].shape[:-1].numel()))
        with torch.no_grad():
            expected = module(*inputs)
            chunk_feed_forward(module)
            torch.testing.assert_close(module(*inputs), expected, rtol=1e-5, atol=1e-5)
        assert rows == [90, 30, 30, 30]

    @pytest.mark.parametrize("length", [1, 7, CHUNK, CHUNK + 1, 63])
    def test_any_number_of_tokens(self, length: int) -> None:
        model = tiny("bert")
        with torch.no_grad():
            expected = run(model, 1, length)
            chunk_feed_forward(model)
            torch.testing.assert_close(run(model, 1, length), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_dtypes_are_those_of_the_whole(self, dtype: torch.dtype) -> None:
        module = tiny("modernbert").layers[0].mlp
        hidden = torch.randn(2, 45, 32)
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            expected = module(hidden)
            chunk_feed_forward(module)
            output = module(hidden)
        assert output.dtype == expected.dtype == dtype
        torch.testing.assert_close(output, expected, rtol=0.05, atol=0.05)

    def test_conversion_brings_them(self) -> None:
        model = tiny("bert")
        linearise(model, feature_map="hedgehog", window=8)
        with torch.no_grad():
            assert most_rows(model, lambda: run(model)) <= CHUNK

    def test_packed_texts_go_through_in_chunks(self, bert: str, text: Callable[..., str]) -> None:
        encoder = LinearTransformer(bert, window=8, feature_map="hedgehog")
        features = encoder.preprocess([text(40), text(9), text(30)])
        assert "cu_seq_lens_q" in features
        with torch.inference_mode():
            assert most_rows(encoder.model, lambda: encoder(features)["token_embeddings"]) <= CHUNK


class TestWholes:
    def test_training_is_whole(self) -> None:
        model = tiny("bert")
        chunk_feed_forward(model)
        assert most_rows(model, lambda: run(model)) == 90
        with torch.no_grad():
            assert most_rows(model.train(), lambda: run(model)) == 90

    def test_dropout_is_drawn_as_it_was(self) -> None:
        # Without gradients, as in the first pass of a checkpoint.
        model = tiny("bert").train()
        with torch.no_grad():
            torch.manual_seed(0)
            expected = run(model)
            chunk_feed_forward(model)
            torch.manual_seed(0)
            torch.testing.assert_close(run(model), expected, rtol=0, atol=0)

    def test_other_devices_are_whole(self) -> None:
        model = tiny("bert").to("meta")
        chunk_feed_forward(model)
        with torch.no_grad():
            hidden = torch.empty(2, 45, 32, device="meta")
            assert most_rows(model, lambda: model.encoder.layer[0].feed_forward_chunk(hidden)) == 90

    def test_exported_graphs_are_whole(self) -> None:
        layer = tiny("bert").encoder.layer[0]
        chunk_feed_forward(layer)
        with torch.no_grad():
            graph = torch.export.export(layer, (torch.randn(1, 90, 32),)).graph_module.code
        assert "chunk" not in graph

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
    def test_traced_graphs_take_other_lengths(self) -> None:
        module = tiny("modernbert").layers[0].mlp
        chunk_feed_forward(module)
        other = torch.randn(1, 50, 32)
        with torch.no_grad():
            traced = torch.jit.trace(module, torch.randn(1, 90, 32))
            torch.testing.assert_close(traced(other), module(other))

    def test_compiled_graphs_are_whole(self) -> None:
        module = tiny("distilbert").transformer.layer[0].ffn
        chunk_feed_forward(module)
        graphs: list[str] = []

        def note(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            graphs.append(graph.code)
            return graph.forward

        with torch.no_grad():
            torch.compile(module, backend=note)(torch.randn(1, 90, 32))
        assert graphs
        assert not any("chunk" in code for code in graphs)

    def test_modules_from_elsewhere_stay(self) -> None:
        class Own(nn.Module):
            def feed_forward_chunk(self, hidden: Tensor) -> Tensor:
                return hidden.cumsum(dim=1)

        module = Own()
        chunk_feed_forward(module)
        assert type(module) is Own

    def test_methods_of_two_arguments_stay(self) -> None:
        model = transformers.IBertModel(transformers.IBertConfig(**SMALL))
        classes = [type(module) for module in model.modules()]
        chunk_feed_forward(model)
        assert [type(module) for module in model.modules()] == classes

    def test_undone(self) -> None:
        model = tiny("bert")
        classes = [type(module) for module in model.modules()]
        chunk_feed_forward(model)
        chunk_feed_forward(model)
        assert [type(module) for module in model.modules()] != classes
        unchunk_feed_forward(model)
        assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("name", ["bert", "modernbert"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_run_in_chunks_with_weights_of_their_own(
    name: str, copied: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    model = tiny(name)
    chunk_feed_forward(model)
    other = copied(model)
    with torch.no_grad():
        torch.testing.assert_close(run(other), run(model), rtol=0, atol=0)
        assert most_rows(other, lambda: run(other)) <= CHUNK
        expected = run(model)
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(run(other), expected, rtol=0, atol=0)


def test_replicas_use_weights_of_their_own() -> None:
    layer = tiny("bert").encoder.layer[0]
    chunk_feed_forward(layer)
    # What DataParallel makes of a module, before it gives it its weights.
    replica = layer._replicate_for_data_parallel()
    other = tiny("bert").encoder.layer[1]
    replica.intermediate, replica.output = other.intermediate, other.output
    hidden = torch.randn(1, 90, 32)
    with torch.no_grad():
        torch.testing.assert_close(replica.feed_forward_chunk(hidden), other.feed_forward_chunk(hidden))
