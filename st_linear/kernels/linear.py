"""Purely linear attention with φ inside the kernels, forward and backward: nothing of size N × R is ever stored.

Shapes as in :mod:`st_linear.attention`. With query and key logits ``l`` (φ is exp(l), or a pointwise function of l), a
feature r is a slot that holds a weighted mean of the values, and a query reads a weighted mean of the R slots:

    ``mass_r = Σ_j φ_k,jr``                                   ``mean_r = Σ_j φ_k,jr v_j / mass_r``
    ``a_ir = φ_q,ir mass_r / Σ_s φ_q,is mass_s``              ``o_i = Σ_r a_ir mean_r``

This is ``φ_q S / φ_q s`` with the state S divided by s. Means lie among the values and weights in [0, 1], so both fit
half precision at any length. Key sums are kept in units of each feature's peak and query sums in units of each row's,
found online, so nothing over- or underflows. φ and all sums are float32. Products run on tensor cores: of
half-precision operands in the forward pass, in tf32 for gradients of states and logits, whose errors bfloat16 would
raise above those of plain PyTorch. Float32 inputs get float32 products.

What each kernel moves, in units of N·H·D elements (the states are small beside it), and computes for a token and head:

    =================  ==========================================  ==========================  ====================
    kernel             a program for each                          units                       operations
    =================  ==========================================  ==========================  ====================
    state              chunk of a text, head, tile of R            k, v                        4·R·D
    readout            block of rows, head                         q; writes o                 4·R·D
    query gradient     chunk, head, tile of R                      q, o, do; may write dq      4·R·D to 10·R·D
    query rows         block of rows, head, if R has > 1 tile      q, o, do; writes dq         6·R·D
    key rows           block of rows, head                         k, v; writes dk, dv         8·R·D
    key gradient       chunk, head, tile of R, for learned maps    k, v                        6·R·D
    =================  ==========================================  ==========================  ====================

So the forward pass moves 4 units, the floor: each input is read once, and the output written once. The backward pass
moves 8 (q, k, v, o, do, dq, dk, dv: the floor again) where R is one tile and the map is not learned, 2 more for
learned keys and 3 more for further tiles; tiles of one chunk run side by side and share its rows through the L2 cache.
Without a projection each evaluation of φ takes 2·R·D operations less. Partial states, R·(D + 2) float32 per chunk and
head, are about ``_PROGRAMS`` in number at any length, and one per text and head. No atomics: a run repeats to the bit.
"""

# Triton reads a kernel's annotations: only compile-time constants have one.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from st_linear.feature_maps import FeatureMap, feature_map_class

Kind = Literal["elu", "relu", "exp"]

_PROGRAMS = 256
"""Programs to cut a batch into where each carries a partial state: a few for each multiprocessor of a large GPU."""
_MIN_CHUNK = 256
"""Fewest tokens per partial state: below this, writing and merging states costs more than it spreads."""


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FusedMap:
    """How a kernel evaluates φ(x) of scaled queries or keys; a constant factor is left out, as it cancels.

    Attributes:
        kind: ``exp``; ``elu``, which is elu + 1; or ``relu``.
        projection: (H, R', D): logits are ``projection · x``. Without it they are x itself, and R' = D.
        bias: (H, R'), added to the logits; needs a projection.
        mirrored: Logits are [x, -x]: R = 2·R'.
        squared_norm: ``|x|²/2`` is taken from the logits; ``exp`` only.
        offset: Added to the features of ``relu``.
    """

    kind: Kind
    projection: Tensor | None = None
    bias: Tensor | None = None
    mirrored: bool = False
    squared_norm: bool = False
    offset: float = 0.0


def _pointwise(kind: Kind, offset: float = 0.0) -> Callable[[Any], tuple[FusedMap, FusedMap]]:
    def build(feature_map: Any) -> tuple[FusedMap, FusedMap]:
        fused = FusedMap(kind, getattr(feature_map, "projection", None), offset=offset)
        return fused, fused

    return build


def _favor(feature_map: Any) -> tuple[FusedMap, FusedMap]:
    fused = FusedMap("exp", feature_map.projection, squared_norm=True)
    return fused, fused


def _learned(kind: Kind, mirrored: bool = False) -> Callable[[Any], tuple[FusedMap, FusedMap]]:
    def build(feature_map: Any) -> tuple[FusedMap, FusedMap]:
        query, key = (
            FusedMap(kind, side.weight, side.bias.flatten(1), mirrored=mirrored)
            for side in (feature_map.query_projection, feature_map.key_projection)
        )
        return query, key

    return build


_FUSED: dict[str, Callable[[Any], tuple[FusedMap, FusedMap]]] = {
    "elu": _pointwise("elu"),
    "relu": _pointwise("relu"),
    "favor": _favor,
    "favor_relu": _pointwise("relu", offset=1e-3),
    "hedgehog": _learned("exp", mirrored=True),
    "t2r": _learned("relu"),
}


def fused_maps(feature_map: FeatureMap) -> tuple[FusedMap, FusedMap] | None:
    """The map of queries and of keys as the kernels take them, or None where they do not know the map.

    Subclasses of a known map may compute anything: they are not known.
    """
    name = getattr(feature_map, "name", None)
    if name not in _FUSED or type(feature_map) is not feature_map_class(name):
        return None
    return _FUSED[name](feature_map)


