"""Feature maps φ of linear attention: the base class, the registry, and the maps.

Linear attention replaces the softmax weight ``exp(q·k)`` by ``φ_q(q)·φ_k(k)``. A new map is one class with
:func:`register_feature_map` above it: the tests, the command line and the docs read the registry.

Shapes follow :mod:`st_linear.attention`: B batch, H heads, T tokens, D head size, R features.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_REGISTRY: dict[str, type[FeatureMap]] = {}


def register_feature_map(name: str) -> Callable[[type[FeatureMap]], type[FeatureMap]]:
    """Class decorator that makes a feature map known under ``name``.

    Args:
        name: The value of ``feature_map=`` that selects it.

    Raises:
        ValueError: If the name is taken.
    """

    def register(cls: type[FeatureMap]) -> type[FeatureMap]:
        if name in _REGISTRY:
            raise ValueError(f"feature map {name!r} is registered already, by {_REGISTRY[name].__qualname__}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def feature_map_names() -> list[str]:
    """Names that ``feature_map=`` accepts, in order of registration."""
    return list(_REGISTRY)


def feature_map_class(name: str) -> type[FeatureMap]:
    """The class registered under ``name``.

    Raises:
        ValueError: If there is none.
    """
    if name not in _REGISTRY:
        raise ValueError(f"unknown feature_map {name!r}; choose one of: {', '.join(_REGISTRY)}")
    return _REGISTRY[name]


def make_feature_map(name: str, num_heads: int, head_dim: int, *, seed: int = 0, **options: Any) -> FeatureMap:
    """Build a feature map for one attention layer.

    Args:
        name: One of :func:`feature_map_names`.
        num_heads: H.
        head_dim: D.
        seed: Random features, and random parts of a learned map's start, are a function of it.
        **options: Options of the map, e.g. ``num_features=128``.

    Raises:
        ValueError: If the name or an option is unknown.

    Example:
        >>> make_feature_map("favor", num_heads=12, head_dim=32, num_features=64).num_features
        64
    """
    check_feature_map_options(name, options)
    return feature_map_class(name)(num_heads, head_dim, seed=seed, **options)


def check_feature_map_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise a ValueError unless there is a map ``name`` and it has these options."""
    parameters = inspect.signature(feature_map_class(name)).parameters
    known = [option for option in parameters if option not in ("num_heads", "head_dim", "seed")]
    for option in options:
        if option not in known:
            choices = ", ".join(known) or "none"
            raise ValueError(f"feature map {name!r} has no option {option!r}; its options: {choices}")


def _check_num_features(num_features: int, multiple_of: int = 1) -> int:
    if isinstance(num_features, bool) or not isinstance(num_features, int) or num_features < 1:
        raise ValueError(f"num_features must be a positive integer, got {num_features!r}")
    if num_features % multiple_of:
        raise ValueError(f"num_features must be a multiple of {multiple_of}, got {num_features}")
    return num_features


