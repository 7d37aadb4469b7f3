"""Conversion of transformers encoders: the one place where st_linear meets transformers' attention.

Every encoder that calls its attention through ``AttentionInterface`` hands the registered function its attention
module first. :class:`LinearAttention` lives on that module, so the one function below serves them all, and its
parameters are the encoder's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

from st_linear.attention import (
    exact_limit,
    linear_attention,
    local_attention,
    near_far_attention,
    softmax_attention,
)
from st_linear.feature_maps import check_feature_map_options, feature_map_class, make_feature_map
from st_linear.feed_forward import chunk_feed_forward

ATTENTION_IMPLEMENTATION = "st_linear"
"""Name under which the attention function and its mask function are registered with transformers."""

SUPPORTED = (
    "BERT, RoBERTa, XLM-R, CamemBERT, DistilBERT, ELECTRA, ALBERT, ERNIE, ModernBERT, NomicBERT, GTE, EuroBERT, "
    "Jina v3, and other bidirectional encoders that use transformers' AttentionInterface"
)

_SUBMODULE = "linear_attention"


@dataclass(frozen=True)
class AttentionCall:
    """What one self-attention layer computes: q, k, v (B, H, T, D), after the repetition of grouped key heads."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Tensor | None
    scale: float
    dropout_p: float
    sliding_window: int | None
    cu_seqlens: Tensor | None
    options: dict[str, Any]

    @property
    def radius(self) -> int | None:
        """How far a sliding layer attends to each side, in tokens; None where it attends to all."""
        # transformers counts the token itself: a window of n reaches n - 1 tokens to each side.
        return None if self.sliding_window is None else max(self.sliding_window - 1, 1)

    @property
    def linear_attention(self) -> LinearAttention:
        """What a converted layer carries."""
        return getattr(self.module, _SUBMODULE)

    def softmax(self) -> Tensor:
        """Output of exact attention, (B, H, T, D)."""
        if self.radius is not None:
            return self._apply(local_attention, radius=self.radius)
        return self._apply(softmax_attention, dropout_p=self.dropout_p)

    def linear(self) -> Tensor:
        """Output of the layer's :class:`LinearAttention`, (B, H, T, D)."""
        attention = self.linear_attention
        if attention.window:
            return self._apply(
                near_far_attention,
                feature_map=attention.feature_map,
                window=attention.window,
                exact_up_to=attention.exact_up_to,
                gain=attention.gain,
                dropout_p=self.dropout_p,
            )
        return self._apply(linear_attention, feature_map=attention.feature_map)

    def is_linear(self) -> bool:
        """Whether the layer was converted; sliding layers and ``exact_layers`` were not."""
        return hasattr(self.module, _SUBMODULE)

    def _apply(self, function: Callable[..., Tensor], **options: Any) -> Tensor:
        if self.cu_seqlens is None:
            return function(self.query, self.key, self.value, self.attention_mask, scale=self.scale, **options)
        packed = (x[0].transpose(0, 1) for x in (self.query, self.key, self.value))
        return function(*packed, scale=self.scale, cu_seqlens=self.cu_seqlens, **options).transpose(0, 1)[None]


_OBSERVER: ContextVar[Callable[[AttentionCall], Tensor] | None] = ContextVar("st_linear_observer", default=None)


@contextmanager
def observe_attention(observer: Callable[[AttentionCall], Tensor]) -> Iterator[None]:
    """Hand every attention call inside the block to ``observer``; what it returns, (B, H, T, D), is the output."""
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function behind ``attn_implementation="st_linear"``; arguments are those of transformers' interface."""
    if attention_mask is not None and attention_mask.ndim != 2:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"st_linear takes a 2-D attention_mask (B, T) and builds no (T, T) mask, got shape {shape}")
    groups = getattr(module, "num_key_value_groups", 1)
    call = AttentionCall(
        module=module,
        query=query,
        key=repeat_kv(key, groups),
        value=repeat_kv(value, groups),
        attention_mask=attention_mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout_p=dropout,
        sliding_window=sliding_window,
        cu_seqlens=cu_seq_lens_q,
        options=kwargs,
    )
    output = (_OBSERVER.get() or _attend)(call)
    return output.transpose(1, 2).contiguous(), None


