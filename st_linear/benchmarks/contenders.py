"""Who takes part: names of contenders, and the attention function behind each.

``MAP[:features][@window]`` is st_linear's own attention, e.g. ``hedgehog``, ``favor:128``, ``hedgehog@64``; the other
names are peers. Shapes follow :mod:`st_linear.attention`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from st_linear.attention import linear_attention, near_far_attention
from st_linear.feature_maps import (
    ExponentialFeatureMap,
    FeatureMap,
    check_feature_map_options,
    feature_map_class,
    feature_map_names,
    make_feature_map,
)
from st_linear.kernels import cpu
from st_linear.settings import ATTENTION_FORM, read_attention_name

PERFORMER_FEATURES = 256
"""Features of ``performer`` and ``plain`` where none are named: those of st_linear's ``favor``."""

_FLASH_BLA = {
    # flash-bidirectional-linear-attention, by the name of the package: today's, and that of its first releases.
    "flash_bla": "flash_bla.ops.linear_attn.fused",
    "fbi_la": "fbi_la.ops.linear_attn.attention",
}


@dataclass(frozen=True)
class MapSpec:
    """st_linear's attention as a contender: ``MAP[:features][@window]``.

    Attributes:
        feature_map: Name of a feature map.
        num_features: Features, or None for the map's own number.
        window: Near window in tokens; 0 = purely linear.
    """

    feature_map: str
    num_features: int | None = None
    window: int = 0

    @classmethod
    def parse(cls, name: str, features: int | None = None, peers: str = "") -> MapSpec:
        """Read a name.

        Args:
            name: ``MAP[:features][@window]``.
            features: Features of maps that have a choice, where the name holds none.
            peers: Other names there are, for the error message.

        Raises:
            ValueError: If the name has another form, or there is no such map or option.
        """
        form = read_attention_name(name)
        maps = [known for known in feature_map_names() if not feature_map_class(known).exact]
        if form is None or form[0] not in maps:
            choices = f"{peers}, {ATTENTION_FORM}" if peers else ATTENTION_FORM
            raise ValueError(f"unknown model {name!r}; choose among: {choices}; MAP is one of {', '.join(maps)}")
        feature_map, number, window = form
        if number is not None:
            check_feature_map_options(feature_map, {"num_features": number})
        elif "num_features" in inspect.signature(feature_map_class(feature_map)).parameters:
            number = features
        return cls(feature_map, number, window)

    @property
    def options(self) -> dict[str, Any]:
        """Options of the feature map."""
        return {} if self.num_features is None else {"num_features": self.num_features}


class Attention(NamedTuple):
    """An attention function of q, k, v (B, H, T, D), and the parameters that its backward pass differentiates."""

    function: Callable[[Tensor, Tensor, Tensor], Any]
    parameters: tuple[nn.Parameter, ...] = ()
    differentiable: bool = True
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    """What it runs inside, its backward pass too."""


@dataclass(frozen=True)
class Shape:
    """What an attention function is made for."""

    heads: int
    head_dim: int
    device: torch.device
    dtype: torch.dtype
    features: int | None = None
    seed: int = 0


def check_attention(name: str, shape: Shape) -> None:
    """Find out before the work, not after it, that :func:`make_attention` can't make a contender.

    Raises:
        ValueError: As :func:`make_attention`.
        ImportError: If a peer's package is missing.
    """
    with torch.random.fork_rng(devices=[]):
        make_attention(name, shape)


def make_attention(name: str, shape: Shape) -> Attention:
    """Make a contender of the level ``attention``.

    Args:
        name: ``MAP[:features][@window]``, or one of :data:`ATTENTION_PEERS`, of which ``performer`` takes
            ``[:features]``, ``plain`` ``[:MAP[:features]]`` and ``uncompiled`` ``:MAP[:features][@window]``.
        shape: What it is made for.

    Raises:
        ValueError: If the name is unknown, or the contender does not run on the device or in the number format.
        ImportError: If its package is missing.
    """
    head, _, rest = name.partition(":")
    if head in ATTENTION_PEERS:
        return ATTENTION_PEERS[head](rest, shape)
    spec = MapSpec.parse(name, shape.features, peers=", ".join(ATTENTION_PEERS))
    feature_map = _feature_map(spec, shape)
    function: Callable[..., Tensor]
    if spec.window:
        gain = nn.Parameter(torch.zeros(shape.heads, device=shape.device, dtype=shape.dtype))
        function = partial(near_far_attention, feature_map=feature_map, window=spec.window, gain=gain)
        return Attention(function, (*feature_map.parameters(), gain))
    return Attention(partial(linear_attention, feature_map=feature_map), tuple(feature_map.parameters()))


