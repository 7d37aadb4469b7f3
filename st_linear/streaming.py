"""Linear and near/far attention in chunks: what is mapped is never stored at length, forward or backward.

A text's keys and values are folded, chunk by chunk, into one *state* per head: for each of R features a mean value and
its weight. Queries are read out of it, chunk by chunk. The backward pass computes each chunk again, in PyTorch's fused
kernel or as a checkpoint; only what short texts store is kept. So memory beyond inputs and outputs is a few chunks and
a few states, whatever the length, and in near/far attention as much as the output, for its near part.

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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from st_linear import kernels
from st_linear.feature_maps import ExponentialFeatureMap, FeatureMap
from st_linear.kernels import cpu
from st_linear.near import attend_near, attend_near_on_gpu, chunk_tokens, in_blocks
from st_linear.softmax import (
    LOG_ZERO,
    fused_softmax_mean,
    fused_softmax_pays,
    has_fused_softmax,
    log_of,
    merged_means,
    softmax_mean,
)

_SEGMENT_TOKENS = 1024

# Tokens at a time where a fused kernel keeps logits out of memory: a limit on copies of the inputs alone.
_FUSED_TOKENS = 2048


class State(NamedTuple):
    """What is left of some keys and values.

    Attributes:
        value: Exponential maps: (…, R, D), the mean value by feature. Others: (…, R, D + 1), sums of values and ones.
        log_weight: Exponential maps: (…, 1, R), the logarithm of each feature's weight. Others: (…, 1, 1), nought.
    """

    value: Tensor
    log_weight: Tensor


class _Folding(ABC):
    """Fold, merge and read, for any φ. Queries and keys come unscaled."""

    def __init__(self, feature_map: FeatureMap, scale: float) -> None:
        self.map = feature_map
        self.root = scale**0.5

    def chunk(self, query: Tensor) -> int:
        """Tokens to fold or to read at a time."""
        chunk = chunk_tokens(query, self.map.num_features)
        # The state of every chunk is kept for the backward pass, R · D numbers: to be fewer than the chunk's own keys.
        return max(chunk, 2 * self.map.num_features) if torch.is_grad_enabled() else chunk

    @abstractmethod
    def empty(self, value: Tensor) -> State:
        """The state of no keys and values, for values (B, H, …, D)."""

    @abstractmethod
    def fold(self, key: Tensor, value: Tensor, mask: Tensor | None, position: Tensor, blocks: int = 0) -> State:
        """The state of keys and values (B, H, T, D), or with ``blocks`` those of so many parts, along dim 2."""

    @abstractmethod
    def merge(self, state: State, other: State) -> State:
        """One state for the keys and values of both."""

    @abstractmethod
    def merge_others(self, states: State) -> State:
        """One state of all along dim 2 but the first."""

    @abstractmethod
    def merge_each(self, states: State, chosen: Tensor) -> State:
        """M merged states of the N along dim 2, each of those that its row of ``chosen``, (M, N) bool, says."""

    @abstractmethod
    def read(self, query: Tensor, state: State, position: Tensor, blocks: int = 0) -> tuple[Tensor, Tensor]:
        """Outputs (…, T, D) of queries (B, H, T, D), and the logarithm of the sum of their weights, (…, T, 1)."""

    def read_alone(self, query: Tensor, state: State, position: Tensor) -> Tensor:
        """The outputs of :meth:`read`."""
        return self.read(query, state, position)[0]

    def merge_far(self, before: State, blocks: Sequence[State], after: State, chosen: Tensor) -> tuple[State, State]:
        """What is far from each of M blocks of a segment, and all that is before the segment's last block.

        Args:
            before: The state of all before ``blocks``.
            blocks: States of N blocks in all, along dim 2.
            after: The state of all behind them.
            chosen: (M + 1, N) bool; True where one of the N is far from one of the M, or before the last.
        """
        merged = self.merge_each(stacked([before, *blocks]), F.pad(chosen, (1, 0), value=True))
        # Not among the others: its gradient waits for that of all segments, and would be a view of all of theirs.
        far = self.merge(_part(merged, 0, -1), stacked([after]))
        # A copy: a view would keep all of the merged states until the backward pass.
        return far, State(*(x[:, :, -1].clone() for x in merged))

    def read_onto(
        self, near: tuple[Tensor, Tensor], query: Tensor, state: State, position: Tensor, blocks: int
    ) -> Tensor:
        """Outputs (B, H, n, T, D) of :meth:`read`, merged with means that others gave and logarithms of their sums."""
        return merged_means(near, self.read(query, state, position, blocks))[0]


class _Exponential(_Folding):
    """:class:`_Folding` for ``φ(x) = exp(logits(x))``."""

    map: ExponentialFeatureMap

    def __init__(
        self, feature_map: ExponentialFeatureMap, scale: float, weights: tuple[Tensor, Tensor] | None
    ) -> None:
        super().__init__(feature_map, scale)
        # (H, R, D) of queries and of keys. To scale these costs less than to scale what they are applied to.
        self.weights = None if weights is None else (weights[0] * self.root, weights[1] * self.root)

    def empty(self, value: Tensor) -> State:
        texts, heads, features = *value.shape[:2], self.map.num_features
        return State(
            value.new_zeros(texts, heads, features, value.shape[-1]),
            value.new_full((texts, heads, 1, features), LOG_ZERO),
        )

    def fold(self, key: Tensor, value: Tensor, mask: Tensor | None, position: Tensor, blocks: int = 0) -> State:
        logits = self.map.key_logits(key * self.root) if self.weights is None else key @ self.weights[1].mT
        for bias in self._key_biases(key, mask):
            logits = logits + bias
        return State(*softmax_mean(in_blocks(logits, blocks), in_blocks(value, blocks), dim=-2))

    def merge(self, state: State, other: State) -> State:
        share = torch.sigmoid(other.log_weight - state.log_weight).mT
        return State(state.value.lerp(other.value, share), torch.logaddexp(state.log_weight, other.log_weight))

    def merge_others(self, states: State) -> State:
        log_weight = states.log_weight.clone()
        log_weight[:, :, 0] = LOG_ZERO
        share = log_weight.softmax(dim=2).mT
        return State((states.value * share).sum(dim=2), log_weight.logsumexp(dim=2))

    def merge_each(self, states: State, chosen: Tensor) -> State:
        # By feature, a softmax over states. Features come before heads, as they lie in memory.
        logits = states.log_weight.permute(0, 4, 1, 3, 2).masked_fill(~chosen, -math.inf)
        value, log_weight = softmax_mean(logits, states.value.permute(0, 3, 1, 2, 4))
        return State(value.permute(0, 2, 3, 1, 4), log_weight.permute(0, 2, 3, 4, 1))

    def read(self, query: Tensor, state: State, position: Tensor, blocks: int = 0) -> tuple[Tensor, Tensor]:
        mean, log_weight = softmax_mean(in_blocks(self._query_logits(query), blocks) + state.log_weight, state.value)
        return mean, self._with_query_offset(log_weight, query, blocks)

    def read_alone(self, query: Tensor, state: State, position: Tensor) -> Tensor:
        return (self._query_logits(query) + state.log_weight).softmax(dim=-1) @ state.value

    def _with_query_offset(self, log_weight: Tensor, query: Tensor, blocks: int, sign: int = 1) -> Tensor:
        """What all logits of a query share is added, or taken away; (B, H, …, T, 1)."""
        if _has(self.map, "query_offset") and (offset := self.map.query_offset(query * self.root)) is not None:
            return log_weight.add(in_blocks(offset, blocks), alpha=sign)
        return log_weight

    def _query_logits(self, query: Tensor) -> Tensor:
        return self.map.query_logits(query * self.root) if self.weights is None else query @ self.weights[0].mT

    def _key_biases(self, key: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """What is added to all logits of a key, (B or 1, H or 1, T, 1) each."""
        if _has(self.map, "key_offset") and (offset := self.map.key_offset(key * self.root)) is not None:
            yield offset
        if mask is not None:
            yield log_of(mask, key.dtype)


class _Fused(_Exponential):
    """:class:`_Exponential` for ``φ(x) = exp(W x + offsets)`` on the CPU.

    Its two softmaxes run in a fused kernel. In the fold the rows of W are queries, and in the read they
    are keys: logits are never in memory, not even those of a chunk.
    """

    weights: tuple[Tensor, Tensor]

    def chunk(self, query: Tensor) -> int:
        # One chunk, as the gradients of several would be copied to make one, and the compiled kernel copies nothing.
        # Not of half precision: the upcast inputs would be kept.
        if not _is_half(query) and (torch.is_grad_enabled() or cpu.takes(query)):
            return query.shape[2]
        return max(1, _FUSED_TOKENS // len(query))

    def fold(self, key: Tensor, value: Tensor, mask: Tensor | None, position: Tensor, blocks: int = 0) -> State:
        biases = list(self._key_biases(key, mask))
        bias = in_blocks(reduce(torch.add, biases), blocks).mT if biases else None
        key, value = in_blocks(key, blocks), in_blocks(value, blocks)
        mean, log_weight = fused_softmax_mean(self._weight(1, key), key, value, bias)
        return State(mean, log_weight.mT)

    def read(self, query: Tensor, state: State, position: Tensor, blocks: int = 0) -> tuple[Tensor, Tensor]:
        mean, log_weight = self._read(in_blocks(query, blocks), state)
        return mean, self._with_query_offset(log_weight, query, blocks)

    def read_alone(self, query: Tensor, state: State, position: Tensor) -> Tensor:
        return self._read(query, state)[0]

    def _read(self, query: Tensor, state: State, other: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return fused_softmax_mean(query, self._weight(0, query), state.value, state.log_weight, other=other)

    def merge_far(self, before: State, blocks: Sequence[State], after: State, chosen: Tensor) -> tuple[State, State]:
        if torch.is_grad_enabled() or not cpu.takes(after.value):
            return super().merge_far(before, blocks, after, chosen)
        chosen = F.pad(chosen, (1, 1), value=True)
        chosen[-1, -1] = False
        merged = State(*cpu.merge_states([_as_several(before), *blocks, _as_several(after)], chosen))
        return _part(merged, 0, -1), State(*(x[:, :, -1].clone() for x in merged))

    def read_onto(
        self, near: tuple[Tensor, Tensor], query: Tensor, state: State, position: Tensor, blocks: int
    ) -> Tensor:
        mean, log_sum = near
        other = mean, self._with_query_offset(log_sum, query, blocks, sign=-1)
        return self._read(in_blocks(query, blocks), state, other)[0]

    def _weight(self, side: int, x: Tensor) -> Tensor:
        """W, (H, R, D), beside x, (B, H, T, D) or (B, H, n, T, D)."""
        weight = self.weights[side] if x.ndim == 4 else self.weights[side].unsqueeze(1)
        return weight.expand(*x.shape[:-2], -1, -1)


class _Sums(_Folding):
    """:class:`_Folding` for every other φ."""

    def empty(self, value: Tensor) -> State:
        return self._state(value.new_zeros(*value.shape[:2], self.map.num_features, value.shape[-1] + 1))

    def fold(self, key: Tensor, value: Tensor, mask: Tensor | None, position: Tensor, blocks: int = 0) -> State:
        features = self.map.key_features(key * self.root, position)
        if mask is not None:
            features = features * mask
        value = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
        return self._state(in_blocks(features, blocks).mT @ in_blocks(value, blocks))

    def merge(self, state: State, other: State) -> State:
        return self._state(state.value + other.value)

    def merge_each(self, states: State, chosen: Tensor) -> State:
        # What is chosen is added up. To take the rest from the total would be cheaper, and cancel.
        # Heads come last before D, as they lie in memory.
        value = states.value.permute(0, 2, 3, 1, 4)
        sums = chosen.to(value.dtype) @ value.flatten(2)
        return self._state(sums.unflatten(-1, value.shape[2:]).permute(0, 3, 1, 2, 4))

    def merge_others(self, states: State) -> State:
        return self._state(states.value[:, :, 1:].sum(dim=2))

    def read(self, query: Tensor, state: State, position: Tensor, blocks: int = 0) -> tuple[Tensor, Tensor]:
        sums = in_blocks(self.map.query_features(query * self.root, position), blocks) @ state.value
        total, weight = sums[..., :-1], sums[..., -1:]
        # A sum this small has lost terms to underflow, and the quotient's gradients would overflow.
        info = torch.finfo(weight.dtype)
        positive = weight > info.tiny / info.eps
        weight = torch.where(positive, weight, 1)
        return torch.where(positive, total, 0) / weight, torch.where(positive, weight.log(), LOG_ZERO)

    def _state(self, value: Tensor) -> State:
        return State(value, value.new_zeros(*value.shape[:-2], 1, 1))


def kernel_of(feature_map: FeatureMap, query: Tensor, scale: float, *, fused: bool = False) -> _Folding:
    """What folds, merges and reads for a map; ``fused`` where that is to be had."""
    if not isinstance(feature_map, ExponentialFeatureMap):
        return _Sums(feature_map, scale)
    projections = feature_map.projections()
    if projections is None:
        return _Exponential(feature_map, scale, None)
    dtype = torch.promote_types(query.dtype, torch.float32)
    weights = projections[0].to(dtype), projections[1].to(dtype)
    return (_Fused if fused else _Exponential)(feature_map, scale, weights)


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
    fused = fused_softmax_pays(query, query.shape[2]) if torch.is_grad_enabled() else has_fused_softmax(query)
    kernel = kernel_of(feature_map, query, scale, fused=fused)
    token_mask = None if mask is None else mask[:, None, :, None]
    offset = state_offset(feature_map, key, mask, scale)

    def fold(key: Tensor, value: Tensor, mask: Tensor | None, position: Tensor) -> State:
        return kernel.fold(_upcast(key), _upcast(value), mask, position)

    def read(query: Tensor, position: Tensor) -> Tensor:
        return kernel.read_alone(_upcast(query), state, position).to(query.dtype)

    chunk = kernel.chunk(query)
    call = _caller(query, kernel)
    positions = _split(positions_of(query, token_mask), chunk)
    masks = [None] * len(positions) if token_mask is None else _split(token_mask, chunk)
    parts = zip(_split(key, chunk), _split(value, chunk), masks, positions)
    state = with_offset(reduce(kernel.merge, (call(fold, *part) for part in parts)), offset)
    return _joined((call(read, *part) for part in zip(_split(query, chunk), positions)), query)


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
    kernel = kernel_of(feature_map, query, scale, fused=fused_softmax_pays(query, window))
    text = _Blocks(query, key, value, mask, window)
    offset = state_offset(feature_map, key, mask, scale)
    log_factor: Tensor | float = math.log(feature_map.weight)
    if gain is not None:
        log_factor = log_factor + _upcast(gain)[:, None, None]
    nothing = kernel.empty(_upcast(value[:, :, :1]))
    near_of: Callable[[int], tuple[Tensor, Tensor]] = partial(text.near, scale=scale)
    if kernels.take(query):
        whole = attend_near_on_gpu(query, key, value, mask, window, scale)
        slots = (text.segments[0][1] - text.segments[0][0]) * window
        near_of = list(zip(*(x.split(slots, dim=2) for x in whole))).__getitem__

    def fold(start: int, stop: int) -> State:
        """States of those blocks that there are."""
        return _fold_blocks(kernel, *text.keys(start, stop), window)

    # No more numbers than there are in the values: cheaper to keep than to make again.
    keep = feature_map.num_features <= window
    call = _caller(query, kernel)
    kept = [call(fold, *segment) for segment in text.segments] if keep else []

    def states_of(segment: int, reach: int) -> list[State]:
        """States of a segment's blocks, and of ``reach`` (0 or 1) neighbouring blocks on either side."""
        start, stop = text.segments[segment]
        if not keep:
            return [fold(start - reach, stop + reach)]
        left = [_part(kept[segment - 1], -1, None)] if reach and segment > 0 else []
        return [*left, kept[segment], *(_part(state, 0, 1) for state in kept[segment + 1 : segment + 1 + reach])]

    def behind(segment: int, first: State, after: State) -> tuple[State, State]:
        """The state of a segment's first block, and of all blocks behind that one.

        ``first`` is that of the next segment's first block, and ``after`` that of all blocks behind it.
        """
        (states,) = states_of(segment, 0)
        others = kernel.merge(kernel.merge_others(states), first)
        # A copy: a view would keep the states of all blocks.
        return State(*(x[:, :, 0].clone() for x in states)), kernel.merge(others, after)

    def attend(segment: int, before: State, after: State) -> tuple[Tensor, State]:
        """A segment's output, and the state of all blocks before its last one."""
        start, stop = text.segments[segment]
        queries, position = text.queries(start, stop)
        near, near_log_weight = near_of(segment)
        # One row for each block: the blocks before and within the segment that are far from it. One more: those before
        # the segment's last.
        block = torch.arange(max(start - 1, 0), min(stop + 1, text.num_blocks), device=query.device)
        row = torch.arange(start, stop, device=query.device)[:, None]
        chosen = torch.cat([(block - row).abs() > 1, (block < stop - 1)[None]])
        far_states, before_last = kernel.merge_far(before, states_of(segment, 1), after, chosen)
        far_states = with_offset(far_states, offset)
        output = _read_blocks_onto(kernel, (near, near_log_weight - log_factor), queries, far_states, position, window)
        return output.to(query.dtype), before_last

    # What lies behind each segment and the block that follows it, from the last segment backwards.
    segments = range(len(text.segments))
    afters, first = [nothing], nothing
    for segment in reversed(segments[1:]):
        first, after = _recomputed(behind, segment, first, afters[-1])
        afters.append(after)

    def outputs() -> Iterator[Tensor]:
        before = nothing
        for segment, after in zip(segments, reversed(afters)):
            output, before = _recomputed(attend, segment, before, after)
            yield output

    return _joined(outputs(), query)


