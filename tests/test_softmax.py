"""PyTorch's fused kernel, with the gradients that it lacks, equals the same in plain products."""

from __future__ import annotations

import pytest
import torch
from test_attention import randn
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

from st_linear import softmax
from st_linear.softmax import LOG_ZERO, fused_gradients, fused_softmax_mean, softmax_gradients, softmax_mean

B, H, D = 2, 3, 5
DTYPE = torch.float64


def inputs_of(rows: int, columns: int, blocks: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
    """Query, key, value and a bias of keys."""
    shapes = (
        (B, H, *blocks, rows, D),
        (B, H, *blocks, columns, D),
        (B, H, *blocks, columns, D),
        (B, H, *blocks, 1, columns),
    )
    return tuple(randn(*shape, seed=seed, dtype=DTYPE) for seed, shape in enumerate(shapes))


def plain_softmax_mean(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    logits = 0.3 * query @ key.mT + bias
    return logits.softmax(dim=-1) @ value, logits.logsumexp(dim=-1, keepdim=True)


SHAPES = [(1, 1, ()), (7, 4, ()), (4, 7, ()), (6, 6, ()), (4, 12, (3,)), (5, 4, (1,))]


@pytest.mark.parametrize("tokens", [1, 6, 2**10])
@pytest.mark.parametrize(("rows", "columns", "blocks"), SHAPES)
def test_outputs_and_all_gradients(
    rows: int, columns: int, blocks: tuple[int, ...], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax, "FUSED_BACKWARD_TOKENS", tokens)
    leaves = [x.requires_grad_() for x in inputs_of(rows, columns, blocks)]
    expected = plain_softmax_mean(*leaves)
    actual = fused_softmax_mean(*leaves, scale=0.3)
    assert_close(actual, expected)
    weights = [randn(*x.shape, seed=9, dtype=DTYPE) for x in expected]
    gradients = (torch.autograd.grad(outputs, leaves, weights) for outputs in (actual, expected))
    assert_close(next(gradients), next(gradients))
    with torch.no_grad():
        assert_close(fused_softmax_mean(*leaves, scale=0.3), expected)


def test_one_output_alone_has_gradients() -> None:
    leaves = [x.requires_grad_() for x in inputs_of(7, 4)]
    for index in (0, 1):
        pair = [
            outputs[index].sum() for outputs in (fused_softmax_mean(*leaves, scale=0.3), plain_softmax_mean(*leaves))
        ]
        assert_close(
            *(torch.autograd.grad(output, leaves, materialize_grads=True, allow_unused=True) for output in pair)
        )


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (B, 1, 1, 4), (1, H, 1, 4)])
def test_a_bias_that_many_share(shape: tuple[int, ...]) -> None:
    query, key, value, _ = inputs_of(7, 4)
    bias = randn(*shape, seed=5, dtype=DTYPE).requires_grad_()
    outputs = (fused_softmax_mean(query, key, value, bias, 0.3), plain_softmax_mean(query, key, value, bias))
    assert_close(*(torch.autograd.grad(mean.square().sum() + log.sum(), bias) for mean, log in outputs))


def test_gradients_pass_gradcheck() -> None:
    leaves = [x.requires_grad_() for x in inputs_of(4, 6)]
    assert gradcheck(lambda *inputs: fused_softmax_mean(*inputs, scale=0.3), leaves, fast_mode=True)


@pytest.mark.parametrize("blocks", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_in_plain_products_equal_those_of_the_kernel(dtype: torch.dtype, blocks: tuple[int, ...]) -> None:
    query, key, value, bias = (x.to(dtype) for x in inputs_of(4, 6, blocks))
    band = softmax.log_of((torch.arange(4)[:, None] - torch.arange(6)).abs() <= 2, dtype)
    for added in (None, bias, band):
        logits, shift = 0.3 * query @ key.mT, torch.zeros_like(bias).requires_grad_()
        mean, log_sum = softmax_mean(logits + shift if added is None else logits + added + shift, value)
        gradients = (randn(*mean.shape, seed=8, dtype=dtype), randn(*log_sum.shape, seed=8, dtype=dtype))
        (by_bias,) = torch.autograd.grad((mean, log_sum), shift, gradients)
        inputs = (gradients, (mean.detach(), log_sum.detach()), query, key, value, added, 0.3)
        assert_close(fused_gradients(*inputs), (*softmax_gradients(*inputs), by_bias.mT))


def test_small_gradients_keep_their_digits() -> None:
    """What one column brings is not a number of another size, that takes the digits of the others' sums."""
    leaves = [x.float().requires_grad_() for x in inputs_of(40, 60)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    weights = [1e-12 * randn(B, H, 40, size, seed=size, dtype=DTYPE) for size in (D, 1)]
    actual = torch.autograd.grad(fused_softmax_mean(*leaves, scale=0.3), leaves, [x.float() for x in weights])
    expected = torch.autograd.grad(plain_softmax_mean(*exact), exact, weights)
    for gradient, right in zip(actual, expected):
        assert_close(gradient.double(), right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


def test_keys_that_are_masked_out_get_no_gradient() -> None:
    query, key, value, bias = inputs_of(7, 4)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    bias = torch.tensor([0.0, LOG_ZERO, 0.0, LOG_ZERO], dtype=DTYPE).expand(B, H, 1, 4)
    mean, log_sum = fused_softmax_mean(*leaves, bias, 0.3)
    by_query, *by_key = torch.autograd.grad(mean.square().sum() + log_sum.sum(), leaves)
    assert by_query.abs().min() > 0
    for gradient in by_key:
        assert (gradient[:, :, 1::2] == 0).all()
        assert gradient[:, :, ::2].abs().min() > 0


@pytest.mark.parametrize("index", range(4))
def test_inputs_with_any_strides(index: int) -> None:
    inputs = list(inputs_of(7, 4))
    expected = fused_softmax_mean(*inputs, scale=0.3)
    inputs[index] = inputs[index].transpose(1, 3).contiguous().transpose(1, 3)
    assert inputs[index].stride(-1) > 1
    leaves = [x.requires_grad_() for x in inputs]
    assert_close(fused_softmax_mean(*leaves, scale=0.3), expected)
    outputs = (fused_softmax_mean(*leaves, scale=0.3), plain_softmax_mean(*leaves))
    assert_close(*(torch.autograd.grad(mean.square().sum() + log.sum(), leaves) for mean, log in outputs))


def test_a_scale_of_nought() -> None:
    query, key, value, _ = (x.requires_grad_() for x in inputs_of(7, 4))
    mean, log_sum = fused_softmax_mean(query, key, value, scale=0.0)
    gradients = torch.autograd.grad(mean.square().sum() + log_sum.sum(), (query, key, value))
    assert not any(gradient.any() for gradient in gradients[:2])
    assert_close(gradients[2], (2 * mean.sum(dim=2, keepdim=True) / 4).expand_as(value))


def test_autocast_around_the_backward_pass_rounds_nothing() -> None:
    leaves = [x.float().requires_grad_() for x in inputs_of(7, 4)]
    query, key, value, bias = leaves

    def plain() -> tuple[Tensor, Tensor]:
        return softmax_mean(0.3 * query @ key.mT + bias, value)

    for attend in (plain, lambda: fused_softmax_mean(*leaves, scale=0.3)):
        gradients = []
        for enabled in (False, True):
            mean, log_sum = attend()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                gradients.append(torch.autograd.grad((mean, log_sum), value, (mean.detach(), log_sum.detach())))
        assert_close(*gradients, rtol=0, atol=0)
