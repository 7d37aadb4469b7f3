from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from st_linear.attention import (
    linear_attention,
    linear_attention_reference,
    local_attention,
    local_attention_reference,
    near_far_attention,
    near_far_attention_reference,
    softmax_attention,
    softmax_attention_reference,
)
from st_linear.feature_maps import ExponentialFeatureMap, FeatureMap, feature_map_names, make_feature_map


class Tolerance(NamedTuple):
    output: float
    gradient: float


# Absolute and relative at once; in half precision, multiples of the largest error that PyTorch's autocast makes.
TOLERANCES = {
    torch.float64: Tolerance(1e-10, 1e-9),
    torch.float32: Tolerance(1e-5, 1e-4),
    torch.bfloat16: Tolerance(2, 3),
    torch.float16: Tolerance(2, 3),
}

MAPS = [name for name in feature_map_names() if name != "softmax"]
FORMS = ["softmax", "local", *(f"{form}:{name}" for form in ("linear", "near_far") for name in MAPS)]
WINDOWED = ["local", *(f"near_far:{name}" for name in MAPS)]
SIZES = [(form, size) for form in FORMS for size in ((1, 4, 5) if form in WINDOWED else (4,))]

H, D = 2, 4


class Form(NamedTuple):
    """An attention form with its options bound, and what else it takes gradients of."""

    attend: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    parameters: list[Tensor]
    options: dict[str, Any]


