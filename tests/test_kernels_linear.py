"""The fused kernels against a float64 definition: in Triton's interpreter on the CPU, and on CUDA with ``-m gpu``."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from conftest import refused, slow
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("triton")

from st_linear import kernels
from st_linear.attention import linear_attention
from st_linear.feature_maps import Elu, FeatureMap, feature_map_names, make_feature_map
from st_linear.kernels import linear
from st_linear.kernels.linear import FusedMap, fused_linear_attention, fused_maps

H = 2
FUSED = ("elu", "relu", "favor", "favor_relu", "hedgehog", "t2r")
PARAMETERS = ("query_projection.weight", "query_projection.bias", "key_projection.weight", "key_projection.bias")
# Absolute and relative at once; in half precision, multiples of the largest error that PyTorch's autocast makes.
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2, 3), torch.float16: (2, 3)}

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="runs in Triton's interpreter, which conftest.py chooses where there is no CUDA"
)


class Batch(NamedTuple):
    """Rows (N, H, D) of texts; the others hold NaN."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor
    starts: list[int]
    lengths: list[int]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def texts(self) -> list[slice]:
        return [slice(start, start + length) for start, length in zip(self.starts, self.lengths)]

    def hidden(self) -> Tensor:
        hidden = torch.ones(self.query.shape[0], dtype=torch.bool, device=self.query.device)
        for text in self.texts():
            hidden[text] = False
        return hidden


class Run(NamedTuple):
    output: Tensor
    gradients: list[Tensor]


def make_batch(
    *lengths: int, head_dim: int, gap: int = 0, dtype: torch.dtype = torch.float32, seed: int = 0, num_heads: int = H
) -> Batch:
    """``gap`` rows of NaN before, between and behind the texts; 0 is the packed form."""
    starts = [gap + sum(lengths[:text]) + gap * text for text in range(len(lengths))]
    num_rows = sum(lengths) + gap * (len(lengths) + 1)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4, num_rows, num_heads, head_dim, generator=generator, dtype=torch.float64).to(dtype)
    # Values with a mean: that of a text would else be near zero, and relative errors without a meaning.
    rows[2] += 0.5
    batch = Batch(*rows, starts, list(lengths))
    for x in rows:
        x[batch.hidden()] = float("nan")
    return batch