class FeatureMap(nn.Module):
    """Base class: maps queries and keys so that ``weight · φ_q(q_i)·φ_k(k_j)`` stands for an attention weight.

    Inputs are already scaled (``x · scale**0.5``, so that ``q·k`` is the logit of softmax attention), and float32 or
    float64. A map sees a part of a text at a time: what it makes of a token may depend on the token and on where in
    its text it stands, not on other tokens.

    Args:
        num_heads: H.
        head_dim: D.
        seed: Seed of everything random in the map.

    Attributes:
        weight: Constant factor that makes a weight comparable with ``exp(q·k)``, ``1/R`` for most: near/far attention
            needs it, purely linear attention does not see it.
    """

    name: ClassVar[str]
    num_features: int
    exact: ClassVar[bool] = False
    """Whether the map stands for softmax attention itself, which no finite φ gives."""

    def __init__(self, num_heads: int, head_dim: int, *, seed: int = 0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.seed = seed

    @property
    def weight(self) -> float:
        return 1 / self.num_features

    def query_features(self, query: Tensor, position: Tensor) -> Tensor:
        """φ of queries.

        Args:
            query: (B, H, T, D).
            position: Broadcasts to (B, 1, T, 1): the share of the text's tokens that stand before this one, in [0, 1).

        Returns:
            (B, H, T, R).
        """
        raise NotImplementedError

    def key_features(self, key: Tensor, position: Tensor) -> Tensor:
        """φ of keys; shapes as in :meth:`query_features`."""
        raise NotImplementedError

    def redraw(self, seed: int) -> None:
        """Draw random features anew from ``seed``. Maps without any keep what they learned."""
        self.seed = seed

    def calibrate(self, sums: Tensor, generator: torch.Generator) -> None:
        """Start where attention looks, before training; most maps need not.

        Args:
            sums: ``q_i + k_j`` of pairs of tokens as attention picks them, (H, pairs, D), float32, on the CPU.
            generator: Of what is drawn, on the CPU.
        """

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, num_features={self.num_features}"


class PointwiseFeatureMap(FeatureMap):
    """A map that treats queries and keys alike, token by token."""

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def query_features(self, query: Tensor, position: Tensor) -> Tensor:
        return self.features(query)

    def key_features(self, key: Tensor, position: Tensor) -> Tensor:
        return self.features(key)


class ExponentialFeatureMap(FeatureMap):
    """A map of the form ``φ(x) = exp(logits(x) + offsets)``. Attention works on these: nothing over- or underflows.

    Where logits are ``W x``, give :meth:`projections`; else :meth:`query_logits` and :meth:`key_logits`. Offsets are
    what many logits share; added apart from them they cost less.
    """

    def projections(self) -> tuple[Tensor, Tensor] | None:
        """W of queries and of keys, (H, R, D) each, or None where logits are not ``W x``."""
        return None

    def query_logits(self, query: Tensor) -> Tensor:
        """(B, H, T, D) to (B, H, T, R)."""
        return self._project(query, 0)

    def key_logits(self, key: Tensor) -> Tensor:
        """(B, H, T, D) to (B, H, T, R)."""
        return self._project(key, 1)

    def query_offset(self, query: Tensor) -> Tensor | None:
        """What a query adds to all its logits, (B, H, T, 1) or None: purely linear attention can't see it."""
        return None

    def key_offset(self, key: Tensor) -> Tensor | None:
        """What a key adds to all its logits, (B, H, T, 1) or None."""
        return None

    def feature_bias(self) -> Tensor | None:
        """What a feature adds to its logit in every text, queries' and keys' together: (H, 1, R) or None."""
        return None

    def feature_offset(self, key: Tensor, mask: Tensor | None) -> Tensor | None:
        """What a feature adds to its logit in all of one text, because of its keys.

        Args:
            key: (B, H, T, D), all keys of the texts.
            mask: (B, T) bool, True = token, or None where all are.

        Returns:
            (B or 1, H, 1, R), or None.
        """
        return None

    def _project(self, x: Tensor, side: int) -> Tensor:
        projections = self.projections()
        if projections is None:
            raise NotImplementedError(f"{type(self).__name__} defines neither projections nor logits")
        return x @ projections[side].to(x.dtype).transpose(-1, -2)


@register_feature_map("softmax")
class Softmax(FeatureMap):
    """Exact attention, ``exp(q·k)``: no feature map, but the control of every comparison. Quadratic time."""

    exact = True
    num_features = 0


@register_feature_map("elu")
class Elu(PointwiseFeatureMap):
    """``φ(x) = elu(x) + 1``; R = D.

    Written ``where(x >= 0, x + 1, exp(min(x, 0)))``: the plain form rounds to 0 in bfloat16 below -6.

    References:
        - Transformers are RNNs: https://arxiv.org/abs/2006.16236
    """

    def __init__(self, num_heads: int, head_dim: int, *, seed: int = 0) -> None:
        super().__init__(num_heads, head_dim, seed=seed)
        self.num_features = head_dim

    def features(self, x: Tensor) -> Tensor:
        return torch.where(x >= 0, x + 1, x.clamp(max=0).exp())


@register_feature_map("relu")
class Relu(PointwiseFeatureMap):
    """``φ(x) = relu(x)``; R = D. A query that meets no key in any feature gets a zero output.

    References:
        - Finetuning Pretrained Transformers into RNNs: https://arxiv.org/abs/2103.13076 (the map without its layer)
    """

    def __init__(self, num_heads: int, head_dim: int, *, seed: int = 0) -> None:
        super().__init__(num_heads, head_dim, seed=seed)
        self.num_features = head_dim

    def features(self, x: Tensor) -> Tensor:
        return F.relu(x)


def orthogonal_features(num_heads: int, num_features: int, head_dim: int, seed: int) -> Tensor:
    """Gaussian rows, orthogonal in blocks of D, drawn anew for each head: (H, R, D), a function of ``seed`` alone.

    References:
        - Rethinking Attention with Performers, section 2.4: https://arxiv.org/abs/2009.14794
    """
    from performer_pytorch.performer_pytorch import gaussian_orthogonal_random_matrix

    # performer-pytorch draws from the global generator: lend it ours, and leave the caller's as it was. The CPU's
    # alone: torch.manual_seed would seed every GPU's too, and they would stay so.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        rows = torch.stack(
            [gaussian_orthogonal_random_matrix(num_features, head_dim, device="cpu") for _ in range(num_heads)]
        )
        # The signs of its QR follow the draw, so that row r leans to one side of axis r: random signs undo that.
        rows = rows * (2 * torch.randint(2, (num_heads, num_features, 1), device="cpu") - 1)
    # torch.get_default_device() of torch 2.6 does not know of `with torch.device(...)`.
    return rows.to(torch.empty(0).device)


