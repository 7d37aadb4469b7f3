"""Softmax attention that also gives the logarithm of its sum of weights: what other parts are merged by.

:func:`attend_near` is the near part of near/far attention, and with a radius all of local attention.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Mapped elements of one chunk. On the CPU a chunk and what is made of it should stay in the cache of its cores
# (docs/performance.md has the measurements); a GPU wants enough work for all of its processors at once.
CHUNK_ELEMENTS = {"cpu": 2**18}
CHUNK_ELEMENTS_ELSEWHERE = 2**25

# Logarithm of a weight of nothing. Finite, so that a row of such weights has a softmax, and sums of it no NaN.
LOG_ZERO = -1e30


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


class _SoftmaxMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        weights, mean, log_sum = _softmax_mean(logits, value, dim)
        ctx.save_for_backward(weights, value, mean)
        ctx.dim = dim
        return mean, log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_log_sum: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, value, mean = ctx.saved_tensors
        by_row = (grad_mean * mean).sum(-1, keepdim=True)
        if ctx.dim == -1:
            grad_logits = grad_mean @ value.transpose(-1, -2)
            grad_value = weights.transpose(-1, -2) @ grad_mean
        else:
            grad_logits = value @ grad_mean.transpose(-1, -2)
            grad_value = weights @ grad_mean
            by_row = by_row.transpose(-1, -2)
        return grad_logits.sub_(by_row - grad_log_sum).mul_(weights), grad_value, None


def attend_near(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    window: int,
    neighbours: tuple[bool, bool],
    scale: float,
    radius: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each block to itself and its neighbours, and the logarithm of the sum of its weights.

    Shapes: query (B, H, t, D) to (B, H, t, D) and (B, H, t, 1); key and value (B, H, t', D) and mask (B, 1, t', 1) are
    those of the same blocks, with the block before them and the one after them if ``neighbours`` says so.
    """
    # The fused kernel keeps few weights at a time in any case. Here they are few so that they stay in the cache.
    fused = has_fused_softmax(query)
    length, before = query.shape[2], window if neighbours[0] else 0
    most = length if fused else max(1, chunk_tokens(query, 3 * window) // window)
    outputs: list[tuple[Tensor, Tensor]] = []
    start = 0
    while start < length:
        here = start + before
        # Blocks with two whole neighbours are alike, and taken together; a first or last one is taken alone.
        alike = min((key.shape[2] - here) // window - 1, (length - start) // window) if here >= window else 0
        blocks = max(0, min(alike, most))
        first, stop = max(here - window, 0), min(start + max(blocks, 1) * window, length)
        keys, values = (x[:, :, first : stop + before + window] for x in (key, value))
        queries = in_blocks(query[:, :, start:stop], blocks)
        bias = None
        if mask is not None:
            token_mask = _with_neighbours(mask[:, :, first : stop + before + window], window, blocks)
            bias = log_of(token_mask.transpose(-1, -2), query.dtype)
        if radius is not None:
            i = torch.arange(queries.shape[-2], device=query.device)[:, None] + here - first
            j = torch.arange(3 * window if blocks else keys.shape[2], device=query.device)
            band = log_of((i - j).abs() <= radius, query.dtype)
            bias = band if bias is None else bias + band
        if fused:
            # Overlapping views: the fused kernel takes keys with any strides, and nothing is copied.
            keys, values = (x.unfold(2, 3 * window, window).mT if blocks else x for x in (keys, values))
            mean, log_weight = fused_softmax_mean(queries, keys, values, bias, scale)
        else:
            keys, values = (_with_neighbours(x, window, blocks) for x in (keys, values))
            logits = queries * scale @ keys.mT
            mean, log_weight = softmax_mean(logits if bias is None else logits + bias, values)
        outputs.append((mean.flatten(2, 3), log_weight.flatten(2, 3)) if blocks else (mean, log_weight))
        start = stop
    mean, log_weight = (torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] for parts in zip(*outputs))
    return mean, log_weight


def attend_near_on_gpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """What :func:`attend_near` does in the Triton kernels, for whole texts (B, H, T, D) that are not scaled yet.

    ``mask`` is (B, T) bool with padding on the right, or None.
    """
    return _KernelNear.apply(query, key, value, mask, window, scale)


class _KernelNear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        from st_linear.kernels.near import near_attention

        texts, _, length, _ = query.shape
        starts = torch.arange(0, texts * length, length, dtype=torch.int32, device=query.device)
        lengths = torch.full_like(starts, length) if mask is None else mask.sum(dim=-1, dtype=torch.int32)
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        ctx.options = {"max_length": length, "window": window, "scale": scale}
        mean, log_weight = near_attention(query, key, value, starts, lengths, **ctx.options)
        ctx.save_for_backward(query, key, value, mean, log_weight, starts, lengths)
        ctx.texts, ctx.dtype = texts, query.dtype
        mean = mean.unflatten(0, (texts, length)).transpose(1, 2)
        return mean, log_weight.unflatten(1, (texts, length)).transpose(0, 1).unsqueeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_log_weight: Tensor) -> tuple[Tensor | None, ...]:
        from st_linear.kernels.near import near_attention_backward

        query, key, value, mean, log_weight, starts, lengths = ctx.saved_tensors
        grad_mean = grad_mean.transpose(1, 2).flatten(0, 1).contiguous()
        grad_lse = grad_log_weight.squeeze(-1).transpose(0, 1).flatten(1)
        gradients = near_attention_backward(
            grad_mean, query, key, value, mean, log_weight, starts, lengths, grad_lse=grad_lse, **ctx.options
        )
        length = ctx.options["max_length"]
        back = (x.to(ctx.dtype).unflatten(0, (ctx.texts, length)).transpose(1, 2) for x in gradients)
        return (*back, None, None, None)


