"""Streaming equals the O(T²) references whatever is drawn, and stores nothing that is as large as what is mapped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from conftest import slow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention import (
    FORMS,
    MAPS,
    TOLERANCES,
    Form,
    assert_finite,
    features,
    make_form,
    make_inputs,
    offsets_of,
    randn,
    run,
)
from torch import Tensor
from torch.autograd import gradcheck
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from st_linear import attention, near, softmax, streaming
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
from st_linear.feature_maps import ExponentialFeatureMap, make_feature_map

H, D = 2, 4

STREAMED = [name for name in FORMS if name != "softmax"]
KINDS = {
    "softmax": (softmax_attention, softmax_attention_reference),
    "local": (local_attention, local_attention_reference),
    "linear": (linear_attention, linear_attention_reference),
    "near_far": (near_far_attention, near_far_attention_reference),
}
SIZED = ("favor", "favor_relu", "learned_favor", "hedgehog", "t2r")
"""Maps with the option ``num_features``."""


@contextmanager
def sizes(
    chunk: int | None = None, segment: int | None = None, short: int | None = None, fused: int | None = None
) -> Iterator[None]:
    """Mapped elements of a chunk, tokens of a segment, tokens of a text that is not short, and rows from which on
    gradients come from the fused kernel; None leaves a size."""
    with pytest.MonkeyPatch.context() as patch:
        if chunk is not None:
            patch.setattr(near, "CHUNK_ELEMENTS", {"cpu": chunk, "cuda": chunk})
            patch.setattr(streaming, "_FUSED_TOKENS", max(1, chunk // 8))
            patch.setattr(softmax, "FUSED_BACKWARD_TOKENS", max(1, chunk // 8))
        if segment is not None:
            patch.setattr(streaming, "_SEGMENT_TOKENS", segment)
        if short is not None:
            patch.setattr(attention, "_SHORT", short)
        if fused is not None:
            patch.setattr(softmax, "FUSED_ROWS", fused)
        yield


fused_or_plain = pytest.mark.parametrize("fused", [1, 512])
"""Gradients from the fused kernel wherever it can give them, or from plain products."""


class Case(NamedTuple):
    kind: str
    map_name: str
    num_features: int
    shape: tuple[int, int, int, int]
    size: int
    """The window or the radius."""
    beyond: int
    """Tokens beyond two windows up to which a text is exact."""
    scale: float | None
    lengths: list[int]
    padding: str
    poison: float
    packed: bool
    tokens_first: bool
    """Tokens before heads in memory, as an encoder's projections leave them."""
    trained: tuple[bool, bool, bool, bool]
    """Whether query, key, value and the map want a gradient."""
    chunk: int
    segment: int
    short: int
    fused: int
    seed: int


ROUNDINGS = (1.0, 0.7, 0.9, 1.1, 1.3)
"""Factors on the values, no powers of two: each has them rounded in another way."""

