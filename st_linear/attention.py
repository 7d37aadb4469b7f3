"""Attention in linear time: softmax, linear, near/far and local attention, each with its O(T²) reference.

Shapes, here and in every module: B batch, H heads, T tokens, D head size, R features, N = ΣT packed tokens.
Two forms, everywhere:

- padded: query, key, value (B, H, T, D) and ``attention_mask`` (B, T), 1 = token, 0 = padding;
- packed: query, key, value (N, H, D) and ``cu_seqlens`` (B + 1,), the texts one behind the other.

With ``s_ij = scale · q_i·k_j``, the output is ``o_i = Σ_j w_ij v_j / Σ_j w_ij`` over the tokens j of i's text:

- softmax: ``w_ij = exp(s_ij)``
- linear: ``w_ij = φ_q(q_i)·φ_k(k_j)``
- near/far: ``exp(s_ij)`` where j's block of ``window`` tokens is i's own or a neighbour of it, and
  ``exp(γ_h) φ_q(q_i)·φ_k(k_j)`` elsewhere
- local: ``exp(s_ij)`` where ``|i - j| <= radius``, else 0

Slots outside a text hold anything, NaN included, and change nothing; their outputs are zeros, as are those of a text
without a token. The linear parts of float16 and bfloat16 inputs are computed in float32, also under autocast; softmax
attention leaves precision to PyTorch's fused kernels, which accumulate in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from st_linear.feature_maps import FeatureMap

Attention = Callable[..., Tensor]


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Exact attention through PyTorch's fused kernels. Time O(T²·D), memory O(T·D).

    Args:
        query: (B, H, T, D), or (N, H, D) when packed.
        key: As query.
        value: As query.
        attention_mask: (B, T), 1 = token; None where every slot is one.
        scale: Factor of the logits, ``D**-0.5`` by default.
        dropout_p: Probability of dropping a weight.
        cu_seqlens: (B + 1,) offsets of the texts; makes the inputs packed.

    Returns:
        The shape and dtype of ``query``.

    Raises:
        ValueError: If shapes do not fit.
    """
    return _run(partial(_softmax, scale=scale, dropout_p=dropout_p), query, key, value, attention_mask, cu_seqlens)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    feature_map: FeatureMap,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Linear attention: keys and values are folded into one (R, D) state per text and head. Time O(T·R·D).

    Args:
        query: (B, H, T, D), or (N, H, D) when packed.
        key: As query.
        value: As query.
        attention_mask: (B, T), 1 = token; None where every slot is one.
        feature_map: φ, from :func:`~st_linear.feature_maps.make_feature_map`.
        scale: Factor of the logits, ``D**-0.5`` by default; its root goes into q and into k before φ.
        cu_seqlens: (B + 1,) offsets of the texts; makes the inputs packed.

    Returns:
        The shape and dtype of ``query``.

    Raises:
        ValueError: If shapes do not fit, or the map is ``softmax``.

    References:
        - Transformers are RNNs: https://arxiv.org/abs/2006.16236

    Example:
        >>> import torch
        >>> from st_linear import linear_attention, make_feature_map
        >>> q = k = v = torch.randn(2, 12, 100, 32)
        >>> linear_attention(q, k, v, feature_map=make_feature_map("elu", 12, 32)).shape
        torch.Size([2, 12, 100, 32])
    """
    _refuse_exact(feature_map, "linear_attention")
    return _run(partial(_linear, feature_map=feature_map, scale=scale), query, key, value, attention_mask, cu_seqlens)


def near_far_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    feature_map: FeatureMap,
    window: int,
    gain: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Exact attention to near blocks and linear attention beyond, under one normaliser. Time O(T·(3·window + R)·D).

    A text of at most ``2 · window`` tokens has no far token: it gets softmax attention, to rounding.

    Args:
        query: (B, H, T, D), or (N, H, D) when packed.
        key: As query.
        value: As query.
        attention_mask: (B, T), 1 = token; None where every slot is one. Blocks count tokens, not slots.
        feature_map: φ of the far part.
        window: Block length in tokens, at least 1.
        gain: (H,), γ: the logarithm of a factor on far weights. Zeros by default.
        scale: Factor of the logits, ``D**-0.5`` by default.
        dropout_p: Probability of dropping a weight; only where T <= 2 · window, as no weights exist in the far part.
        cu_seqlens: (B + 1,) offsets of the texts; makes the inputs packed.

    Returns:
        The shape and dtype of ``query``.

    Raises:
        ValueError: If shapes do not fit, ``window`` < 1, or the map is ``softmax``.
    """
    _refuse_exact(feature_map, "near_far_attention")
    if window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}; linear_attention has no window")
    if gain is not None and gain.shape != (feature_map.num_heads,):
        raise ValueError(f"gain must be (H,) = {(feature_map.num_heads,)}, got {tuple(gain.shape)}")
    attend = partial(_near_far, feature_map=feature_map, window=window, gain=gain, scale=scale, dropout_p=dropout_p)
    return _run(attend, query, key, value, attention_mask, cu_seqlens)


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    radius: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Exact attention to the tokens at most ``radius`` away (ModernBERT's sliding layers). Time O(T·radius·D).

    Args and Returns as in :func:`near_far_attention`.

    Raises:
        ValueError: If shapes do not fit or ``radius`` < 1.
    """
    if radius < 1:
        raise ValueError(f"radius must be at least 1 token, got {radius}")
    return _run(partial(_local, radius=radius, scale=scale), query, key, value, attention_mask, cu_seqlens)


def softmax_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """:func:`softmax_attention` by its definition, padded form: O(T²) memory."""
    query, key, value, mask = _prepare(query, key, value, attention_mask, scale)
    return _weighted_mean(torch.exp(query @ key.transpose(-1, -2)), value, mask)


def linear_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    feature_map: FeatureMap,
    scale: float | None = None,
) -> Tensor:
    """:func:`linear_attention` by its definition, padded form: O(T²) memory."""
    query, key, value, mask = _prepare(query, key, value, attention_mask, scale)
    return _weighted_mean(_far_weights(query, key, mask, feature_map), value, mask)


def near_far_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    feature_map: FeatureMap,
    window: int,
    gain: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """:func:`near_far_attention` by its definition, padded form: O(T²) memory."""
    query, key, value, mask = _prepare(query, key, value, attention_mask, scale)
    far = _far_weights(query, key, mask, feature_map)
    if gain is not None:
        far = far * gain.to(query.dtype).exp()[:, None, None]
    position = torch.arange(query.shape[-2], device=query.device)[None] if mask is None else mask.cumsum(dim=-1) - 1
    block = position // window
    near = (block[:, None, :, None] - block[:, None, None, :]).abs() <= 1
    return _weighted_mean(torch.where(near, torch.exp(query @ key.transpose(-1, -2)), far), value, mask)


def local_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    radius: int,
    scale: float | None = None,
) -> Tensor:
    """:func:`local_attention` by its definition, padded form: O(T²) memory."""
    query, key, value, mask = _prepare(query, key, value, attention_mask, scale)
    position = torch.arange(query.shape[-2], device=query.device)
    near = (position[:, None] - position[None]).abs() <= radius
    return _weighted_mean(torch.exp(query @ key.transpose(-1, -2)) * near, value, mask)


def _far_weights(query: Tensor, key: Tensor, mask: Tensor | None, feature_map: FeatureMap) -> Tensor:
    token_mask = None if mask is None else mask[:, None, :, None]
    phi_q, phi_k = feature_map.query(query, token_mask), feature_map.key(key, token_mask)
    weights = phi_q.features @ phi_k.features.transpose(-1, -2)
    return weights * (phi_q.log_scale + phi_k.log_scale).exp()


def _weighted_mean(weights: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        weights = weights * mask[:, None, None, :]
    return _normalise(weights @ value, weights.sum(dim=-1, keepdim=True), mask)


def _refuse_exact(feature_map: FeatureMap, function: str) -> None:
    if feature_map.exact:
        raise ValueError(f"{function} takes no feature map {feature_map.name!r}: call softmax_attention instead")


def _run(
    attend: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Check shapes and bring packed inputs to the padded form that ``attend`` takes."""
    ndim = 4 if cu_seqlens is None else 3
    if query.ndim != ndim or not query.shape == key.shape == value.shape:
        form = "(B, H, T, D)" if cu_seqlens is None else "packed (N, H, D)"
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"query, key and value must all be {form}, got {shapes}")
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("packed inputs (cu_seqlens) hold no padding: attention_mask must be None")
        return _run_packed(attend, query, key, value, cu_seqlens)
    if attention_mask is not None and attention_mask.shape != (query.shape[0], query.shape[2]):
        expected = (query.shape[0], query.shape[2])
        raise ValueError(f"attention_mask must be (B, T) = {expected}, got {tuple(attention_mask.shape)}")
    if 0 in query.shape:
        return query.clone()
    with torch.autocast(query.device.type, enabled=False):
        return attend(query, key, value, attention_mask)


