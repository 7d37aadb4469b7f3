"""Floating-point operations of an encoder, counted from its shapes: what budgets and convergence are stated in.

Matrix products are counted, two operations for a multiplication and an addition; what is done number by number
(exponentials, norms, activations) is not. D is the size of a head, R the number of features, T the tokens of a text;
per layer and head:

- the common part, of an encoder that does not attend: every ``nn.Linear``, ``2 · in · out`` a token
- softmax: ``4 T² D``, queries with keys, and weights with values
- linear: ``4 T R D + 2 T R``, the state, its reading and the normaliser; and what the feature map multiplies
- near/far: ``4 D`` for every pair of tokens in the same or in neighbouring blocks, and the linear part; softmax where
  a text is no longer than ``exact_up_to``, two windows as a rule

A training step is three forward passes: each product has two in its gradient. What an implementation computes twice to
save memory is not counted again, so these are operations of the mathematics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from st_linear.conversion import AttentionCall, LinearAttention, observe_attention
from st_linear.feature_maps import FeatureMap

TRAINING = 3
"""Forward passes that a step of training stands for."""

_PROBES = (4, 8)


@dataclass(frozen=True)
class Layer:
    """One attention call: H heads of size D; R features and what φ multiplies for one token, of linear attention."""

    num_heads: int
    head_dim: int
    num_features: int = 0
    map_operations: float = 0.0
    window: int = 0
    exact_up_to: int = 0
    sliding_window: int | None = None

    def operations(self, tokens: int) -> float:
        """Of attention itself, in one forward pass of one text."""
        per_pair = 4 * self.head_dim * self.num_heads
        if not self.num_features:
            if self.sliding_window is None:
                return per_pair * tokens**2
            reach = max(self.sliding_window - 1, 1)
            return per_pair * sum(min(tokens, i + reach + 1) - max(0, i - reach) for i in range(tokens))
        linear = tokens * (self.map_operations + self.num_heads * self.num_features * (4 * self.head_dim + 2))
        if not self.window:
            return linear
        if tokens <= self.exact_up_to:
            return per_pair * tokens**2
        return per_pair * near_pairs(tokens, self.window) + linear


@dataclass(frozen=True)
class Operations:
    """Operations of one forward pass, by the number of a text's tokens.

    Attributes:
        per_text: Of the common part, whatever the length.
        per_token: Of the common part.
        layers: The attention calls.
    """

    per_text: float
    per_token: float
    layers: tuple[Layer, ...]

    @classmethod
    def of(cls, model: SentenceTransformer) -> Operations:
        """Read the shapes off a model, from two short forward passes."""
        (few, layers), (more, _) = (_probe(model, tokens) for tokens in _PROBES)
        per_token = (more - few) / (_PROBES[1] - _PROBES[0])
        return cls(few - per_token * _PROBES[0], per_token, tuple(layers))

    def forward(self, tokens: int) -> float:
        """Of one text."""
        return self.common(tokens) + sum(layer.operations(tokens) for layer in self.layers)

    def common(self, tokens: int) -> float:
        """Of one text, without attention."""
        return self.per_text + self.per_token * tokens

    def training(self, lengths: Iterable[int]) -> float:
        """Of training steps that read texts of these lengths once."""
        return TRAINING * sum(count * self.forward(tokens) for tokens, count in Counter(lengths).items())


def near_pairs(tokens: int, window: int) -> int:
    """Pairs of a token and one that it attends to exactly: in its own block of ``window`` or in a neighbour of it."""
    pairs = 0
    for start in range(0, tokens, window):
        block = min(window, tokens - start)
        pairs += block * (min(tokens, start + 2 * window) - max(0, start - window))
    return pairs


@torch.no_grad()
def map_operations(feature_map: FeatureMap) -> float:
    """What a feature map multiplies for one token, its query and its key, in all heads."""
    device = next((tensor.device for tensor in feature_map.state_dict().values()), torch.device("cpu"))
    x = torch.zeros(1, feature_map.num_heads, 1, feature_map.head_dim, device=device)
    position = torch.zeros(1, 1, 1, 1, device=device)
    with FlopCounterMode(display=False) as counter:
        for side in ("query", "key"):
            # Exponential maps have logits where others have features.
            logits = getattr(feature_map, f"{side}_logits", None)
            if logits is None:
                getattr(feature_map, f"{side}_features")(x, position)
            else:
                logits(x)
    return float(counter.get_total_flops())


def _probe(model: SentenceTransformer, tokens: int) -> tuple[float, list[Layer]]:
    """Operations of the common part in a forward pass of one text, and its attention calls."""
    encoder: Any = model[0]
    layers: list[Layer] = []
    products = [0.0]

    def count(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        products[0] += 2 * module.in_features * output.numel()

    def see(call: AttentionCall) -> Tensor:
        layers.append(_layer(call))
        return call.query

    hooks = [m.register_forward_hook(count) for m in encoder.model.modules() if isinstance(m, nn.Linear)]
    training = encoder.training
    encoder.eval()
    try:
        ids = torch.zeros(1, tokens, dtype=torch.long, device=encoder.model.device)
        with torch.no_grad(), observe_attention(see):
            encoder({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    finally:
        encoder.train(training)
        for hook in hooks:
            hook.remove()
    return products[0], layers


def _layer(call: AttentionCall) -> Layer:
    heads, size = call.query.shape[1], call.query.shape[-1]
    if not call.is_linear():
        return Layer(heads, size, sliding_window=call.sliding_window)
    attention: Any = call.module.linear_attention
    assert isinstance(attention, LinearAttention)
    feature_map = attention.feature_map
    return Layer(
        num_heads=heads,
        head_dim=size,
        num_features=feature_map.num_features,
        map_operations=map_operations(feature_map),
        window=attention.window,
        exact_up_to=attention.exact_up_to,
    )
