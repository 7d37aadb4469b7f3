"""Near kernels against a float64 reference: in Triton's interpreter on the CPU, and compiled with ``-m gpu``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

if not torch.cuda.is_available():
    # Triton reads this once, when a kernel is decorated.
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from conftest import refused, slow

from st_linear.kernels.near import near_attention, near_attention_backward


class Tolerance(NamedTuple):
    output: float
    gradient: float


# Absolute and relative at once; in half precision, multiples of the largest error of plain PyTorch in that dtype.
# Triton's interpreter truncates to bfloat16 where a GPU rounds, and so errs up to twice as much as a GPU does.
TOLERANCES = {
    torch.float32: Tolerance(1e-5, 1e-4),
    torch.bfloat16: Tolerance(2, 3),
    torch.float16: Tolerance(2, 3),
}
WINDOWS = [1, 5, 16, 64]
HALF = [torch.bfloat16, torch.float16]
H = 2
DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"


class Texts(NamedTuple):
    """Where the texts lie in N rows."""

    starts: list[int]
    lengths: list[int]
    N: int


class Result(NamedTuple):
    output: Tensor
    lse: Tensor
    gradients: list[Tensor]
    """Of query, key and value."""


def packed(*lengths: int) -> Texts:
    return Texts([sum(lengths[:text]) for text in range(len(lengths))], list(lengths), sum(lengths))


def padded(*lengths: int, side: str = "right") -> Texts:
    """T is one more than the longest text, so that every text has a gap beside it."""
    T = max(lengths) + 1
    starts = [text * T + (T - length if side == "left" else 0) for text, length in enumerate(lengths)]
    return Texts(starts, list(lengths), T * len(lengths))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_inputs(texts: Texts, head_dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key, value and the gradient of the output, (N, H, D), zeros in the rows of no text."""
    inputs = randn(4, texts.N, H, head_dim).to(dtype)
    return list(inputs.masked_fill(~rows_of(texts)[:, None, None], 0))


def rows_of(texts: Texts) -> Tensor:
    """(N,), true in the rows of a text."""
    rows = torch.zeros(texts.N, dtype=torch.bool)
    for start, length in zip(texts.starts, texts.lengths):
        rows[start : start + length] = True
    return rows


def reference(
    inputs: Sequence[Tensor],
    texts: Texts,
    *,
    window: int,
    scale: float,
    dtype: torch.dtype = torch.float64,
    far: tuple[Tensor, Tensor] | None = None,
) -> Result:
    """The definition in plain PyTorch and its autograd; ``far`` (N, H, D) and (N, H) is added to both sums."""
    query, key, value = (x.detach().to(dtype).requires_grad_() for x in inputs[:3])
    outputs, logs = query.new_zeros(query.shape), query.new_full(query.shape[:2], float("-inf"))
    for start, length in zip(texts.starts, texts.lengths):
        rows = slice(start, start + length)
        block = torch.arange(length) // window
        near = (block[:, None] - block[None]).abs() <= 1
        logits = scale * torch.einsum("ihd,jhd->hij", query[rows], key[rows])
        weights = logits.exp() * near
        numerator, denominator = torch.einsum("hij,jhd->ihd", weights, value[rows]), weights.sum(dim=-1).T
        if far is not None:
            numerator, denominator = numerator + far[0][rows].to(dtype), denominator + far[1][rows].to(dtype)
        outputs = outputs.slice_scatter(numerator / denominator[..., None], 0, start, start + length)
        logs = logs.slice_scatter(denominator.log(), 0, start, start + length)
    gradients = torch.autograd.grad(outputs, [query, key, value], inputs[3].to(dtype))
    return Result(outputs.detach(), logs.detach().T, list(gradients))


def run(
    inputs: Sequence[Tensor],
    texts: Texts,
    *,
    window: int,
    scale: float,
    max_length: int | None = None,
    whole: Result | None = None,
) -> Result:
    """The kernels; the backward takes the output and lse of ``whole``, by default the forward's own."""
    query, key, value, grad_output = (x.to(DEVICE) for x in inputs)
    starts, lengths = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (texts.starts, texts.lengths))
    options = {"max_length": max(texts.lengths, default=0) if max_length is None else max_length}
    options |= {"window": window, "scale": scale}
    with nan_in_empty_tensors():
        output, lse = near_attention(query, key, value, starts, lengths, **options)
        merged = (output, lse) if whole is None else (whole.output.float().to(DEVICE), whole.lse.float().to(DEVICE))
        gradients = near_attention_backward(grad_output, query, key, value, *merged, starts, lengths, **options)
    assert {x.dtype for x in (output, lse, *gradients)} == {torch.float32}
    return Result(output.cpu(), lse.cpu(), [gradient.cpu() for gradient in gradients])


