"""Attention in linear time: softmax, linear, near/far and local attention, each with its O(T²) reference.

Shapes, here and in every module: B batch, H heads, T tokens, D head size, R features, N = ΣT packed tokens.
Two forms, everywhere:

- padded: query, key, value (B, H, T, D) and ``attention_mask`` (B, T), 1 = token, 0 = padding;
- packed: query, key, value (N, H, D) and ``cu_seqlens`` (B + 1,), the texts one behind the other.

With ``s_ij = scale · q_i·k_j``, the output is ``o_i = Σ_j w_ij v_j / Σ_j w_ij`` over the tokens j of i's text:

- softmax: ``w_ij = exp(s_ij)``
- linear: ``w_ij = φ_q(q_i)·φ_k(k_j)``
- near/far: ``exp(s_ij)`` where j's block of ``window`` tokens is i's own or a neighbour of it, and
  ``exp(γ_h) φ_q(q_i)·φ_k(k_j)`` elsewhere; ``exp(s_ij)`` throughout in texts of at most ``exact_up_to`` tokens
- local: ``exp(s_ij)`` where j is at most ``radius`` tokens away from i, else 0

Slots outside a text hold anything, NaN included, and change nothing; their outputs are zeros, as are those of a text
without a token. The linear parts of float16 and bfloat16 inputs are computed in float32, also under autocast; softmax
attention leaves precision to PyTorch's fused kernels, which accumulate in float32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from st_linear import kernels
from st_linear.feature_maps import ExponentialFeatureMap, FeatureMap
from st_linear.streaming import stream_linear, stream_local, stream_near_far

Attention = Callable[..., Tensor]
Packed = Callable[..., Tensor]

# Texts of more tokens than this are worth a call each.
_SHORT = 512


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
    attend = partial(_softmax, scale=scale, dropout_p=dropout_p)
    return _run(attend, query, key, value, attention_mask, cu_seqlens, takes_padding=True)


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
    attend = partial(_streamed, stream=partial(stream_linear, feature_map=feature_map), scale=scale)
    packed = _fused_linear(query, feature_map, scale)
    return _run(attend, query, key, value, attention_mask, cu_seqlens, packed=packed)


def near_far_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    feature_map: FeatureMap,
    window: int,
    exact_up_to: int | None = None,
    gain: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Exact attention to near blocks and linear attention beyond, under one normaliser. Time O(T·(3·window + R)·D).

    A text of at most ``exact_up_to`` tokens gets softmax attention, in time O(T²·D).

    Args:
        query: (B, H, T, D), or (N, H, D) when packed.
        key: As query.
        value: As query.
        attention_mask: (B, T), 1 = token; None where every slot is one. Blocks count tokens, not slots.
        feature_map: φ of the far part.
        window: Block length in tokens, at least 1.
        exact_up_to: Texts of at most so many tokens have no far part. ``2 · window`` by default, and at least, as they
            have no far token.
        gain: (H,), γ: the logarithm of a factor on far weights. Zeros by default.
        scale: Factor of the logits, ``D**-0.5`` by default.
        dropout_p: Probability of dropping a weight; only in texts of at most ``exact_up_to`` tokens, as no weights
            exist in the far part.
        cu_seqlens: (B + 1,) offsets of the texts; makes the inputs packed.

    Returns:
        The shape and dtype of ``query``.

    Raises:
        ValueError: If shapes do not fit, ``window`` < 1, ``exact_up_to`` < ``2 · window``, or the map is ``softmax``.
    """
    _refuse_exact(feature_map, "near_far_attention")
    if window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}; linear_attention has no window")
    limit = exact_limit(window, exact_up_to)
    if gain is not None and gain.shape != (feature_map.num_heads,):
        raise ValueError(f"gain must be (H,) = {(feature_map.num_heads,)}, got {tuple(gain.shape)}")
    stream = partial(stream_near_far, feature_map=feature_map, window=window, gain=gain)
    exact = partial(_softmax, scale=scale, dropout_p=dropout_p)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if query.shape[2] <= limit:
            return exact(query, key, value, mask)
        return _streamed(query, key, value, mask, stream=stream, scale=scale)

    # Padding counts as length only where what it costs is little: a batch of texts within two windows.
    takes_padding = query.ndim == 4 and query.shape[2] <= 2 * window
    return _run(attend, query, key, value, attention_mask, cu_seqlens, takes_padding=takes_padding, exact=limit)


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
    attend = partial(_streamed, stream=partial(stream_local, radius=radius), scale=scale)
    return _run(attend, query, key, value, attention_mask, cu_seqlens)


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
    exact_up_to: int | None = None,
    gain: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """:func:`near_far_attention` by its definition, padded form: O(T²) memory."""
    query, key, value, mask = _prepare(query, key, value, attention_mask, scale)
    far = _far_weights(query, key, mask, feature_map)
    if gain is not None:
        far = far * gain.to(query.dtype).exp()[:, None, None]
    block = _token_indices(query, mask) // window
    near = (block[:, None, :, None] - block[:, None, None, :]).abs() <= 1
    count = torch.tensor([query.shape[2]], device=query.device) if mask is None else mask.sum(dim=-1)
    near = near | (count <= exact_limit(window, exact_up_to))[:, None, None, None]
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
    index = _token_indices(query, mask)
    near = (index[:, None, :, None] - index[:, None, None, :]).abs() <= radius
    return _weighted_mean(torch.exp(query @ key.transpose(-1, -2)) * near, value, mask)


