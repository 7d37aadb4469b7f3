"""Linear and near/far attention in chunks: what is mapped is never stored at length, forward or backward.

A text's keys and values are folded, chunk by chunk, into one *state* per head: for each of R features a mean value and
its weight. Queries are read out of it, chunk by chunk. In training each chunk is a checkpoint: the backward pass
recomputes it. So memory beyond inputs and outputs is a few chunks and a few states, whatever the length.

Exponential maps, ``φ(x) = exp(logits)``, are two softmaxes, which is what keeps them in range at any size of logits:

- fold: ``mean_r = Σ_j softmax_j(key_logit_jr) v_j`` and ``log_weight_r = log Σ_j exp(key_logit_jr)``
- read: ``o_i = Σ_r softmax_r(query_logit_ir + log_weight_r) mean_r``

Every other map has the plain sums ``Σ_j φ_k(k_j) [v_j, 1]`` for its state, and a quotient for its read-out.

In near/far attention the keys that are far from one block of queries are far from the blocks around it too, but for a
few. Texts are cut into segments of some blocks: the far keys of a block are those before and after its segment (one
state each, carried along) and some blocks within it (a state each, made anew for every segment).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from st_linear import kernels
from st_linear.feature_maps import ExponentialFeatureMap, FeatureMap
from st_linear.near import (
    LOG_ZERO,
    attend_near,
    attend_near_on_gpu,
    chunk_tokens,
    fused_softmax_mean,
    has_fused_softmax,
    in_blocks,
    softmax_mean,
)

_SEGMENT_TOKENS = 1024

# Tokens at a time where PyTorch's fused kernel keeps logits out of memory: a limit on copies of the inputs alone.
_FUSED_TOKENS = 2048


class State(NamedTuple):
    """What is left of some keys and values.

    Attributes:
        value: Exponential maps: (…, R, D), the mean value by feature. Others: (…, R, D + 1), sums of values and ones.
        log_weight: Exponential maps: (…, 1, R), the logarithm of each feature's weight. Others: (…, 1, 1), nought.
    """

    value: Tensor
    log_weight: Tensor


class _Exponential:
    """Fold, merge and read for ``φ(x) = exp(logits(x))``."""

    def __init__(self, feature_map: ExponentialFeatureMap) -> None:
        self.map = feature_map

    def empty(self, value: Tensor) -> State:
        """The state of no keys and values, for values (B, H, …, D)."""
        texts, heads, features = *value.shape[:2], self.map.num_features
        return State(
            value.new_zeros(texts, heads, features, value.shape[-1]),
            value.new_full((texts, heads, 1, features), LOG_ZERO),
        )

    def fold(self, key: Tensor, value: Tensor, mask: Tensor | None, position: Tensor, blocks: int = 0) -> State:
        """The state of keys and values (B, H, T, D), or with ``blocks`` those of so many parts, along dim 2."""
        logits = self.map.key_logits(key)
        offset = self.map.key_offset(key)
        if offset is not None:
            logits = logits + offset
        if mask is not None:
            logits = logits.masked_fill(~mask, LOG_ZERO)
        return State(*softmax_mean(in_blocks(logits, blocks), in_blocks(value, blocks), dim=-2))

    def merge(self, state: State, other: State) -> State:
        """One state for the keys and values of both."""
        share = torch.sigmoid(other.log_weight - state.log_weight).transpose(-1, -2)
        return State(state.value.lerp(other.value, share), torch.logaddexp(state.log_weight, other.log_weight))

    def read(self, query: Tensor, state: State, position: Tensor, blocks: int = 0) -> tuple[Tensor, Tensor]:
        """Outputs (…, T, D) of queries (B, H, T, D), and the logarithm of the sum of their weights, (…, T, 1)."""
        logits = in_blocks(self.map.query_logits(query), blocks)
        mean, log_weight = softmax_mean(logits + state.log_weight, state.value)
        offset = self.map.query_offset(query)
        return mean, log_weight if offset is None else log_weight + in_blocks(offset, blocks)

    def read_alone(self, query: Tensor, state: State, position: Tensor) -> Tensor:
        """The outputs of :meth:`read`, for less."""
        return (self.map.query_logits(query) + state.log_weight).softmax(dim=-1) @ state.value


class _Sums:
    """Fold, merge and read for any φ; shapes as in :class:`_Exponential`."""

    def __init__(self, feature_map: FeatureMap) -> None:
        self.map = feature_map

    def empty(self, value: Tensor) -> State:
        return self._state(value.new_zeros(*value.shape[:2], self.map.num_features, value.shape[-1] + 1))

    def fold(self, key: Tensor, value: Tensor, mask: Tensor | None, position: Tensor, blocks: int = 0) -> State:
        features = self.map.key_features(key, position)
        if mask is not None:
            features = features * mask
        value = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
        return self._state(in_blocks(features, blocks).transpose(-1, -2) @ in_blocks(value, blocks))

    def merge(self, state: State, other: State) -> State:
        return self._state(state.value + other.value)

    def read(self, query: Tensor, state: State, position: Tensor, blocks: int = 0) -> tuple[Tensor, Tensor]:
        sums = in_blocks(self.map.query_features(query, position), blocks) @ state.value
        total, weight = sums[..., :-1], sums[..., -1:]
        # A sum this small has lost terms to underflow, and the quotient's gradients would overflow.
        info = torch.finfo(weight.dtype)
        positive = weight > info.tiny / info.eps
        weight = torch.where(positive, weight, 1)
        return torch.where(positive, total, 0) / weight, torch.where(positive, weight.log(), LOG_ZERO)

    def read_alone(self, query: Tensor, state: State, position: Tensor) -> Tensor:
        return self.read(query, state, position)[0]

    def _state(self, value: Tensor) -> State:
        return State(value, value.new_zeros(*value.shape[:-2], 1, 1))


def _kernel(feature_map: FeatureMap) -> _Exponential | _Sums:
    return _Exponential(feature_map) if isinstance(feature_map, ExponentialFeatureMap) else _Sums(feature_map)


@torch.compiler.disable
def stream_linear(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, feature_map: FeatureMap, scale: float
) -> Tensor:
    """Linear attention over texts side by side. Time O(B·H·T·R·D), memory beyond inputs and output O(B·H·R·D).

    Args:
        query: (B, H, T, D).
        key: As query.
        value: As query.
        mask: (B, T) bool, True = token; None where every slot is one. Padded slots must be finite.
        feature_map: φ.
        scale: Factor of the logits.

    Returns:
        (B, H, T, D) in the dtype of ``query``, tokens before heads in memory; padded slots hold anything finite.
    """
    kernel = _kernel(feature_map)
    token_mask = None if mask is None else mask[:, None, :, None]
    offset = _state_offset(feature_map, key, mask, scale)
    if isinstance(feature_map, ExponentialFeatureMap) and has_fused_softmax(query):
        projections = feature_map.projections()
        if projections is not None:
            return _fused_stream_linear(query, key, value, token_mask, feature_map, projections, offset, scale)
    chunk = chunk_tokens(query, feature_map.num_features)
    if torch.is_grad_enabled():
        # The state of every chunk is kept for the backward pass, R · D numbers: to be fewer than the chunk's own keys.
        chunk = max(chunk, 2 * feature_map.num_features)

    def fold(key: Tensor, value: Tensor, mask: Tensor | None, position: Tensor) -> State:
        return kernel.fold(_scaled(key, scale), _upcast(value), mask, position)

    def read(query: Tensor, position: Tensor) -> Tensor:
        return kernel.read_alone(_scaled(query, scale), state, position).to(query.dtype)

    positions = _positions(query, token_mask).split(chunk, dim=2)
    masks = [None] * len(positions) if token_mask is None else token_mask.split(chunk, dim=2)
    parts = zip(key.split(chunk, dim=2), value.split(chunk, dim=2), masks, positions)
    state = _with_offset(reduce(kernel.merge, (_recomputed(fold, *part) for part in parts)), offset)
    return _joined((_recomputed(read, *part) for part in zip(query.split(chunk, dim=2), positions)), query)


def _fused_stream_linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    token_mask: Tensor | None,
    feature_map: ExponentialFeatureMap,
    projections: tuple[Tensor, Tensor],
    offset: Tensor | None,
    scale: float,
) -> Tensor:
    """:func:`stream_linear` for ``φ(x) = exp(W x + offsets)``: its two softmaxes in PyTorch's own fused kernel.

    For the first the rows of W are queries, and for the second they are keys: logits are never in memory, not even
    those of a chunk. Chunks are there for what is made of the inputs, their copies in float32 say.
    """
    kernel, root = _Exponential(feature_map), scale**0.5
    dtype = torch.promote_types(query.dtype, torch.float32)
    query_weight, key_weight = (x.to(dtype).expand(len(query), -1, -1, -1) for x in projections)

    def fold(key: Tensor, value: Tensor, mask: Tensor | None) -> State:
        bias = feature_map.key_offset(_scaled(key, scale))
        if mask is not None:
            bias = (mask.new_zeros((), dtype=dtype) if bias is None else bias).masked_fill(~mask, LOG_ZERO)
        bias = None if bias is None else bias.transpose(-1, -2).contiguous()
        mean, log_weight = fused_softmax_mean(key_weight, _upcast(key), _upcast(value), bias, root)
        return State(mean, log_weight.transpose(-1, -2))

    chunk = max(1, _FUSED_TOKENS // len(query))
    keys, values = (x.split(chunk, dim=2) for x in (key, value))
    masks = [None] * len(keys) if token_mask is None else token_mask.split(chunk, dim=2)
    state = _with_offset(reduce(kernel.merge, (fold(*part) for part in zip(keys, values, masks))), offset)
    bias = state.log_weight.to(dtype).contiguous()

    def read(query: Tensor) -> Tensor:
        return fused_softmax_mean(_upcast(query), query_weight, state.value, bias, root)[0].to(query.dtype)

    # Queries that need no copy are read all at once.
    return read(query) if query.dtype == dtype else _joined(map(read, query.split(chunk, dim=2)), query)


@torch.compiler.disable
def stream_near_far(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    feature_map: FeatureMap,
    window: int,
    gain: Tensor | None,
    scale: float,
) -> Tensor:
    """Near/far attention over texts side by side; arguments and result as in :func:`stream_linear`.

    Blocks count slots: padding must be on the right. Time O(B·H·T·(3·window + R)·D).
    """
    kernel = _kernel(feature_map)
    text = _Blocks(query, key, value, mask, window, scale)
    offset = _state_offset(feature_map, key, mask, scale)
    log_factor: Tensor | float = math.log(feature_map.weight)
    if gain is not None:
        log_factor = log_factor + _upcast(gain)[:, None, None]
    nothing = kernel.empty(_upcast(value[:, :, :1]))
    near_parts = None
    if kernels.take(query):
        whole = attend_near_on_gpu(query, key, value, mask, window, scale)
        slots = (text.segments[0][1] - text.segments[0][0]) * window
        near_parts = list(zip(*(x.split(slots, dim=2) for x in whole)))

    def start_of(start: int, stop: int) -> tuple[State, State]:
        """States of the segment's first block, and of its other blocks."""
        others = kernel.fold(*text.keys(start + 1, stop)) if stop > start + 1 else nothing
        return kernel.fold(*text.keys(start, start + 1)), others

    def attend(start: int, stop: int, before: State, after: State) -> tuple[Tensor, State]:
        """The segment's output, and the state of all blocks before its last one."""
        queries, position = text.queries(start, stop)
        keys = text.keys(start - 1, stop + 1)
        if near_parts is None:
            near, near_log_weight = attend_near(queries, *keys[:3], window, text.neighbours(start, stop))
        else:
            near, near_log_weight = near_parts[text.segments.index((start, stop))]
        # The states of the left neighbour, of the segment's blocks, and of the right neighbour.
        states = _fold_blocks(kernel, *keys, window)
        states = [nothing] * (start == 0) + states + [nothing] * (stop + 1 - text.num_blocks)
        # Only far blocks are added up. To take the near ones from the total would be cheaper, and cancel.
        befores = list(accumulate(states[: stop - start], kernel.merge, initial=before))
        afters = list(accumulate(reversed(states[3:]), kernel.merge, initial=after))
        far_state = _with_offset(kernel.merge(_stacked(befores[:-1]), _stacked(afters[::-1])), offset)
        far, far_log_weight = _read_blocks(kernel, queries, far_state, position, window)
        output = near.lerp(far, torch.sigmoid(far_log_weight + log_factor - near_log_weight))
        return output.to(query.dtype), befores[-1]

    # What lies behind each segment and the block that follows it, from the last segment backwards.
    afters, first = [nothing], nothing
    for segment in reversed(text.segments[1:]):
        next_first, others = _recomputed(start_of, *segment)
        afters.append(kernel.merge(kernel.merge(others, first), afters[-1]))
        first = next_first

    def outputs() -> Iterator[Tensor]:
        before = nothing
        for segment, after in zip(text.segments, reversed(afters)):
            output, before = _recomputed(attend, *segment, before, after)
            yield output

    return _joined(outputs(), query)


