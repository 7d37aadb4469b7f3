"""Attention of whole texts in one expression, without a loop or a branch on data: what a graph exporter can trace.

One graph serves every batch and length. Arithmetic is that of :mod:`st_linear.streaming`, but for the far states of
near/far attention: sums over the blocks before and after each, ``O(T)`` in time, scaled by each feature's largest
weight in the text. What weighs less than float32's smallest number beside that weighs nothing.

Shapes: query, key, value (B, H, T, D) to (B, H, T, D); mask (B, T) bool, True = token, padding on the right.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from st_linear.attention import exact_limit, softmax_attention
from st_linear.feature_maps import ExponentialFeatureMap, FeatureMap
from st_linear.near import in_blocks
from st_linear.softmax import LOG_ZERO, log_of, softmax_mean
from st_linear.streaming import State, kernel_of, positions_of, state_offset, with_offset


def traceable_linear(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, feature_map: FeatureMap, scale: float
) -> Tensor:
    """:func:`~st_linear.attention.linear_attention`. Memory O(B·H·T·R)."""
    kernel = kernel_of(feature_map, query, scale)
    token_mask = mask[:, None, :, None]
    position = positions_of(query, token_mask)
    state = kernel.fold(key, value, token_mask, position)
    state = with_offset(state, state_offset(feature_map, key, mask, scale))
    return kernel.read_alone(query, state, position).masked_fill(~token_mask, 0)


def traceable_near_far(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    feature_map: FeatureMap,
    window: int,
    exact_up_to: int | None = None,
    gain: Tensor | None,
    scale: float,
) -> Tensor:
    """:func:`~st_linear.attention.near_far_attention`. Memory O(B·H·T·(3·window + R + R·D / window)).

    Where ``exact_up_to`` is more than two windows, that many tokens of every text are attended to exactly besides, as
    a short text may stand beside long ones: O(B·H·exact_up_to²) more.
    """
    kernel = kernel_of(feature_map, query, scale)
    length, limit = query.shape[2], exact_limit(window, exact_up_to)
    exact = _of_short_texts(query, key, value, mask, limit, scale) if limit > 2 * window else None
    query, key, value = (_whole_blocks(x, window) for x in (query, key, value))
    token_mask = _whole_blocks(mask[:, None, :, None], window)
    blocks = query.shape[2] // window
    near, near_log_weight = _near(query, key, value, token_mask, window, scale)
    position = positions_of(query, token_mask)
    states = _far(
        kernel.fold(key, value, token_mask, position, blocks),
        exponential=isinstance(feature_map, ExponentialFeatureMap),
    )
    states = with_offset(states, state_offset(feature_map, key, token_mask[:, 0, :, 0], scale))
    far, far_log_weight = kernel.read(query, states, position, blocks)
    log_factor: Tensor | float = math.log(feature_map.weight)
    if gain is not None:
        log_factor = log_factor + gain[:, None, None, None]
    output = near.lerp(far, torch.sigmoid(far_log_weight + log_factor - near_log_weight))
    output = output.flatten(2, 3).masked_fill(~token_mask, 0).narrow(2, 0, length)
    if exact is None:
        return output
    return torch.where((mask.sum(dim=-1) <= limit)[:, None, None, None], exact, output)


def traceable_local(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, radius: int, scale: float) -> Tensor:
    """:func:`~st_linear.attention.local_attention`. Memory O(B·H·T·3·radius)."""
    length = query.shape[2]
    query, key, value = (_whole_blocks(x, radius) for x in (query, key, value))
    token_mask = _whole_blocks(mask[:, None, :, None], radius)
    output, _ = _near(query, key, value, token_mask, radius, scale, radius)
    return output.flatten(2, 3).masked_fill(~token_mask, 0).narrow(2, 0, length)


def _of_short_texts(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, limit: int, scale: float) -> Tensor:
    """Softmax attention of those texts that have at most ``limit`` tokens; of others, it holds anything."""
    length = query.shape[2]
    # Padded first, so that the part has a length that tracers know, whatever the whole has.
    query, key, value = (F.pad(x, (0, 0, 0, limit)).narrow(2, 0, limit) for x in (query, key, value))
    output = softmax_attention(query, key, value, F.pad(mask, (0, limit)).narrow(1, 0, limit), scale=scale)
    return F.pad(output, (0, 0, 0, length)).narrow(2, 0, length)


def _whole_blocks(x: Tensor, window: int) -> Tensor:
    """(…, T, D) with zeros behind, so that T is a multiple of ``window``."""
    length = x.shape[2]
    # Not -length % window, which is the same: tracers can't tell that the sum is divisible.
    whole = (length + window - 1) // window * window
    return F.pad(x, (0, 0, 0, whole - length))


def _near(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, window: int, scale: float, radius: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of each block to itself and its neighbours, (B, H, n, window, D), and the logarithm of its weights."""
    blocks = query.shape[2] // window
    key, value, mask = (_with_neighbours(x, window, blocks) for x in (key, value, mask))
    allowed = mask.mT
    if radius is not None:
        step = torch.arange(3 * window, device=query.device)
        allowed = allowed & ((step[:window, None] + window - step).abs() <= radius)
    logits = in_blocks(query, blocks) * scale @ key.mT
    return softmax_mean(logits + log_of(allowed, query.dtype), value)


def _with_neighbours(x: Tensor, window: int, blocks: int) -> Tensor:
    """(B, H, n · window, D) to (B, H, n, 3 · window, D), with zeros for neighbours that there are none of."""
    x = F.pad(x, (0, 0, window, window)).unflatten(2, (blocks + 2, window))
    return torch.cat([x[:, :, shift : shift + blocks] for shift in range(3)], dim=3)


def _far(states: State, *, exponential: bool) -> State:
    """For each block, along dim 2, the state of all blocks that are no neighbours of it."""
    if not exponential:
        return State(_sum_of_far(states.value), states.log_weight)
    largest = states.log_weight.amax(dim=2, keepdim=True)
    weight = (states.log_weight - largest).exp()
    total, value = _sum_of_far(weight), _sum_of_far(states.value * weight.mT)
    some = total > 0
    divisor = torch.where(some, total, 1)
    return State(value / divisor.mT, torch.where(some, largest + divisor.log(), LOG_ZERO))


def _sum_of_far(x: Tensor) -> Tensor:
    """Sums along dim 2 of what lies at least two places before or behind. Sums only: a difference would cancel."""
    return _sum_before(x) + _sum_before(x.flip(2)).flip(2)


def _sum_before(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 2, 0))[:, :, : x.shape[2]].cumsum(dim=2)
