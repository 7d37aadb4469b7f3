"""Positions beyond the trained ones: longer tables for absolute positions, rescaling for rotary ones."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PositionExtension = Literal["tile", "interpolate", "none"]


def check_position_extension(method: str) -> None:
    """Raise a ValueError unless ``method`` is a known way to extend positions."""
    choices = get_args(PositionExtension)
    if method not in choices:
        raise ValueError(f"unknown position_extension {method!r}; choose one of: {', '.join(choices)}")


def extend_table(weight: Tensor, length: int, method: PositionExtension, offset: int = 0) -> Tensor:
    """A position table with ``offset + length`` rows.

    ``tile``: rows stay bitwise as they are, and row N + i starts as a copy of row i, so texts within the old limit
    are unchanged. ``interpolate``: all positions are stretched linearly, which moves every text.

    Args:
        weight: (offset + N, hidden) the trained table.
        length: Wanted number of positions.
        method: ``"tile"`` or ``"interpolate"``.
        offset: Leading rows that stand for no position (RoBERTa's two); kept.

    Returns:
        (offset + length, hidden); ``weight`` itself where it is long enough.

    References:
        - LongEmbed: Extending Embedding Models for Long Context Retrieval: https://arxiv.org/abs/2404.12096
    """
    trained = weight.shape[0] - offset
    if length <= trained:
        return weight
    rows = weight[offset:]
    if method == "tile":
        rows = rows[torch.arange(length, device=weight.device) % trained]
    else:
        rows = F.interpolate(rows.float().T[None], size=length, mode="linear", align_corners=True)[0].T
    return torch.cat([weight[:offset], rows.to(weight.dtype)])


def extend_positions(model: nn.Module, length: int, method: PositionExtension) -> int:
    """Give ``model`` room for ``length`` tokens, in place, and write it into its config.

    Tables grow by :func:`extend_table`. Rotary models have none: ``interpolate`` rescales their frequencies for every
    text (``rope_type="linear"`` in the config); with ``tile`` :func:`rescaled_positions` squeezes those texts alone
    that are longer than the trained range.

    Args:
        model: A transformers encoder.
        length: Wanted number of tokens.
        method: ``"tile"``, ``"interpolate"``, or ``"none"`` to leave positions alone.

    Returns:
        The number of tokens that the model takes now; less than ``length`` where ``method`` is ``"none"``.
    """
    check_position_extension(method)
    config: Any = model.config
    table, offset = _position_table(model)
    limit = config.max_position_embeddings - offset
    if length <= limit or method == "none":
        return limit
    config.original_max_position_embeddings = trained_positions(model)
    config.max_position_embeddings = length + offset
    if table is None:
        if method == "interpolate":
            _rescale_rotary(model, length / limit)
        return length
    embedding = table.position_embeddings
    embedding.weight = nn.Parameter(
        extend_table(embedding.weight.data, length, method, offset), requires_grad=embedding.weight.requires_grad
    )
    embedding.num_embeddings = length + offset
    for name in ("position_ids", "token_type_ids"):
        buffer = getattr(table, name, None)
        if isinstance(buffer, Tensor):
            values = torch.arange(length + offset) if name == "position_ids" else torch.zeros(length + offset).long()
            setattr(table, name, values[None].to(buffer.device))
    return length


def trained_positions(model: nn.Module) -> int:
    """Entries of the position range that the base model was trained with, before any extension."""
    config: Any = model.config
    return getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings


def has_rotary_positions(model: nn.Module) -> bool:
    """Whether the model rotates queries and keys instead of adding rows of a table."""
    return _position_table(model)[0] is None


def rescaled_positions(attention_mask: Tensor, limit: int) -> Tensor | None:
    """Rotary positions that squeeze a text longer than ``limit`` into it; shorter texts keep theirs exactly.

    Each text is rescaled by its own length, so a text's vector does not depend on its neighbours in the batch.

    Args:
        attention_mask: (B, T), 1 = token.
        limit: Trained number of positions.

    Returns:
        (B, T) float positions, or None where no text is longer.

    References:
        - Extending Context Window via Positional Interpolation: https://arxiv.org/abs/2306.15595
    """
    if attention_mask.shape[-1] <= limit:
        return None
    length = attention_mask.sum(dim=-1, keepdim=True)
    position = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
    return position * (limit / length.clamp(min=limit))


def _position_table(model: nn.Module) -> tuple[Any, int]:
    """The module that holds ``position_embeddings``, or None, and the first row that stands for a position."""
    for module in model.modules():
        if isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            padding_idx = getattr(module, "padding_idx", None)
            return module, padding_idx + 1 if isinstance(padding_idx, int) else 0
    return None, 0


def _rescale_rotary(model: nn.Module, factor: float) -> None:
    config: Any = model.config
    parameters = config.rope_parameters
    per_layer_type = all(isinstance(value, dict) for value in parameters.values())
    for rope in parameters.values() if per_layer_type else [parameters]:
        rope_type = rope["rope_type"]
        if rope_type not in ("default", "linear"):
            raise ValueError(f"position_extension='interpolate' can't rescale {rope_type=}; choose 'tile' or 'none'")
        rope.update(rope_type="linear", factor=factor * rope.get("factor", 1.0))
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if any(key.endswith("inv_freq") for key, _ in child.named_buffers(recurse=False)):
                device = next(child.buffers()).device
                setattr(parent, name, type(child)(config=config).to(device))