@contextmanager
def nan_in_empty_tensors() -> Iterator[None]:
    """Shows what a kernel leaves unwritten."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_same(result: Result, expected: Result, plain: Result | None = None) -> None:
    """Within float32's tolerances; with ``plain``, an evaluation in half precision, within multiples of its error."""
    pairs = [(result.output, expected.output), (result.lse, expected.lse), *zip(result.gradients, expected.gradients)]
    if plain is None:
        bounds = [TOLERANCES[torch.float32].output] * 2 + [TOLERANCES[torch.float32].gradient] * 3
    else:
        tolerance = TOLERANCES[torch.bfloat16]
        factors = [tolerance.output] * 2 + [tolerance.gradient] * 3
        others = [plain.output, plain.lse, *plain.gradients]
        bounds = [
            factor * (other.double() - right).nan_to_num().abs().max().item()
            for factor, other, (_, right) in zip(factors, others, pairs)
        ]
    for (actual, right), bound in zip(pairs, bounds):
        assert_close(actual.double(), right, atol=bound, rtol=bound if plain is None else 0)


RAGGED = (130, 0, 7, 63, 1)
LAYOUTS = {
    "packed": packed(*RAGGED),
    "right-padded": padded(*RAGGED),
    "left-padded": padded(*RAGGED, side="left"),
    # The first rows, the last rows and some between belong to no text, and the texts come in no order.
    "scattered": Texts([100, 4, 0, 31], [63, 26, 0, 7], 170),
    # Gaps that several programs share.
    "sparse": Texts([5000, 3], [1, 7], 9000),
}


@pytest.mark.parametrize(
    ("layout", "window"),
    [
        ("packed", WINDOWS[0]),
        *(slow("packed", window) for window in WINDOWS[1:]),
        slow("right-padded", 5),
        ("left-padded", 64),
        ("scattered", 16),
        slow("sparse", 5),
    ],
)
def test_equals_reference(layout: str, window: int) -> None:
    texts = LAYOUTS[layout]
    inputs = make_inputs(texts, 8)
    expected = reference(inputs, texts, window=window, scale=0.3)
    poisoned = [x.masked_fill(~rows_of(texts)[:, None, None], float("nan")) for x in inputs]
    assert_same(run(poisoned, texts, window=window, scale=0.3), expected)


@pytest.mark.parametrize("head_dim", [32, 48])
def test_head_sizes(head_dim: int) -> None:
    texts = packed(7, 63)
    inputs = make_inputs(texts, head_dim)
    expected = reference(inputs, texts, window=16, scale=head_dim**-0.5)
    assert_same(run(inputs, texts, window=16, scale=head_dim**-0.5), expected)


@pytest.mark.parametrize(
    ("window", "dtype"),
    [
        (5, HALF[1]),
        (16, HALF[0]),
        *(slow(*case) for case in ((1, HALF[0]), (16, HALF[1]), (64, HALF[0]))),
    ],
)
def test_half_precision_is_near_plain_pytorch(window: int, dtype: torch.dtype) -> None:
    texts = packed(130, 0, 7)
    inputs = make_inputs(texts, 32, dtype)
    expected = reference(inputs, texts, window=window, scale=32**-0.5)
    plain = reference(inputs, texts, window=window, scale=32**-0.5, dtype=dtype)
    assert_same(run(inputs, texts, window=window, scale=32**-0.5), expected, plain)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_gradients_of_a_larger_normaliser(dtype: torch.dtype) -> None:
    texts = packed(63, 0, 7)
    inputs = make_inputs(texts, 8, dtype)
    far = randn(texts.N, H, 8, seed=1), 5 + 5 * randn(texts.N, H, seed=2).abs()
    expected = reference(inputs, texts, window=5, scale=0.3, far=far)
    plain = None if dtype is torch.float32 else reference(inputs, texts, window=5, scale=0.3, far=far, dtype=dtype)
    result = run(inputs, texts, window=5, scale=0.3, whole=expected)
    assert_same(result._replace(output=expected.output, lse=expected.lse), expected, plain)