def fused_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    max_length: int,
    query_map: FusedMap,
    key_map: FusedMap,
    scale: float | None = None,
) -> Tensor:
    """Linear attention of each text to itself, on CUDA or in Triton's interpreter. Differentiable once.

    Text t is the rows ``starts[t]`` to ``starts[t] + lengths[t] - 1``. Rows of no text are never read; their outputs
    and gradients are zeros, as are those of rows whose weights sum to zero. Time O(N·R·D); memory beyond inputs and
    outputs O(N·H + B·H·R·D).

    Args:
        query: (N, H, D), float32, bfloat16 or float16. Any strides; copied where the last is not 1.
        key: As query.
        value: As query.
        starts: (B,) int32 on the device of ``query``, never falling, empty texts included.
        lengths: (B,) int32, 0 for an empty text. Texts do not overlap.
        max_length: At least the largest of ``lengths``; given, so that the device need not be asked.
        query_map: φ of queries. Gradients reach its projection and bias.
        key_map: φ of keys, of the same kind and R.
        scale: Factor of the logits, ``D**-0.5`` by default; its root goes into q and into k before φ.

    Returns:
        (N, H, D), contiguous, in the dtype of ``query``.

    Raises:
        ValueError: If shapes, dtypes or the two maps do not fit.
    """
    if query.ndim != 3 or not query.shape == key.shape == value.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"query, key and value must all be (N, H, D), got {shapes}")
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype:
        dtypes = ", ".join(str(x.dtype) for x in (query, key, value))
        raise ValueError(f"query, key and value must all be float32, bfloat16 or float16, got {dtypes}")
    if starts.ndim != 1 or starts.shape != lengths.shape or not starts.dtype == lengths.dtype == torch.int32:
        got = " and ".join(f"{tuple(x.shape)} {x.dtype}" for x in (starts, lengths))
        raise ValueError(f"starts and lengths must both be (B,) int32, got {got}")
    if query_map.kind != key_map.kind:
        raise ValueError(f"query_map and key_map must be of one kind, got {query_map.kind!r} and {key_map.kind!r}")
    _, num_heads, head_dim = query.shape
    query_weight, query_bias = _signed_projection(query_map, num_heads, head_dim, "query_map")
    key_weight, key_bias = _signed_projection(key_map, num_heads, head_dim, "key_map")
    query_features, key_features = (head_dim if x is None else x.shape[1] for x in (query_weight, key_weight))
    if query_features != key_features or (query_weight is None) != (key_weight is None):
        got = " and ".join(
            f"{features} {'without' if weight is None else 'with'} a projection"
            for features, weight in ((query_features, query_weight), (key_features, key_weight))
        )
        raise ValueError(f"query_map and key_map must have the same number of features, got {got}")
    if 0 in query.shape or 0 in starts.shape:
        return query.masked_fill(torch.ones_like(query, dtype=torch.bool), 0)
    plan = _Plan(
        root=(head_dim**-0.5 if scale is None else scale) ** 0.5,
        max_length=max_length,
        num_features=query_features,
        kind=key_map.kind,
        squared_norm=key_map.squared_norm,
        query_offset=query_map.offset,
        key_offset=key_map.offset,
    )
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    return _FusedLinearAttention.apply(
        query, key, value, query_weight, query_bias, key_weight, key_bias, starts, lengths, plan
    )


