"""A kernel for means under a softmax on the CPU, in C++; :mod:`st_linear.softmax` calls it once it is compiled.

PyTorch's own fused kernel stands in for it until then. ``st-linear build`` compiles it, once for a machine.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("cpu.cpp")

# What PyTorch compiles its own kernels with, by what it finds in the processor.
_FLAGS = {
    "AVX512": ["-DCPU_CAPABILITY_AVX512", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    "AVX2": ["-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"],
}


def takes(*inputs: Tensor) -> bool:
    """Whether the kernel is there, for tensors of rows (…, D)."""
    fits = all(x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[-1] % 16 == 0 for x in inputs)
    return fits and is_built()


def softmax_mean(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    other: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`st_linear.softmax.fused_softmax_mean`, without gradients; a bias is one of keys, (…, 1, N)."""
    if query.ndim == 4:
        query, key, value = query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2)
        bias = None if bias is None else bias.unsqueeze(-3)
        other = None if other is None else (other[0].unsqueeze(2), other[1].unsqueeze(2))
        mean, log_sum = softmax_mean(query, key, value, bias, scale, other)
        return mean.squeeze(2), log_sum.squeeze(2)
    if bias is not None:
        bias = bias.expand(*query.shape[:3], 1, key.shape[3])
    return torch.ops.st_linear_cpu.softmax_mean(query, key, value, bias, scale, *(other or (None, None)))


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
    if library.exists():
        torch.ops.load_library(library)
        return True
    return False


def build() -> Path:
    """Compile the kernel, in some 15 seconds, unless that has been done.

    Returns:
        The library, :func:`library_path`.

    Raises:
        RuntimeError: If there is no compiler, or it fails.
        ImportError: If there is no ninja.
    """
    library = library_path()
    if library.exists():
        return library
    if sys.platform == "win32":
        raise RuntimeError("the CPU kernel is for Linux and macOS; PyTorch's own kernels do its work on Windows")
    from torch.utils import cpp_extension

    if shutil.which(cpp_extension.get_cxx_compiler()) is None:
        raise RuntimeError("the CPU kernel needs a C++ compiler, such as g++ (Debian: apt install g++)")
    if not cpp_extension.is_ninja_available():
        raise ImportError('the CPU kernel needs ninja: pip install "st-linear[native]"')
    flags = ["-O3", *_FLAGS.get(_capability(), []), *(["-fopenmp"] if sys.platform == "linux" else [])]
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        cpp_extension.load(
            library.stem, [str(_SOURCE)], extra_cflags=flags, build_directory=folder, is_python_module=False
        )
        os.replace(Path(folder) / library.name, library)
    is_built.cache_clear()
    return library


def library_path() -> Path:
    """Where the compiled kernel belongs: under ``~/.cache/st_linear``, or ``XDG_CACHE_HOME`` where it is set."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(_SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    return cache / "st_linear" / "kernels" / f"st_linear_cpu_{_capability().lower()}_{key}.so"


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()
