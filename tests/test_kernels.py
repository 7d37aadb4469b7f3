"""Attention goes through the Triton kernels where they are to be had: here in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import slow
from test_attention import TOLERANCES, assert_runs_close, make_form, make_inputs, make_mask, run

from st_linear import kernels
from st_linear.attention import linear_attention

pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="runs in Triton's interpreter, which conftest.py chooses where there is no CUDA"
)

HEADS, LENGTH, HEAD_DIM = 2, 40, 16
TAKE = kernels.take


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets the kernels take any query, and notes which are called."""
    from st_linear.kernels import linear, near

    called: list[str] = []

    def noted(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        called.append(function.__name__)
        return function(*args, **kwargs)

    for module, name in ((linear, "fused_linear_attention"), (near, "near_attention")):
        monkeypatch.setattr(module, name, partial(noted, getattr(module, name)))
    monkeypatch.setattr(kernels, "take", lambda query: True)
    return called


@pytest.mark.parametrize("padding", ["right", "holes", *(slow(name) for name in ("none", "left"))])
@pytest.mark.parametrize(
    "name",
    [
        slow("linear:favor"),
        *("linear:elu", "near_far:hedgehog", "near_far:taylor"),
    ],
)
def test_padded_batches_equal_the_reference(name: str, padding: str, calls: list[str]) -> None:
    form = make_form(name, num_heads=HEADS, head_dim=HEAD_DIM, size=8)
    inputs, mask = make_inputs(3, HEADS, LENGTH, HEAD_DIM), make_mask(padding, LENGTH)
    actual = run(form.attend, form.parameters, inputs, mask)
    assert calls
    assert_runs_close(actual, run(form.reference, form.parameters, inputs, mask), TOLERANCES[torch.float32])


@pytest.mark.parametrize("name", ["linear:hedgehog", "near_far:favor"])
def test_packed_texts_equal_those_alone(name: str, calls: list[str]) -> None:
    form = make_form(name, num_heads=HEADS, head_dim=HEAD_DIM, size=8)
    lengths = [5, 0, 40, 23]
    query, key, value, _ = make_inputs(sum(lengths), HEADS, HEAD_DIM)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    output = form.attend(query, key, value, cu_seqlens=offsets)
    assert calls
    for start, stop in zip(offsets.tolist(), offsets.tolist()[1:]):
        if stop > start:
            alone = form.reference(*(x[start:stop].transpose(0, 1)[None] for x in (query, key, value)))
            torch.testing.assert_close(output[start:stop], alone[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_a_map_that_the_kernels_do_not_know_is_streamed(calls: list[str]) -> None:
    form = make_form("linear:cosformer", num_heads=HEADS, head_dim=HEAD_DIM)
    inputs = make_inputs(2, HEADS, LENGTH, HEAD_DIM)[:3]
    torch.testing.assert_close(form.attend(*inputs), form.reference(*inputs), rtol=1e-5, atol=1e-5)
    assert not calls


def test_the_cpu_is_left_to_pytorch(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "take", TAKE)
    form = make_form("linear:elu", num_heads=HEADS, head_dim=HEAD_DIM)
    linear_attention(*make_inputs(1, HEADS, LENGTH, HEAD_DIM)[:3], **form.options)
    assert not calls