def _signed_projection(
    fused: FusedMap, num_heads: int, head_dim: int, name: str
) -> tuple[Tensor | None, Tensor | None]:
    """The projection (H, R, D) and bias (H, R), float32, with their mirror images; autograd folds these back."""
    weight, bias = fused.projection, fused.bias
    if weight is None:
        if bias is not None or fused.mirrored or fused.squared_norm or fused.kind == "exp":
            raise ValueError(f"{name} of kind {fused.kind!r} with these options needs a projection")
        return None, None
    if weight.ndim != 3 or (weight.shape[0], weight.shape[2]) != (num_heads, head_dim):
        expected = f"({num_heads}, R, {head_dim})"
        raise ValueError(f"{name}.projection must be (H, R, D) = {expected}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(f"{name}.bias must be (H, R) = {tuple(weight.shape[:2])}, got {tuple(bias.shape)}")
    if fused.squared_norm and fused.kind != "exp":
        raise ValueError(f"{name}.squared_norm goes with kind 'exp' alone, got {fused.kind!r}")
    sides = [None if x is None else x.float() for x in (weight, bias)]
    if fused.mirrored:
        sides = [None if x is None else torch.cat([x, -x], dim=1) for x in sides]
    return sides[0], sides[1]


@dataclass(frozen=True)
class _Plan:
    """What a call fixes beside its tensors."""

    root: float
    max_length: int
    num_features: int
    kind: Kind
    squared_norm: bool
    query_offset: float
    key_offset: float


class _Launcher:
    """Tile sizes, chunks and the arguments that kernels share."""

    def __init__(self, query: Tensor, starts: Tensor, lengths: Tensor, projected: bool, plan: _Plan) -> None:
        self.device, self.features = query.device, plan.num_features
        self.rows, self.heads, self.head_dim = query.shape
        self.texts = starts.shape[0]
        single = query.dtype == torch.float32
        block_d = max(16, triton.next_power_of_2(self.head_dim))
        # Tiles whose logits and sums stay in registers, checked by compiling for sm_90: large where a state is carried
        # through a long loop, small where programs are short, so that several share a multiprocessor. Products of
        # float32 need registers for their operands too.
        sizes = (32, 32) if single else (128 if block_d <= 64 else 64, 64)
        whole_r = max(16, triton.next_power_of_2(self.features))
        chunk_r, block_r = (min(whole_r, size) if projected else block_d for size in sizes)
        self.block_t = (16 if chunk_r > 32 else 32) if single else 64
        self.chunk_tile = {"BLOCK_R": chunk_r, "num_warps": 8 if chunk_r * max(block_d, 64) > 64 * 64 else 4}
        self.block_tile = {"BLOCK_R": block_r, "num_warps": 8 if block_r * block_d > 64 * 64 else 4}
        self.tiles = triton.cdiv(self.features, chunk_r)
        chunk = max(_MIN_CHUNK, triton.cdiv(self.rows * self.heads * self.tiles, _PROGRAMS))
        self.chunk = triton.cdiv(chunk, self.block_t) * self.block_t
        # Texts of one chunk each: their sums are the state, and there is nothing to merge.
        self.whole = plan.max_length <= self.chunk
        self.slots = self.texts if self.whole else self.rows // self.chunk + self.texts
        self.texts_and_sizes: dict[str, Any] = {
            "starts": starts,
            "lengths": lengths,
            "num_heads": self.heads,
            "D": self.head_dim,
            "R": self.features,
            "BLOCK_D": block_d,
        }
        self.common: dict[str, Any] = {
            **self.texts_and_sizes,
            "num_texts": self.texts,
            "root": plan.root,
            "KIND": plan.kind,
            "TEXTS": triton.next_power_of_2(self.texts),
            "PRECISION": "interpret" if query.device.type == "cpu" else "ieee" if single else "tf32",
        }

    def by_chunk(self, kernel: Any, **arguments: Any) -> None:
        """One program per chunk, head and tile of R."""
        tile = {**self.chunk_tile, "BLOCK_T": self.block_t}
        arguments = {**self.common, **tile, "chunk": self.chunk, "WHOLE": self.whole, **arguments}
        self._launch(kernel, self.slots * self.heads * self.tiles, arguments)

    def by_block(self, kernel: Any, **arguments: Any) -> None:
        """One program per block of rows and head; every row is in one block, those of no text too."""
        tile = {**self.block_tile, "BLOCK_T": self.block_t}
        arguments = {**self.common, **tile, "num_rows": self.rows, **arguments}
        self._launch(kernel, (self.rows // self.block_t + self.texts) * self.heads, arguments)

    def merge(self, kernel: Any, **arguments: Any) -> None:
        """One program per text, head and 16 features."""
        arguments = {**self.texts_and_sizes, "chunk": self.chunk, "BLOCK_R": 16, "num_warps": 2, **arguments}
        self._launch(kernel, self.texts * self.heads * triton.cdiv(self.features, 16), arguments)

    def _launch(self, kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        # Triton launches on the current device, whatever the tensors' own.
        with torch.cuda.device_of(arguments["starts"]):
            kernel[(programs,)](**arguments)

    def state(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(count, self.heads, self.features, self.head_dim, dtype=dtype, device=self.device)

    def per_feature(self, count: int) -> Tensor:
        return torch.empty(count, self.heads, self.features, device=self.device)

    def per_row(self) -> Tensor:
        return torch.empty(self.rows, self.heads, device=self.device)


def _strides(name: str, x: Tensor) -> dict[str, Any]:
    """A tensor (N, H, D) and its strides as arguments of a kernel."""
    return {name: x, f"{name}_row": x.stride(0), f"{name}_head": x.stride(1)}


class _FusedLinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_weight: Tensor | None,
        query_bias: Tensor | None,
        key_weight: Tensor | None,
        key_bias: Tensor | None,
        starts: Tensor,
        lengths: Tensor,
        plan: _Plan,
    ) -> Tensor:
        launcher = _Launcher(query, starts, lengths, query_weight is not None, plan)
        # Rounding a projection moves all logits a little, and some across the kink of relu, where gradients jump: for
        # relu it stays float32, and kernels take it as two terms of half precision.
        dtype = query.dtype if plan.kind == "exp" else torch.float32
        query_weight, key_weight = (
            None if x is None else x.to(dtype).contiguous() for x in (query_weight, key_weight)
        )
        query_bias, key_bias = (None if x is None else x.contiguous() for x in (query_bias, key_bias))
        state = {
            "mean": launcher.state(launcher.texts, query.dtype),
            "peak": launcher.per_feature(launcher.texts),
            "mass": launcher.per_feature(launcher.texts),
        }
        partial = state
        if not launcher.whole:
            partial = {
                "mean": launcher.state(launcher.slots),
                "peak": launcher.per_feature(launcher.slots),
                "mass": launcher.per_feature(launcher.slots),
            }
        launcher.by_chunk(
            _state_kernel,
            **_strides("key", key),
            **_strides("value", value),
            **partial,
            weight=key_weight,
            bias=key_bias,
            SQUARED=plan.squared_norm,
            OFFSET=plan.key_offset,
        )
        if not launcher.whole:
            parts = {f"partial_{name}": x for name, x in partial.items()}
            launcher.merge(_merge_states_kernel, **parts, **state, KIND=plan.kind)

        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        inverse = launcher.per_row()
        # Pointwise maps need no stabiliser in the backward pass: the argument is not read.
        shift = launcher.per_row() if plan.kind == "exp" else inverse
        launcher.by_block(
            _readout_kernel,
            **_strides("query", query),
            **state,
            weight=query_weight,
            bias=query_bias,
            output=output,
            shift=shift,
            inverse=inverse,
            OFFSET=plan.query_offset,
        )
        ctx.save_for_backward(
            query, key, value, output, query_weight, query_bias, key_weight, key_bias, starts, lengths,
            *state.values(), shift, inverse,
        )  # fmt: skip
        ctx.plan = plan
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, query_weight, query_bias, key_weight, key_bias, starts, lengths, *rest = (
            ctx.saved_tensors
        )
        mean, peak, mass, shift, inverse = rest
        plan: _Plan = ctx.plan
        launcher = _Launcher(query, starts, lengths, query_weight is not None, plan)
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        needs_query, *needs_kv, learns_qw, learns_qb, learns_kw, learns_kb = ctx.needs_input_grad[:7]
        needs_kv, learns_query, learns_key = any(needs_kv), learns_qw or learns_qb, learns_kw or learns_kb
        grads: dict[str, Tensor | None] = dict.fromkeys(_INPUTS)

        one_tile = launcher.tiles == 1
        by_chunk = needs_kv or learns_query or learns_key
        query_side = {
            **_strides("query", query),
            **_strides("grad", grad),
            "output": output,
            "weight": query_weight,
            "bias": query_bias,
            "mean": mean,
            "peak": peak,
            "mass": mass,
            "shift": shift,
            "inverse": inverse,
            "OFFSET": plan.query_offset,
        }
        if needs_query and not (by_chunk and one_tile):
            grads["query"] = torch.empty(query.shape, dtype=query.dtype, device=query.device)
            launcher.by_block(_query_rows_kernel, **query_side, grad_query=grads["query"])
        if by_chunk:
            if needs_query and one_tile:
                # Programs write the rows of their chunk alone.
                grads["query"] = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
            grad_mean = launcher.state(launcher.texts)
            grad_sum = launcher.per_feature(launcher.texts)
            whole, slots = launcher.whole, launcher.slots
            partial_mean = grad_mean if whole else launcher.state(slots)
            partial_sum = grad_sum if whole else launcher.per_feature(slots)
            grad_weight = launcher.state(slots) if learns_query else None
            grad_bias = launcher.per_feature(slots) if learns_query else None
            launcher.by_chunk(
                _query_gradient_kernel,
                # The sums of two gradients leave half the registers.
                BLOCK_T=launcher.block_t // 2 if learns_query else launcher.block_t,
                **query_side,
                grad_query=grads["query"] if one_tile else None,
                grad_mean=partial_mean,
                grad_sum=partial_sum,
                grad_weight=grad_weight,
                grad_bias=grad_bias,
            )
            if not whole:
                launcher.merge(
                    _merge_gradients_kernel,
                    partial_mean=partial_mean,
                    partial_sum=partial_sum,
                    mass=mass,
                    grad_mean=grad_mean,
                    grad_sum=grad_sum,
                )
            if grad_weight is not None and grad_bias is not None:
                grads["query_weight"], grads["query_bias"] = grad_weight.sum(0), grad_bias.sum(0)
        if needs_kv or learns_key:
            key_side = {
                **_strides("key", key),
                **_strides("value", value),
                "weight": key_weight,
                "bias": key_bias,
                "peak": peak,
                "grad_mean": grad_mean,
                "grad_sum": grad_sum,
                "SQUARED": plan.squared_norm,
                "OFFSET": plan.key_offset,
            }
        if needs_kv:
            grads["key"] = torch.empty(key.shape, dtype=key.dtype, device=key.device)
            grads["value"] = torch.empty(value.shape, dtype=value.dtype, device=value.device)
            launcher.by_block(_key_rows_kernel, **key_side, grad_key=grads["key"], grad_value=grads["value"])
        if learns_key:
            grad_weight, grad_bias = launcher.state(launcher.slots), launcher.per_feature(launcher.slots)
            launcher.by_chunk(_key_gradient_kernel, **key_side, grad_weight=grad_weight, grad_bias=grad_bias)
            grads["key_weight"], grads["key_bias"] = grad_weight.sum(0), grad_bias.sum(0)
        needed = (x if need else None for x, need in zip(grads.values(), ctx.needs_input_grad))
        return *needed, None, None, None


_INPUTS = ("query", "key", "value", "query_weight", "query_bias", "key_weight", "key_bias")


@triton.jit
def _dot(a, b, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    a, b = a.to(DTYPE), b.to(DTYPE)
    if PRECISION == "interpret":
        # Triton's interpreter would multiply the bits of bfloat16.
        result = tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        result = tl.dot(a, b, input_precision=PRECISION)
    return result


@triton.jit
def _locate(starts, slot, num_texts, size, TEXTS: tl.constexpr):
    """The text that a slot of ``size`` rows belongs to, and the first of its rows.

    Text t has the slots from ``begin_t // size + t`` on. As ``begin`` never falls, these ranges do not overlap,
    whatever the lengths, and there are at most ``N // size + B``: no table is built. The rows before text 0 count as
    its own.
    """
    texts = tl.arange(0, TEXTS)
    begins = tl.load(starts + texts, mask=(texts > 0) & (texts < num_texts), other=0)
    text = tl.sum(((texts < num_texts) & (begins // size + texts <= slot)).to(tl.int32)) - 1
    begin = tl.load(starts + text, mask=text > 0, other=0)
    return text, begin + (slot - begin // size - text) * size


@triton.jit
def _chunk(starts, lengths, slot, num_texts, size, WHOLE: tl.constexpr, TEXTS: tl.constexpr):
    """The text of a chunk, and its first row and the row after its last, equal where the chunk is empty."""
    if WHOLE:
        text = slot
        low = tl.load(starts + text)
        high = low + tl.load(lengths + text)
    else:
        text, low = _locate(starts, slot, num_texts, size, TEXTS)
        start = tl.load(starts + text)
        high = tl.minimum(low + size, start + tl.load(lengths + text))
        low = tl.maximum(low, start)
    return text, low, high


@triton.jit
def _load(base, row, column, row_stride, mask, D: tl.constexpr):
    """A tile of ``mask``'s shape; ``row`` and ``column`` hold indices along its two dimensions, either way round."""
    return tl.load(base + row.to(tl.int64) * row_stride + column, mask=mask & (column < D), other=0.0)


@triton.jit
def _weights(weight, bias, head, r, BLOCK_D: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """A tile (R, D) of the projection and (R,) of its bias, zeros where there is none."""
    d = tl.arange(0, BLOCK_D)
    if weight is None:
        w = tl.zeros([1, 1], tl.float32)
    else:
        mask = (r < R)[:, None] & (d < D)[None, :]
        w = tl.load(weight + (head * R + r)[:, None] * D + d[None, :], mask=mask, other=0.0)
    b = tl.zeros_like(r).to(tl.float32) if bias is None else tl.load(bias + head * R + r, mask=r < R, other=0.0)
    return w, b


@triton.jit
def _parts(w, DTYPE: tl.constexpr):
    """A float32 projection as the sum of two of half precision, which is exact to 16 bits at least."""
    high = w.to(DTYPE)
    return high, (w - high.to(tl.float32)).to(DTYPE)


@triton.jit
def _logits_across(x, w, b, weight, root, SQUARED: tl.constexpr, PRECISION: tl.constexpr):
    """Logits (R, T) of x (D, T)."""
    scaled = x.to(tl.float32) * root
    if weight is None:
        logits = scaled
    elif w.dtype == x.dtype:
        logits = _dot(w, x, x.dtype, PRECISION) * root + b[:, None]
    else:
        high, low = _parts(w, x.dtype)
        logits = (_dot(high, x, x.dtype, PRECISION) + _dot(low, x, x.dtype, PRECISION)) * root + b[:, None]
    if SQUARED:
        logits -= tl.sum(scaled * scaled, 0)[None, :] * 0.5
    return logits


@triton.jit
def _logits_down(x, w, b, weight, root, SQUARED: tl.constexpr, PRECISION: tl.constexpr):
    """Logits (T, R) of x (T, D)."""
    scaled = x.to(tl.float32) * root
    if weight is None:
        logits = scaled
    elif w.dtype == x.dtype:
        logits = _dot(x, tl.trans(w), x.dtype, PRECISION) * root + b[None, :]
    else:
        high, low = _parts(tl.trans(w), x.dtype)
        logits = (_dot(x, high, x.dtype, PRECISION) + _dot(x, low, x.dtype, PRECISION)) * root + b[None, :]
    if SQUARED:
        logits -= tl.sum(scaled * scaled, 1)[:, None] * 0.5
    return logits


@triton.jit
def _features(logits, KIND: tl.constexpr, OFFSET: tl.constexpr):
    if KIND == "elu":
        result = tl.where(logits >= 0, logits + 1, tl.exp(tl.minimum(logits, 0.0)))
    else:
        result = tl.maximum(logits, 0.0) + OFFSET
    return result


@triton.jit
def _slopes(logits, KIND: tl.constexpr):
    if KIND == "elu":
        result = tl.where(logits >= 0, 1.0, tl.exp(tl.minimum(logits, 0.0)))
    else:
        result = tl.where(logits > 0, 1.0, 0.0)
    return result


@triton.jit
def _rescale(old, new, KIND: tl.constexpr):
    """Factor that brings what was divided by ``old`` (by exp(old) for exp) to ``new``; 0 where there was nothing."""
    if KIND == "exp":
        factor = tl.exp(old - tl.where(new == float("-inf"), 0.0, new))
    else:
        factor = old / tl.where(new > 0, new, 1.0)
    return factor


@triton.jit
def _online(terms, peak, KIND: tl.constexpr):
    """Weights of a tile's terms over the largest so far in its row, that peak, and what earlier sums shrink by."""
    new = tl.maximum(peak, tl.max(terms, 1))
    if KIND == "exp":
        weights = tl.exp(terms - tl.where(new == float("-inf"), 0.0, new)[:, None])
    else:
        weights = terms * (1 / tl.where(new > 0, new, 1.0))[:, None]
    return weights, new, _rescale(peak, new, KIND)


@triton.jit
def _nothing(size: tl.constexpr, KIND: tl.constexpr):
    """The peak of no terms."""
    peak = tl.full([size], float("-inf"), tl.float32) if KIND == "exp" else tl.zeros([size], tl.float32)
    return peak


@triton.jit
def _total(peak, mass, KIND: tl.constexpr):
    """The sum of a feature over keys, ``mass`` in units of its peak: its logarithm for exp."""
    if KIND == "exp":
        total = tl.where(mass > 0, peak + tl.log(tl.where(mass > 0, mass, 1.0)), float("-inf"))
    else:
        total = peak * mass
    return total


@triton.jit
def _load_total(peak, mass, at, mask, KIND: tl.constexpr):
    return _total(tl.load(peak + at, mask=mask, other=0.0), tl.load(mass + at, mask=mask, other=0.0), KIND)


@triton.jit
def _query_weights(logits, total, shift, inverse, KIND: tl.constexpr, OFFSET: tl.constexpr):
    """a_ir from logits, features' totals, rows' stabilisers and inverse sums, all broadcastable."""
    if KIND == "exp":
        weights = tl.exp(logits + total - shift) * inverse
    else:
        weights = _features(logits, KIND, OFFSET) * total * inverse
    return weights


@triton.jit
def _query_slopes(logits, weights, total, inverse, KIND: tl.constexpr):
    """The derivative of ``a_ir`` times its row's sum by ``l_ir``, over that sum."""
    slopes = weights if KIND == "exp" else _slopes(logits, KIND) * total * inverse
    return slopes


@triton.jit
def _key_weights(logits, peak, KIND: tl.constexpr, OFFSET: tl.constexpr):
    """φ of keys in units of the feature's peak, and its derivative by the logits."""
    if KIND == "exp":
        weights = tl.exp(logits - tl.where(peak == float("-inf"), float("inf"), peak))
        slopes = weights
    else:
        inverse = tl.where(peak > 0, 1 / tl.where(peak > 0, peak, 1.0), 0.0)
        weights = _features(logits, KIND, OFFSET) * inverse
        slopes = _slopes(logits, KIND) * inverse
    return weights, slopes


@triton.jit
def _state_kernel(
    key, key_row, key_head, value, value_row, value_head, weight, bias, mean, peak, mass,
    starts, lengths, num_texts, num_heads, chunk, root,
    KIND: tl.constexpr, SQUARED: tl.constexpr, OFFSET: tl.constexpr, WHOLE: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    TEXTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum of φ_k v and of φ_k over a chunk, in units of each feature's peak; the mean where the chunk is the text."""
    tiles: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    program = tl.program_id(0)
    r = program % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    head = program // tiles % num_heads
    slot = program // (tiles * num_heads)
    _, low, high = _chunk(starts, lengths, slot, num_texts, chunk, WHOLE, TEXTS)
    key += head.to(tl.int64) * key_head
    value += head.to(tl.int64) * value_head
    d = tl.arange(0, BLOCK_D)
    w, b = _weights(weight, bias, head, r, BLOCK_D, D, R)

    top = _nothing(BLOCK_R, KIND)
    total = tl.zeros([BLOCK_R], tl.float32)
    sums = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for row in range(low, high, BLOCK_T):
        t = row + tl.arange(0, BLOCK_T)
        valid = t < high
        x = _load(key, t[None, :], d[:, None], key_row, valid[None, :], D)
        v = _load(value, t[:, None], d[None, :], value_row, valid[:, None], D)
        logits = _logits_across(x, w, b, weight, root, SQUARED, PRECISION)
        if KIND == "exp":
            terms = tl.where(valid[None, :], logits, float("-inf"))
        else:
            terms = tl.where(valid[None, :], _features(logits, KIND, OFFSET), 0.0)
        weights, top, shrink = _online(terms, top, KIND)
        # Sum the rounded weights, so that the mean is one of the values with weights that add up to 1.
        weights = weights.to(v.dtype)
        total = total * shrink + tl.sum(weights.to(tl.float32), 1)
        sums = sums * shrink[:, None] + _dot(weights, v, v.dtype, PRECISION)

    if WHOLE:
        sums = sums / tl.where(total > 0, total, 1.0)[:, None]
    at = (slot * num_heads + head).to(tl.int64) * R + r
    tl.store(peak + at, top, mask=r < R)
    tl.store(mass + at, total, mask=r < R)
    tl.store(mean + at[:, None] * D + d[None, :], sums, mask=(r < R)[:, None] & (d < D)[None, :])


@triton.jit
def _merge_states_kernel(
    partial_mean, partial_peak, partial_mass, mean, peak, mass,
    starts, lengths, num_heads, chunk,
    KIND: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The mean, peak and mass of each feature of a text from those of its chunks."""
    tiles: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    program = tl.program_id(0)
    r = program % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    head = program // tiles % num_heads
    text = program // (tiles * num_heads)
    d = tl.arange(0, BLOCK_D)
    inside = (r < R)[:, None] & (d < D)[None, :]
    first, last = _slots_of(starts, lengths, text, chunk)

    top = _nothing(BLOCK_R, KIND)
    total = tl.zeros([BLOCK_R], tl.float32)
    sums = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for slot in range(first, last):
        at = (slot * num_heads + head).to(tl.int64) * R + r
        chunk_top = tl.load(partial_peak + at, mask=r < R, other=0.0)
        new = tl.maximum(top, chunk_top)
        shrink, factor = _rescale(top, new, KIND), _rescale(chunk_top, new, KIND)
        total = total * shrink + tl.load(partial_mass + at, mask=r < R, other=0.0) * factor
        part = tl.load(partial_mean + at[:, None] * D + d[None, :], mask=inside, other=0.0)
        sums = sums * shrink[:, None] + part * factor[:, None]
        top = new

    at = (text * num_heads + head).to(tl.int64) * R + r
    tl.store(peak + at, top, mask=r < R)
    tl.store(mass + at, total, mask=r < R)
    tl.store(mean + at[:, None] * D + d[None, :], sums / tl.where(total > 0, total, 1.0)[:, None], mask=inside)


@triton.jit
def _slots_of(starts, lengths, text, size):
    """First slot of a text, and the slot after its last that holds tokens."""
    begin = tl.load(starts + text, mask=text > 0, other=0)
    stop = tl.load(starts + text) + tl.load(lengths + text)
    first = begin // size + text
    return first, first + tl.where(tl.load(lengths + text) > 0, (stop - begin + size - 1) // size, 0)


@triton.jit
def _readout_kernel(
    query, query_row, query_head, weight, bias, mean, peak, mass, output, shift, inverse,
    starts, lengths, num_texts, num_heads, num_rows, root,
    KIND: tl.constexpr, OFFSET: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    TEXTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of a block of queries, and what their weights were divided by."""
    program = tl.program_id(0)
    head = program % num_heads
    text, t, owned, valid = _block(starts, lengths, program // num_heads, num_texts, num_rows, BLOCK_T, TEXTS)
    d = tl.arange(0, BLOCK_D)
    x = _load(query + head.to(tl.int64) * query_head, t[:, None], d[None, :], query_row, valid[:, None], D)

    top = _nothing(BLOCK_T, KIND)
    total = tl.zeros([BLOCK_T], tl.float32)
    sums = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for tile in range(0, R, BLOCK_R):
        r = tile + tl.arange(0, BLOCK_R)
        w, b = _weights(weight, bias, head, r, BLOCK_D, D, R)
        at = (text * num_heads + head).to(tl.int64) * R + r
        mass_r = _load_total(peak, mass, at, r < R, KIND)
        v = tl.load(mean + at[:, None] * D + d[None, :], mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
        # The query's |x|²/2 is the same for all features: it cancels.
        logits = _logits_down(x, w, b, weight, root, False, PRECISION)
        terms = logits + mass_r[None, :] if KIND == "exp" else _features(logits, KIND, OFFSET) * mass_r[None, :]
        weights, top, shrink = _online(terms, top, KIND)
        weights = weights.to(v.dtype)
        total = total * shrink + tl.sum(weights.to(tl.float32), 1)
        sums = sums * shrink[:, None] + _dot(weights, v, v.dtype, PRECISION)

    if KIND == "exp":
        scale = 1 / tl.where(total > 0, total, 1.0)
        positive = valid & (total > 0)
    else:
        # Sums this small have lost terms to underflow: float32's tiny / eps, as in st_linear.attention.
        positive = valid & (total * top > 9.860761315262648e-32)
        scale = 1 / tl.where(positive, total, 1.0)
    out = tl.where(positive[:, None], sums * scale[:, None], 0.0)
    at = t.to(tl.int64) * num_heads + head
    tl.store(output + at[:, None] * D + d[None, :], out, mask=owned[:, None] & (d < D)[None, :])
    if KIND == "exp":
        tl.store(shift + at, top, mask=owned)
    else:
        scale = scale / tl.where(positive, top, 1.0)
    tl.store(inverse + at, tl.where(positive, scale, 0.0), mask=owned)


@triton.jit
def _block(starts, lengths, slot, num_texts, num_rows, BLOCK_T: tl.constexpr, TEXTS: tl.constexpr):
    """The text of a block of rows, the rows, which of them it stores, and which of these are tokens."""
    text, low = _locate(starts, slot, num_texts, BLOCK_T, TEXTS)
    t = low + tl.arange(0, BLOCK_T)
    # Rows behind a text's last token are its own, to be zeroed, up to the next text.
    end = tl.load(starts + text + 1, mask=text + 1 < num_texts, other=num_rows)
    start = tl.load(starts + text)
    stop = start + tl.load(lengths + text)
    return text, t, t < end, (t >= start) & (t < stop)


@triton.jit
def _query_gradient_kernel(
    query, query_row, query_head, grad, grad_row, grad_head, output, weight, bias,
    mean, peak, mass, shift, inverse, grad_mean, grad_sum, grad_query, grad_weight, grad_bias,
    starts, lengths, num_texts, num_heads, chunk, root,
    KIND: tl.constexpr, OFFSET: tl.constexpr, WHOLE: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    TEXTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_i a_ir grad_i and -Σ_i a_ir grad_i·o_i over a chunk; gradients of the map and, where asked for, of queries."""
    tiles: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    program = tl.program_id(0)
    r = program % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    head = program // tiles % num_heads
    slot = program // (tiles * num_heads)
    text, low, high = _chunk(starts, lengths, slot, num_texts, chunk, WHOLE, TEXTS)
    query += head.to(tl.int64) * query_head
    grad += head.to(tl.int64) * grad_head
    d = tl.arange(0, BLOCK_D)
    inside = (r < R)[:, None] & (d < D)[None, :]
    w, b = _weights(weight, bias, head, r, BLOCK_D, D, R)
    at = (text * num_heads + head).to(tl.int64) * R + r
    mass_r = _load_total(peak, mass, at, r < R, KIND)
    means = tl.load(mean + at[:, None] * D + d[None, :], mask=inside, other=0.0)

    d_mean = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    d_sum = tl.zeros([BLOCK_R], tl.float32)
    if grad_weight is not None:
        d_weight = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        d_bias = tl.zeros([BLOCK_R], tl.float32)
    for row in range(low, high, BLOCK_T):
        t = row + tl.arange(0, BLOCK_T)
        valid = t < high
        x = _load(query, t[None, :], d[:, None], query_row, valid[None, :], D)
        g = _load(grad, t[:, None], d[None, :], grad_row, valid[:, None], D)
        o = _load(output + head * D, t[:, None], d[None, :], num_heads * D, valid[:, None], D)
        delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        token = t.to(tl.int64) * num_heads + head
        shift_t = tl.load(shift + token, mask=valid, other=float("inf"))
        inverse_t = tl.load(inverse + token, mask=valid, other=0.0)
        logits = _logits_across(x, w, b, weight, root, False, PRECISION)
        a = _query_weights(logits, mass_r[:, None], shift_t[None, :], inverse_t[None, :], KIND, OFFSET)
        rounded = a.to(g.dtype)
        d_mean += _dot(rounded, g, g.dtype, PRECISION)
        d_sum -= tl.sum(rounded.to(tl.float32) * delta[None, :], 1)
        if (grad_weight is not None) or (grad_query is not None):
            slopes = _query_slopes(logits, a, mass_r[:, None], inverse_t[None, :], KIND)
            d_logits = slopes * (_dot(means, tl.trans(g), g.dtype, PRECISION) - delta[None, :])
            if grad_weight is not None:
                d_weight += _dot(d_logits, tl.trans(x), tl.float32, PRECISION)
                d_bias += tl.sum(d_logits, 1)
            if grad_query is not None:
                d_x = tl.trans(d_logits) if weight is None else _dot(tl.trans(d_logits), w, tl.float32, PRECISION)
                tl.store(
                    grad_query + token[:, None] * D + d[None, :], d_x * root, mask=valid[:, None] & (d < D)[None, :]
                )

    at = (slot * num_heads + head).to(tl.int64) * R + r
    if WHOLE:
        # grad_mean over the mass is what the key kernels take.
        mass_r = tl.load(mass + at, mask=r < R, other=0.0)
        scale = tl.where(mass_r > 0, 1 / tl.where(mass_r > 0, mass_r, 1.0), 0.0)
        d_mean = d_mean * scale[:, None]
        d_sum = d_sum * scale
    tl.store(grad_mean + at[:, None] * D + d[None, :], d_mean, mask=inside)
    tl.store(grad_sum + at, d_sum, mask=r < R)
    if grad_weight is not None:
        tl.store(grad_weight + at[:, None] * D + d[None, :], d_weight * root, mask=inside)
        tl.store(grad_bias + at, d_bias, mask=r < R)


@triton.jit
def _merge_gradients_kernel(
    partial_mean, partial_sum, mass, grad_mean, grad_sum,
    starts, lengths, num_heads, chunk,
    D: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of the state of a text, over the mass, from those of its chunks."""
    tiles: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    program = tl.program_id(0)
    r = program % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    head = program // tiles % num_heads
    text = program // (tiles * num_heads)
    d = tl.arange(0, BLOCK_D)
    inside = (r < R)[:, None] & (d < D)[None, :]
    first, last = _slots_of(starts, lengths, text, chunk)

    d_mean = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    d_sum = tl.zeros([BLOCK_R], tl.float32)
    for slot in range(first, last):
        at = (slot * num_heads + head).to(tl.int64) * R + r
        d_mean += tl.load(partial_mean + at[:, None] * D + d[None, :], mask=inside, other=0.0)
        d_sum += tl.load(partial_sum + at, mask=r < R, other=0.0)

    at = (text * num_heads + head).to(tl.int64) * R + r
    mass_r = tl.load(mass + at, mask=r < R, other=0.0)
    scale = tl.where(mass_r > 0, 1 / tl.where(mass_r > 0, mass_r, 1.0), 0.0)
    tl.store(grad_mean + at[:, None] * D + d[None, :], d_mean * scale[:, None], mask=inside)
    tl.store(grad_sum + at, d_sum * scale, mask=r < R)


@triton.jit
def _query_rows_kernel(
    query, query_row, query_head, grad, grad_row, grad_head, output, weight, bias,
    mean, peak, mass, shift, inverse, grad_query,
    starts, lengths, num_texts, num_heads, num_rows, root,
    KIND: tl.constexpr, OFFSET: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    TEXTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries, over all tiles of R."""
    program = tl.program_id(0)
    head = program % num_heads
    text, t, owned, valid = _block(starts, lengths, program // num_heads, num_texts, num_rows, BLOCK_T, TEXTS)
    d = tl.arange(0, BLOCK_D)
    x = _load(query + head.to(tl.int64) * query_head, t[:, None], d[None, :], query_row, valid[:, None], D)
    g = _load(grad + head.to(tl.int64) * grad_head, t[:, None], d[None, :], grad_row, valid[:, None], D)
    o = _load(output + head * D, t[:, None], d[None, :], num_heads * D, valid[:, None], D)
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    token = t.to(tl.int64) * num_heads + head
    shift_t = tl.load(shift + token, mask=valid, other=float("inf"))
    inverse_t = tl.load(inverse + token, mask=valid, other=0.0)

    d_x = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for tile in range(0, R, BLOCK_R):
        r = tile + tl.arange(0, BLOCK_R)
        w, b = _weights(weight, bias, head, r, BLOCK_D, D, R)
        at = (text * num_heads + head).to(tl.int64) * R + r
        mass_r = _load_total(peak, mass, at, r < R, KIND)
        v = tl.load(mean + at[:, None] * D + d[None, :], mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
        logits = _logits_down(x, w, b, weight, root, False, PRECISION)
        a = _query_weights(logits, mass_r[None, :], shift_t[:, None], inverse_t[:, None], KIND, OFFSET)
        slopes = _query_slopes(logits, a, mass_r[None, :], inverse_t[:, None], KIND)
        d_logits = slopes * (_dot(g, tl.trans(v), g.dtype, PRECISION) - delta[:, None])
        if weight is None:
            d_x += d_logits
        else:
            d_x += _dot(d_logits, w, tl.float32, PRECISION)

    tl.store(grad_query + token[:, None] * D + d[None, :], d_x * root, mask=owned[:, None] & (d < D)[None, :])


@triton.jit
def _key_rows_kernel(
    key, key_row, key_head, value, value_row, value_head, weight, bias,
    peak, grad_mean, grad_sum, grad_key, grad_value,
    starts, lengths, num_texts, num_heads, num_rows, root,
    KIND: tl.constexpr, SQUARED: tl.constexpr, OFFSET: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    TEXTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values, over all tiles of R."""
    program = tl.program_id(0)
    head = program % num_heads
    text, t, owned, valid = _block(starts, lengths, program // num_heads, num_texts, num_rows, BLOCK_T, TEXTS)
    d = tl.arange(0, BLOCK_D)
    x = _load(key + head.to(tl.int64) * key_head, t[:, None], d[None, :], key_row, valid[:, None], D)
    v = _load(value + head.to(tl.int64) * value_head, t[:, None], d[None, :], value_row, valid[:, None], D)

    d_x = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    d_value = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    d_norm = tl.zeros([BLOCK_T], tl.float32)
    for tile in range(0, R, BLOCK_R):
        r = tile + tl.arange(0, BLOCK_R)
        w, b = _weights(weight, bias, head, r, BLOCK_D, D, R)
        at = (text * num_heads + head).to(tl.int64) * R + r
        peak_r = tl.load(peak + at, mask=r < R, other=float("inf"))
        d_sum = tl.load(grad_sum + at, mask=r < R, other=0.0)
        d_mean = tl.load(grad_mean + at[:, None] * D + d[None, :], mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
        logits = _logits_down(x, w, b, weight, root, SQUARED, PRECISION)
        logits = tl.where(valid[:, None], logits, float("-inf"))
        weights, slopes = _key_weights(logits, peak_r[None, :], KIND, OFFSET)
        d_logits = slopes * (_dot(v, tl.trans(d_mean), tl.float32, PRECISION) + d_sum[None, :])
        d_value += _dot(weights, d_mean, tl.float32, PRECISION)
        if weight is None:
            d_x += d_logits
        else:
            d_x += _dot(d_logits, w, tl.float32, PRECISION)
        if SQUARED:
            d_norm += tl.sum(d_logits, 1)

    d_x = d_x * root
    if SQUARED:
        d_x -= x.to(tl.float32) * (root * root) * d_norm[:, None]
    at = (t.to(tl.int64) * num_heads + head)[:, None] * D + d[None, :]
    tl.store(grad_key + at, tl.where(valid[:, None], d_x, 0.0), mask=owned[:, None] & (d < D)[None, :])
    tl.store(grad_value + at, tl.where(valid[:, None], d_value, 0.0), mask=owned[:, None] & (d < D)[None, :])


@triton.jit
def _key_gradient_kernel(
    key, key_row, key_head, value, value_row, value_head, weight, bias,
    peak, grad_mean, grad_sum, grad_weight, grad_bias,
    starts, lengths, num_texts, num_heads, chunk, root,
    KIND: tl.constexpr, SQUARED: tl.constexpr, OFFSET: tl.constexpr, WHOLE: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    TEXTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys' map over a chunk."""
    tiles: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    program = tl.program_id(0)
    r = program % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    head = program // tiles % num_heads
    slot = program // (tiles * num_heads)
    text, low, high = _chunk(starts, lengths, slot, num_texts, chunk, WHOLE, TEXTS)
    key += head.to(tl.int64) * key_head
    value += head.to(tl.int64) * value_head
    d = tl.arange(0, BLOCK_D)
    inside = (r < R)[:, None] & (d < D)[None, :]
    w, b = _weights(weight, bias, head, r, BLOCK_D, D, R)
    at = (text * num_heads + head).to(tl.int64) * R + r
    peak_r = tl.load(peak + at, mask=r < R, other=float("inf"))
    d_sum = tl.load(grad_sum + at, mask=r < R, other=0.0)
    d_mean = tl.load(grad_mean + at[:, None] * D + d[None, :], mask=inside, other=0.0)

    d_weight = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    d_bias = tl.zeros([BLOCK_R], tl.float32)
    for row in range(low, high, BLOCK_T):
        t = row + tl.arange(0, BLOCK_T)
        valid = t < high
        x = _load(key, t[None, :], d[:, None], key_row, valid[None, :], D)
        v = _load(value, t[:, None], d[None, :], value_row, valid[:, None], D)
        logits = _logits_across(x, w, b, weight, root, SQUARED, PRECISION)
        logits = tl.where(valid[None, :], logits, float("-inf"))
        _, slopes = _key_weights(logits, peak_r[:, None], KIND, OFFSET)
        d_logits = slopes * (_dot(d_mean, tl.trans(v), tl.float32, PRECISION) + d_sum[:, None])
        d_weight += _dot(d_logits, tl.trans(x), tl.float32, PRECISION)
        d_bias += tl.sum(d_logits, 1)

    at = (slot * num_heads + head).to(tl.int64) * R + r
    tl.store(grad_weight + at[:, None] * D + d[None, :], d_weight * root, mask=inside)
    tl.store(grad_bias + at, d_bias, mask=r < R)