def test_any_strides() -> None:
    texts = packed(33)
    inputs = make_inputs(texts, 8)
    expected = reference(inputs, texts, window=5, scale=0.3)
    # Slices of one tensor, as a fused projection gives them, and heads first.
    fused = torch.stack(inputs[:3], dim=1).unbind(dim=1)
    assert not any(x.is_contiguous() for x in fused)
    assert_same(run([*fused, inputs[3]], texts, window=5, scale=0.3), expected)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    whole = expected._replace(output=heads_first[0].clone().copy_(expected.output), lse=expected.lse.T.contiguous().T)
    assert_same(run(heads_first, texts, window=5, scale=0.3, whole=whole), expected)


def test_logits_beyond_the_range_of_exp() -> None:
    texts = packed(33)
    # Products of integers are exact, so that only the kernels' own rounding is seen.
    query, key, *rest = (x.mul(2).round() for x in make_inputs(texts, 8))
    inputs = [query, key, *rest]
    expected = reference(inputs, texts, window=5, scale=4.0)
    assert expected.lse.max() > 100
    result = run(inputs, texts, window=5, scale=4.0)
    for actual, right in zip((result.output, result.lse, *result.gradients), (*expected[:2], *expected.gradients)):
        assert_close(actual.double(), right, atol=1e-3, rtol=1e-3)


def test_max_length_is_an_upper_bound() -> None:
    texts = packed(33, 7)
    inputs = make_inputs(texts, 8)
    exact, generous = (run(inputs, texts, window=5, scale=0.3, max_length=size) for size in (33, 200))
    assert_close(exact, generous, atol=0, rtol=0)
    # Texts beyond it are cut: what is left out reads as rows of no text.
    cut = run(inputs, texts, window=5, scale=0.3, max_length=20)
    assert_same(cut, reference(inputs, Texts([0, 33], [20, 7], 40), window=5, scale=0.3))


@pytest.mark.parametrize("texts", [packed(), packed(0, 0), Texts([], [], 3), Texts([1], [0], 3)], ids=str)
def test_no_token(texts: Texts) -> None:
    inputs = [torch.full((texts.N, H, 8), float("nan"))] * 4
    result = run(inputs, texts, window=5, scale=0.3)
    assert_close(result.lse, torch.full((H, texts.N), float("-inf")))
    for x in (result.output, *result.gradients):
        assert_close(x, torch.zeros(texts.N, H, 8))


def test_errors() -> None:
    x, lse = torch.zeros(6, H, 8), torch.zeros(H, 6)
    starts, lengths = torch.tensor([[0, 4], [4, 2]], dtype=torch.int32)
    rest = (starts, lengths)
    options = {"max_length": 4, "window": 2, "scale": 1.0}
    with refused("query, key and value must all be (N, H, D), got (6, 2, 8), (6, 2, 8), (5, 2, 8)"):
        near_attention(x, x, x[1:], *rest, **options)
    with refused("query must have a head size D of at most 128, got 129"):
        near_attention(*[torch.zeros(6, H, 129)] * 3, *rest, **options)
    with refused("query, key and value must share one dtype out of torch.float32, torch.bfloat16, torch.float16, got"):
        near_attention(x, x, x.half(), *rest, **options)
    with refused("query, key and value must share one dtype out of torch.float32, torch.bfloat16, torch.float16, got"):
        near_attention(*[x.double()] * 3, *rest, **options)
    with refused("query, key and value must have last stride 1, got strides (16, 8, 1), (16, 1, 2), (16, 8, 1)"):
        near_attention(x, torch.zeros(6, 8, H).transpose(1, 2), x, *rest, **options)
    with refused("starts and lengths must both be (B,) in torch.int32, got (2,) torch.int64, (2,) torch.int32"):
        near_attention(x, x, x, starts.long(), lengths, **options)
    with refused("starts and lengths must both be (B,) in torch.int32, got (2,) torch.int32, (1,) torch.int32"):
        near_attention(x, x, x, starts, lengths[1:], **options)
    with refused("starts and lengths must be contiguous, got strides (0,), (1,)"):
        near_attention(x, x, x, starts[:1].expand(2), lengths, **options)
    with refused("window must be at least 1 token, got 0"):
        near_attention(x, x, x, *rest, **(options | {"window": 0}))
    with refused("window must be at least 1 token, got 0"):
        near_attention_backward(x, x, x, x, x, lse, *rest, **(options | {"window": 0}))
    with refused("grad_output must be (N, H, D) = (6, 2, 8), floating point, with last stride 1, got (5, 2, 8)"):
        near_attention_backward(x[1:], x, x, x, x, lse, *rest, **options)
    with refused(
        "output must be (N, H, D) = (6, 2, 8), floating point, with last stride 1, got (6, 2, 8), torch.int64"
    ):
        near_attention_backward(x, x, x, x, x.long(), lse, *rest, **options)
    with refused("lse must be (H, N) = (2, 6) in float32, got (6, 2) in torch.float32"):
        near_attention_backward(x, x, x, x, x, lse.T, *rest, **options)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_a_gpu(capability: int) -> None:
    """The interpreter takes more than the compiler does."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", COMPILE, str(capability)], env=environment, check=True)


COMPILE = """
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from st_linear.kernels import near