def plain_linear_attention(query: Tensor, key: Tensor, value: Tensor, *, feature_map: FeatureMap) -> Tensor:
    """Linear attention in plain PyTorch: mapped queries and keys, (B, H, T, R), are made whole and kept."""
    root = query.shape[-1] ** -0.25
    query, key = query * root, key * root
    if isinstance(feature_map, ExponentialFeatureMap):
        # As performer-pytorch does it: the largest logit is taken out, of each query, and of all keys of a head.
        query_logits, key_logits = feature_map.query_logits(query), feature_map.key_logits(key)
        for offset in (feature_map.key_offset(key), feature_map.feature_bias(), feature_map.feature_offset(key, None)):
            if offset is not None:
                key_logits = key_logits + offset
        phi_q = (query_logits - query_logits.detach().amax(dim=-1, keepdim=True)).exp()
        phi_k = (key_logits - key_logits.detach().amax(dim=(-2, -1), keepdim=True)).exp()
    else:
        length = query.shape[-2]
        position = torch.arange(length, device=query.device, dtype=query.dtype)[:, None] / length
        phi_q, phi_k = feature_map.query_features(query, position), feature_map.key_features(key, position)
    normaliser = phi_k.sum(dim=-2, keepdim=True)
    return (phi_q @ (phi_k.transpose(-1, -2) @ value)) / (phi_q @ normaliser.transpose(-1, -2))


def performer_attention(rest: str, head_dim: int, features: int | None = None) -> nn.Module:
    """performer-pytorch's ``FastAttention``: FAVOR+ with one projection for all heads.

    Args:
        rest: What stands behind ``performer:`` in the contender's name: the number of features, or nothing.
        head_dim: D.
        features: The number where ``rest`` is empty.
    """
    from performer_pytorch import FastAttention

    number = int(rest) if _is_positive(rest) else features or PERFORMER_FEATURES
    if rest and not _is_positive(rest):
        raise ValueError(f"unknown model {'performer:' + rest!r}; write performer:NUMBER, its number of features")
    return FastAttention(dim_heads=head_dim, nb_features=number)


def flash_bla_attention() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The forward function of flash-bidirectional-linear-attention: mapped q, mapped k, v, each (B, H, T, D).

    Raises:
        ImportError: If neither of the names under which the package has been published can be imported.
    """
    for package, module in _FLASH_BLA.items():
        if find_spec(package) is not None:
            return importlib.import_module(module).linear_attention
    raise ImportError(
        "flash-bidirectional-linear-attention is missing: "
        "pip install git+https://github.com/fla-org/flash-bidirectional-linear-attention"
    )


def _feature_map(spec: MapSpec, shape: Shape) -> FeatureMap:
    made = make_feature_map(spec.feature_map, shape.heads, shape.head_dim, seed=shape.seed, **spec.options)
    return made.to(shape.device, shape.dtype)


def _sdpa(rest: str, shape: Shape) -> Attention:
    _no_more("sdpa", rest)
    return Attention(F.scaled_dot_product_attention)


def _flash(rest: str, shape: Shape) -> Attention:
    _no_more("flash", rest)
    if shape.device.type != "cuda" or shape.dtype not in (torch.float16, torch.bfloat16):
        dtype = str(shape.dtype).removeprefix("torch.")
        raise ValueError(f"flash needs device=cuda and dtype float16 or bfloat16, got {shape.device} and {dtype}")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(query, key, value)

    return Attention(attend)


def _performer(rest: str, shape: Shape) -> Attention:
    return Attention(performer_attention(rest, shape.head_dim, shape.features).to(shape.device))


def _plain(rest: str, shape: Shape) -> Attention:
    spec = MapSpec.parse(rest or "favor", shape.features)
    if spec.window:
        raise ValueError(f"unknown model {'plain:' + rest!r}; plain is purely linear: leave out @{spec.window}")
    feature_map = _feature_map(spec, shape)
    return Attention(partial(plain_linear_attention, feature_map=feature_map), tuple(feature_map.parameters()))


def _uncompiled(rest: str, shape: Shape) -> Attention:
    if shape.device.type != "cpu":
        raise ValueError(f"uncompiled needs device=cpu, got {shape.device}")
    if not cpu.is_built():
        raise ValueError("uncompiled is there to compare with the compiled CPU kernel: run `st-linear build` first")
    MapSpec.parse(rest, shape.features)
    return make_attention(rest, shape)._replace(around=cpu.left_out)


def _flash_bla(rest: str, shape: Shape) -> Attention:
    if rest not in ("", "kernel"):
        raise ValueError(
            f"unknown model {'flash-bla:' + rest!r}; write flash-bla, or flash-bla:kernel without its map"
        )
    attend = flash_bla_attention()
    if shape.device.type != "cuda":
        raise ValueError(f"flash-bla needs device=cuda, got {shape.device}")
    if rest == "kernel":
        # Unmapped q and k give other numbers, in the same time.
        return Attention(attend)
    return Attention(lambda query, key, value: attend(F.elu(query) + 1, F.elu(key) + 1, value))


def _copy(rest: str, shape: Shape) -> Attention:
    _no_more("copy", rest)

    def copy(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        # Two tensors read, two written: as many bytes as q, k, v read and o written.
        return query.clone(), key.clone()

    return Attention(copy, differentiable=False)


ATTENTION_PEERS: dict[str, Callable[[str, Shape], Attention]] = {
    "sdpa": _sdpa,
    "flash": _flash,
    "performer": _performer,
    "plain": _plain,
    "uncompiled": _uncompiled,
    "flash-bla": _flash_bla,
    "copy": _copy,
}
"""Contenders of the level ``attention`` that are not st_linear's: how each is made."""


def _no_more(name: str, rest: str) -> None:
    if rest:
        raise ValueError(f"unknown model {name + ':' + rest!r}; {name} has no options")


def _is_positive(text: str) -> bool:
    return text.isdigit() and int(text) > 0
