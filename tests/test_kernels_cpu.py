"""The compiled CPU kernel equals plain products in float64, and attention through it equals its reference."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused, slow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention import TOLERANCES, assert_runs_close, make_form, make_inputs, make_mask, randn, run
from test_streaming import CASES, Case, cases, check
from torch import Tensor
from torch.testing import assert_close

from st_linear import near, streaming
from st_linear.benchmarks.settings import Settings
from st_linear.benchmarks.workloads import attention_workloads
from st_linear.cli import main
from st_linear.kernels import cpu
from st_linear.softmax import LOG_ZERO, fused_softmax_mean

TOO_SLOW = [HealthCheck.too_slow]

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", autouse=True)
def built(empty_cache: None) -> Iterator[Path]:
    """The kernel is compiled, for this module alone: a process can load one library of its operators."""
    if sys.platform != "linux" or shutil.which("c++") is None:
        pytest.skip("the kernel is for Linux, and needs a C++ compiler")
    library = cpu.build()
    yield library
    library.unlink()
    cpu.is_built.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the kernel's functions are called."""
    called: list[str] = []

    def noted(name: str, function: Callable[..., object], *args: object) -> object:
        called.append(name)
        return function(*args)

    for name in ("softmax_mean", "add_softmax_gradients", "merge_states"):
        monkeypatch.setattr(cpu, name, partial(noted, name, getattr(cpu, name)))
    return called


def exit_with(code: int) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, "", "")


def expected_mean(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    logits = scale * query.double() @ key.double().mT
    if bias is not None:
        logits = logits + bias
    return (logits.softmax(-1) @ value.double()).float(), logits.logsumexp(-1, keepdim=True).float()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("head_dim", [16, 32, 48])
@pytest.mark.parametrize("blocks", [(), (3,)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3), (64, 192), (70, 129), (130, 300)])
def test_softmax_mean(
    rows: int, columns: int, blocks: tuple[int, ...], head_dim: int, biased: bool, calls: list[str]
) -> None:
    query, key, value = (
        randn(2, 3, *blocks, n, head_dim, seed=seed) for seed, n in enumerate((rows, columns, columns))
    )
    bias = randn(2, 1, *blocks, 1, columns, seed=5) if biased else None
    actual = fused_softmax_mean(query, key, value, bias, 0.3)
    assert calls
    assert_close(actual, expected_mean(query, key, value, bias, 0.3), **TOLERANCE)