class RandomFeatures(FeatureMap):
    """A map with a random projection ``w`` of shape (H, R, D), kept as a buffer."""

    projection: Tensor

    def __init__(self, num_heads: int, head_dim: int, *, seed: int = 0, num_features: int = 256) -> None:
        super().__init__(num_heads, head_dim, seed=seed)
        self.num_features = _check_num_features(num_features)
        self.register_buffer("projection", orthogonal_features(num_heads, num_features, head_dim, seed))

    def redraw(self, seed: int) -> None:
        super().redraw(seed)
        self.projection.copy_(orthogonal_features(self.num_heads, self.num_features, self.head_dim, seed))

    def project(self, x: Tensor) -> Tensor:
        return x @ self.projection.to(x.dtype).transpose(-1, -2)


def squared_norm(x: Tensor) -> Tensor:
    """(B, H, T, D) to (B, H, T, 1)."""
    # Encoders lay tokens before heads in memory, and a sum in that order takes a quarter of the time.
    return torch.linalg.vector_norm(x.transpose(1, 2), dim=-1, keepdim=True).transpose(1, 2).square()


@register_feature_map("favor")
class Favor(RandomFeatures, ExponentialFeatureMap):
    """FAVOR+, ``φ(x) = exp(w·x - |x|²/2)``, weight 1/R: an unbiased, positive estimate of ``exp(q·k)``.

    Args:
        num_features: R; the variance of the estimate falls as 1/R.

    References:
        - Rethinking Attention with Performers: https://arxiv.org/abs/2009.14794
    """

    def projections(self) -> tuple[Tensor, Tensor]:
        return self.projection, self.projection

    def query_offset(self, query: Tensor) -> Tensor:
        return squared_norm(query) / -2

    def key_offset(self, key: Tensor) -> Tensor:
        return self.query_offset(key)


@register_feature_map("favor_relu")
class FavorRelu(RandomFeatures, PointwiseFeatureMap):
    """FAVOR's generalised attention, ``φ(x) = relu(w·x) + 0.001``.

    Args:
        num_features: R.

    References:
        - Rethinking Attention with Performers, section 2.2: https://arxiv.org/abs/2009.14794
    """

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.project(x)) + 1e-3


