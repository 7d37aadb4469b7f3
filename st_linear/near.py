"""Exact attention of blocks of tokens to themselves and their neighbours: the near part of near/far attention.

With a radius, it is all of local attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from st_linear.kernels import cpu
from st_linear.softmax import (
    backward_tokens,
    fused_gradients,
    fused_softmax_mean,
    has_fused_softmax,
    in_full_precision,
    log_of,
    pytorchs_softmax_pays,
    softmax_gradients,
    softmax_mean,
    zero_rows,
)

# Mapped elements of one chunk. On the CPU a chunk and what is made of it should stay in the cache of its cores
# (docs/performance.md has the measurements); a GPU wants enough work for all of its processors at once.
CHUNK_ELEMENTS = {"cpu": 2**18}
CHUNK_ELEMENTS_ELSEWHERE = 2**25


def attend_near(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    window: int,
    before: int,
    scale: float,
    radius: int | None = None,
    known: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each block to itself and its neighbours, and the logarithm of the sum of its weights.

    Shapes: query (B, H, t, D) to (B, H, t, D) and (B, H, t, 1); key and value (B, H, t', D) and mask (B, 1, t', 1) are
    those of the same blocks, with the block that comes before them, of ``before`` slots or 0, and the one that comes
    after them, if there is one. ``known`` is the result, where only its gradients are wanted.
    """
    form = _Form(mask, window, before, scale, radius)
    if torch.is_grad_enabled():
        return _Near.apply(query, key, value, form, known)
    return form.attend(query, key, value)


class _Run(NamedTuple):
    """Blocks that are attended to the same way, and taken together."""

    queries: slice
    keys: slice
    """Those of the blocks and of their neighbours."""
    alike: int
    """How many blocks with two whole neighbours; 0 = a first or last one, alone."""


class _Form(NamedTuple):
    """What is the same for all blocks; names as in :func:`attend_near`."""

    mask: Tensor | None
    window: int
    before: int
    scale: float
    radius: int | None

    def runs(self, length: int, key_length: int, most: int) -> Iterator[_Run]:
        """Runs of at most so many blocks."""
        window, start = self.window, 0
        while start < length:
            here = start + self.before
            # Blocks with two whole neighbours are alike, and taken together; a first or last one is taken alone.
            alike = min((key_length - here) // window - 1, (length - start) // window) if here else 0
            blocks = max(0, min(alike, most))
            stop = min(start + max(blocks, 1) * window, length)
            keys = slice(max(here - window, 0), min(stop + self.before + window, key_length))
            yield _Run(slice(start, stop), keys, blocks)
            start = stop

    def inputs(
        self, query: Tensor, key: Tensor, value: Tensor, run: _Run
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys, values and bias of a run, (B, H, n, …) each, or (B, H, …) for one block alone."""
        window = self.window
        query, key, value = in_blocks(query[:, :, run.queries], run.alike), self.keys(key, run), self.keys(value, run)
        bias = None
        if self.mask is not None:
            mask = self.mask[:, :, run.keys]
            bias = log_of(mask.unfold(2, 3 * window, window) if run.alike else mask.mT, query.dtype)
        if self.radius is not None:
            i = torch.arange(query.shape[-2], device=query.device)[:, None] + run.queries.start + self.before
            j = torch.arange(key.shape[-2], device=query.device) + run.keys.start
            band = log_of((i - j).abs() <= self.radius, query.dtype)
            bias = band if bias is None else bias + band
        return query, key, value, bias

    def keys(self, key: Tensor, run: _Run) -> Tensor:
        """Keys of a run, (B, H, n, t, D) in overlapping views, or (B, H, t, D) for one block alone."""
        key = key[:, :, run.keys]
        return key.unfold(2, 3 * self.window, self.window).mT if run.alike else key

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        # The fused kernel keeps few weights at a time, however many blocks there are.
        fused = has_fused_softmax(query)
        most = query.shape[2] if fused else max(1, chunk_tokens(query, 3 * self.window) // self.window)
        outputs = []
        for run in self.runs(query.shape[2], key.shape[2], most):
            q, k, v, bias = self.inputs(query, key, value, run)
            if fused:
                output = fused_softmax_mean(q, k, v, bias, self.scale)
            else:
                logits = q @ k.mT * self.scale
                output = softmax_mean(logits if bias is None else logits + bias, v)
            outputs.append([x.flatten(2, 3) if run.alike else x for x in output])
        mean, log_weight = (torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] for parts in zip(*outputs))
        return mean, log_weight


class _Near(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, form: _Form, known: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        # Tensors of its own, as what is returned gets a history.
        mean, log_weight = (x.detach() for x in (form.attend(query, key, value) if known is None else known))
        ctx.save_for_backward(query, key, value, mean, log_weight)
        ctx.form = form
        return mean, log_weight

    @staticmethod
    @once_differentiable
    @in_full_precision
    def backward(ctx: Any, grad_mean: Tensor, grad_log_weight: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mean, log_weight = ctx.saved_tensors
        form, window = ctx.form, ctx.form.window
        grad_query, grad_key, grad_value = zero_rows(query), zero_rows(key), zero_rows(value)
        compiled = cpu.takes(query, key, value) and form.radius is None
        fused = pytorchs_softmax_pays(query, window)
        gradients_of: Callable[..., tuple[Tensor, ...]] = fused_gradients if fused else softmax_gradients
        tokens = backward_tokens(query) if fused else chunk_tokens(query, 3 * window)
        most = query.shape[2] if compiled else max(1, tokens // window)
        for run in form.runs(query.shape[2], key.shape[2], most):
            gradients, outputs = (
                (in_blocks(x[:, :, run.queries], run.alike), in_blocks(y[:, :, run.queries], run.alike))
                for x, y in ((grad_mean, grad_log_weight), (mean, log_weight))
            )
            q, k, v, bias = form.inputs(query, key, value, run)
            by_query = in_blocks(grad_query[:, :, run.queries], run.alike)
            if compiled:
                into = by_query, form.keys(grad_key, run), form.keys(grad_value, run), None
                cpu.add_softmax_gradients(gradients, outputs, q, k, v, bias, form.scale, into)
                continue
            piece, *pieces = gradients_of(gradients, outputs, q, k, v, bias, form.scale)[:3]
            by_query.copy_(piece)
            for gradient, piece in zip((grad_key, grad_value), pieces):
                if not run.alike:
                    gradient[:, :, run.keys] += piece
                    continue
                for shift, part in enumerate(piece.split(window, dim=3)):
                    first = run.keys.start + shift * window
                    in_blocks(gradient[:, :, first : first + run.alike * window], run.alike).add_(part)
        return grad_query, grad_key, grad_value, None, None


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


def in_blocks(x: Tensor, blocks: int) -> Tensor:
    """(B, H, n · window, D) to (B, H, n, window, D); x as it is for 0 blocks."""
    return x.unflatten(2, (blocks, -1)) if blocks else x


def chunk_tokens(query: Tensor, num_features: int) -> int:
    """Tokens per chunk, so that all chunks but the last are of one size, and that one about as long."""
    elements = CHUNK_ELEMENTS.get(query.device.type, CHUNK_ELEMENTS_ELSEWHERE)
    texts, heads, length, _ = query.shape
    chunks = math.ceil(texts * heads * length * num_features / elements)
    return max(16, math.ceil(length / chunks))
