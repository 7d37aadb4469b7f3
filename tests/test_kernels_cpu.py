"""The compiled CPU kernel equals plain products in float64, and attention through it equals its reference."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import refused
from test_attention import TOLERANCES, assert_runs_close, make_form, make_inputs, make_mask, randn, run
from torch import Tensor
from torch.testing import assert_close
from torch.utils import cpp_extension

from st_linear import softmax, streaming
from st_linear.kernels import cpu
from st_linear.softmax import LOG_ZERO, fused_softmax_mean

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", autouse=True)
def built(empty_cache: None) -> Iterator[Path]:
    """The kernel is compiled, for this module alone: a process can load one library of its operators."""
    if shutil.which(cpp_extension.get_cxx_compiler()) is None:
        pytest.skip("there is no C++ compiler")
    library = cpu.build()
    yield library
    library.unlink()
    cpu.is_built.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the kernel's functions are called."""
    called: list[str] = []

    def noted(name: str, *args: object, **kwargs: object) -> object:
        called.append(name)
        return getattr_(name)(*args, **kwargs)

    originals = {name: getattr(cpu, name) for name in ("softmax_mean", "merge_states")}
    getattr_ = originals.__getitem__
    for name in originals:
        monkeypatch.setattr(cpu, name, partial(noted, name))
    return called


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


FORMS = ["linear:favor", "linear:hedgehog", "near_far:favor", "near_far:hedgehog", "near_far:efficient", "local"]


@pytest.mark.parametrize("length", [7, 40, 150])
@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("name", FORMS)
def test_attention_equals_the_reference(
    name: str, padding: str, length: int, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax, "FUSED_ROWS", 1)
    monkeypatch.setattr(streaming, "_SEGMENT_TOKENS", 32)
    form = make_form(name, num_heads=2, head_dim=16, size=8)
    inputs, mask = make_inputs(3, 2, length, 16), make_mask(padding, length)
    with torch.no_grad():
        output = form.attend(*inputs[:3], mask)
    if name == "near_far:favor" and length > 16:
        assert set(calls) == {"softmax_mean", "merge_states"}
    expected = run(form.reference, form.parameters, inputs, mask)
    assert_close(output, expected.output, **TOLERANCE)
    assert_runs_close(run(form.attend, form.parameters, inputs, mask), expected, TOLERANCES[torch.float32])


@pytest.mark.parametrize("name", ["linear:favor", "near_far:hedgehog"])
def test_packed_texts_equal_those_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "FUSED_ROWS", 1)
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
    assert [path.name for path in built.parent.iterdir()] == [built.name]


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with monkeypatch.context() as patch, refused("needs ninja: pip install", ImportError):
        patch.setattr(cpp_extension, "is_ninja_available", lambda: False)
        cpu.build()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with refused("needs a C++ compiler", RuntimeError):
        cpu.build()


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_lesser_processors(capability: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    line = [sys.executable, "-m", "pytest", "-q", "-n0", __file__]
    subprocess.run(line, env=environment, check=True)