class Run(NamedTuple):
    output: Tensor
    inputs: list[Tensor]
    """Gradients of query, key and value."""
    parameters: list[Tensor]
    """Gradients of the map's parameters and of the gain."""


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_inputs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key, value and the gradient of the output."""
    return list(randn(4, *shape, seed=seed, dtype=dtype))


def make_form(
    name: str, *, num_heads: int = H, head_dim: int = D, size: int = 4, dtype: torch.dtype = torch.float32
) -> Form:
    """``size`` is the window or the radius. The values do not depend on ``dtype``."""
    if name == "softmax":
        return Form(softmax_attention, softmax_attention_reference, [], {})
    if name == "local":
        options: dict[str, Any] = {"radius": size}
        return Form(partial(local_attention, **options), partial(local_attention_reference, **options), [], options)
    kind, map_name = name.split(":")
    feature_map = make_feature_map(map_name, num_heads, head_dim)
    for seed, parameter in enumerate(feature_map.parameters()):
        # Away from the identity, which is the same in all heads.
        parameter.data += 0.2 * randn(*parameter.shape, seed=seed)
    options = {"feature_map": feature_map.to(dtype)}
    parameters: list[Tensor] = list(feature_map.parameters())
    if kind == "linear":
        attend, reference = linear_attention, linear_attention_reference
    else:
        attend, reference = near_far_attention, near_far_attention_reference
        gain = (randn(num_heads, seed=9) / 2).to(dtype).requires_grad_()
        options |= {"window": size, "gain": gain}
        parameters.append(gain)
    return Form(partial(attend, **options), partial(reference, **options), parameters, options)


def run(
    function: Callable[..., Tensor],
    parameters: list[Tensor],
    inputs: list[Tensor],
    *args: Any,
    autocast: torch.dtype | None = None,
    **kwargs: Any,
) -> Run:
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        output = function(*leaves, *args, **kwargs)
    gradients = torch.autograd.grad(
        output, leaves + parameters, inputs[3].to(output.dtype), allow_unused=True, materialize_grads=True
    )
    return Run(output.detach(), list(gradients[:3]), list(gradients[3:]))


def features(feature_map: FeatureMap, query: Tensor, key: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """φ of queries and of keys, all of them tokens."""
    if not isinstance(feature_map, ExponentialFeatureMap):
        return feature_map.query_features(query, position), feature_map.key_features(key, position)
    query_logits, key_logits = feature_map.query_logits(query), feature_map.key_logits(key)
    of_query, of_key = offsets_of(feature_map, query, key)
    return (query_logits + of_query).exp(), (key_logits + of_key).exp()


def offsets_of(feature_map: ExponentialFeatureMap, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """What is added to the logits of queries and of keys, all of them tokens."""
    offsets = [feature_map.query_offset(query), feature_map.key_offset(key)]
    offsets += [feature_map.feature_bias(), feature_map.feature_offset(key, None)]
    of_query, *of_key = (query.new_zeros(()) if offset is None else offset for offset in offsets)
    return of_query, sum(of_key)


def assert_runs_close(actual: Run, expected: Run, tolerance: Tolerance) -> None:
    close = partial(assert_close, check_dtype=False)
    close(actual.output, expected.output, rtol=tolerance.output, atol=tolerance.output)
    close(actual.inputs, expected.inputs, rtol=tolerance.gradient, atol=tolerance.gradient)
    close(actual.parameters, expected.parameters, rtol=tolerance.gradient, atol=tolerance.gradient)


def assert_finite(run: Run) -> None:
    for tensor in (run.output, *run.inputs, *run.parameters):
        assert tensor.isfinite().all()


def make_mask(padding: str, length: int) -> Tensor | None:
    """A full text, a text of about half the length, and one without a token."""
    if padding == "none":
        return None
    mask = torch.zeros(3, length, dtype=torch.long)
    mask[0] = 1
    half = (length + 1) // 2
    if padding == "right":
        mask[1, :half] = 1
    elif padding == "left":
        mask[1, -half:] = 1
    else:
        mask[:2] = randn(2, length) > 0
        mask[:2, length // 2] = 1
    return mask


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("length", [1, 7, 41])
@pytest.mark.parametrize(("name", "size"), SIZES)
def test_equals_the_reference_in_float64(name: str, size: int, length: int, padding: str) -> None:
    form = make_form(name, size=size, dtype=torch.float64)
    inputs = make_inputs(3, H, length, D, dtype=torch.float64)
    mask = make_mask(padding, length)
    actual = run(form.attend, form.parameters, inputs, mask)
    assert_runs_close(actual, run(form.reference, form.parameters, inputs, mask), TOLERANCES[torch.float64])


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    return {
        "name": draw(st.sampled_from(FORMS)),
        "shape": (batch, draw(st.integers(1, 3)), length, draw(st.integers(1, 5))),
        "size": draw(st.integers(1, 12)),
        "mask": draw(st.none() | st.lists(row, min_size=batch, max_size=batch)),
        "scale": draw(st.none() | st.floats(0.1, 2)),
        "seed": draw(st.integers(0, 2**16)),
    }


@given(cases())
@settings(deadline=None, derandomize=True, max_examples=200)
def test_equals_the_reference_for_any_shape_and_mask(case: dict[str, Any]) -> None:
    _, num_heads, _, head_dim = case["shape"]
    form = make_form(case["name"], num_heads=num_heads, head_dim=head_dim, size=case["size"], dtype=torch.float64)
    inputs = make_inputs(*case["shape"], seed=case["seed"], dtype=torch.float64)
    mask = None if case["mask"] is None else torch.tensor(case["mask"])
    actual = run(form.attend, form.parameters, inputs, mask, scale=case["scale"])
    expected = run(form.reference, form.parameters, inputs, mask, scale=case["scale"])
    assert_runs_close(actual, expected, TOLERANCES[torch.float64])


@pytest.mark.parametrize("name", FORMS)
def test_reference_is_the_definition(name: str) -> None:
    length, size, scale = 11, 3, 0.7
    form = make_form(name, size=size, dtype=torch.float64)
    query, key, value = make_inputs(1, H, length, D, dtype=torch.float64)[:3]

    if "feature_map" in form.options:
        feature_map = form.options["feature_map"]
        position = torch.arange(length, dtype=torch.float64)[:, None] / length
        phi_q, phi_k = features(feature_map, query * scale**0.5, key * scale**0.5, position)
        phi_q = feature_map.weight * phi_q

    def weight(h: int, i: int, j: int) -> Tensor:
        exact = (scale * query[0, h, i].dot(key[0, h, j])).exp()
        if name == "softmax":
            return exact
        if name == "local":
            return exact if abs(i - j) <= size else 0 * exact
        if name.startswith("near_far") and abs(i // size - j // size) <= 1:
            return exact
        linear = phi_q[0, h, i].dot(phi_k[0, h, j])
        return linear if name.startswith("linear") else form.options["gain"][h].exp() * linear

    expected = torch.empty_like(query)
    for h in range(H):
        for i in range(length):
            weights = torch.stack([weight(h, i, j) for j in range(length)])
            mean = weights @ value[0, h] / weights.sum()
            expected[0, h, i] = mean.where(weights.sum() > 0, 0).detach()
    output = form.reference(query, key, value, scale=scale).detach()
    assert_close(output, expected, rtol=TOLERANCES[torch.float64].output, atol=TOLERANCES[torch.float64].output)


@pytest.mark.parametrize("name", FORMS)
def test_scale_is_one_over_the_root_of_the_head_size_by_default(name: str) -> None:
    form = make_form(name)
    inputs = make_inputs(2, H, 20, D)[:3]
    assert_close(form.attend(*inputs), form.attend(*inputs, scale=D**-0.5), rtol=0, atol=0)


@pytest.mark.parametrize("name", FORMS)
def test_float32_is_close_to_float64(name: str) -> None:
    inputs, mask = make_inputs(3, H, 63, D), make_mask("right", 63)
    single, double = make_form(name), make_form(name, dtype=torch.float64)
    actual = run(single.attend, single.parameters, inputs, mask)
    assert actual.output.dtype == torch.float32
    expected = run(double.reference, double.parameters, [x.double() for x in inputs], mask)
    assert_runs_close(actual, expected, TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_half_precision_is_as_good_as_autocast(name: str, dtype: torch.dtype) -> None:
    """What a user has otherwise is the O(T²) form under autocast: same inputs, products in half precision.

    Errors are against float64 on the very inputs, after rounding; the largest of a tensor's errors is compared with
    the largest of the other's, as single entries may be right by luck.
    """
    inputs, mask = make_inputs(3, H, 63, D, dtype=dtype), make_mask("right", 63)
    form, double = make_form(name), make_form(name, dtype=torch.float64)
    actual = run(form.attend, form.parameters, inputs, mask)
    assert actual.output.dtype == dtype
    assert [gradient.dtype for gradient in actual.inputs] == [dtype] * 3
    exact = run(double.reference, double.parameters, [x.double() for x in inputs], mask)
    autocast = run(form.reference, form.parameters, inputs, mask, autocast=dtype)
    assert_finite(autocast)

    def assert_error_within(multiple: float, actual: Tensor, autocast: Tensor, exact: Tensor) -> None:
        error = float((autocast.double() - exact).abs().max())
        assert_close(actual.double(), exact, rtol=0, atol=multiple * error)

    assert_error_within(TOLERANCES[dtype].output, actual.output, autocast.output, exact.output)
    for gradients in zip(*(run.inputs + run.parameters for run in (actual, autocast, exact))):
        assert_error_within(TOLERANCES[dtype].gradient, *gradients)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", FORMS)
def test_autocast_gives_the_float32_result(name: str, packed: bool) -> None:
    form = make_form(name)
    inputs = make_inputs(20, H, D) if packed else make_inputs(2, H, 20, D)
    options = {"cu_seqlens": torch.tensor([0, 5, 20])} if packed else {}
    expected = run(form.attend, form.parameters, inputs, **options)
    actual = run(form.attend, form.parameters, inputs, autocast=torch.bfloat16, **options)
    assert actual.output.dtype == torch.float32
    assert_runs_close(actual, expected, TOLERANCES[torch.float32])


TEXTS = (13, 5, 1)


@cache
def run_alone(name: str, lengths: tuple[int, ...]) -> list[Run]:
    """Each text by itself, without padding; empty ones are left out."""
    form = make_form(name)
    return [run(form.attend, form.parameters, inputs) for inputs in text_inputs(lengths) if inputs[0].shape[2]]


def text_inputs(lengths: tuple[int, ...]) -> list[list[Tensor]]:
    return [make_inputs(1, H, length, D, seed=seed) for seed, length in enumerate(lengths)]


def sum_of_gradients(runs: list[Run]) -> list[Tensor]:
    return [torch.stack(gradients).sum(dim=0) for gradients in zip(*(run.parameters for run in runs))]


@pytest.mark.parametrize("poison", [1e9, float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("name", FORMS)
def test_padding_changes_nothing(name: str, side: str, poison: float) -> None:
    form = make_form(name)
    length = max(TEXTS) + 67
    mask = torch.zeros(len(TEXTS), length, dtype=torch.long)
    inputs = [torch.full((len(TEXTS), H, length, D), poison) for _ in range(3)] + [randn(len(TEXTS), H, length, D)]
    texts = []
    for row, size in enumerate(TEXTS):
        start = {"right": 0, "left": length - size, "both": 30 + row}[side]
        texts.append(slice(start, start + size))
        mask[row, texts[row]] = 1
    for row, of_text in enumerate(text_inputs(TEXTS)):
        for padded, alone in zip(inputs, of_text):
            padded[row, :, texts[row]] = alone[0]

    actual = run(form.attend, form.parameters, inputs, mask)
    assert_finite(actual)
    expected = run_alone(name, TEXTS)
    for row, alone in enumerate(expected):
        of_text = [x[row : row + 1, :, texts[row]] for x in (actual.output, *actual.inputs)]
        assert_runs_close(Run(of_text[0], of_text[1:], []), alone._replace(parameters=[]), TOLERANCES[torch.float32])
    tolerance = TOLERANCES[torch.float32].gradient
    assert_close(actual.parameters, sum_of_gradients(expected), rtol=tolerance, atol=tolerance)
    hidden = (mask == 0)[:, None, :, None]
    for tensor in (actual.output, *actual.inputs):
        assert not tensor.masked_select(hidden).any()


@pytest.mark.parametrize("length", [5, 30])
@pytest.mark.parametrize("name", FORMS)
def test_a_batch_without_a_token_gives_zeros(name: str, length: int) -> None:
    form = make_form(name)
    inputs = [torch.full((2, H, length, D), float("nan")) for _ in range(3)] + [randn(2, H, length, D)]
    actual = run(form.attend, form.parameters, inputs, torch.zeros(2, length))
    for tensor in (actual.output, *actual.inputs, *actual.parameters):
        assert_close(tensor, torch.zeros_like(tensor), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["softmax", "local", "linear:elu", "near_far:elu"])
def test_mask_of_any_dtype(name: str, dtype: torch.dtype) -> None:
    form = make_form(name)
    inputs, mask = make_inputs(3, H, 20, D)[:3], make_mask("holes", 20)
    assert mask is not None
    assert_close(form.attend(*inputs, mask.to(dtype)), form.attend(*inputs, mask), rtol=0, atol=0)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, H, 0, D), {}),
        ((2, H, 0, D), {"attention_mask": torch.ones(2, 0)}),
        ((0, H, 5, D), {"attention_mask": torch.ones(0, 5)}),
        ((0, H, D), {"cu_seqlens": torch.tensor([0, 0, 0])}),
        ((0, H, D), {"cu_seqlens": torch.tensor([0])}),
    ],
    ids=["no slots", "no slots, masked", "no texts", "packed empty texts", "packed nothing"],
)
def test_nothing_to_attend_to(name: str, shape: tuple[int, ...], options: dict[str, Tensor]) -> None:
    form = make_form(name)
    actual = run(form.attend, form.parameters, make_inputs(*shape), **options)
    assert [x.shape for x in (actual.output, *actual.inputs)] == [shape] * 4
    for gradient in actual.parameters:
        assert not gradient.any()


PACKED = (0, 1, 7, 0, 0, 63, 8, 9, 30, 0)


def pack(lengths: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    inputs = [torch.cat(xs, dim=2)[0].transpose(0, 1).contiguous() for xs in zip(*text_inputs(lengths))]
    return inputs, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("name", FORMS)
def test_packed_equals_per_text(name: str) -> None:
    form = make_form(name)
    inputs, cu_seqlens = pack(PACKED)
    actual = run(form.attend, form.parameters, inputs, cu_seqlens=cu_seqlens)
    alone = run_alone(name, PACKED)
    expected = [
        torch.cat([x[0].transpose(0, 1) for x in xs]) for xs in zip(*((run.output, *run.inputs) for run in alone))
    ]
    assert_runs_close(actual, Run(expected[0], expected[1:], sum_of_gradients(alone)), TOLERANCES[torch.float32])


@given(
    st.sampled_from(FORMS),
    st.lists(st.integers(0, 20), min_size=1, max_size=6),
    st.integers(1, 6),
)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_packed_equals_the_reference_of_padded(name: str, lengths: list[int], size: int) -> None:
    form = make_form(name, size=size, dtype=torch.float64)
    inputs, cu_seqlens = pack(tuple(lengths))
    inputs = [x.double() for x in inputs]
    actual = run(form.attend, form.parameters, inputs, cu_seqlens=cu_seqlens)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    if not mask.any():
        assert actual.output.shape == (0, H, D)
        return
    padded = [x.new_zeros(*mask.shape, H, D).masked_scatter(mask[..., None, None], x).transpose(1, 2) for x in inputs]
    expected = run(form.reference, form.parameters, padded, mask)
    output, *gradients = (x.transpose(1, 2)[mask] for x in (expected.output, *expected.inputs))
    assert_runs_close(actual, Run(output, gradients, expected.parameters), TOLERANCES[torch.float64])


@pytest.mark.parametrize("name", FORMS)
def test_packed_texts_do_not_see_each_other(name: str) -> None:
    form = make_form(name)
    inputs, cu_seqlens = pack((12, 9, 12))
    before = run(form.attend, form.parameters, inputs, cu_seqlens=cu_seqlens)
    for x in inputs[:3]:
        x[12:21] = float("nan")
    after = run(form.attend, form.parameters, inputs, cu_seqlens=cu_seqlens)
    others = torch.ones(33, dtype=torch.bool).index_fill(0, torch.arange(12, 21), False)
    for new, old in zip((after.output, *after.inputs), (before.output, *before.inputs)):
        assert_close(new[others], old[others])


@pytest.mark.parametrize(("exact_up_to", "lengths"), [(None, (8, 5, 30, 1)), (8, (8, 5, 30, 1)), (20, (20, 9, 21, 1))])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", MAPS)
def test_near_far_is_softmax_up_to_a_limit(
    name: str, padding: str, exact_up_to: int | None, lengths: tuple[int, ...]
) -> None:
    window, slots = 4, 30
    form = make_form(f"near_far:{name}", size=window)
    form = form._replace(attend=partial(form.attend, exact_up_to=exact_up_to))
    inputs = make_inputs(len(lengths), H, slots, D)
    mask = torch.arange(slots) < torch.tensor(lengths)[:, None]
    if padding == "left":
        mask = mask.flip(1)
    short = [0, 1, 3]
    inputs[3][2] = 0
    actual = run(form.attend, form.parameters, inputs, mask)
    expected = run(softmax_attention_reference, [], inputs, mask)
    of_short = Run(actual.output[short], [x[short] for x in actual.inputs], [])
    exact = Run(expected.output[short], [x[short] for x in expected.inputs], [])
    assert_runs_close(of_short, exact, TOLERANCES[torch.float32])
    assert (actual.output[2] - expected.output[2]).abs().max() > 1e-3


@pytest.mark.parametrize("name", MAPS)
def test_gain_is_nought_by_default_and_moves_far_weights_alone(name: str) -> None:
    form = make_form(f"near_far:{name}")
    query, key, _ = make_inputs(1, H, 30, D)[:3]
    far_only = torch.zeros(1, H, 30, D)
    far_only[:, :, 20:] = 1
    options = {key: value for key, value in form.options.items() if key != "gain"}
    attend = partial(near_far_attention, query, key, far_only, **options)
    share = attend()[:, :, :12]
    assert_close(attend(gain=torch.zeros(H))[:, :, :12], share)
    # With values 1 far away and 0 near, the output is the far weights' share: its odds grow by exp(gain).
    raised = attend(gain=torch.tensor([0.0, 1.0]))[:, :, :12]
    assert_close(raised[:, 0], share[:, 0])
    assert (raised[:, 1] > share[:, 1]).any()


def test_bfloat16_elu_far_below_zero_still_attends() -> None:
    feature_map = make_feature_map("elu", H, D)
    query = key = torch.full((1, H, 30, D), -10.0, dtype=torch.bfloat16)
    value = randn(1, H, 30, D, dtype=torch.bfloat16)
    output = linear_attention(query, key, value, feature_map=feature_map, scale=1.0)
    mean = value.double().mean(dim=2, keepdim=True).expand(1, H, 30, D)
    assert_close(output, mean.to(torch.bfloat16))
    assert (feature_map.query_features(query, torch.zeros(())) > 0).all()


def make_large_inputs(factor: float) -> list[Tensor]:
    query, key, value, gradient = make_inputs(3, H, 63, D)
    return [query * factor, key * factor, value, gradient]


@pytest.mark.parametrize("name", FORMS)
def test_logits_a_hundred_times_larger_are_right(name: str) -> None:
    inputs, mask = make_large_inputs(10), make_mask("right", 63)
    single, double = make_form(name), make_form(name, dtype=torch.float64)
    actual = run(single.attend, single.parameters, inputs, mask)
    expected = run(double.reference, double.parameters, [x.double() for x in inputs], mask)
    # Float32 rounds a logit of some hundreds by 1e-5, and so its weight: outputs are as far off as gradients.
    tolerance = TOLERANCES[torch.float32]
    assert_runs_close(actual, expected, tolerance._replace(output=tolerance.gradient))


@pytest.mark.parametrize("name", FORMS)
def test_logits_whose_weights_all_underflow_stay_finite(name: str) -> None:
    form = make_form(name)
    inputs, mask = make_large_inputs(100), make_mask("right", 63)
    actual = run(form.attend, form.parameters, inputs, mask)
    assert_finite(actual)
    assert actual.output.abs().max() <= inputs[2].abs().max() * (1 + TOLERANCES[torch.float32].output)


def test_dropout_of_near_far_is_softmax_attentions_where_texts_are_exact_and_none_beyond() -> None:
    feature_map = make_feature_map("elu", H, D)
    query, key, value = make_inputs(2, H, 8, D)[:3]

    def attend(window: int, dropout_p: float, exact_up_to: int | None = None) -> Tensor:
        torch.manual_seed(0)
        options = {"window": window, "exact_up_to": exact_up_to, "dropout_p": dropout_p}
        return near_far_attention(query, key, value, feature_map=feature_map, **options)

    with torch.random.fork_rng(devices=[]):
        dropped = attend(4, 0.5)
        torch.manual_seed(0)
        assert_close(dropped, softmax_attention(query, key, value, dropout_p=0.5), rtol=0, atol=0)
        assert (dropped != attend(4, 0.0)).any()
        assert_close(attend(2, 0.5), attend(2, 0.0), rtol=0, atol=0)
        assert_close(attend(2, 0.5, 8), dropped, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["softmax", "local", "linear:elu", "near_far:elu"])
@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (
            [(2, 5, D)] * 3,
            {},
            "query, key and value must all be (B, H, T, D), got (2, 5, 4), (2, 5, 4), (2, 5, 4)",
        ),
        (
            [(2, H, 5, D), (2, H, 6, D), (2, H, 6, D)],
            {},
            "query, key and value must all be (B, H, T, D), got (2, 2, 5, 4), (2, 2, 6, 4), (2, 2, 6, 4)",
        ),
        (
            [(2, H, 5, D), (2, H, 5, D), (2, H, 6, D)],
            {},
            "query, key and value must all be (B, H, T, D), got (2, 2, 5, 4), (2, 2, 5, 4), (2, 2, 6, 4)",
        ),
        (
            [(2, H, 5, D)] * 3,
            {"cu_seqlens": torch.tensor([0, 5])},
            "query, key and value must all be packed (N, H, D), got (2, 2, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4)",
        ),
        (
            [(2, H, 5, D)] * 3,
            {"attention_mask": torch.ones(2, 1, 1, 5)},
            "attention_mask must be (B, T) = (2, 5), got (2, 1, 1, 5)",
        ),
        (
            [(2, H, 5, D)] * 3,
            {"attention_mask": torch.ones(2, 6)},
            "attention_mask must be (B, T) = (2, 5), got (2, 6)",
        ),
        (
            [(5, H, D)] * 3,
            {"cu_seqlens": torch.tensor([0, 5]), "attention_mask": torch.ones(1, 5)},
            "packed inputs (cu_seqlens) hold no padding: attention_mask must be None",
        ),
        ([(5, H, D)] * 3, {"cu_seqlens": torch.tensor([1, 5])}, "cu_seqlens must rise from 0 to N = 5, got [1, 5]"),
        ([(5, H, D)] * 3, {"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens must rise from 0 to N = 5, got [0, 4]"),
        (
            [(5, H, D)] * 3,
            {"cu_seqlens": torch.tensor([0, 4, 3, 5])},
            "cu_seqlens must rise from 0 to N = 5, got [0, 4, 3, 5]",
        ),
        ([(5, H, D)] * 3, {"cu_seqlens": torch.tensor([])}, "cu_seqlens must rise from 0 to N = 5, got []"),
        ([(5, H, D)] * 3, {"cu_seqlens": torch.tensor(5)}, "cu_seqlens must rise from 0 to N = 5, got 5"),
        (
            [(5, H, D)] * 3,
            {"cu_seqlens": torch.tensor([[0, 5]])},
            "cu_seqlens must rise from 0 to N = 5, got [[0, 5]]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str, shapes: list[tuple[int, ...]], options: dict[str, Tensor], message: str
) -> None:
    attend = make_form(name).attend
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        attend(*(torch.zeros(*shape) for shape in shapes), **options)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("attend", "message"),
    [
        (
            partial(near_far_attention, feature_map=make_feature_map("elu", H, D), window=0),
            "window must be at least 1 token, got 0; linear_attention has no window",
        ),
        (
            partial(near_far_attention, feature_map=make_feature_map("elu", H, D), window=-4),
            "window must be at least 1 token, got -4; linear_attention has no window",
        ),
        (
            partial(near_far_attention, feature_map=make_feature_map("elu", H, D), window=4, exact_up_to=7),
            "exact_up_to must be at least two windows, 8 tokens, got 7",
        ),
        (partial(local_attention, radius=0), "radius must be at least 1 token, got 0"),
        (
            partial(linear_attention, feature_map=make_feature_map("softmax", H, D)),
            "linear_attention takes no feature map 'softmax': call softmax_attention instead",
        ),
        (
            partial(near_far_attention, feature_map=make_feature_map("softmax", H, D), window=4),
            "near_far_attention takes no feature map 'softmax': call softmax_attention instead",
        ),
    ],
)
def test_bad_options_are_refused(attend: Callable[..., Tensor], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        attend(*make_inputs(2, H, 5, D)[:3])
    assert str(error.value) == message