def exact_limit(window: int, exact_up_to: int | None) -> int:
    """Tokens of the longest texts without a far part.

    Raises:
        ValueError: If ``exact_up_to`` is less than two windows, or there is no window.
    """
    if exact_up_to is None or exact_up_to == 2 * window:
        return 2 * window
    if not window:
        raise ValueError(f"exact_up_to={exact_up_to} asks for a window: window=0 is linear at every length")
    if exact_up_to < 2 * window:
        raise ValueError(f"exact_up_to must be at least two windows, {2 * window} tokens, got {exact_up_to}")
    return exact_up_to


def _token_indices(query: Tensor, mask: Tensor | None) -> Tensor:
    """How many tokens of its text stand before each, (B or 1, T)."""
    if mask is None:
        return torch.arange(query.shape[-2], device=query.device)[None]
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def _far_weights(query: Tensor, key: Tensor, mask: Tensor | None, feature_map: FeatureMap) -> Tensor:
    count = query.shape[2] if mask is None else mask.sum(dim=-1)[:, None].clamp(min=1)
    position = (_token_indices(query, mask).to(query.dtype) / count)[:, None, :, None]
    if not isinstance(feature_map, ExponentialFeatureMap):
        phi_q, phi_k = feature_map.query_features(query, position), feature_map.key_features(key, position)
        return feature_map.weight * phi_q @ phi_k.transpose(-1, -2)
    query_logits, key_logits = feature_map.query_logits(query), feature_map.key_logits(key)
    if (offset := feature_map.query_offset(query)) is not None:
        query_logits = query_logits + offset
    for offset in (feature_map.key_offset(key), feature_map.feature_bias(), feature_map.feature_offset(key, mask)):
        if offset is not None:
            key_logits = key_logits + offset.to(key.dtype)
    # What is taken out before the exponentials is put back after them: a factor may underflow, their product may not.
    if mask is not None:
        key_logits = key_logits.masked_fill(~mask[:, None, :, None], -math.inf)
    largest_q = query_logits.detach().amax(dim=-1, keepdim=True)
    largest_k = key_logits.detach().amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(key.dtype).min)
    weights = (query_logits - largest_q).exp() @ (key_logits - largest_k).exp().transpose(-1, -2)
    return feature_map.weight * weights * (largest_q + largest_k).exp()


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
    *,
    takes_padding: bool = False,
    exact: int = 0,
    packed: Packed | None = None,
) -> Tensor:
    """Check shapes and hand the texts to ``attend``, (B, H, T, D) with a bool mask (B, T) or None.

    Padding is left out, so that all masks mean slots on the right, unless ``attend`` takes it as it is. Texts of at
    most ``exact`` tokens are handed over apart from longer ones. ``packed``, if any, is for texts one behind the
    other, (N, H, D) with their lengths, and stands in for ``attend`` altogether.
    """
    ndim = 4 if cu_seqlens is None else 3
    if query.ndim != ndim or not query.shape == key.shape == value.shape:
        form = "(B, H, T, D)" if cu_seqlens is None else "packed (N, H, D)"
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"query, key and value must all be {form}, got {shapes}")
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("packed inputs (cu_seqlens) hold no padding: attention_mask must be None")
        offsets = cu_seqlens.tolist()
        if cu_seqlens.ndim != 1 or offsets[:1] + offsets[-1:] != [0, query.shape[0]] or offsets != sorted(offsets):
            raise ValueError(f"cu_seqlens must rise from 0 to N = {query.shape[0]}, got {offsets}")
    elif attention_mask is not None and attention_mask.shape != (query.shape[0], query.shape[2]):
        expected = (query.shape[0], query.shape[2])
        raise ValueError(f"attention_mask must be (B, T) = {expected}, got {tuple(attention_mask.shape)}")
    if 0 in query.shape:
        return query.clone()
    pack = packed or partial(_packed, attend, exact)
    with torch.autocast(query.device.type, enabled=False):
        if cu_seqlens is not None:
            return pack(query, key, value, cu_seqlens.diff().tolist())
        texts, _, length, _ = query.shape
        if attention_mask is None:
            if packed is None:
                return attend(query, key, value, None)
            tokens = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
            return packed(*tokens, [length] * texts).unflatten(0, (texts, length)).transpose(1, 2)
        mask = attention_mask.bool()
        if takes_padding:
            return attend(query, key, value, mask)
        tokens = [x.transpose(1, 2)[mask] for x in (query, key, value)]
        output = query.new_zeros(query.transpose(1, 2).shape)
        output[mask] = pack(*tokens, mask.sum(dim=-1).tolist())
        return output.transpose(1, 2)


