"""Means under a softmax that also give the logarithm of its sum of weights: what parts of attention are merged by."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from st_linear.kernels import cpu

Backward = TypeVar("Backward", bound=Callable[..., Any])

# Logarithm of a weight of nothing. Finite, so that a row of such weights has a softmax, and sums of it no NaN. In a
# backward pass through recomputed weights such a row's are 1 each: it must be one that no gradient comes in for.
LOG_ZERO = -1e30

# Rows of queries or of keys from which on PyTorch's fused kernel is worth it in training, or block by block.
FUSED_ROWS = 64

# Tokens that are copied at a time for its backward pass.
FUSED_BACKWARD_TOKENS = 1024

# Columns added to these copies. One is needed, and a vector's worth of them costs the same.
_COLUMNS = 8


def log_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The logarithm of a mask: nought where it is true, :data:`LOG_ZERO` elsewhere."""
    return mask.new_zeros((), dtype=dtype).masked_fill(~mask, LOG_ZERO)


def softmax_mean(logits: Tensor, value: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Mean of ``value`` under the softmax of ``logits`` along ``dim``, and the logarithm of the softmax's sum.

    Shapes: logits (…, M, N), value (…, N, D) to (…, M, D) and (…, M, 1) for ``dim=-1``; for ``dim=-2`` the rows of
    logits are those of value, (…, N, M), and the outputs are (…, M, D) and (…, 1, M).
    """
    if torch.is_grad_enabled():
        return _SoftmaxMean.apply(logits, value, dim)
    return _softmax_mean(logits, value, dim)[1:]


def _softmax_mean(logits: Tensor, value: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    weights = logits.softmax(dim)
    mean = (weights if dim == -1 else weights.transpose(-1, -2)) @ value
    # The weight of the largest logit is one over the sum of exponentials: no second pass of exponentials.
    return weights, mean, logits.amax(dim, keepdim=True) - weights.amax(dim, keepdim=True).log()


def in_full_precision(backward: Backward) -> Backward:
    """A backward pass without autocast, also where it is called under one: that would round what is exponentiated."""

    @wraps(backward)
    def without_autocast(ctx: Any, *gradients: Tensor) -> Any:
        with torch.autocast(gradients[0].device.type, enabled=False):
            return backward(ctx, *gradients)

    return cast(Backward, without_autocast)


class _SoftmaxMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        weights, mean, log_sum = _softmax_mean(logits, value, dim)
        ctx.save_for_backward(weights, value, mean)
        ctx.dim = dim
        return mean, log_sum

    @staticmethod
    @once_differentiable
    @in_full_precision
    def backward(ctx: Any, grad_mean: Tensor, grad_log_sum: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, value, mean = ctx.saved_tensors
        return *_through_softmax(weights, value, mean, ctx.dim, grad_mean, grad_log_sum), None


def _through_softmax(
    weights: Tensor, value: Tensor, mean: Tensor, dim: int, grad_mean: Tensor, grad_log_sum: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and values. Those of logits are ``p · (g·v - g·mean + h)``, h that of the logarithm."""
    by_row = (grad_mean * mean).sum(-1, keepdim=True)
    if dim == -1:
        grad_logits = grad_mean @ value.mT
        grad_value = weights.mT @ grad_mean
    else:
        grad_logits = value @ grad_mean.mT
        grad_value = weights @ grad_mean
        by_row = by_row.mT
    return grad_logits.sub_(by_row - grad_log_sum).mul_(weights), grad_value


def has_fused_softmax(query: Tensor) -> bool:
    """Whether :func:`fused_softmax_mean` takes such a query: on the CPU."""
    return query.device.type == "cpu"


def fused_softmax_pays(query: Tensor, rows: int) -> bool:
    """Whether it also is faster than plain products in training, or for blocks, of so many rows.

    The query may still be in half precision.
    """
    compiled = cpu.takes(query, dtype=torch.promote_types(query.dtype, torch.float32))
    return compiled or pytorchs_softmax_pays(query, rows)


def pytorchs_softmax_pays(query: Tensor, rows: int) -> bool:
    """The same of PyTorch's kernel alone."""
    return has_fused_softmax(query) and rows >= FUSED_ROWS


def backward_tokens(query: Tensor) -> int:
    """Tokens of each text that the fused kernel's backward pass should take at a time."""
    return max(1, FUSED_BACKWARD_TOKENS // len(query))


def fused_softmax_mean(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    other: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`softmax_mean` of the logits ``scale · q·k + bias``, on the CPU: logits are never in memory, nor kept.

    Shapes: query (B, H, M, D), key and value (B, H, N, D), or n blocks of each, (B, H, n, M, D) and (B, H, n, N, D);
    bias broadcasts to (B, H, M, N), or (B, H, n, M, N). With gradients, it is one of keys, (…, 1, N). ``other`` is
    what a softmax over other keys gave, to be merged with.
    """
    if not torch.is_grad_enabled():
        return _fused_softmax_mean(query, key, value, bias, scale, other)
    if query.ndim == 5:
        texts = _FusedSoftmaxMean.apply(*_inputs_as_texts(query, key, value, bias), scale)
        own = _as_blocks(texts[0], len(query)), _as_blocks(texts[1], len(query))
    else:
        own = _FusedSoftmaxMean.apply(query, key, value, bias, scale)
    return own if other is None else merged_means(other, own)


def _fused_softmax_mean(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    other: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    if cpu.takes(query, key, value) and (bias is None or bias.shape[-2] == 1):
        return cpu.softmax_mean(query, key, value, bias, scale, other)
    if query.ndim == 5:
        mean, log_sum = _fused_softmax_mean(*_inputs_as_texts(query, key, value, bias), scale)
        mean, log_sum = _as_blocks(mean, len(query)), _as_blocks(log_sum, len(query))
    else:
        # The kernel behind scaled_dot_product_attention, which does not hand on the logarithm. It takes rows with any
        # strides, but columns as if they lay side by side.
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        mean, log_sum = attend(query, key, value, attn_mask=bias, scale=scale)
        log_sum = log_sum.unsqueeze(-1)
    return (mean, log_sum) if other is None else merged_means(other, (mean, log_sum))


def merged_means(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Means (…, D) under softmaxes over some rows and over others, and logarithms (…, 1) of their sums: over all."""
    (mean, log_sum), (other_mean, other_log_sum) = one, other
    share = torch.sigmoid(other_log_sum - log_sum)
    return mean.lerp(other_mean, share), torch.logaddexp(log_sum, other_log_sum)


class _FusedSoftmaxMean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        mean, log_sum = _fused_softmax_mean(query, key, value, bias, scale)
        ctx.save_for_backward(query, key, value, bias, mean, log_sum)
        ctx.scale = scale
        return mean, log_sum

    @staticmethod
    @once_differentiable
    @in_full_precision
    def backward(ctx: Any, grad_mean: Tensor, grad_log_sum: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, mean, log_sum = ctx.saved_tensors
        if cpu.takes(query, key, value):
            like = (query, key, value, key[..., :1].mT)
            into = [zero_rows(x) if wanted else None for x, wanted in zip(like, ctx.needs_input_grad)]
            gradients, outputs = (grad_mean, grad_log_sum), (mean, log_sum)
            cpu.add_softmax_gradients(gradients, outputs, query, key, value, bias, ctx.scale, into)
            *by_others, by_bias = into
            return *by_others, None if by_bias is None else by_bias.sum_to_size(bias.shape), None
        # The longer side is cut into parts, each with a gradient of its own; the other's are added up.
        by_query = query.shape[2] >= key.shape[2]
        cut = (by_query, *[not by_query] * 3)
        like = (query, key, value, key[..., :1])
        results = [torch.empty_like(x) if parts else torch.zeros_like(x) for x, parts in zip(like, cut)]
        step, whole = backward_tokens(query), slice(None)
        for start in range(0, max(query.shape[2], key.shape[2]), step):
            part = slice(start, start + step)
            rows, columns = (part, whole) if by_query else (whole, part)
            pieces = fused_gradients(
                (grad_mean[:, :, rows], grad_log_sum[:, :, rows]),
                (mean[:, :, rows], log_sum[:, :, rows]),
                query[:, :, rows],
                key[:, :, columns],
                value[:, :, columns],
                None if bias is None else bias[..., columns],
                ctx.scale,
            )
            for result, piece, parts in zip(results, pieces, cut):
                if parts:
                    result[:, :, part] = piece
                else:
                    result += piece
        *others, grad_bias = results
        return *others, grad_bias.mT.sum_to_size(bias.shape) if ctx.needs_input_grad[3] else None, None


def softmax_gradients(
    gradients: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from those of a mean and its logarithm, whose ``outputs`` are at hand.

    Shapes are those of :func:`fused_softmax_mean`.
    """
    mean, log_sum = outputs
    logits = query @ key.mT * scale
    weights = ((logits if bias is None else logits + bias) - log_sum).exp_()
    grad_logits, grad_value = _through_softmax(weights, value, mean, -1, *gradients)
    return grad_logits @ key * scale, grad_logits.mT @ query * scale, grad_value


def fused_gradients(
    gradients: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`softmax_gradients` through the backward pass of the fused kernel, and that of a bias of keys, (…, N, 1).

    With g the gradient of the mean and h that of the logarithm: the pass takes no h, and gives none of the bias. One
    more column brings both: it is 1 in g, 0 in v and -h in the mean; and 1 in q and 0 in k, whose gradient there is
    ``scale`` times the bias's.
    """
    if query.ndim == 5:
        texts = len(query)
        gradients, outputs = ((_as_texts(mean), _as_texts(log_sum)) for mean, log_sum in (gradients, outputs))
        inputs = _inputs_as_texts(query, key, value, bias)
        by_query, by_key, by_value, by_bias = fused_gradients(gradients, outputs, *inputs, scale)
        return (
            _as_blocks(by_query, texts),
            _as_blocks(by_key, texts),
            _as_blocks(by_value, texts),
            _as_blocks(by_bias, texts),
        )
    (grad_mean, grad_log_sum), (mean, log_sum) = gradients, outputs
    head_dim = query.shape[-1]
    query, key, value = (_with_column(x, column) for x, column in ((query, 1), (key, 0), (value, 0)))
    mean, grad_mean = _with_column(mean, -grad_log_sum.squeeze(-1)), _with_column(grad_mean, 1)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    by_query, by_key, by_value = backward(
        grad_mean, query, key, value, mean, log_sum.squeeze(-1), 0.0, False, attn_mask=bias, scale=scale
    )
    grad_bias = by_key[..., head_dim : head_dim + 1] / scale
    return by_query[..., :head_dim], by_key[..., :head_dim], by_value[..., :head_dim], grad_bias


def zero_rows(x: Tensor) -> Tensor:
    """Zeros in the shape of x, (B, H, T, D), tokens before heads in memory."""
    texts, heads, length, head_dim = x.shape
    return x.new_zeros(texts, length, heads, head_dim).transpose(1, 2)


def _with_column(x: Tensor, column: Tensor | float) -> Tensor:
    """A copy of x, (…, D), with a column behind its last, and some of zeros."""
    head_dim = x.shape[-1]
    copy = x.new_empty(*x.shape[:-1], head_dim + _COLUMNS)
    copy[..., :head_dim] = x
    copy[..., head_dim] = column
    copy[..., head_dim + 1 :] = 0
    return copy


def _inputs_as_texts(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Blocks of each, (B, H, n, …), in the place of texts. Of several texts, overlapping blocks are copied."""
    if bias is not None and bias.ndim == 5:
        bias = _as_texts(bias.expand(len(query), -1, query.shape[2], -1, -1))
    return _as_texts(query), _as_texts(key), _as_texts(value), bias


def _as_texts(x: Tensor) -> Tensor:
    """(B, H, n, …) to (B · n, H, …)."""
    return x.transpose(1, 2).flatten(0, 1)


def _as_blocks(x: Tensor, texts: int) -> Tensor:
    """(B · n, H, …) to (B, H, n, …)."""
    return x.unflatten(0, (texts, -1)).transpose(1, 2)