@register_feature_map("learned_favor")
class LearnedFavor(ExponentialFeatureMap):
    """FAVOR+ that learns, ``φ_q(x) = exp(W_q x + b - a_q|x|²)`` and ``φ_k(x) = exp(W_k x - a_k|x|²)``, weight 1/R.

    W, b and a are learned per head. They start as FAVOR+ is, ``W_q = W_k`` orthogonal Gaussian rows, ``b = 0`` and
    ``a = 1/2``. :meth:`calibrate` gives a better start: as unbiased, at a fraction of the variance.

    Args:
        num_features: R.

    References:
        - Rethinking Attention with Performers: https://arxiv.org/abs/2009.14794 (the map that it starts as)
    """

    def __init__(self, num_heads: int, head_dim: int, *, seed: int = 0, num_features: int = 128) -> None:
        super().__init__(num_heads, head_dim, seed=seed)
        self.num_features = _check_num_features(num_features)
        rows = orthogonal_features(num_heads, num_features, head_dim, seed)
        self.query_weight = nn.Parameter(rows.clone())
        self.key_weight = nn.Parameter(rows.clone())
        self.bias = nn.Parameter(torch.zeros(num_heads, 1, num_features))
        self.query_norm = nn.Parameter(torch.full((num_heads, 1, 1), 0.5))
        self.key_norm = nn.Parameter(torch.full((num_heads, 1, 1), 0.5))

    def projections(self) -> tuple[Tensor, Tensor]:
        return self.query_weight, self.key_weight

    def query_offset(self, query: Tensor) -> Tensor:
        return -self.query_norm.to(query.dtype) * squared_norm(query)

    def key_offset(self, key: Tensor) -> Tensor:
        return -self.key_norm.to(key.dtype) * squared_norm(key)

    def feature_bias(self) -> Tensor:
        return self.bias

    @torch.no_grad()
    def calibrate(self, sums: Tensor, generator: torch.Generator) -> None:
        """Draw the rows anew, from where attention looks.

        FAVOR+ rests on ``exp(q·k) = E_w[exp(w·q - |q|²/2) exp(w·k - |k|²/2)]`` with w ~ N(0, I). What is averaged is
        large around ``w = q + k``, and rows of N(0, I) rarely come near. So rows are drawn from p, the mixture of
        N(q_i + k_j, I) over the pairs (i, j), and weighted by ``N(w; 0, I) / p(w)``, which goes into b: the estimate
        stays unbiased.

        Args and shapes as in :meth:`FeatureMap.calibrate`.
        """
        for head, centre in enumerate(sums):
            picked = torch.randint(len(centre), (self.num_features,), generator=generator)
            w = centre[picked] + torch.randn(self.num_features, self.head_dim, generator=generator)
            log_p = torch.cdist(w, centre).square().div(-2).logsumexp(dim=-1) - math.log(len(centre))
            self.query_weight[head] = self.key_weight[head] = w.to(self.query_weight)
            self.bias[head, 0] = (w.square().sum(dim=-1) / -2 - log_p).to(self.bias)


class LearnedProjection(nn.Module):
    """``W x + b`` per head. W starts as the identity, continued by seeded orthogonal rows where R > D.

    Shapes: x (B, H, T, D) to (B, H, T, R).
    """

    def __init__(self, num_heads: int, num_features: int, head_dim: int, seed: int) -> None:
        super().__init__()
        weight = torch.eye(num_features, head_dim).expand(num_heads, -1, -1).clone()
        if num_features > head_dim:
            weight[:, head_dim:] = orthogonal_features(num_heads, num_features - head_dim, head_dim, seed)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(num_heads, 1, num_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype).transpose(-1, -2) + self.bias.to(x.dtype)