def make_map(name: str, head_dim: int, num_features: int | None = None, num_heads: int = H) -> FeatureMap:
    options = {} if num_features is None else {"num_features": num_features}
    feature_map = make_feature_map(name, num_heads, head_dim, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in feature_map.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return feature_map


def logits(x: Tensor, feature_map: FeatureMap, side: str, parameters: dict[str, Tensor]) -> Tensor:
    """(T, H, D), scaled, to (H, T, R)."""
    x = x.transpose(0, 1)
    if feature_map.name in ("elu", "relu"):
        return x
    if feature_map.name in ("favor", "favor_relu"):
        projected = x @ feature_map.projection.to(x.dtype).transpose(-1, -2)
        return projected - x.square().sum(-1, keepdim=True) / 2 if feature_map.name == "favor" else projected
    weight, bias = (parameters[f"{side}_projection.{part}"].to(x.dtype) for part in ("weight", "bias"))
    projected = x @ weight.transpose(-1, -2) + bias
    return torch.cat([projected, -projected], dim=-1) if feature_map.name == "hedgehog" else projected


def definition(query: Tensor, key: Tensor, value: Tensor, feature_map: FeatureMap, parameters: Any) -> Tensor:
    """Attention within one text by the O(T²) definition; products in half precision under autocast."""
    root = query.shape[-1] ** -0.25
    dtype = torch.promote_types(query.dtype, torch.float32)
    l_q = logits(query.to(dtype) * root, feature_map, "query", parameters)
    l_k = logits(key.to(dtype) * root, feature_map, "key", parameters)
    value = value.to(dtype).transpose(0, 1)
    if feature_map.name in ("favor", "hedgehog"):
        if dtype == torch.float64:
            weights = torch.logsumexp(l_q[:, :, None] + l_k[:, None], dim=-1).softmax(dim=-1)
            return (weights @ value).transpose(0, 1)
        l_q, l_k = l_q - l_q.detach().amax(-1, keepdim=True), l_k - l_k.detach().amax((-1, -2), keepdim=True)
        phi_q, phi_k = l_q.exp(), l_k.exp()
    elif feature_map.name == "elu":
        phi_q, phi_k = (torch.where(x >= 0, x + 1, x.clamp(max=0).exp()) for x in (l_q, l_k))
    else:
        phi_q, phi_k = (x.relu() + (1e-3 if feature_map.name == "favor_relu" else 0) for x in (l_q, l_k))
    weights = phi_q @ phi_k.transpose(-1, -2)
    total = weights.sum(-1, keepdim=True)
    return ((weights @ value) / torch.where(total > 0, total, 1)).transpose(0, 1)


def run_definition(batch: Batch, feature_map: FeatureMap, autocast: torch.dtype | None = None) -> Run:
    """In float64, or in float32 under autocast."""
    dtype = torch.float64 if autocast is None else torch.float32
    parameters = {name: x.detach().to(dtype).requires_grad_() for name, x in feature_map.named_parameters()}
    leaves = [x.detach().to(dtype if autocast is None else x.dtype).requires_grad_() for x in batch.inputs]
    outputs = torch.zeros_like(leaves[0])
    with torch.autocast(leaves[0].device.type, dtype=autocast, enabled=autocast is not None):
        for text in filter(lambda text: text.start < text.stop, batch.texts()):
            output = definition(*(x[text] for x in leaves), feature_map, parameters)
            outputs = outputs.index_put((torch.arange(text.start, text.stop),), output.to(outputs.dtype))
    grad = batch.grad.to(outputs.dtype).nan_to_num()
    gradients = torch.autograd.grad(outputs, [*leaves, *parameters.values()], grad)
    return Run(outputs.detach(), list(gradients))


def fused(batch: Batch, feature_map: FeatureMap, inputs: Any = None, **options: Any) -> Tensor:
    maps = fused_maps(feature_map)
    assert maps is not None
    starts, lengths = (
        torch.tensor(x, dtype=torch.int32).to(batch.query.device) for x in (batch.starts, batch.lengths)
    )
    options = {"max_length": max(batch.lengths, default=0), "query_map": maps[0], "key_map": maps[1]} | options
    return fused_linear_attention(*(inputs or batch.inputs), starts, lengths, **options)


def run_fused(batch: Batch, feature_map: FeatureMap, **options: Any) -> Run:
    leaves = [x.detach().requires_grad_() for x in batch.inputs]
    output = fused(batch, feature_map, leaves, **options)
    gradients = torch.autograd.grad(output, [*leaves, *feature_map.parameters()], batch.grad)
    for tensor in (output, *gradients[:3]):
        assert tensor.dtype == batch.query.dtype
        assert not tensor[batch.hidden()].any()
    return Run(output.detach(), list(gradients))


def assert_as_good(actual: Run, batch: Batch, feature_map: FeatureMap) -> None:
    """Float32 within the tolerance of float64; half precision within a multiple of autocast's largest error."""
    dtype, exact = batch.query.dtype, run_definition(batch, feature_map)
    tolerance, gradient_tolerance = TOLERANCES[dtype]
    if dtype == torch.float32:
        assert_close(actual.output.double(), exact.output, rtol=tolerance, atol=tolerance)
        for gradient, expected in zip(actual.gradients, exact.gradients):
            assert_close(gradient.double(), expected, rtol=gradient_tolerance, atol=gradient_tolerance)
        return
    plain = run_definition(batch, feature_map, autocast=dtype)

    def assert_error_within(multiple: float, actual: Tensor, plain: Tensor, exact: Tensor) -> None:
        error = float((plain.double() - exact).abs().max())
        assert_close(actual.double(), exact, rtol=0, atol=multiple * error)

    assert_error_within(tolerance, actual.output, plain.output, exact.output)
    for gradients in zip(actual.gradients, plain.gradients, exact.gradients):
        assert_error_within(gradient_tolerance, *gradients)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """States of 64 tokens, so that texts of this size have several."""
    monkeypatch.setattr(linear, "_MIN_CHUNK", 64)
    monkeypatch.setattr(linear, "_PROGRAMS", 10**6)


CASES = [
    ("hedgehog", 8, 6),
    ("elu", 8, None),
    ("favor", 8, 6),
    ("favor", 32, 33),
    ("relu", 48, None),
    ("favor_relu", 32, 50),
    ("hedgehog", 48, 20),
    ("t2r", 32, 17),
]
FAST = [*((*case, torch.float32) for case in CASES[:4]), (*CASES[0], torch.bfloat16)]


@interpreted
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("name", "head_dim", "num_features", "dtype"),
    [case if case in FAST else slow(*case) for case in ((*shapes, dtype) for shapes in CASES for dtype in TOLERANCES)],
    ids=str,
)
def test_equals_the_definition(name: str, head_dim: int, num_features: int | None, dtype: torch.dtype) -> None:
    batch = make_batch(7, 0, 70, head_dim=head_dim, gap=3 if head_dim == 8 else 0, dtype=dtype)
    feature_map = make_map(name, head_dim, num_features)
    assert_as_good(run_fused(batch, feature_map), batch, feature_map)


