"""Records of runs: where a run took place, and files that are either whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch

_VARIABLES = ("OMP_NUM_THREADS", "THP_MEM_ALLOC_ENABLE", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD")


def environment() -> dict[str, Any]:
    """
    Describe where this process runs, as JSON values.

    Returns:
        The versions of ``st_linear``, ``torch``, ``transformers``, ``sentence_transformers`` and ``python``;
        ``platform``, ``device`` (the accelerator, else the processor), ``instructions`` of the processor that torch
        uses, ``bfloat16`` (whether the device multiplies it in hardware) and ``threads``; ``variables`` of the
        environment that change how memory is allocated and threads run, where they are set; ``git_commit`` and
        ``git_dirty`` (tracked files differ from that commit) of the checkout that st_linear is imported from, both
        None outside a checkout; ``time_utc`` in ISO 8601.
    """
    commit, dirty = _checkout()
    return {
        # The package in use; an installed distribution of that name may be another.
        "st_linear": getattr(sys.modules.get("st_linear"), "__version__", None),
        "torch": str(torch.__version__),
        "transformers": _version("transformers"),
        "sentence_transformers": _version("sentence-transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": has_bfloat16(),
        "threads": torch.get_num_threads(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "git_commit": commit,
        "git_dirty": dirty,
        "time_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def has_bfloat16(device: torch.device | None = None) -> bool:
    """
    Whether a device multiplies bfloat16 in hardware: elsewhere it is many times slower than float32.

    Args:
        device: None = the GPU if there is one, else the CPU.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def peak_memory_mib() -> float:
    """
    Peak memory of this process so far, in MiB.

    Returns:
        With a CUDA device in use, the most that torch had allocated on it since the last
        ``torch.cuda.reset_peak_memory_stats()``; otherwise the peak resident memory of the process.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file():
        # A child started by vfork inherits its parent's ru_maxrss; VmHWM belongs to this process alone.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, the others KiB.
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def reset_peak_memory() -> None:
    """Let :func:`peak_memory_mib` count from here on, where the system allows it (Linux, CUDA)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """
    Hand out a temporary path beside ``path`` that takes its place once the block has ended well.

    Whoever reads ``path`` meanwhile, or after a crash, sees the old file or the new one, never a part. Missing
    parent folders are made. If the block raises, the temporary file goes and ``path`` stays as it was.

    Args:
        path: The file to write.

    Yields:
        The path to write to; the suffix is that of ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are readable by their owner alone, and would stay so under the final name.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """
    Write a text file atomically, in UTF-8 with the line ends as they are in ``text``.

    Args:
        path: The file to write; missing parent folders are made.
        text: What it shall hold.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """
    Write a JSON file atomically.

    Args:
        path: The file to write; missing parent folders are made.
        value: JSON values. Keys that are not strings become strings (None becomes ``"null"``), as ``json`` does.

    Raises:
        ValueError: If ``value`` holds NaN, an infinity, or what JSON has no form for. Nothing is written then.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"value can't be written to {path} as JSON: {error}") from error
    write_text(path, text + "\n")


def read_json(path: str | Path) -> Any:
    """
    Read a JSON file.

    Args:
        path: The file to read.

    Returns:
        Its value.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or holds NaN or an infinity.
    """
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8"), parse_constant=_refuse_constant)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: not JSON ({error}); restore it, or delete it and run again") from error


def as_json(value: Any) -> Any:
    """
    Turn a value into what comes back when it is written as JSON and read again: tuples become lists, say.

    Args:
        value: A JSON value, tuples allowed.

    Returns:
        The same in JSON's own types.
    """
    return json.loads(json.dumps(value))


def digest(value: Any) -> str:
    """
    Tell values apart: 16 hexadecimal digits that are the same for the same value.

    Args:
        value: A JSON value.

    Returns:
        BLAKE2 of its JSON.
    """
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _checkout() -> tuple[str | None, bool | None]:
    root = Path(__file__).resolve().parent.parent
    # Asked of the folder itself: a virtual environment may lie inside somebody else's checkout.
    if not (root / ".git").exists():
        return None, None
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return commit, None if commit is None or changes is None else bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