@register_feature_map("hedgehog")
class Hedgehog(ExponentialFeatureMap):
    """Hedgehog, ``φ(x) = [exp(Wx + b), exp(-Wx - b)]``, W and b learned per head, apart for q and k.

    Args:
        num_features: R, even; 2·D by default, where W is square and starts as the identity.

    References:
        - The Hedgehog & the Porcupine: https://arxiv.org/abs/2402.04347
    """

    def __init__(self, num_heads: int, head_dim: int, *, seed: int = 0, num_features: int | None = None) -> None:
        super().__init__(num_heads, head_dim, seed=seed)
        self.num_features = _check_num_features(2 * head_dim if num_features is None else num_features, multiple_of=2)
        self.query_projection = LearnedProjection(num_heads, self.num_features // 2, head_dim, seed)
        self.key_projection = LearnedProjection(num_heads, self.num_features // 2, head_dim, seed)

    def projections(self) -> tuple[Tensor, Tensor]:
        query, key = (torch.cat([x.weight, -x.weight], dim=1) for x in (self.query_projection, self.key_projection))
        return query, key

    def feature_bias(self) -> Tensor:
        bias = self.query_projection.bias + self.key_projection.bias
        return torch.cat([bias, -bias], dim=-1)


@register_feature_map("t2r")
class T2R(FeatureMap):
    """Transformer-to-RNN, ``φ(x) = relu(Wx + b)``, W and b learned per head, apart for q and k.

    Args:
        num_features: R; D by default.

    References:
        - Finetuning Pretrained Transformers into RNNs: https://arxiv.org/abs/2103.13076
    """

    def __init__(self, num_heads: int, head_dim: int, *, seed: int = 0, num_features: int | None = None) -> None:
        super().__init__(num_heads, head_dim, seed=seed)
        self.num_features = _check_num_features(head_dim if num_features is None else num_features)
        self.query_projection = LearnedProjection(num_heads, self.num_features, head_dim, seed)
        self.key_projection = LearnedProjection(num_heads, self.num_features, head_dim, seed)

    def query_features(self, query: Tensor, position: Tensor) -> Tensor:
        return F.relu(self.query_projection(query))

    def key_features(self, key: Tensor, position: Tensor) -> Tensor:
        return F.relu(self.key_projection(key))


@register_feature_map("cosformer")
class Cosformer(FeatureMap):
    """cosFormer, ``w_ij = relu(q_i)·relu(k_j) · cos(π/2 · (i - j)/n)``, n the text's number of tokens; R = 2·D.

    The cosine splits as ``cos a cos b + sin a sin b``. Positions count valid tokens, so padding does not move them.

    References:
        - cosFormer: Rethinking Softmax in Attention: https://arxiv.org/abs/2202.08791
    """

    def __init__(self, num_heads: int, head_dim: int, *, seed: int = 0) -> None:
        super().__init__(num_heads, head_dim, seed=seed)
        self.num_features = 2 * head_dim

    def query_features(self, query: Tensor, position: Tensor) -> Tensor:
        angle = position * (math.pi / 2)
        active = F.relu(query)
        return torch.cat([active * angle.cos(), active * angle.sin()], dim=-1)

    def key_features(self, key: Tensor, position: Tensor) -> Tensor:
        return self.query_features(key, position)


@register_feature_map("taylor")
class Taylor(PointwiseFeatureMap):
    """Second-order Taylor expansion of the softmax kernel, ``1 + s + s²/2`` with ``s = q·k``; R = 1 + D + D(D+1)/2.

    Always positive, as ``1 + s + s²/2 = ((1 + s)² + 1) / 2``. Costs D/2 times as much as ``elu``.

    References:
        - Linear Transformers with Learnable Kernel Functions (Based): https://arxiv.org/abs/2402.18668
    """

    row: Tensor
    column: Tensor

    def __init__(self, num_heads: int, head_dim: int, *, seed: int = 0) -> None:
        super().__init__(num_heads, head_dim, seed=seed)
        # Two buffers and not two views of one: what a branch of an exported graph reads may share no memory.
        for name, indices in zip(("row", "column"), torch.triu_indices(head_dim, head_dim)):
            self.register_buffer(name, indices.clone(), persistent=False)

    @property
    def num_features(self) -> int:  # type: ignore[override]
        return 1 + self.head_dim + len(self.row)

    @property
    def weight(self) -> float:
        return 1.0

    def features(self, x: Tensor) -> Tensor:
        # x_a x_b stands once for (a, b) and (b, a): weight 1 where a != b, 1/2 on the diagonal.
        weight = torch.ones_like(self.row, dtype=x.dtype).masked_fill(self.row == self.column, 0.5**0.5)
        return torch.cat([torch.ones_like(x[..., :1]), x, x[..., self.row] * x[..., self.column] * weight], dim=-1)


@register_feature_map("efficient")
class Efficient(ExponentialFeatureMap):
    """Efficient attention, softmax of the query over features and of the key over tokens; R = D.

    Keys are multiplied by the text's number of tokens, so that the mean weight is 1, as near/far attention needs.

    References:
        - Efficient Attention: Attention with Linear Complexities: https://arxiv.org/abs/1812.01243
    """

    def __init__(self, num_heads: int, head_dim: int, *, seed: int = 0) -> None:
        super().__init__(num_heads, head_dim, seed=seed)
        self.num_features = head_dim

    @property
    def weight(self) -> float:
        return 1.0

    def query_logits(self, query: Tensor) -> Tensor:
        return query

    def key_logits(self, key: Tensor) -> Tensor:
        return key

    def query_offset(self, query: Tensor) -> Tensor:
        return -query.logsumexp(dim=-1, keepdim=True)

    def feature_offset(self, key: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return math.log(key.shape[-2]) - key.logsumexp(dim=-2, keepdim=True)
        mask = mask[:, None, :, None]
        count = mask.sum(dim=-2, keepdim=True).clamp(min=1)
        # A text without a token keeps finite logits: its keys are multiplied away, and so are their gradients.
        hidden = ~mask & mask.any(dim=-2, keepdim=True)
        return count.to(key.dtype).log() - key.masked_fill(hidden, -math.inf).logsumexp(dim=-2, keepdim=True)