KERNELS = (
    near._clear_kernel, near._forward_kernel, near._query_gradient_kernel, near._key_value_gradient_kernel
)
POINTERS = {"starts": "*i32", "lengths": "*i32", **dict.fromkeys(("query", "key", "value", "grad_output"), None)}
INTEGERS = ("num_texts", "num_rows", "max_length")
NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
CASES = ((torch.bfloat16, 64, 64), (torch.bfloat16, 128, 128), (torch.float16, 48, 5), (torch.float32, 32, 16))
for dtype, head_dim, window in CASES:
    options = near._options(torch.empty(1, 1, head_dim, dtype=dtype), window)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    for kernel in KERNELS:
        constants = {**options, "COUNT": 3, "SIZE": 12 * head_dim, "TEXTS": 1024}
        signature = {}
        for argument in kernel.arg_names:
            if argument in constants:
                signature[argument] = "constexpr"
            elif argument in POINTERS:
                signature[argument] = POINTERS[argument] or NAMES[dtype]
            elif argument in INTEGERS or argument.endswith("stride"):
                signature[argument] = "i32"
            else:
                signature[argument] = "fp32" if argument.endswith("scale") else "*fp32"
        constants = {(kernel.arg_names.index(x),): y for x, y in constants.items() if x in kernel.arg_names}
        target = GPUTarget("cuda", int(sys.argv[1]), 32)
        triton.compile(ASTSource(kernel, signature, constants), target=target, options=launch)
"""


@pytest.mark.gpu
@pytest.mark.parametrize("window", [5, 64, 100, 128])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_long_text_on_a_gpu(dtype: torch.dtype, window: int) -> None:
    assert DEVICE == "cuda", "needs a CUDA device, and TRITON_INTERPRET unset"
    assert_long_text_is_right(16_384, 64, dtype, window=window)


def assert_long_text_is_right(length: int, head_dim: int, dtype: torch.dtype, *, window: int) -> None:
    """By slices of eight blocks: an output depends on one block on either side, a gradient on two."""
    texts = packed(length, 0, 101)
    inputs = make_inputs(texts, head_dim, dtype)
    scale = head_dim**-0.5
    result = run(inputs, texts, window=window, scale=scale)
    assert_close(run(inputs, texts, window=window, scale=scale), result, atol=0, rtol=0)
    size, margin = 8 * window, 2 * window
    slices = [
        (slice(0, size), slice(0, size - margin)),
        (slice(size, 2 * size), slice(margin, size - margin)),
        (slice(length // window * window - size, length), slice(margin, None)),
        (slice(length, texts.N), slice(None)),
    ]
    for part, inner in slices:
        sliced = [x[part] for x in inputs]
        local = packed(len(sliced[0]))
        expected = reference(sliced, local, window=window, scale=scale)
        plain = None
        if dtype is not torch.float32:
            plain = take(reference(sliced, local, window=window, scale=scale, dtype=dtype), inner)
        assert_same(take(take(result, part), inner), take(expected, inner), plain)


def take(result: Result, part: slice) -> Result:
    return Result(result.output[part], result.lse[:, part], [gradient[part] for gradient in result.gradients])