@interpreted
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("name", "gap"),
    [
        *(("elu", 0), ("hedgehog", 2)),
        *(slow(*case) for case in (("elu", 2), ("hedgehog", 0))),
    ],
)
def test_all_lengths(name: str, gap: int) -> None:
    batch, feature_map = make_batch(1, 7, 0, 63, 130, 0, head_dim=8, gap=gap, num_heads=1), make_map(name, 8, None, 1)
    assert_as_good(run_fused(batch, feature_map), batch, feature_map)


@interpreted
@pytest.mark.parametrize(
    ("name", "num_features", "dtype"),
    [("favor", 256, torch.bfloat16), ("hedgehog", 80, torch.float32)],
    ids=["favor", "hedgehog"],
)
def test_many_features(name: str, num_features: int, dtype: torch.dtype) -> None:
    batch = make_batch(40, head_dim=24, dtype=dtype, num_heads=1)
    feature_map = make_map(name, 24, num_features, num_heads=1)
    assert_as_good(run_fused(batch, feature_map), batch, feature_map)


@interpreted
@pytest.mark.parametrize("name", ["hedgehog", *(slow(name) for name in ("elu", "favor"))])
def test_texts_of_one_chunk_are_not_merged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, feature_map = make_batch(20, 0, 33, head_dim=8, gap=2), make_map(name, 8, None if name == "elu" else 6)
    monkeypatch.setattr(linear._Launcher, "merge", None)
    assert_as_good(run_fused(batch, feature_map), batch, feature_map)


@interpreted
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", [name if name in ("favor", "hedgehog") else slow(name) for name in FUSED])
def test_extreme_logits(name: str) -> None:
    """Logits of 1e4 and more: a float32 logit is known to about 1e-3, and so are weights."""
    batch = make_batch(66, head_dim=8, num_heads=1)
    batch = batch._replace(query=batch.query * 100, key=batch.key * 100)
    feature_map = make_map(name, 8, 6 if name in ("favor", "hedgehog") else None, num_heads=1)
    with torch.no_grad():
        for parameter in feature_map.parameters():
            parameter *= 100
    actual = run_fused(batch, feature_map)
    assert all(x.isfinite().all() for x in (actual.output, *actual.gradients))
    assert_close(actual.output.double(), run_definition(batch, feature_map).output, rtol=1e-2, atol=1e-2)


@interpreted
def test_a_query_that_meets_no_key_gives_zeros() -> None:
    batch, feature_map = make_batch(9, head_dim=8, num_heads=1), make_map("relu", 8, num_heads=1)
    query, key = batch.query.abs(), batch.key.abs()
    query[:4, :, 4:] = -1
    key[:, :, :4] = -1
    batch = batch._replace(query=query, key=key)
    actual = run_fused(batch, feature_map)
    assert not actual.output[:4].any()
    assert not actual.gradients[0][:4].any()
    assert_as_good(actual, batch, feature_map)