def _run_packed(attend: Attention, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Texts of like length (within a power of two) are attended to together, so padding stays below half."""
    offsets = cu_seqlens.tolist()
    if cu_seqlens.ndim != 1 or offsets[:1] + offsets[-1:] != [0, query.shape[0]] or offsets != sorted(offsets):
        raise ValueError(f"cu_seqlens must rise from 0 to N = {query.shape[0]}, got {offsets}")
    groups: dict[int, list[int]] = {}
    for text, length in enumerate(cu_seqlens.diff().tolist()):
        if length:
            groups.setdefault((length - 1).bit_length(), []).append(text)
    outputs, slots = [], []
    for texts in groups.values():
        start, stop = (torch.tensor([offsets[i + end] for i in texts], device=query.device) for end in (0, 1))
        slot = start[:, None] + torch.arange(int((stop - start).max()), device=query.device)
        mask = slot < stop[:, None]
        slot = slot.clamp(max=query.shape[0] - 1)
        padded = [x[slot].transpose(1, 2) for x in (query, key, value)]
        with torch.autocast(query.device.type, enabled=False):
            output = attend(*padded, None if mask.all() else mask)
        outputs.append(output.transpose(1, 2)[mask])
        slots.append(slot[mask])
    if not outputs:
        return query.clone()
    return torch.cat(outputs)[torch.cat(slots).argsort()]


def _prepare(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Float32 at least, the scale's root in q and in k, zeros in padded slots, a bool mask (B, T)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    root = (query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    query, key, value = query.to(dtype) * root, key.to(dtype) * root, value.to(dtype)
    if attention_mask is None:
        return query, key, value, None
    mask = attention_mask.bool()
    hidden = ~mask[:, None, :, None]
    return query.masked_fill(hidden, 0), key.masked_fill(hidden, 0), value.masked_fill(hidden, 0), mask


def _normalise(numerator: Tensor, denominator: Tensor, mask: Tensor | None) -> Tensor:
    """Quotient of the two sums; zeros where no weight is positive, and in padded slots."""
    # Sums this small have lost terms to underflow, and the quotient's gradients would overflow.
    info = torch.finfo(torch.promote_types(denominator.dtype, torch.float32))
    positive = denominator > info.tiny / info.eps
    if mask is not None:
        positive = positive & mask[:, None, :, None]
    return torch.where(positive, numerator, 0) / torch.where(positive, denominator, 1)


def _softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scale: float | None,
    dropout_p: float = 0.0,
) -> Tensor:
    if attention_mask is None:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, scale=scale)
    mask = attention_mask.bool()
    hidden = ~mask[:, None, :, None]
    query, key, value = (x.masked_fill(hidden, 0) for x in (query, key, value))
    # A text without a token attends to its zero values: a row of SDPA's mask must not be empty.
    key_mask = (mask | ~mask.any(dim=-1, keepdim=True))[:, None, None, :]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask, dropout_p=dropout_p, scale=scale)
    return output.masked_fill(hidden, 0)


def _linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    feature_map: FeatureMap,
    scale: float | None,
) -> Tensor:
    dtype = query.dtype
    query, key, value, mask = _prepare(query, key, value, attention_mask, scale)
    token_mask = None if mask is None else mask[:, None, :, None]
    phi_q = feature_map.query(query, token_mask).features
    phi_k = feature_map.key(key, token_mask).features
    if token_mask is not None:
        phi_k = phi_k * token_mask
    # log_scale is constant over a row's keys: it cancels.
    state = phi_k.transpose(-1, -2) @ value
    normaliser = phi_k.sum(dim=-2).unsqueeze(-1)
    return _normalise(phi_q @ state, phi_q @ normaliser, mask).to(dtype)


def _near_far(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    feature_map: FeatureMap,
    window: int,
    gain: Tensor | None,
    scale: float | None,
    dropout_p: float = 0.0,
) -> Tensor:
    if query.shape[-2] <= 2 * window:
        return _softmax(query, key, value, attention_mask, scale=scale, dropout_p=dropout_p)
    if attention_mask is not None and not _is_right_padded(attention_mask):
        # Blocks count tokens: bring each text's tokens to the front, and the outputs back.
        order = attention_mask.bool().int().argsort(dim=-1, descending=True, stable=True)
        output = _near_far(
            _take_tokens(query, order),
            _take_tokens(key, order),
            _take_tokens(value, order),
            attention_mask.gather(-1, order),
            feature_map=feature_map,
            window=window,
            gain=gain,
            scale=scale,
        )
        return _take_tokens(output, order.argsort(dim=-1))

    dtype, length = query.dtype, query.shape[-2]
    query, key, value, mask = _prepare(query, key, value, attention_mask, scale)
    near = _NearBlocks(query, key, value, mask, window)
    token_mask = near.mask[:, None, :, None]
    phi_q = feature_map.query(near.query.flatten(2, 3), token_mask)
    phi_k = feature_map.key(near.key.flatten(2, 3), token_mask)

    # One state per block, then for each block the sum over all blocks before and after its near ones. Summing the far
    # blocks, rather than taking the near ones from the total, keeps every term positive: nothing cancels.
    keys = (phi_k.features * token_mask).unflatten(2, (-1, window))
    values = torch.cat([near.value, torch.ones_like(near.value[..., :1])], dim=-1)
    states = keys.transpose(-1, -2) @ values
    count = near.mask.unflatten(1, (-1, window)).sum(dim=-1)[:, None, :, None, None].to(states.dtype)
    far_state, far_count = _sum_of_far_blocks(states), _sum_of_far_blocks(count)
    far = phi_q.features.unflatten(2, (-1, window)) @ far_state

    far_log_scale = phi_q.log_scale + phi_k.log_scale
    if gain is not None:
        far_log_scale = far_log_scale + gain.to(query.dtype)[:, None, None]
    far_log_scale = far_log_scale.expand(*query.shape[:2], near.mask.shape[1], 1).unflatten(2, (-1, window))
    far_log_scale = far_log_scale.masked_fill(far_count == 0, -math.inf)

    largest = torch.maximum(near.largest, far_log_scale.detach())
    largest = largest.masked_fill(largest == -math.inf, 0)
    near_weights = near.weights(largest)
    far = far * (far_log_scale - largest).exp()
    numerator = near_weights @ near.neighbour_value + far[..., :-1]
    denominator = near_weights.sum(dim=-1, keepdim=True) + far[..., -1:]
    output = _normalise(numerator.flatten(2, 3)[:, :, :length], denominator.flatten(2, 3)[:, :, :length], mask)
    return output.to(dtype)


def _local(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, radius: int, scale: float | None
) -> Tensor:
    dtype, length = query.dtype, query.shape[-2]
    query, key, value, mask = _prepare(query, key, value, attention_mask, scale)
    near = _NearBlocks(query, key, value, mask, window=min(radius, length), radius=radius)
    weights = near.weights(near.largest.masked_fill(near.largest == -math.inf, 0))
    numerator = (weights @ near.neighbour_value).flatten(2, 3)[:, :, :length]
    denominator = weights.sum(dim=-1, keepdim=True).flatten(2, 3)[:, :, :length]
    return _normalise(numerator, denominator, mask).to(dtype)


class _NearBlocks:
    """Blocks of ``window`` tokens, and the logits of each with itself and its two neighbours.

    Attributes:
        query, key, value: (B, H, blocks, window, D), zero-padded to whole blocks.
        mask: (B, blocks · window), True = token.
        neighbour_value: (B, H, blocks, 3 · window, D).
        logits: (B, H, blocks, window, 3 · window), -inf where there is nothing to attend to.
        largest: (B, H, blocks, window, 1), the largest logit of each row, detached.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int, radius: int | None = None
    ) -> None:
        length = query.shape[-2]
        if mask is None:
            mask = torch.ones(query.shape[0], length, dtype=torch.bool, device=query.device)
        extra = -length % window
        self.mask = F.pad(mask, (0, extra))
        self.query, self.key, self.value = (
            F.pad(x, (0, 0, 0, extra)).unflatten(2, (-1, window)) for x in (query, key, value)
        )
        self.neighbour_value = _with_neighbours(self.value, dim=2)
        attendable = _with_neighbours(self.mask.unflatten(1, (-1, window)), dim=1)[:, None, :, None, :]
        if radius is not None:
            step = torch.arange(window, device=query.device)
            distance = torch.arange(-window, 2 * window, device=query.device)[None] - step[:, None]
            attendable = attendable & (distance.abs() <= radius)
        logits = self.query @ _with_neighbours(self.key, dim=2).transpose(-1, -2)
        self.logits = logits.masked_fill(~attendable, -math.inf)
        self.largest = self.logits.detach().amax(dim=-1, keepdim=True)

    def weights(self, log_scale: Tensor) -> Tensor:
        return (self.logits - log_scale).exp()