@torch.compiler.disable
def stream_local(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, radius: int, scale: float
) -> Tensor:
    """Attention to the slots at most ``radius`` away; arguments and result as in :func:`stream_near_far`."""
    text = _Blocks(query, key, value, mask, radius)

    def attend(segment: int) -> Tensor:
        output, _ = text.near(segment, scale, radius)
        return output.to(query.dtype)

    call = _caller(query)
    return _joined((call(attend, segment) for segment in range(len(text.segments))), query)


class _Blocks:
    """Texts side by side, cut into blocks of ``window`` slots, the last of which may be shorter.

    What is handed out is in float32 at least.

    Attributes:
        num_blocks: How many there are.
        segments: First block, and block after the last, of each segment.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int) -> None:
        self.window = window
        self.num_blocks, step = math.ceil(query.shape[2] / window), max(1, _SEGMENT_TOKENS // window)
        self.segments = [(start, min(start + step, self.num_blocks)) for start in range(0, self.num_blocks, step)]
        self.mask = None if mask is None else mask[:, None, :, None]
        self.whole = (query, key, value, positions_of(query, self.mask))
        if torch.is_grad_enabled():
            # The gradient of a slice is as large as the whole; that of all pieces of one split is made once.
            self.pieces = [x.split(window, dim=2) for x in self.whole]
            self.of_segments = [dict(zip(self.segments, _split(x, step * window))) for x in self.whole]
        self.near_parts: dict[int, tuple[Tensor, Tensor]] = {}

    def queries(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Queries (B, H, t, D) of some blocks, and their positions."""
        return _upcast(self._take(0, start, stop)), self._take(3, start, stop)

    def keys(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Keys and values (B, H, t, D) of those blocks that there are, their mask or None, and their positions."""
        key, value, position = (self._take(index, start, stop) for index in (1, 2, 3))
        slots = slice(max(start, 0) * self.window, stop * self.window)
        mask = None if self.mask is None else self.mask[:, :, slots]
        return _upcast(key), _upcast(value), mask, position

    def near(self, segment: int, scale: float, radius: int | None = None) -> tuple[Tensor, Tensor]:
        """:func:`attend_near` for a segment; what it gives is kept for when the backward pass asks again."""
        start, stop = self.segments[segment]
        queries, _ = self.queries(start, stop)
        keys, values, mask, _ = self.keys(start - 1, stop + 1)
        before, known = self.window if start else 0, self.near_parts.get(segment)
        near = attend_near(queries, keys, values, mask, self.window, before, scale, radius, known)
        if torch.is_grad_enabled() and known is None:
            self.near_parts[segment] = near[0].detach(), near[1].detach()
        return near

    def _take(self, index: int, start: int, stop: int) -> Tensor:
        start, stop = max(start, 0), min(stop, self.num_blocks)
        if not torch.is_grad_enabled():
            return self.whole[index][:, :, start * self.window : stop * self.window]
        if (start, stop) in self.of_segments[index]:
            return self.of_segments[index][start, stop]
        pieces = self.pieces[index][start:stop]
        return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]


def _in_chunks(kernel: _Folding, x: Tensor, window: int) -> Iterator[tuple[slice, int]]:
    """Slots and number of some blocks of x (B, H, t, D) at a time; the last block may be shorter."""
    whole = x.shape[2] // window
    some = max(1, kernel.chunk(x) // window)
    for start in range(0, whole, some):
        stop = min(start + some, whole)
        yield slice(start * window, stop * window), stop - start
    if x.shape[2] % window:
        yield slice(whole * window, None), 1


def _fold_blocks(
    kernel: _Folding, key: Tensor, value: Tensor, mask: Tensor | None, position: Tensor, window: int
) -> State:
    """The state of each block, along dim 2."""
    states = []
    for part, blocks in _in_chunks(kernel, key, window):
        token_mask = None if mask is None else mask[:, :, part]
        states.append(kernel.fold(key[:, :, part], value[:, :, part], token_mask, position[:, :, part], blocks))
    return stacked(states)


def _read_blocks_onto(
    kernel: _Folding,
    near: tuple[Tensor, Tensor],
    query: Tensor,
    states: State,
    position: Tensor,
    window: int,
) -> Tensor:
    """Outputs (B, H, t, D) of blocks of queries, each of its own state, merged with those that ``near`` gave."""
    outputs, first = [], 0
    for part, blocks in _in_chunks(kernel, query, window):
        state = _part(states, first, first + blocks)
        mean, log_sum = (in_blocks(x[:, :, part], blocks) for x in near)
        output = kernel.read_onto((mean, log_sum), query[:, :, part], state, position[:, :, part], blocks)
        outputs.append(output.flatten(2, 3))
        first += blocks
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def stacked(states: Sequence[State]) -> State:
    """States, and such as hold several along dim 2, as one that holds all of them."""
    # In memory heads come behind features, as the products of merge_each read them.
    values, log_weights = zip(*map(_as_several, states))
    if len(states) == 1:
        return State(values[0], log_weights[0])
    value = torch.cat([x.permute(0, 2, 3, 1, 4) for x in values], dim=1)
    return State(value.permute(0, 3, 1, 2, 4), torch.cat(log_weights, dim=2))


def _as_several(state: State) -> State:
    """A state as one that holds several along dim 2, unless it is."""
    return state if state.value.ndim == 5 else State(*(x.unsqueeze(2) for x in state))


def _part(states: State, start: int, stop: int | None) -> State:
    return State(*(x[:, :, start:stop] for x in states))


def with_offset(state: State, offset: Tensor | None) -> State:
    """``state`` with ``offset`` (B, H, 1, R), if any, on its weights, which may be those of several blocks."""
    if offset is None:
        return state
    return State(state.value, state.log_weight + (offset.unsqueeze(2) if state.log_weight.ndim == 5 else offset))


def state_offset(feature_map: FeatureMap, key: Tensor, mask: Tensor | None, scale: float) -> Tensor | None:
    """What is added to the weights of a whole text's state, (B or 1, H, 1, R), or None."""
    if not isinstance(feature_map, ExponentialFeatureMap):
        return None
    bias = feature_map.feature_bias()
    if not _has(feature_map, "feature_offset"):
        return None if bias is None else _upcast(bias)[None]
    offset = feature_map.feature_offset(_upcast(key) * scale**0.5, mask)
    return offset if bias is None or offset is None else offset + bias


def _has(feature_map: ExponentialFeatureMap, offset: str) -> bool:
    """Whether a map defines an offset that depends on tokens: what it is computed from costs a pass over the text."""
    return getattr(type(feature_map), offset) is not getattr(ExponentialFeatureMap, offset)


def positions_of(query: Tensor, token_mask: Tensor | None) -> Tensor:
    """Share of its text's tokens before each slot, (B or 1, 1, T, 1)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    if token_mask is None:
        length = query.shape[2]
        return torch.arange(length, device=query.device, dtype=dtype)[None, None, :, None] / length
    count = token_mask.sum(dim=2, keepdim=True).clamp(min=1)
    return (token_mask.cumsum(dim=2) - 1).clamp(min=0).to(dtype) / count


def _caller(query: Tensor, kernel: _Folding | None = None) -> Callable[..., Any]:
    """What calls the parts of texts (B, H, T, D), to make them anew in the backward pass where that saves memory.

    A text of at most D tokens has fewer logits than its state or its keys have numbers, which are kept in any case.
    The fused kernel keeps no logits, but half precision would be kept upcast.
    """
    keeps_little = query.shape[2] <= query.shape[3] or (isinstance(kernel, _Fused) and not _is_half(query))
    return _called if keeps_little else _recomputed


def _called(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _upcast(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _is_half(x: Tensor) -> bool:
    """Whether :func:`_upcast` makes a copy."""
    return x.dtype in (torch.float16, torch.bfloat16)


def _recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function``; what it stores for the backward pass is made anew there, rather than kept until then."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _split(x: Tensor, chunk: int) -> Sequence[Tensor]:
    """Chunks of x along dim 2: x itself where one holds it all, as a split's gradient is a copy."""
    return (x,) if chunk >= x.shape[2] else x.split(chunk, dim=2)


def _joined(chunks: Iterable[Tensor], like: Tensor) -> Tensor:
    """Chunks (B, H, …, D) one behind the other, (B, H, T, D), tokens before heads in memory."""
    if torch.is_grad_enabled():
        parts = [chunk.transpose(1, 2) for chunk in chunks]
        return (torch.cat(parts, dim=1) if len(parts) > 1 else parts[0].contiguous()).transpose(1, 2)
    texts, heads, length, head_dim = like.shape
    output, start = like, 0  # which has no token if there is no chunk
    for chunk in chunks:
        if chunk.shape[2] == length and chunk.transpose(1, 2).is_contiguous():
            return chunk
        if start == 0:
            output = like.new_empty(texts, length, heads, head_dim).transpose(1, 2)
        output[:, :, start : start + chunk.shape[2]] = chunk
        start += chunk.shape[2]
    return output
