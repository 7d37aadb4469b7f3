"""A kernel for means under a softmax on the CPU, in C++; :mod:`st_linear.softmax` calls it once it is compiled.

PyTorch's own fused kernel stands in for it until then. ``st-linear build`` compiles it, once for a machine.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("cpu.cpp")

# What PyTorch compiles its own kernels with, by what it finds in the processor.
_FLAGS = {
    "AVX512": ["-DCPU_CAPABILITY_AVX512", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    "AVX2": ["-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"],
}

_is_left_out = False


def takes(*inputs: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether the kernel is there for tensors of rows (…, D), in ``dtype`` if it is to be another than theirs."""
    fits = all(
        x.device.type == "cpu" and (dtype or x.dtype) == torch.float32 and x.shape[-1] % 16 == 0 for x in inputs
    )
    return fits and not _is_left_out and is_built()


@contextmanager
def left_out() -> Iterator[None]:
    """Inside, PyTorch's own kernels do the work of this one: for comparisons."""
    global _is_left_out
    before, _is_left_out = _is_left_out, True
    try:
        yield
    finally:
        _is_left_out = before


def softmax_mean(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    other: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`st_linear.softmax.fused_softmax_mean`, without gradients; a bias is one of keys, (…, 1, N)."""
    alone = query.ndim == 4
    query, key, value, *others = (_in_rows(x, alone) for x in (query, key, value, *(other or ())))
    bias = _biases(bias, query, key, alone)
    texts, heads, blocks, queries, head_dim = query.shape
    # Tokens before heads in memory.
    mean = query.new_empty(texts, blocks, queries, heads, head_dim).permute(0, 3, 1, 2, 4)
    log_sum = torch.ops.st_linear_cpu.softmax_mean(mean, query, key, value, bias, scale, *(others or (None, None)))
    return (mean.squeeze(2), log_sum.squeeze(2)) if alone else (mean, log_sum)


def add_softmax_gradients(
    gradients: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    into: Sequence[Tensor | None],
) -> None:
    """The gradients of query, key, value and bias, from those of what :func:`softmax_mean` returned, its ``outputs``.

    ``into`` has a tensor for each that is wanted, in its shape; the bias's is (B, H, 1, N) or (B, H, n, 1, N). In them
    numbers of a row lie side by side. The query's is written; the others are added to what is there, and may be
    overlapping views where blocks overlap.
    """
    alone = query.ndim == 4
    (grad_mean, grad_log_sum), (mean, log_sum) = gradients, outputs
    rows = (_in_rows(x, alone) for x in (grad_mean, grad_log_sum, query, key, value, mean, log_sum))
    grad_mean, grad_log_sum, query, key, value, mean, log_sum = rows
    into = [x.unsqueeze(2) if alone and x is not None else x for x in into]
    bias = _biases(bias, query, key, alone)
    torch.ops.st_linear_cpu.add_softmax_gradients(
        grad_mean, grad_log_sum, query, key, value, bias, scale, mean, log_sum, *into
    )


def _in_rows(x: Tensor, alone: bool) -> Tensor:
    """x, (B, H, n, …), or (B, H, …) as one block, with the last dimension side by side in memory."""
    x = x.unsqueeze(2) if alone else x
    return x if x.stride(-1) == 1 else x.contiguous()


def _biases(bias: Tensor | None, query: Tensor, key: Tensor, alone: bool) -> Tensor | None:
    """(B, H, n, 1, N)."""
    if bias is None:
        return None
    return (bias.unsqueeze(-3) if alone else bias).expand(*query.shape[:3], 1, key.shape[3])


def merge_states(states: Sequence[tuple[Tensor, Tensor]], chosen: Tensor) -> tuple[Tensor, Tensor]:
    """M merged states of N, which come in parts along dim 2: their values (B, H, n, R, D) and log weights.

    Log weights are (B, H, n, 1, R). Row m of ``chosen``, (M, N) bool, says of which states, of one at least, the m-th
    result is made.
    """
    values, log_weights = zip(*states)
    return torch.ops.st_linear_cpu.merge_states(list(values), list(log_weights), chosen)


@functools.cache
def is_built() -> bool:
    """Whether the kernel has been compiled for this machine and this version of PyTorch; it is loaded then."""
    library = library_path()
    # Not Path's: that raises where the folder may not be read.
    if not library.is_absolute() or not os.path.isfile(library):
        return False
    try:
        torch.ops.load_library(library)
    except OSError as error:
        warnings.warn(f"the compiled CPU kernel is left out, run `st-linear build` again: {error}", stacklevel=2)
        return False
    return True


def build() -> Path:
    """Compile the kernel, in some 15 seconds, unless that has been done.

    Returns:
        The library, :func:`library_path`.

    Raises:
        FileNotFoundError: If there is no compiler, or no home folder.
        RuntimeError: If it fails, or this is not Linux.
    """
    library = library_path()
    if is_built():
        return library
    if sys.platform != "linux":
        raise RuntimeError("the CPU kernel is for Linux; elsewhere PyTorch's own kernels do its work")
    if not library.is_absolute():
        raise FileNotFoundError("there is no home folder to keep the CPU kernel in: set XDG_CACHE_HOME")
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"the CPU kernel needs a C++ compiler, and there is no {compiler[0]!r}: install g++")
    from torch.utils import cpp_extension

    folders = [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-lc10", "-ltorch_cpu"]
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        temporary = Path(folder) / library.name
        line = [*compiler, *_flags(), *folders, str(_SOURCE), "-o", str(temporary), *libraries]
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            errors = [text for text in done.stderr.splitlines() if "error" in text] or [f"exit code {done.returncode}"]
            raise RuntimeError(f"{compiler[0]} could not compile the CPU kernel: {errors[0]}")
        os.replace(temporary, library)
    is_built.cache_clear()
    if not is_built():
        library.unlink(missing_ok=True)
        raise RuntimeError(f"what {compiler[0]} compiled can't be loaded: set CXX to another compiler, g++ say")
    return library


def library_path() -> Path:
    """Where the compiled kernel belongs: under ``~/.cache/st_linear``, or ``XDG_CACHE_HOME`` where it is set."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    parts = (_SOURCE.read_text(encoding="utf-8"), torch.__version__, platform.machine(), *_flags())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return cache / "st_linear" / "kernels" / f"cpu-{_capability().lower().replace(' ', '-')}-{key}.so"


def _flags() -> list[str]:
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return ["-std=c++20", "-O3", "-funroll-loops", "-shared", "-fPIC", "-fopenmp", abi, *_FLAGS.get(_capability(), [])]


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()