def _attend(call: AttentionCall) -> Tensor:
    return call.linear() if call.is_linear() else call.softmax()


def padding_mask(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask function: hands on the 2-D padding mask, or None where nothing is padded."""
    if attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all())):
        return None
    return attention_mask


AttentionInterface.register(ATTENTION_IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(ATTENTION_IMPLEMENTATION, padding_mask)


class LinearAttention(nn.Module):
    """What a converted layer carries: a feature map, the near window, and a gain per head.

    Args:
        feature_map: Name of a map that is not ``softmax``.
        num_heads: H.
        head_dim: D.
        window: Near window in tokens; 0 = purely linear.
        exact_up_to: Texts of at most so many tokens get softmax attention; None = two windows.
        seed: Seed of the model; the map's is a function of it and of ``layer``.
        layer: Index of the layer among all attention layers of the model.
        feature_map_kwargs: Options of the map.
    """

    def __init__(
        self,
        feature_map: str,
        num_heads: int,
        head_dim: int,
        *,
        window: int,
        exact_up_to: int | None,
        seed: int,
        layer: int,
        feature_map_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.feature_map = make_feature_map(
            feature_map, num_heads, head_dim, seed=self._map_seed(seed), **(feature_map_kwargs or {})
        )
        self.window = window
        self.exact_up_to = exact_limit(window, exact_up_to)
        self.gain = nn.Parameter(torch.zeros(num_heads)) if window else None

    def redraw(self, seed: int) -> None:
        """Draw the random features anew, as a model made with ``seed`` has them."""
        self.feature_map.redraw(self._map_seed(seed))

    def _map_seed(self, seed: int) -> int:
        return 1000 * seed + self.layer


def attention_calls(model: PreTrainedModel) -> list[AttentionCall]:
    """The attention calls of one forward pass on three tokens, first call of each attention module, in order.

    Raises:
        ValueError: If the model can't be converted: the message says why and what is supported.
    """
    name = type(model).__name__
    config = model.config
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise _unsupported(name, "has cross-attention")
    if getattr(config, "is_decoder", False):
        raise _unsupported(name, "is a causal decoder")
    if not model.is_backend_compatible():
        raise _unsupported(
            name, "computes attention outside transformers' AttentionInterface (relative position bias, say)"
        )
    calls: dict[int, AttentionCall] = {}

    def record(call: AttentionCall) -> Tensor:
        calls.setdefault(id(call.module), call)
        return call.query

    with _trial_run(model), observe_attention(record):
        model(input_ids=torch.arange(3, device=model.device)[None])
    for call in calls.values():
        causal = call.options.get("is_causal")
        if getattr(call.module, "is_causal", False) if causal is None else causal:
            raise _unsupported(name, "attends causally")
        for option in ("position_bias", "softcap", "s_aux"):
            if call.options.get(option) is not None:
                raise _unsupported(name, f"adds {option} to its attention logits")
    if not calls:
        raise _unsupported(name, "made no call through transformers' AttentionInterface")
    return list(calls.values())


def accepts_packed_inputs(model: PreTrainedModel) -> bool:
    """Whether ``cu_seq_lens_q`` reaches every attention call of the model."""
    seen: list[bool] = []

    def record(call: AttentionCall) -> Tensor:
        seen.append(call.cu_seqlens is not None)
        return call.query

    offsets = torch.tensor([0, 2, 3], dtype=torch.int32, device=model.device)
    positions = torch.tensor([[0, 1, 0]], device=model.device)
    with _trial_run(model), observe_attention(record):
        try:
            model(
                input_ids=torch.arange(3, device=model.device)[None],
                position_ids=positions,
                cu_seq_lens_q=offsets,
                cu_seq_lens_k=offsets,
                max_length_q=2,
                max_length_k=2,
            )
        except TypeError:
            return False
    return bool(seen) and all(seen)


def check_settings(
    *,
    feature_map: str,
    window: int,
    exact_up_to: int | None = None,
    exact_layers: Sequence[int] = (),
    seed: int = 0,
    feature_map_kwargs: dict[str, Any] | None = None,
) -> None:
    """Raise a ValueError if an argument of :func:`linearise` is wrong for every model."""
    if not is_integer(window) or window < 0:
        raise ValueError(f"window must be a number of tokens >= 0 (0 = purely linear), got {window!r}")
    check_exact_up_to(exact_up_to)
    exact_limit(window, exact_up_to)
    if not isinstance(exact_layers, Sequence) or not all(is_integer(layer) for layer in exact_layers):
        raise ValueError(f"exact_layers must be a list of layer indices, got {exact_layers!r}")
    if not is_integer(seed):
        raise ValueError(f"seed must be an integer, got {seed!r}")
    if not isinstance(feature_map_kwargs, dict | None):
        raise ValueError(f"feature_map_kwargs must be a dictionary of options, got {feature_map_kwargs!r}")
    check_feature_map_options(feature_map, feature_map_kwargs or {})


def check_exact_up_to(exact_up_to: Any) -> None:
    """Raise a ValueError if it is no number of tokens, whatever the window."""
    if exact_up_to is not None and not (is_integer(exact_up_to) and 0 <= exact_up_to < 2**31):
        raise ValueError(f"exact_up_to must be a number of tokens, got {exact_up_to!r}")


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an int and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def linearise(
    model: PreTrainedModel,
    *,
    feature_map: str,
    window: int,
    exact_up_to: int | None = None,
    exact_layers: Sequence[int] = (),
    seed: int = 0,
    feature_map_kwargs: dict[str, Any] | None = None,
) -> None:
    """Replace the attention of ``model``, in place, and have its feed-forward modules go through long texts in chunks.

    An earlier conversion is undone first. Layers count attention modules in order of use, so layers that share one
    (ALBERT) count once. Sliding-window layers stay as they are: exact, and linear in time already.

    Args:
        model: A transformers encoder.
        feature_map: One of :func:`~st_linear.feature_maps.feature_map_names`; ``softmax`` keeps every layer exact.
        window: Near window in tokens; 0 = purely linear.
        exact_up_to: Texts of at most so many tokens get softmax attention; None = two windows.
        exact_layers: Layers that keep softmax attention.
        seed: Random features are a function of it and of the layer.
        feature_map_kwargs: Options of the map.

    Raises:
        ValueError: If an argument is out of range, or the model can't be converted.
    """
    check_settings(
        feature_map=feature_map,
        window=window,
        exact_up_to=exact_up_to,
        exact_layers=exact_layers,
        seed=seed,
        feature_map_kwargs=feature_map_kwargs,
    )
    for module in model.modules():
        module._modules.pop(_SUBMODULE, None)
    calls = attention_calls(model)
    for layer in exact_layers:
        if layer not in range(len(calls)):
            raise ValueError(f"exact_layers must lie in 0..{len(calls) - 1}, got {layer!r}")
    exact = feature_map_class(feature_map).exact
    for layer, call in enumerate(calls):
        if exact or layer in exact_layers or call.sliding_window is not None:
            continue
        _, num_heads, _, head_dim = call.query.shape
        attention = LinearAttention(
            feature_map,
            num_heads,
            head_dim,
            window=window,
            exact_up_to=exact_up_to,
            seed=seed,
            layer=layer,
            feature_map_kwargs=feature_map_kwargs,
        )
        call.module.add_module(_SUBMODULE, attention.to(call.query.device, call.query.dtype))
    model.set_attn_implementation(ATTENTION_IMPLEMENTATION)
    chunk_feed_forward(model)


def linear_attentions(model: nn.Module) -> dict[str, LinearAttention]:
    """The :class:`LinearAttention` of each converted layer, by its name in ``model``, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LinearAttention)}


def split_state_dict(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's tensors, apart: those of a plain transformers checkpoint, and those linear attention adds."""
    plain: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        (added if f".{_SUBMODULE}." in name else plain)[name] = tensor
    return plain, added


@contextmanager
def _trial_run(model: PreTrainedModel) -> Iterator[None]:
    implementation, training = model.config._attn_implementation, model.training
    model.set_attn_implementation(ATTENTION_IMPLEMENTATION)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        model.set_attn_implementation(implementation)


def _unsupported(name: str, reason: str) -> ValueError:
    return ValueError(f"{name} can't be converted: it {reason}. Supported: {SUPPORTED}.")
