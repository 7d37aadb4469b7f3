from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import FAMILIES, SMALL
from test_conversion import tiny
from torch import Tensor, nn
from torch.nn import functional as F

from st_linear import LinearTransformer, memory
from st_linear.conversion import linearise
from st_linear.memory import reused_memory

TOKENS = 50
"""Of texts that count as long here."""


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MIN_TOKENS", TOKENS)
    monkeypatch.setattr(memory, "MIN_BYTES", 1)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def linear() -> nn.Linear:
    return nn.Linear(16, 8)


def reused() -> Any:
    return reused_memory(nn.Identity(), torch.zeros(TOKENS))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What memory is asked for."""
    requests: list[Any] = []
    own = memory._ReusedMemory._empty

    def noted(pool: Any, shape: Any, dtype: torch.dtype) -> Tensor:
        requests.append((shape, dtype))
        return own(pool, shape, dtype)

    monkeypatch.setattr(memory._ReusedMemory, "_empty", noted)
    return requests


def address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class TestOutputs:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("shape", [(3, 16), (2, 5, 16), (2, 3, 1, 16)])
    def test_linear_layers_give_the_same(
        self, dtype: torch.dtype, bias: bool, shape: tuple[int, ...], asked: list[Any]
    ) -> None:
        layer, x = nn.Linear(16, 8, bias=bias, dtype=dtype), torch.randn(shape).to(dtype)
        expected = layer(x)
        with reused():
            actual = layer(x)
        assert len(asked) == 1
        assert actual.shape == expected.shape
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)

    @pytest.mark.parametrize(("shape", "weight"), [((16,), (8, 16)), ((0, 16), (8, 16)), ((5, 16), (16,))])
    def test_other_shapes_do_without(self, shape: tuple[int, ...], weight: tuple[int, ...], asked: list[Any]) -> None:
        x, w = torch.randn(shape), torch.randn(weight)
        expected = F.linear(x, w)
        with reused():
            torch.testing.assert_close(F.linear(x, w), expected, rtol=0, atol=0)
        assert not asked

    def test_strided_inputs_do_too(self, linear: nn.Linear) -> None:
        x = torch.randn(16, 5, 3).permute(2, 1, 0)
        expected = linear(x)
        with reused():
            torch.testing.assert_close(linear(x), expected)

    @pytest.mark.parametrize("size", [(3,), (2, 3), ((2, 3),), (torch.Size([2, 3]),), ([2, 3],), (0, 4)])
    def test_empty_tensors_have_shape_and_dtype(self, size: Any) -> None:
        like = torch.zeros(1, dtype=torch.float64)
        with reused():
            empty = like.new_empty(*size)
        expected = like.new_empty(*size)
        assert (empty.shape, empty.dtype, empty.stride()) == (expected.shape, expected.dtype, expected.stride())

    @pytest.mark.parametrize("feature_map", ["softmax", "hedgehog", "elu"])
    @pytest.mark.parametrize("name", FAMILIES)
    def test_every_family_gives_the_same(self, name: str, feature_map: str, asked: list[Any]) -> None:
        model = tiny(name)
        linearise(model, feature_map=feature_map, window=0)
        ids = torch.arange(90).view(2, 45) % 40 + 5
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states
        for _ in range(2):
            with reused_memory(model, ids):
                actual = model(input_ids=ids, output_hidden_states=True).hidden_states
            # Of every layer: memory of none that is held has been written to since.
            for one, other in zip(actual, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert asked

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("lengths", [(60,), (40, 9, 30)])
    def test_so_does_the_module(
        self, bert: str, text: Callable[..., str], lengths: tuple[int, ...], mode: Callable[[], Any], asked: list[Any]
    ) -> None:
        encoder = LinearTransformer(bert, window=8, feature_map="hedgehog").eval()
        features = encoder.preprocess([text(length) for length in lengths])
        with mode():
            with memory.left_out():
                expected = encoder(features)["token_embeddings"]
            assert not asked
            torch.testing.assert_close(encoder(features)["token_embeddings"], expected, rtol=1e-5, atol=1e-5)
        assert asked

    def test_the_module_takes_embeddings_in_place_of_tokens(self, bert: str) -> None:
        encoder = LinearTransformer(bert, window=8, feature_map="hedgehog").eval()
        ids = torch.arange(60)[None] % 40 + 5
        features = {
            "attention_mask": torch.ones_like(ids),
            "inputs_embeds": encoder.model.embeddings.word_embeddings(ids),
        }
        expected = encoder({"attention_mask": features["attention_mask"]}, input_ids=ids)["token_embeddings"]
        torch.testing.assert_close(encoder(features)["token_embeddings"], expected, rtol=1e-5, atol=1e-5)


class TestReuse:
    def test_memory_of_what_is_gone_is_used_again(self, linear: nn.Linear) -> None:
        x = torch.randn(3, 16)
        with reused():
            addresses = {address(linear(x)) for _ in range(10)}
            assert address(x.new_empty(3, 8)) in addresses
        assert len(addresses) == 1

    def test_dtypes_share_it(self) -> None:
        with reused():
            first = address(torch.zeros(1).new_empty(4))
            assert address(torch.zeros(1, dtype=torch.float64).new_empty(2)) == first

    @pytest.mark.parametrize("keep", [Tensor.detach, Tensor.numpy, lambda x: x[1:], lambda x: x.mT[0]])
    def test_memory_of_what_is_held_is_not(self, linear: nn.Linear, keep: Callable[[Tensor], Any]) -> None:
        x, others = torch.randn(3, 16), torch.randn(10, 3, 16)
        expected = keep(linear(x))
        with reused():
            held = keep(linear(x))
            for other in others:
                linear(other)
        torch.testing.assert_close(torch.as_tensor(held), torch.as_tensor(expected))

    def test_a_tensor_may_go_in_another_thread(self, linear: nn.Linear) -> None:
        x = torch.randn(3, 16)
        with reused():
            held = [linear(x)]
            first = address(held[0])
            thread = threading.Thread(target=held.clear)
            thread.start()
            thread.join()
            assert address(linear(x)) == first

    def test_it_is_free_behind_the_block(self, linear: nn.Linear) -> None:
        x = torch.randn(3, 16)
        expected = linear(x)
        with reused() as pool:
            held, gone = linear(x), linear(x)
            del gone
            ((free,),) = pool._free.values()
            free, alive = weakref.ref(free), weakref.ref(pool)
            del pool
        # What is held behind it keeps its own memory, and no other.
        assert alive() is None
        assert free() is None
        torch.testing.assert_close(held, expected, rtol=0, atol=0)

    def test_layers_of_an_encoder_share_it(self) -> None:
        model = tiny("bert")
        linearise(model, feature_map="hedgehog", window=0)
        ids = torch.arange(90).view(2, 45) % 40 + 5
        blocks = []
        for _ in range(2):
            with reused_memory(model, ids) as pool:
                model(input_ids=ids)
                blocks.append(sum(map(len, pool._free.values())))
            del model.encoder.layer[-1]
        assert blocks[0] == blocks[1] > 0


class TestLeftAlone:
    def run(self, linear: nn.Linear, x: Tensor) -> None:
        """Put ``x`` through a linear layer, and make a new tensor like it."""
        with reused():
            linear(x)
            x.new_empty(3)

    def test_both_are_asked_for(self, linear: nn.Linear, asked: list[Any]) -> None:
        self.run(linear, torch.randn(3, 16))
        assert asked == [((3, 8), torch.float32), ((3,), torch.float32)]

    def test_with_gradients(self, linear: nn.Linear, asked: list[Any]) -> None:
        with torch.enable_grad():
            self.run(linear, torch.randn(3, 16))
        with reused(), torch.enable_grad():
            linear(torch.randn(3, 16)).sum().backward()
        assert linear.weight.grad is not None
        assert not asked

    def test_small_tensors(self, linear: nn.Linear, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "MIN_BYTES", 3 * 8 * 4 + 1)
        self.run(linear, torch.randn(3, 16))
        assert not asked

    def test_under_autocast(self, linear: nn.Linear) -> None:
        x = torch.randn(3, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = linear(x)
            with reused():
                actual = linear(x)
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)

    def test_other_devices(self, asked: list[Any]) -> None:
        self.run(nn.Linear(16, 8, device="meta"), torch.empty(3, 16, device="meta"))
        assert not asked

    def test_subclasses_of_tensors(self, linear: nn.Linear, asked: list[Any]) -> None:
        class Own(Tensor):
            pass

        x = torch.randn(3, 16)
        self.run(linear, x.as_subclass(Own))
        with reused():
            assert type(F.linear(x, linear.weight.as_subclass(Own))) is Own
        assert not asked

    def test_options_are_heard(self) -> None:
        with reused():
            assert torch.zeros(1).new_empty(3, dtype=torch.int64).dtype == torch.int64
            weight = torch.randn(4, 16)
            assert F.linear(torch.randn(2, 16), weight=weight, bias=None).shape == (2, 4)

    def test_few_tokens_and_where_it_is_asked_for(self, linear: nn.Linear) -> None:
        with reused_memory(linear, torch.zeros(TOKENS - 1)) as pool:
            assert pool is None
        with reused_memory(linear, torch.zeros(TOKENS, device="meta")) as pool:
            assert pool is None
        with memory.left_out(), reused() as pool:
            assert pool is None
        with reused() as pool:
            assert pool is not None

    @pytest.mark.parametrize("part", [lambda model: model, lambda model: model[0]])
    def test_compiled_models(self, part: Callable[[nn.Module], nn.Module]) -> None:
        model = nn.Sequential(nn.Linear(16, 8))
        with reused_memory(torch.compile(model, backend="eager"), torch.zeros(TOKENS)) as pool:
            assert pool is None
        part(model).compile(backend="eager")
        with reused_memory(model, torch.zeros(TOKENS)) as pool:
            assert pool is None

    def test_graphs(self, bert: str, text: Callable[..., str]) -> None:
        encoder = LinearTransformer(bert, window=8, feature_map="hedgehog").eval()
        features = encoder.preprocess([text(60)])
        expected = encoder(features)["token_embeddings"]
        compiled = torch.compile(encoder, backend="eager")
        torch.testing.assert_close(compiled(features)["token_embeddings"], expected, rtol=1e-5, atol=1e-5)


def test_it_is_for_long_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert SMALL["hidden_size"] * 4 * memory.MIN_TOKENS < memory.MIN_BYTES == 2**25