def _with_neighbours(blocks: Tensor, dim: int) -> Tensor:
    """Each block between its neighbours: (…, blocks, window, …) to (…, blocks, 3 · window, …); zeros past the ends."""
    size = blocks.shape[dim]
    edge = torch.zeros_like(blocks.narrow(dim, 0, 1))
    padded = torch.cat([edge, blocks, edge], dim=dim)
    return torch.cat([padded.narrow(dim, shift, size) for shift in range(3)], dim=dim + 1)


def _sum_of_far_blocks(states: Tensor) -> Tensor:
    """For each block along dim 2, the sum over the blocks that are neither it nor a neighbour."""
    size = states.shape[2]
    total = torch.zeros_like(states)
    if size > 2:
        before = states.narrow(2, 0, size - 2).cumsum(dim=2)
        after = states.narrow(2, 2, size - 2).flip(2).cumsum(dim=2).flip(2)
        total = F.pad(before, (0, 0, 0, 0, 2, 0)) + F.pad(after, (0, 0, 0, 0, 0, 2))
    return total


def _is_right_padded(attention_mask: Tensor) -> bool:
    mask = attention_mask.bool()
    return not bool((mask[:, 1:] & ~mask[:, :-1]).any())


def _take_tokens(x: Tensor, order: Tensor) -> Tensor:
    """x (B, H, T, D) with the tokens of each text in ``order`` (B, T)."""
    return x.gather(2, order[:, None, :, None].expand_as(x))