@pytest.mark.slow
@interpreted
def test_strided_inputs() -> None:
    feature_map = make_map("hedgehog", 8, 6)
    batch = make_batch(20, 20, head_dim=8)
    expected = run_fused(batch, feature_map)
    fused_qkv = torch.stack(batch.inputs, dim=1).requires_grad_()
    by_text = [x.unflatten(0, (2, 20)).transpose(1, 2).contiguous().requires_grad_() for x in batch.inputs]
    last_strided = [x.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_() for x in batch.inputs]
    for leaves, inputs in (
        ([fused_qkv], fused_qkv.unbind(1)),
        (by_text, [x.transpose(1, 2).flatten(0, 1) for x in by_text]),
        (last_strided, last_strided),
    ):
        output = fused(batch, feature_map, inputs)
        assert_close(output, expected.output, rtol=0, atol=0)
        grad = batch.grad.transpose(0, 2).contiguous().transpose(0, 2)
        gradients = torch.autograd.grad(output, leaves, grad)
        if len(leaves) == 1:
            gradients = gradients[0].unbind(1)
        elif leaves is by_text:
            gradients = [x.transpose(1, 2).flatten(0, 1) for x in gradients]
        assert_close(list(gradients), expected.gradients[:3], rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("needed", [("query",), ("key",), ("value",), PARAMETERS[:1], PARAMETERS[3:]], ids=" ".join)
def test_gradients_of_some_inputs(needed: tuple[str, ...]) -> None:
    batch, feature_map = make_batch(20, head_dim=8), make_map("hedgehog", 8, 6)
    names = ("query", "key", "value", *PARAMETERS)
    expected = dict(zip(names, run_fused(batch, feature_map).gradients))
    leaves = {"query": batch.query.clone(), "key": batch.key.clone(), "value": batch.value.clone()}
    leaves |= dict(feature_map.named_parameters())
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in needed)
    fused(batch, feature_map, [leaves[name] for name in names[:3]]).backward(batch.grad)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in needed)
        if leaf.grad is not None:
            assert_close(leaf.grad, expected[name])


@interpreted
def test_scale() -> None:
    batch, feature_map = make_batch(9, head_dim=8), make_map("favor", 8, 6)
    assert_close(fused(batch, feature_map, scale=8**-0.5), fused(batch, feature_map), rtol=0, atol=0)
    root = (0.7 * 8**0.5) ** 0.5
    scaled = fused(batch, feature_map, [batch.query * root, batch.key * root, batch.value])
    assert_close(fused(batch, feature_map, scale=0.7), scaled)


@interpreted
@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=["no text", "empty texts"])
def test_a_batch_without_a_token_gives_zeros(lengths: tuple[int, ...]) -> None:
    batch = make_batch(*lengths, head_dim=8, gap=4)
    output = fused(batch, make_map("elu", 8), max_length=0)
    assert_close(output, torch.zeros(4 * (len(lengths) + 1), H, 8), rtol=0, atol=0)


def test_maps_that_are_fused() -> None:
    assert [name for name in feature_map_names() if fused_maps(make_feature_map(name, H, 8)) is not None] == list(
        FUSED
    )

    class Own(Elu):
        pass

    assert fused_maps(Own(H, 8)) is None


def test_no_copy_of_a_projection_is_kept() -> None:
    feature_map = make_map("hedgehog", 8)
    maps = fused_maps(feature_map)
    assert maps is not None
    assert maps[0].projection is feature_map.get_parameter("query_projection.weight")
    assert maps[1].projection is feature_map.get_parameter("key_projection.weight")