TRAINED = [(True,) * 4, (False, False, False, True), (True, False, False, False), (False, True, True, False)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    length = draw(st.integers(1, 40) | st.integers(41, 150))
    kind = draw(st.sampled_from(["linear", "near_far", "near_far", "linear", "local", "softmax"]))
    # A text within two windows is exact: most windows are smaller.
    size = draw(st.integers(max(1, length // 24), max(1, length // 3)) | st.integers(1, 48))
    padding = draw(st.sampled_from(["none", "right", "left", "holes"]))
    return Case(
        kind=kind,
        map_name=draw(st.sampled_from(MAPS)),
        num_features=2 * draw(st.integers(1, 20)),
        shape=(batch, heads, length, draw(st.integers(1, 12) | st.integers(13, 48))),
        size=size,
        beyond=draw(st.sampled_from([0, 0, 1, 5, 40])),
        scale=draw(st.none() | st.floats(0.05, 0.5)),
        lengths=draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch)),
        padding=padding,
        poison=draw(st.sampled_from([0.0, 1e4, math.nan, math.inf])),
        packed=draw(st.booleans()),
        tokens_first=draw(st.booleans()),
        trained=draw(st.sampled_from(TRAINED)),
        chunk=draw(st.sampled_from([1, 2**12, 2**19])),
        # At least some eight segments' worth, or small blocks would take seconds.
        segment=draw(st.integers(max(1, length // 8), length + 1)),
        short=draw(st.sampled_from([1, 8, 32, 512])),
        fused=draw(st.sampled_from([1, 1, 16, 512])),
        seed=draw(st.integers(0, 2**16)),
    )


def form_of(case: Case, dtype: torch.dtype, device: str) -> Form:
    attend, reference = KINDS[case.kind]
    options: dict[str, Any] = {"scale": case.scale}
    parameters: list[Tensor] = []
    if case.kind == "local":
        options["radius"] = case.size
    elif case.kind != "softmax":
        sized = {"num_features": case.num_features} if case.map_name in SIZED else {}
        feature_map = make_feature_map(case.map_name, case.shape[1], case.shape[3], **sized)
        for seed, parameter in enumerate(feature_map.parameters()):
            parameter.data += 0.2 * randn(*parameter.shape, seed=seed)
        options["feature_map"] = feature_map.to(device, dtype)
        parameters += feature_map.parameters()
        if case.kind == "near_far":
            gain = randn(case.shape[1], seed=case.seed, dtype=torch.float32) / 2
            options |= {"window": case.size, "gain": gain.to(device, dtype).requires_grad_()}
            if case.beyond:
                options["exact_up_to"] = 2 * case.size + case.beyond
            parameters.append(options["gain"])
    return Form(partial(attend, **options), partial(reference, **options), parameters, options)


def mask_of(case: Case) -> Tensor:
    """(B, T) bool."""
    length = torch.tensor(case.lengths)[:, None]
    slot = torch.arange(case.shape[2])
    if case.padding == "none":
        return torch.ones(case.shape[0], case.shape[2], dtype=torch.bool)
    if case.padding == "left":
        return slot >= case.shape[2] - length
    if case.padding == "right":
        return slot < length
    return (randn(case.shape[0], case.shape[2], seed=case.seed) > 0) & (length > 0)


def packed(attend: Callable[..., Tensor], mask: Tensor) -> Callable[..., Tensor]:
    """``attend`` to padded texts through its packed form."""
    cu_seqlens = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(dim=-1).cumsum(0)]).to(torch.int32)

    def attend_packed(*inputs: Tensor) -> Tensor:
        output = attend(*(x.transpose(1, 2)[mask] for x in inputs), cu_seqlens=cu_seqlens)
        whole = output.new_zeros(inputs[0].transpose(1, 2).shape)
        return whole.masked_scatter(mask[..., None, None], output).transpose(1, 2)

    return attend_packed


class Result(NamedTuple):
    without_gradients: Tensor
    output: Tensor
    gradients: list[Tensor]
    """Of those of query, key, value and the map's parameters that want one."""


def compute(
    attend: Callable[..., Tensor],
    inputs: list[Tensor],
    parameters: list[Tensor],
    trained: tuple[bool, ...],
    autocast: torch.dtype | None = None,
) -> Result:
    leaves = [x.detach().requires_grad_(wanted) for x, wanted in zip(inputs[:3], trained)]
    for parameter in parameters:
        parameter.requires_grad_(trained[3])
    with torch.autocast(inputs[0].device.type, dtype=autocast, enabled=autocast is not None):
        with torch.no_grad():
            without_gradients = attend(*leaves)
        output = attend(*leaves)
    wanted = [x for x in leaves + parameters if x.requires_grad]
    if not wanted or not output.requires_grad:
        return Result(without_gradients, output.detach(), [torch.zeros_like(x) for x in wanted])
    gradients = torch.autograd.grad(
        output, wanted, inputs[3].to(output.dtype), allow_unused=True, materialize_grads=True
    )
    return Result(without_gradients, output.detach(), list(gradients))


def check(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Forward, and the gradients that the case asks for, against the float64 reference on the same rounded inputs.

    A quotient of tiny weights loses digits in any form, and how many is a matter of luck: in float32 an output
    or a gradient may be off by a multiple of the most that the definition's own is, for values of some sizes.

    What a user of a half precision has otherwise is the O(T²) form under autocast: there, the largest of a tensor's
    errors may be a multiple of the largest of the other's, as single entries may be right by luck.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    mask = mask_of(case)
    inputs = make_inputs(*case.shape, seed=case.seed, dtype=dtype)
    inputs[:3] = [x.masked_fill(~mask[:, None, :, None], case.poison) for x in inputs[:3]]
    if case.tokens_first:
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    inputs, mask = [x.to(device) for x in inputs], mask.to(device)
    attention_mask = None if case.padding == "none" else mask
    form, double = form_of(case, torch.float32 if half else dtype, device), form_of(case, torch.float64, device)
    attend = packed(form.attend, mask) if case.packed else partial(form.attend, attention_mask=attention_mask)
    with sizes(case.chunk, case.segment, case.short, case.fused):
        actual = compute(attend, inputs, form.parameters, case.trained)
    assert actual.output.dtype == actual.without_gradients.dtype == dtype
    reference = partial(double.reference, attention_mask=attention_mask)
    exact = compute(reference, [x.double() for x in inputs], double.parameters, case.trained)
    plain_reference = partial(form.reference, attention_mask=attention_mask)
    tolerance = TOLERANCES[dtype]
    if not half:
        close = partial(assert_close, check_dtype=False)
        lost = [0.0] * (1 + len(exact.gradients))
        for factor in ROUNDINGS if dtype == torch.float32 else ():
            value = [*inputs[:2], inputs[2] * factor, inputs[3]]
            rounded = compute(plain_reference, value, form.parameters, case.trained)
            right = compute(reference, [x.double() for x in value], double.parameters, case.trained)
            pairs = zip([rounded.output, *rounded.gradients], [right.output, *right.gradients])
            for index, (ours, theirs) in enumerate(pairs):
                error = float((ours.double() - theirs).abs().max()) if ours.numel() else 0.0
                lost[index] = max(lost[index], error)
        for output in (actual.output, actual.without_gradients):
            close(output, exact.output, rtol=tolerance.output, atol=max(tolerance.output, 3 * lost[0]))
        for gradient, expected, definition in zip(actual.gradients, exact.gradients, lost[1:], strict=True):
            close(gradient, expected, rtol=tolerance.gradient, atol=max(tolerance.gradient, 3 * definition))
        return
    plain = compute(plain_reference, inputs, form.parameters, case.trained, autocast=dtype)

    def assert_error_within(kind: str, actual: Tensor, plain: Tensor, exact: Tensor) -> None:
        multiple = getattr(tolerance, kind)
        error = float((plain.double() - exact).abs().amax().nan_to_num(math.inf))
        # Where the other is right by chance, what is left is the rounding of the result, and what float32 may be off.
        # Exact texts go through PyTorch's own kernel, which rounds more often.
        rounding = torch.finfo(dtype).eps * float(exact.abs().amax())
        rounding *= 1 if case.kind in ("linear", "local") else multiple
        assert actual.isfinite().all()
        atol = max(multiple * error, rounding + getattr(TOLERANCES[torch.float32], kind))
        assert_close(actual.double(), exact, rtol=0, atol=atol)

    if actual.output.numel():
        for output in (actual.output, actual.without_gradients):
            assert_error_within("output", output, plain.output, exact.output)
        for gradients in zip(actual.gradients, plain.gradients, exact.gradients):
            assert_error_within("gradient", *gradients)


def draws(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    profile = settings(
        deadline=None, derandomize=True, max_examples=count, suppress_health_check=[HealthCheck.too_slow]
    )
    return lambda test: profile(given(case=cases())(test))


TINY_WEIGHTS = Case(
    kind="linear",
    map_name="t2r",
    num_features=2,
    shape=(2, 1, 1, 3),
    size=1,
    beyond=0,
    scale=0.29746153808163817,
    lengths=[0, 0],
    padding="none",
    poison=0.0,
    packed=False,
    tokens_first=False,
    trained=(True, True, True, True),
    chunk=1,
    segment=1,
    short=1,
    fused=512,
    seed=3,
)


CASES = {torch.float64: 1000, torch.float32: 600, torch.bfloat16: 300, torch.float16: 200}
"""How many are drawn in all; the fast suite draws a twentieth of them."""


@pytest.mark.parametrize("share", [pytest.param(20, id="some"), slow(1, id="all")])
@pytest.mark.parametrize("dtype", CASES, ids=str)
def test_equals_the_reference(dtype: torch.dtype, share: int) -> None:
    @draws(CASES[dtype] // share)
    def test(case: Case) -> None:
        check(case, dtype)

    test()


@pytest.mark.parametrize("scale", [TINY_WEIGHTS.scale, 0.30078125])
def test_weights_that_are_tiny(scale: float) -> None:
    check(TINY_WEIGHTS._replace(scale=scale), torch.float32)


def test_weights_of_two_features_that_are_tiny() -> None:
    """Here the definition itself is off by 1e-5 in float32."""
    two_features = {"map_name": "favor_relu", "shape": (3, 3, 41, 13), "scale": None, "lengths": [0, 0, 0]}
    check(TINY_WEIGHTS._replace(**two_features, tokens_first=True, segment=5, seed=2), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_reference_on_a_gpu(dtype: torch.dtype) -> None:
    @draws(100)
    def test(case: Case) -> None:
        check(case, dtype, "cuda")

    test()


@pytest.mark.parametrize(
    ("name", "length", "fused", "recomputes"),
    [
        *((name, 8, 512, False) for name in ("linear:hedgehog", "linear:elu", "local")),
        *((name, 9, 512, True) for name in ("linear:hedgehog", "linear:elu", "local")),
        *(("linear:hedgehog", 9, 9, False), ("linear:hedgehog", 9, 10, True), ("linear:elu", 9, 9, True)),
    ],
)
@pytest.mark.parametrize("half", [False, True])
def test_only_what_would_be_kept_is_recomputed(
    name: str, length: int, fused: int, recomputes: bool, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(function: Callable[..., object], *arguments: object, **options: object) -> object:
        calls.append(function)
        return checkpoint(function, *arguments, **options)

    monkeypatch.setattr(streaming, "checkpoint", counted)
    form = make_form(name, num_heads=2, head_dim=8, size=4)
    with sizes(fused=fused):
        run(
            form.attend, form.parameters, make_inputs(3, 2, length, 8, dtype=torch.bfloat16 if half else torch.float32)
        )
    # In half precision what is kept would be upcast.
    assert bool(calls) == (recomputes or (half and length > 8))


@fused_or_plain
@pytest.mark.parametrize("name", STREAMED)
def test_result_does_not_depend_on_the_size_of_chunks_and_segments(name: str, fused: int) -> None:
    form = make_form(name)
    inputs = make_inputs(2, H, 41, D)
    expected = run(form.attend, form.parameters, inputs)
    for chunk, segment in ((1, 4), (1, 41), (2**10, 24), (2**19, 1)):
        with sizes(chunk, segment, fused=fused):
            actual = run(form.attend, form.parameters, inputs)
            with torch.no_grad():
                output = form.attend(*inputs[:3])
        for result in (actual.output, output):
            assert_close(result, expected.output)
        assert_close((actual.inputs, actual.parameters), (expected.inputs, expected.parameters), rtol=1e-4, atol=1e-4)


def allocated(function: Callable[[], object]) -> int:
    """Bytes that are allocated at once while ``function`` runs, at most, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_allocated_bytes_are_found() -> None:
    def add_twice() -> None:
        x = torch.ones(2**20)
        for _ in range(2):
            x = x + 1

    assert 2 * 2**22 <= allocated(add_twice) < 3 * 2**22


@pytest.mark.skipif(torch.__version__ < "2.9", reason="the profiler of torch 2.6 misses memory that is freed")
@pytest.mark.parametrize(
    ("name", "fused"),
    [
        *(("local", 1), ("linear:favor", 1), ("near_far:favor_relu", 512), ("near_far:hedgehog", 1)),
        *(slow(*case) for case in (("linear:favor_relu", 512), ("near_far:favor", 1), ("linear:favor", 512))),
    ],
)
def test_memory_per_token_is_a_few_times_that_of_inputs_and_output(name: str, fused: int) -> None:
    # FAVOR's R = 256: what is mapped has 16 times the size of q. States of hedgehog's blocks, R = 32, are kept.
    form = make_form(name, num_heads=1, head_dim=16, size=32)

    def train(length: int) -> None:
        run(form.attend, form.parameters, make_inputs(1, 1, length, 16))

    def encode(length: int) -> None:
        with torch.no_grad():
            form.attend(*make_inputs(1, 1, length, 16)[:3])

    short, long = 2048, 4096
    inputs_and_output = 4 * 16 * 4 * (long - short)
    with sizes(chunk=2**14, segment=256, fused=fused):
        for work, most in ((train, 5), (encode, 3)):
            assert allocated(partial(work, long)) - allocated(partial(work, short)) <= most * inputs_and_output


@pytest.mark.parametrize("name", STREAMED)
def test_inputs_may_be_of_another_precision_than_the_map(name: str) -> None:
    single, double = make_form(name), make_form(name, dtype=torch.float64)
    inputs, mask = make_inputs(2, H, 41, D, dtype=torch.float64)[:3], torch.arange(41) < torch.tensor([[41], [23]])
    expected = double.reference(*inputs, mask).detach()
    outputs = [single.attend(*inputs, mask).detach()]
    with torch.no_grad():
        outputs.append(single.attend(*inputs, mask))
    for output in outputs:
        assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STREAMED)
def test_the_fused_kernel_gives_what_plain_products_do(name: str) -> None:
    """As on devices without it."""
    form = make_form(name, size=8)
    for length in (63, 64, 65):
        inputs = make_inputs(2, H, length, D)
        with sizes(fused=1):
            fused = run(form.attend, form.parameters, inputs)
        with pytest.MonkeyPatch.context() as patch:
            for module in (near, softmax, streaming):
                patch.setattr(module, "has_fused_softmax", lambda *_: False)
            plain = run(form.attend, form.parameters, inputs)
            with torch.no_grad():
                output = form.attend(*inputs[:3])
        assert_close(fused, plain, rtol=1e-4, atol=1e-5)
        assert_close(output, fused.output)


@fused_or_plain
@pytest.mark.parametrize("name", STREAMED)
def test_inputs_may_lie_in_memory_anyhow(name: str, fused: int) -> None:
    form = make_form(name)
    inputs = make_inputs(2, H, 41, D)
    with sizes(fused=fused):
        expected = run(form.attend, form.parameters, inputs)
        inputs = [x.mT.contiguous().mT for x in inputs]
        with torch.no_grad():
            output = form.attend(*inputs[:3])
        actual = run(form.attend, form.parameters, inputs)
    assert_close(actual, expected)
    assert_close(output, expected.output)


@fused_or_plain
@pytest.mark.parametrize("short", [slow(1), 512])
@pytest.mark.parametrize("name", STREAMED)
def test_nan_in_a_packed_text_stays_there(name: str, short: int, fused: int) -> None:
    form = make_form(name)
    inputs, cu_seqlens = make_inputs(47, H, D), torch.tensor([0, 18, 28, 47])
    others = torch.ones(47, dtype=torch.bool).index_fill(0, torch.arange(18, 28), False)
    with sizes(1, 8, short, fused):
        before = run(form.attend, form.parameters, inputs, cu_seqlens=cu_seqlens)
        for x in inputs[:3]:
            x[18:28] = math.nan
        after = run(form.attend, form.parameters, inputs, cu_seqlens=cu_seqlens)
        with torch.no_grad():
            output = form.attend(*inputs[:3], cu_seqlens=cu_seqlens)
    for new, old in zip((output, after.output, *after.inputs), (before.output, before.output, *before.inputs)):
        assert_close(new[others], old[others])


def log_space_reference(name: str, form: Form, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The form's definition through logarithms of weights, which any size of logits leaves in range."""
    query, key = (x * query.shape[-1] ** -0.25 for x in (query, key))
    near_logits = query @ key.transpose(-1, -2)
    index = torch.arange(query.shape[2])
    if name == "local":
        near = (index[:, None] - index).abs() <= form.options["radius"]
        return near_logits.masked_fill(~near, -math.inf).softmax(dim=-1) @ value
    feature_map = form.options["feature_map"]
    if isinstance(feature_map, ExponentialFeatureMap):
        of_query, of_key = offsets_of(feature_map, query, key)
        query_logits = feature_map.query_logits(query) + of_query
        key_logits = feature_map.key_logits(key) + of_key
        log_weights = (query_logits[..., :, None, :] + key_logits[..., None, :, :]).logsumexp(dim=-1)
    else:
        phi_q, phi_k = features(feature_map, query, key, index[:, None].double() / len(index))
        log_weights = (phi_q @ phi_k.transpose(-1, -2)).log()
    log_weights = log_weights + math.log(feature_map.weight)
    if name.startswith("near_far"):
        block = index // form.options["window"]
        near = (block[:, None] - block).abs() <= 1
        log_weights = near_logits.where(near, log_weights + form.options["gain"][:, None, None])
    nothing = (log_weights == -math.inf).all(dim=-1, keepdim=True)
    return (log_weights.masked_fill(nothing, 0).softmax(dim=-1) @ value).masked_fill(nothing, 0)


@fused_or_plain
@pytest.mark.parametrize("name", STREAMED)
def test_logits_ten_thousand_times_larger_are_right(name: str, fused: int) -> None:
    form, single = make_form(name, dtype=torch.float64), make_form(name)
    query, key, value, gradient = make_inputs(2, H, 41, D, dtype=torch.float64)
    inputs = [100 * query, 100 * key, value]
    with sizes(1, 8, fused=fused), torch.no_grad():
        expected = log_space_reference(name, form, *inputs)
        assert_close(form.attend(*inputs), expected, rtol=1e-8, atol=1e-8)
    with sizes(1, 8, fused=fused):
        assert_close(form.attend(*inputs).detach(), expected, rtol=1e-8, atol=1e-8)
        assert_finite(run(single.attend, single.parameters, [x.float() for x in (*inputs, gradient)]))


@fused_or_plain
@pytest.mark.parametrize("name", STREAMED)
def test_gradients_pass_gradcheck(name: str, fused: int) -> None:
    form = make_form(name, size=2, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in make_inputs(1, H, 19, D, dtype=torch.float64)[:3]]
    with sizes(1, 6, fused=fused):
        assert gradcheck(
            lambda query, key, value, *_: form.attend(query, key, value), (*leaves, *form.parameters), fast_mode=True
        )


@fused_or_plain
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["local", "linear:hedgehog", "linear:elu", "near_far:hedgehog", "near_far:elu"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, use_reentrant: bool, fused: int) -> None:
    form = make_form(name)
    inputs, mask = make_inputs(2, H, 41, D), torch.arange(41) < torch.tensor([[41], [23]])

    def attend(*inputs: Tensor) -> Tensor:
        return checkpoint(form.attend, *inputs, mask, use_reentrant=use_reentrant)

    with sizes(1, 8, fused=fused):
        expected = run(form.attend, [], inputs, mask)
        leaves = [x.requires_grad_() for x in inputs[:3]]
        output = attend(*leaves)
        # Reentrant checkpoints know only backward(); the map's gradients come with it.
        output.backward(inputs[3])
    # A reentrant checkpoint runs forward without gradients, and so through the fused near blocks.
    assert_close(output.detach(), expected.output)
    assert_close([x.grad for x in leaves], expected.inputs)
    assert_close([x.grad for x in form.parameters], run(form.attend, form.parameters, inputs, mask).parameters)


@fused_or_plain
def test_backward_runs_again_where_the_graph_is_retained(fused: int) -> None:
    for name in STREAMED:
        form = make_form(name)
        leaves = [x.requires_grad_() for x in make_inputs(1, H, 41, D)[:3]]
        with sizes(1, 8, fused=fused):
            loss = form.attend(*leaves).square().sum()
            first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
        assert_close(second, first, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hedgehog", "elu"])
def test_compiled_functions_may_call_attention(name: str) -> None:
    linear, near_far = make_form(f"linear:{name}"), make_form(f"near_far:{name}")
    inputs, mask = make_inputs(2, H, 41, D), torch.arange(41) < torch.tensor([[41], [23]])

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return near_far.attend(query, key, torch.tanh(linear.attend(query, key, value, mask))) + value

    parameters = linear.parameters + near_far.parameters
    compiled = torch.compile(attend, backend="eager")
    with sizes(1, 8):
        expected = run(attend, parameters, inputs)
        actual = run(compiled, parameters, inputs)
        with torch.no_grad():
            output = compiled(*inputs[:3])
    assert_close(actual, expected)
    assert_close(output, expected.output)


@fused_or_plain
@pytest.mark.parametrize("autocast", [torch.bfloat16, slow(torch.float16)], ids=str)
@pytest.mark.parametrize("name", STREAMED)
def test_autocast_changes_nothing_in_any_chunk(name: str, autocast: torch.dtype, fused: int) -> None:
    form = make_form(name)
    inputs = make_inputs(2, H, 41, D)
    with sizes(1, 8, fused=fused):
        expected = run(form.attend, form.parameters, inputs)
        actual = run(form.attend, form.parameters, inputs, autocast=autocast)
    assert_close(actual, expected)


@fused_or_plain
@pytest.mark.parametrize("name", ["linear:favor", "near_far:favor"])
def test_second_derivatives_are_refused(name: str, fused: int) -> None:
    form = make_form(name, size=4)
    query, key, value, _ = make_inputs(1, 2, 20, 4)
    key.requires_grad_()
    with sizes(fused=fused):
        loss = form.attend(query, key, value).square().sum()
        (gradient,) = torch.autograd.grad(loss, key, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