def _fused_linear(query: Tensor, feature_map: FeatureMap, scale: float | None) -> Packed | None:
    """Linear attention through the fused kernels, where they are to be had for such inputs and such a map."""
    if not kernels.take(query):
        return None
    from st_linear.kernels.linear import fused_linear_attention, fused_maps

    maps = fused_maps(feature_map)
    if maps is None:
        return None

    def attend(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        length = torch.tensor(lengths, dtype=torch.int32, device=query.device)
        starts = (length.cumsum(0) - length).int()
        return fused_linear_attention(
            query, key, value, starts, length, max_length=max(lengths), query_map=maps[0], key_map=maps[1], scale=scale
        )

    return attend


def _packed(attend: Attention, exact: int, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """``attend`` to texts one behind the other, (N, H, D).

    Long texts are taken one by one, as they lie. Runs of short ones are put side by side with others of like length
    (within a power of two, so padding stays below half): a loop over them would cost more than that. None of at most
    ``exact`` tokens stands beside a longer one.
    """
    runs: list[list[int]] = []
    for length in lengths:
        if length > _SHORT or not runs or runs[-1][0] > _SHORT:
            runs.append([length])
        else:
            runs[-1].append(length)
    outputs = []
    sizes = [sum(run) for run in runs]
    for run, q, k, v in zip(runs, *(x.split(sizes) for x in (query, key, value))):
        if len(run) == 1 and run[0]:
            outputs.append(attend(*(x.transpose(0, 1)[None] for x in (q, k, v)), None)[0].transpose(0, 1))
        else:
            outputs.append(_side_by_side(attend, exact, q, k, v, run))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _side_by_side(
    attend: Attention, exact: int, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]
) -> Tensor:
    length = torch.tensor(lengths, device=query.device)
    start = length.cumsum(0) - length
    groups: dict[tuple[int, bool], list[int]] = {}
    for text, n in enumerate(lengths):
        if n:
            groups.setdefault(((n - 1).bit_length(), n <= exact), []).append(text)
    outputs, slots = [], []
    for texts in groups.values():
        step = torch.arange(max(lengths[text] for text in texts), device=query.device)
        mask = step < length[texts][:, None]
        # Slots past a text's end repeat its last token: what is masked must be finite, and its own.
        slot = start[texts][:, None] + step.minimum(length[texts][:, None] - 1)
        whole = all(lengths[text] == len(step) for text in texts)
        padded = (x[slot].transpose(1, 2) for x in (query, key, value))
        output = attend(*padded, None if whole else mask).transpose(1, 2)
        outputs.append(output.flatten(0, 1) if whole else output[mask])
        slots.append(slot.flatten() if whole else slot[mask])
    if not outputs:
        return query.clone()
    return torch.cat(outputs)[torch.cat(slots).argsort()]


def _streamed(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, stream: Attention, scale: float | None
) -> Tensor:
    """``stream`` for as many texts at once as are about as much work as one long text."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    texts = max(1, 2 * _SHORT // query.shape[2])
    if len(query) <= texts:  # the gradients of parts are copied to make that of the whole
        return stream(query, key, value, mask, scale=scale)
    masks = itertools.repeat(None) if mask is None else mask.split(texts)
    outputs = [stream(*part, scale=scale) for part in zip(*(x.split(texts) for x in (query, key, value)), masks)]
    return torch.cat(outputs)


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
    mask: Tensor | None,
    *,
    scale: float | None,
    dropout_p: float = 0.0,
) -> Tensor:
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, scale=scale)
    hidden = ~mask[:, None, :, None]
    query, key, value = (x.masked_fill(hidden, 0) for x in (query, key, value))
    # A text without a token attends to its zero values: a row of SDPA's mask must not be empty.
    key_mask = (mask | ~mask.any(dim=-1, keepdim=True))[:, None, None, :]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask, dropout_p=dropout_p, scale=scale)
    return output.masked_fill(hidden, 0)