def has_fused_softmax(query: Tensor) -> bool:
    """Whether :func:`fused_softmax_mean` takes such a query: on the CPU, without gradients."""
    return query.device.type == "cpu" and not torch.is_grad_enabled()


def fused_softmax_mean(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """:func:`softmax_mean` of the logits ``scale · q·k + bias``, for the CPU and without gradients.

    This is the kernel behind ``scaled_dot_product_attention``, called by its name for the logarithm that it gives too.
    Shapes: query (B, H, M, D), key and value (B, H, N, D), or n blocks of each, (B, H, n, M, D) and (B, H, n, N, D);
    bias broadcasts to (B, H, M, N), or (B, H, n, M, N).
    """
    if query.ndim == 4:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        mean, log_sum = attend(query, key, value, attn_mask=bias, scale=scale)
        return mean, log_sum.unsqueeze(-1)
    # Blocks take the place of texts. Where there are many texts, they are short.
    biases: Iterable[Tensor | None] = itertools.repeat(None)
    if bias is not None:
        biases = bias.expand(*query.shape[:-1], key.shape[-2]).transpose(1, 2)
    texts = zip(*(x.transpose(1, 2) for x in (query, key, value)), biases)
    outputs = [fused_softmax_mean(q, k, v, b, scale) for q, k, v, b in texts]
    mean, log_sum = (torch.stack(parts) if len(parts) > 1 else parts[0][None] for parts in zip(*outputs))
    return mean.transpose(1, 2), log_sum.transpose(1, 2)


def log_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The logarithm of a mask: nought where it is true, :data:`LOG_ZERO` elsewhere."""
    return mask.new_zeros((), dtype=dtype).masked_fill(~mask, LOG_ZERO)


def _with_neighbours(x: Tensor, window: int, blocks: int) -> Tensor:
    """(…, (n + 2) · window, D) to (…, n, 3 · window, D): each block between its neighbours; x as it is without any."""
    if not blocks:
        return x
    if blocks == 1:
        return x.unsqueeze(2)
    x = x.unflatten(2, (-1, window))
    return torch.cat([x[:, :, shift : shift + blocks] for shift in range(3)], dim=3)


def in_blocks(x: Tensor, blocks: int) -> Tensor:
    """(B, H, n · window, D) to (B, H, n, window, D); x as it is for 0 blocks."""
    return x.unflatten(2, (blocks, -1)) if blocks else x


def chunk_tokens(query: Tensor, num_features: int) -> int:
    """Tokens per chunk, so that all chunks but the last are of one size, and that one about as long."""
    elements = CHUNK_ELEMENTS.get(query.device.type, CHUNK_ELEMENTS_ELSEWHERE)
    texts, heads, length, _ = query.shape
    chunks = math.ceil(texts * heads * length * num_features / elements)
    return max(16, math.ceil(length / chunks))