@torch.compiler.disable
def stream_local(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, radius: int, scale: float
) -> Tensor:
    """Attention to the slots at most ``radius`` away; arguments and result as in :func:`stream_near_far`."""
    text = _Blocks(query, key, value, mask, radius, scale)

    def attend(start: int, stop: int) -> Tensor:
        queries, _ = text.queries(start, stop)
        keys = text.keys(start - 1, stop + 1)
        output, _ = attend_near(queries, *keys[:3], radius, text.neighbours(start, stop), radius)
        return output.to(query.dtype)

    return _joined((_recomputed(attend, *segment) for segment in text.segments), query)


class _Blocks:
    """Texts side by side, cut into blocks of ``window`` slots, the last of which may be shorter.

    What is handed out is in float32 at least, and scaled.

    Attributes:
        num_blocks: How many there are.
        segments: First block, and block after the last, of each segment.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int, scale: float
    ) -> None:
        self.window, self.scale = window, scale
        self.num_blocks, step = math.ceil(query.shape[2] / window), max(1, _SEGMENT_TOKENS // window)
        self.segments = [(start, min(start + step, self.num_blocks)) for start in range(0, self.num_blocks, step)]
        self.mask = None if mask is None else mask[:, None, :, None]
        self.whole = (query, key, value, _positions(query, self.mask))
        # The gradient of a slice is as large as the whole; that of all pieces of one split is made once.
        self.pieces = [x.split(window, dim=2) for x in self.whole]

    def queries(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Queries (B, H, t, D) of some blocks, and their positions."""
        return _scaled(self._take(0, start, stop), self.scale), self._take(3, start, stop)

    def keys(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Keys and values (B, H, t, D) of those blocks that there are, their mask or None, and their positions."""
        key, value, position = (self._take(index, start, stop) for index in (1, 2, 3))
        slots = slice(max(start, 0) * self.window, stop * self.window)
        mask = None if self.mask is None else self.mask[:, :, slots]
        return _scaled(key, self.scale), _upcast(value), mask, position

    def neighbours(self, start: int, stop: int) -> tuple[bool, bool]:
        """Whether there is a block before ``start``, and one at ``stop``."""
        return start > 0, stop < self.num_blocks

    def _take(self, index: int, start: int, stop: int) -> Tensor:
        start = max(start, 0)
        if not torch.is_grad_enabled():
            return self.whole[index][:, :, start * self.window : stop * self.window]
        pieces = self.pieces[index][start:stop]
        return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]


def _fold_blocks(
    kernel: _Exponential | _Sums, key: Tensor, value: Tensor, mask: Tensor | None, position: Tensor, window: int
) -> list[State]:
    """The state of each block; the last may be shorter."""
    count = key.shape[2] // window
    states = []
    for start, stop, blocks in ((0, count * window, count), (count * window, key.shape[2], 1)):
        if stop > start:
            part = slice(start, stop)
            token_mask = None if mask is None else mask[:, :, part]
            folded = kernel.fold(key[:, :, part], value[:, :, part], token_mask, position[:, :, part], blocks)
            states += [State(*parts) for parts in zip(*(x.unbind(2) for x in folded))]
    return states


def _read_blocks(
    kernel: _Exponential | _Sums, query: Tensor, states: State, position: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, t, D) of blocks of queries, each of its own state, and the logarithms of the sums of weights."""
    length = query.shape[2]
    if length % window:
        query, position = (F.pad(x, (0, 0, 0, -length % window)) for x in (query, position))
    outputs = kernel.read(query, states, position, query.shape[2] // window)
    mean, log_weight = (x.flatten(2, 3)[:, :, :length] for x in outputs)
    return mean, log_weight


def _stacked(states: Sequence[State]) -> State:
    return State(*(torch.stack(parts, dim=2) for parts in zip(*states)))


def _with_offset(state: State, offset: Tensor | None) -> State:
    """``state`` with ``offset`` (B, H, 1, R), if any, on its weights, which may be those of several blocks."""
    if offset is None:
        return state
    return State(state.value, state.log_weight + (offset.unsqueeze(2) if state.log_weight.ndim == 5 else offset))


def _state_offset(feature_map: FeatureMap, key: Tensor, mask: Tensor | None, scale: float) -> Tensor | None:
    """What is added to the weights of a whole text's state, (B or 1, H, 1, R), or None."""
    # Keys are scaled, a pass over the whole text, only for maps that have such an offset.
    method = getattr(type(feature_map), "feature_offset", None)
    if not isinstance(feature_map, ExponentialFeatureMap) or method is ExponentialFeatureMap.feature_offset:
        return None
    return feature_map.feature_offset(_scaled(key, scale), mask)


def _positions(query: Tensor, token_mask: Tensor | None) -> Tensor:
    """Share of its text's tokens before each slot, (B or 1, 1, T, 1)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    if token_mask is None:
        length = query.shape[2]
        return torch.arange(length, device=query.device, dtype=dtype)[None, None, :, None] / length
    count = token_mask.sum(dim=2, keepdim=True).clamp(min=1)
    return (token_mask.cumsum(dim=2) - 1).clamp(min=0).to(dtype) / count


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scaled(x: Tensor, scale: float) -> Tensor:
    return _upcast(x) * scale**0.5


def _recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function``; what it stores for the backward pass is made anew there, rather than kept until then."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _joined(chunks: Iterable[Tensor], like: Tensor) -> Tensor:
    """Chunks (B, H, …, D) one behind the other, (B, H, T, D), tokens before heads in memory."""
    if torch.is_grad_enabled():
        return torch.cat([chunk.transpose(1, 2) for chunk in chunks], dim=1).transpose(1, 2)
    texts, heads, length, head_dim = like.shape
    output, start = like.new_empty(texts, length, heads, head_dim).transpose(1, 2), 0
    for chunk in chunks:
        output[:, :, start : start + chunk.shape[2]] = chunk
        start += chunk.shape[2]
    return output