@pytest.mark.parametrize("bias_shape", [None, (2, 3), (1, 1)])
@pytest.mark.parametrize("head_dim", [16, 48])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3), (64, 192), (70, 129), (130, 300)])
def test_all_gradients(
    rows: int, columns: int, head_dim: int, bias_shape: tuple[int, int] | None, calls: list[str]
) -> None:
    leaves = [randn(2, 3, n, head_dim, seed=seed) for seed, n in enumerate((rows, columns, columns))]
    leaves += [] if bias_shape is None else [randn(*bias_shape, 1, columns, seed=5)]
    weights = randn(2, 3, rows, head_dim, seed=6), randn(2, 3, rows, 1, seed=7)

    def gradients(function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [x.to(dtype).requires_grad_() for x in leaves]
        outputs = function(*inputs[:3], inputs[3] if len(inputs) > 3 else None, 0.3)
        return torch.autograd.grad(outputs, inputs, [x.to(outputs[0].dtype) for x in weights])

    actual, expected = gradients(fused_softmax_mean, torch.float32), gradients(expected_mean, torch.float64)
    assert set(calls) == {"softmax_mean", "add_softmax_gradients"}
    assert_close(actual, expected, check_dtype=False, rtol=1e-4, atol=1e-4)


def test_a_gradient_may_lie_anyhow_in_memory() -> None:
    inputs = [randn(1, 2, 16, 70, seed=seed).mT.requires_grad_() for seed in range(3)]
    for weight in (torch.ones(()).expand(1, 2, 70, 16), randn(1, 2, 16, 70, seed=4).mT):
        actual = torch.autograd.grad(fused_softmax_mean(*inputs)[0], inputs, weight)
        expected = torch.autograd.grad(expected_mean(*inputs, None, 1.0)[0], inputs, weight)
        assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("blocks", [(), (3,)])
def test_a_softmax_goes_on_from_that_of_other_keys(blocks: tuple[int, ...], gradients: bool) -> None:
    query, key, value = (randn(2, 3, *blocks, n, 16, seed=seed) for seed, n in enumerate((70, 200, 200)))
    bias = randn(2, 3, *blocks, 1, 200, seed=5)
    parts = [(x[..., :150, :], x[..., 150:, :]) for x in (key, value)] + [bias.split((150, 50), dim=-1)]
    (key_1, key_2), (value_1, value_2), (bias_1, bias_2) = parts
    nothing = torch.zeros_like(query), torch.full_like(query[..., :1], LOG_ZERO)
    with torch.set_grad_enabled(gradients):
        one = fused_softmax_mean(query, key_1, value_1, bias_1, 0.3, nothing)
        both = fused_softmax_mean(query, key_2, value_2, bias_2, 0.3, one)
    assert_close(one, expected_mean(query, key_1, value_1, bias_1, 0.3), **TOLERANCE)
    assert_close(both, expected_mean(query, key, value, bias, 0.3), **TOLERANCE)


def test_the_benchmark_runs_it_beside_pytorchs(calls: list[str]) -> None:
    models = "uncompiled:hedgehog@8", "hedgehog@8"
    settings = Settings.for_level("attention", models=models, lengths=(40,), heads=2, head_dim=16, backward=True)
    steps = next(attention_workloads(settings)).build()
    other = steps["uncompiled:hedgehog@8"]()
    assert not calls
    own = steps["hedgehog@8"]()
    assert "add_softmax_gradients" in calls
    assert_close(own, other, rtol=1e-4, atol=1e-4)


def test_what_it_goes_on_from_may_lie_anyhow_in_memory() -> None:
    query, key, value = (randn(1, 2, 70, 16, seed=seed) for seed in range(3))
    other = randn(1, 2, 16, 70, seed=3).mT, randn(1, 70, 2, 1, seed=4).transpose(1, 2)
    with torch.no_grad():
        actual = fused_softmax_mean(query, key, value, None, 1.0, other)
        expected = fused_softmax_mean(query, key, value, None, 1.0, tuple(x.contiguous() for x in other))
    assert_close(actual, expected, rtol=0, atol=0)


def test_a_row_with_every_key_masked_stays_finite() -> None:
    inputs = [randn(1, 2, 40, 16, seed=seed).requires_grad_() for seed in range(3)]
    outputs = fused_softmax_mean(*inputs, torch.full((1, 1, 1, 40), LOG_ZERO))
    assert (outputs[1] <= LOG_ZERO).all()
    assert outputs[0].isfinite().all()
    for gradient in torch.autograd.grad(outputs, inputs, [torch.zeros_like(x) for x in outputs]):
        assert (gradient == 0).all()
    with torch.no_grad():
        mean, log_sum = fused_softmax_mean(*inputs, torch.full((1, 1, 1, 40), -torch.inf))
    assert (mean == 0).all()
    assert (log_sum == -torch.inf).all()


def test_nan_in_a_text_stays_there() -> None:
    # The second text finds what the first has left in the kernel's memory.
    inputs = [randn(2, 1, rows, 16, seed=seed) for seed, rows in enumerate((70, 139, 139))]
    for x in inputs:
        x[0] = torch.nan
    together, alone = [x.requires_grad_() for x in inputs], [x[1:].detach().requires_grad_() for x in inputs]
    outputs, expected = fused_softmax_mean(*together), fused_softmax_mean(*alone)
    assert_close([x[1:] for x in outputs], list(expected), rtol=0, atol=0)
    gradients = torch.autograd.grad(outputs, together, [torch.ones_like(x) for x in outputs])
    expected_gradients = torch.autograd.grad(expected, alone, [torch.ones_like(x) for x in expected])
    assert_close([x[1:] for x in gradients], list(expected_gradients), rtol=0, atol=0)


@pytest.mark.parametrize(
    "wanted", [(True, False, False, False), (False, True, False, True), (False, False, True, False)]
)
def test_only_gradients_that_are_wanted(wanted: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = (2, 3, 9, 16), (2, 3, 7, 16), (2, 3, 7, 16), (2, 3, 1, 7)
    inputs = [randn(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    whole = torch.autograd.grad(fused_softmax_mean(*inputs)[0].sum(), inputs)
    given: list[bool] = []
    add = cpu.add_softmax_gradients

    def noted(*args: Any) -> None:
        given.extend(x is not None for x in args[-1])
        add(*args)

    monkeypatch.setattr(cpu, "add_softmax_gradients", noted)
    some = [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted)]
    leaves = [x for x in some if x.requires_grad]
    actual = torch.autograd.grad(fused_softmax_mean(*some)[0].sum(), leaves)
    assert tuple(given) == wanted
    assert_close(actual, tuple(x for x, want in zip(whole, wanted) if want), rtol=0, atol=0)


def test_gradients_of_overlapping_blocks_and_of_their_biases_add_up() -> None:
    query, keys, values, biases = (
        randn(*shape, seed=seed)
        for seed, shape in enumerate(((1, 2, 3, 64, 16), *[(1, 2, 256, 16)] * 2, (1, 2, 256, 1)))
    )
    leaves = [x.requires_grad_() for x in (query, keys, values, biases)]

    def blocks(x: Tensor) -> Tensor:
        return x.unfold(2, 128, 64).mT

    expected = expected_mean(query, blocks(keys), blocks(values), blocks(biases).mT, 0.3)
    weights = tuple(randn(*x.shape, seed=9) for x in expected)
    gradients = torch.autograd.grad(expected, leaves, weights)
    into = [torch.zeros_like(x) for x in leaves]
    rows = [x.detach() for x in leaves]
    views = [into[0], blocks(into[1]), blocks(into[2]), blocks(into[3]).mT]
    outputs = tuple(x.detach() for x in expected)
    cpu.add_softmax_gradients(
        weights, outputs, rows[0], blocks(rows[1]), blocks(rows[2]), blocks(rows[3]).mT, 0.3, views
    )
    assert_close(tuple(into), gradients, rtol=1e-4, atol=1e-4)


def test_threads_change_nothing() -> None:
    form = make_form("near_far:hedgehog", num_heads=2, head_dim=16, size=64)
    inputs = make_inputs(1, 2, 1100, 16)
    alone = run(form.attend, form.parameters, inputs)
    torch.set_num_threads(3)
    try:
        together = run(form.attend, form.parameters, inputs)
    finally:
        torch.set_num_threads(1)
    assert_runs_close(together, alone, TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["linear:favor", "near_far:hedgehog"])
def test_half_precision_is_upcast(name: str, dtype: torch.dtype, calls: list[str]) -> None:
    form = make_form(name, num_heads=2, head_dim=16, size=8)
    inputs = make_inputs(1, 2, 40, 16, dtype=dtype)
    with torch.no_grad():
        actual, expected = form.attend(*inputs[:3]), form.reference(*(x.float() for x in inputs[:3]))
    assert calls
    assert_close(actual, expected.to(dtype), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("factor", [1.0, 1e4])
def test_masked_keys_change_nothing(factor: float) -> None:
    query, key, value = (randn(1, 2, n, 32, seed=seed) for seed, n in enumerate((40, 150, 150)))
    bias = torch.zeros(1, 1, 1, 150)
    bias[..., 100:] = LOG_ZERO
    actual = fused_softmax_mean(factor * query, key, value, bias)
    expected = expected_mean(factor * query, key[:, :, :100], value[:, :, :100], None, 1.0)
    assert_close(actual, expected, rtol=1e-4, atol=1e-4 if factor == 1 else 1e-2)


def test_rows_may_lie_anyhow_in_memory() -> None:
    whole = [randn(1, 300, 2, 16, seed=seed).transpose(1, 2) for seed in range(3)]
    query = whole[0][:, :, :256].unflatten(2, (4, 64))
    key, value = (x[:, :, :256].unfold(2, 128, 64).mT for x in whole[1:])
    query = query[:, :, : key.shape[2]]
    assert_close(fused_softmax_mean(query, key, value), expected_mean(query, key, value, None, 1.0), **TOLERANCE)
    strided = [x[..., ::2].repeat_interleave(2, dim=-1) for x in whole]
    strided = [torch.cat([x, x], dim=-1)[..., ::2] for x in strided]
    assert_close(fused_softmax_mean(*strided), expected_mean(*strided, None, 1.0), **TOLERANCE)


@pytest.mark.parametrize("states", [3, 140])
@pytest.mark.parametrize("merged", [1, 17, 70])
def test_merge_states(states: int, merged: int) -> None:
    value, log_weight = randn(2, 3, states, 5, 32), 5 * randn(2, 3, states, 1, 5, seed=1)
    chosen = randn(merged, states, seed=2) > 0
    chosen[:, 0] = True
    # That a state is not chosen must not depend on how little the others weigh.
    log_weight[:, :, -1] += 300
    parts = zip(value.split((1, states - 1), dim=2), log_weight.split((1, states - 1), dim=2))
    actual = cpu.merge_states(list(parts), chosen)
    weights = log_weight.double().masked_fill(~chosen[:, None, None, :, None, None], LOG_ZERO)
    expected_log = weights.logsumexp(dim=3).movedim(0, 2)
    expected = (weights.softmax(dim=3).mT * value).sum(dim=3).movedim(0, 2)
    assert_close(actual, (expected.float(), expected_log.float()), **TOLERANCE)


FORMS = ["linear:favor", "linear:hedgehog", "near_far:favor", "near_far:hedgehog", "near_far:efficient"]


@pytest.mark.parametrize("length", [7, 40, 150])
@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("name", FORMS)
def test_attention_equals_the_reference(
    name: str, padding: str, length: int, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_SEGMENT_TOKENS", 32)
    form = make_form(name, num_heads=2, head_dim=16, size=8)
    inputs, mask = make_inputs(3, 2, length, 16), make_mask(padding, length)
    with torch.no_grad():
        output = form.attend(*inputs[:3], mask)
    expected = run(form.reference, form.parameters, inputs, mask)
    assert_close(output, expected.output, **TOLERANCE)
    # Sums are not its work but near blocks, and texts within two windows are SDPA's.
    streamed = name.startswith("linear") or length > 16
    merged = name in ("near_far:favor", "near_far:hedgehog")
    assert set(calls) == {"softmax_mean", *(["merge_states"] if merged else [])} if streamed else not calls
    calls.clear()
    assert_runs_close(run(form.attend, form.parameters, inputs, mask), expected, TOLERANCES[torch.float32])
    assert set(calls) == {"softmax_mean", "add_softmax_gradients"} if streamed else not calls


def test_gradients_of_local_attention_are_plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    # It has no band of keys by query, and below 64 tokens PyTorch's kernel is slower than they are.
    monkeypatch.setattr(near, "fused_gradients", None)
    form = make_form("local", size=8)
    inputs = make_inputs(1, 2, 40, 16)
    assert_runs_close(run(form.attend, [], inputs), run(form.reference, [], inputs), TOLERANCES[torch.float32])


@pytest.mark.parametrize("share", [pytest.param(20, id="some"), slow(1, id="all")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_random_cases_equal_the_reference(dtype: torch.dtype, share: int, calls: list[str]) -> None:
    @settings(deadline=None, derandomize=True, max_examples=CASES[dtype] // share, suppress_health_check=TOO_SLOW)
    @given(case=cases(), head_dim=st.sampled_from([16, 32, 48]))
    def test(case: Case, head_dim: int) -> None:
        check(case._replace(shape=(*case.shape[:3], head_dim)), dtype)

    test()
    assert set(calls) == {"softmax_mean", "add_softmax_gradients", "merge_states"}


@pytest.mark.parametrize("name", ["linear:favor", "near_far:hedgehog"])
def test_packed_texts_equal_those_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = make_form(name, num_heads=2, head_dim=16, size=8)
    lengths = [5, 0, 40, 600, 23]
    query, key, value, _ = make_inputs(sum(lengths), 2, 16)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    with torch.no_grad():
        output = form.attend(query, key, value, cu_seqlens=offsets)
        for start, stop in zip(offsets.tolist(), offsets.tolist()[1:]):
            if stop > start:
                alone = form.reference(*(x[start:stop].transpose(0, 1)[None] for x in (query, key, value)))
                assert_close(output[start:stop], alone[0].transpose(0, 1), **TOLERANCE)


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param([randn(1, 2, 9, 24)] * 3, id="rows that are no whole vectors"),
        pytest.param([randn(1, 2, 9, 16, dtype=torch.float64)] * 3, id="float64"),
    ],
)
def test_what_it_does_not_take_goes_to_pytorch(inputs: list[Tensor], calls: list[str]) -> None:
    actual = fused_softmax_mean(*inputs)
    assert not calls
    assert_close(actual, expected_mean(*inputs, None, 1.0), check_dtype=False, **TOLERANCE)


def test_a_second_build_does_nothing(built: Path) -> None:
    before = built.stat()
    assert cpu.build() == built
    assert built.stat() == before
    assert list(built.parent.iterdir()) == [built]


class TestErrors:
    @pytest.fixture(autouse=True)
    def empty(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        cpu.is_built.cache_clear()
        yield
        cpu.is_built.cache_clear()

    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler -v")
        with refused("needs a C++ compiler, and there is no 'no-such-compiler'", FileNotFoundError):
            cpu.build()

    def test_a_compiler_that_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "false")
        with refused("false could not compile the CPU kernel: exit code 1", RuntimeError):
            cpu.build()
        assert not any(cpu.library_path().parent.iterdir())

    def test_errors_in_the_source(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        source = tmp_path / "cpu.cpp"
        source.write_text("int x = y;")
        monkeypatch.setattr(cpu, "_SOURCE", source)
        with refused("cpu.cpp:1:9: error: ", RuntimeError):
            cpu.build()

    def test_another_system(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "darwin")
        with refused("is for Linux", RuntimeError):
            cpu.build()

    def test_a_damaged_library_is_left_out_and_built_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        library = cpu.library_path()
        library.parent.mkdir(parents=True)
        library.write_text("junk")
        with pytest.warns(UserWarning, match="run `st-linear build` again"):
            assert not cpu.is_built()
        inputs = [randn(1, 2, 9, 16, seed=seed) for seed in range(3)]
        assert_close(fused_softmax_mean(*inputs), expected_mean(*inputs, None, 1.0), **TOLERANCE)
        compiled: list[object] = []
        monkeypatch.setattr(subprocess, "run", lambda line, **options: compiled.append(line) or exit_with(1))
        with refused("could not compile", RuntimeError):
            cpu.build()
        assert compiled

    def test_no_home(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in ("XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
        # Not what lies under the working directory.
        monkeypatch.chdir(tmp_path)
        library = tmp_path / cpu.library_path()
        library.parent.mkdir(parents=True)
        library.write_text("junk")
        assert not cpu.is_built()
        with refused("set XDG_CACHE_HOME", FileNotFoundError):
            cpu.build()


def test_wrong_shapes_are_refused() -> None:
    query, key, value = (randn(2, 3, n, 16, seed=seed) for seed, n in enumerate((5, 7, 7)))
    with pytest.raises(RuntimeError, match=r"shape .* wanted"):
        cpu.softmax_mean(query, key[:1], value, None, 1.0)
    outputs = cpu.softmax_mean(query, key, value, None, 1.0)
    into = [torch.zeros_like(x) for x in (query, key, value)]
    for wrong in ([into[1], *into[1:]], [into[0].double(), *into[1:]], [into[0], into[1][:1], into[2]]):
        with pytest.raises(RuntimeError, match=r"wanted, got"):
            cpu.add_softmax_gradients(outputs, outputs, query, key, value, None, 1.0, [*wrong, None])
    strided = [into[0].mT.contiguous().mT, *into[1:], None]
    with pytest.raises(RuntimeError, match="side by side"):
        cpu.add_softmax_gradients(outputs, outputs, query, key, value, None, 1.0, strided)
    with pytest.raises(RuntimeError, match="D must be a multiple of"):
        cpu.softmax_mean(*[randn(1, 1, 5, 17)] * 3, None, 1.0)
    states = randn(1, 1, 4, 3, 16), randn(1, 1, 4, 1, 3)
    with pytest.raises(RuntimeError, match="4 states, but `chosen` has 3 columns"):
        cpu.merge_states([states], torch.ones(2, 3, dtype=torch.bool))


def test_command(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(["build", "--json"])
    assert not info.value.code
    assert json.loads(capfd.readouterr().out) == {"library": str(cpu.library_path())}


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_lesser_processors(capability: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    line = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"]
    taken = subprocess.run(line, env=environment, check=True, capture_output=True, text=True).stdout
    assert taken.strip().lower() == capability
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-n0", __file__], env=environment, check=True)