def test_errors() -> None:
    x = torch.zeros(4, H, 8)
    starts, elu = torch.zeros(1, dtype=torch.int32), FusedMap("elu")

    def call(*inputs: Tensor, starts: Tensor = starts, query_map: FusedMap = elu, key_map: FusedMap = elu) -> None:
        fused_linear_attention(*inputs, starts, starts, max_length=0, query_map=query_map, key_map=key_map)

    with refused("query, key and value must all be (N, H, D), got (4, 2, 8), (4, 2, 8), (2, 8)"):
        call(x, x, x[0])
    with refused("query, key and value must all be float32, bfloat16 or float16, got torch.float64"):
        call(x.double(), x.double(), x.double())
    with refused("starts and lengths must both be (B,) int32, got (1,) torch.int64"):
        call(x, x, x, starts=starts.long())
    with refused("query_map and key_map must be of one kind, got 'relu' and 'elu'"):
        call(x, x, x, query_map=FusedMap("relu"))
    with refused("query_map of kind 'exp' with these options needs a projection"):
        call(x, x, x, query_map=FusedMap("exp"), key_map=FusedMap("exp"))
    with refused("key_map.squared_norm goes with kind 'exp' alone, got 'elu'"):
        call(x, x, x, key_map=FusedMap("elu", torch.zeros(H, 6, 8), squared_norm=True))
    with refused("query_map.projection must be (H, R, D) = (2, R, 8), got (2, 6, 7)"):
        call(x, x, x, query_map=FusedMap("elu", torch.zeros(H, 6, 7)))
    with refused("key_map.bias must be (H, R) = (2, 6), got (2, 1, 6)"):
        call(x, x, x, key_map=FusedMap("elu", torch.zeros(H, 6, 8), torch.zeros(H, 1, 6)))
    with refused("must have the same number of features, got 6 with a projection and 8 without a projection"):
        call(x, x, x, query_map=FusedMap("elu", torch.zeros(H, 6, 8)))


class Elsewhere(NamedTuple):
    """As much of a tensor on a GPU as :func:`~st_linear.kernels.take` looks at."""

    device: torch.device = torch.device("cuda")
    dtype: torch.dtype = torch.bfloat16
    shape: tuple[int, ...] = (5, 2, 64)


def test_what_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not kernels.take(torch.zeros(5, 2, 64))
    for capability, expected in (((9, 0), True), ((8, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert kernels.take(Elsewhere()) == expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not kernels.take(Elsewhere(dtype=torch.float64))
    assert not kernels.take(Elsewhere(shape=(5, 2, 160)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not kernels.take(Elsewhere())


def to_cuda(batch: Batch, feature_map: FeatureMap) -> tuple[Batch, FeatureMap]:
    rows = (x.cuda() for x in (*batch.inputs, batch.grad))
    return Batch(*rows, batch.starts, batch.lengths), feature_map.cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 48, 64, 128])
@pytest.mark.parametrize("name", FUSED)
def test_equals_the_definition_on_cuda(name: str, head_dim: int, dtype: torch.dtype) -> None:
    batch, feature_map = to_cuda(
        make_batch(1, 7, 0, 63, 700, head_dim=head_dim, gap=2, dtype=dtype), make_map(name, head_dim)
    )
    assert_as_good(run_fused(batch, feature_map), batch, feature_map)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("lengths", [(16384,), (9000, 31, 0, 7000, 353)], ids=["one text", "packed"])
@pytest.mark.parametrize("name", FUSED)
def test_long_texts_on_cuda(name: str, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """16 heads of 64: against the linear form in float64, which is compared with its definition elsewhere."""
    batch, feature_map = to_cuda(
        make_batch(*lengths, head_dim=64, dtype=dtype, num_heads=16), make_map(name, 64, num_heads=16)
    )

    exact_map = make_map(name, 64, num_heads=16).cuda().double()
    leaves = [x.detach().double().requires_grad_() for x in batch.inputs]
    outputs = [
        linear_attention(*(x[text].transpose(0, 1)[None] for x in leaves), feature_map=exact_map)[0].transpose(0, 1)
        for text in batch.texts()
    ]
    gradients = torch.autograd.grad(torch.cat(outputs), [*leaves, *exact_map.parameters()], batch.grad.double())
    exact = Run(torch.cat(outputs).detach(), list(gradients))
    actual = run_fused(batch, feature_map)
    for tensor, expected in zip((actual.output, *actual.gradients), (exact.output, *exact.gradients)):
        # Sums over thousands of tokens: errors count against the largest entry.
        error = (tensor.double() - expected).abs().max() / expected.abs().max()
        assert error < {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}[dtype]
