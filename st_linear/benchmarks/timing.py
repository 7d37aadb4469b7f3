"""How contenders are measured against one another: interleaved rounds, medians, paired ratios, peak memory."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.profiler import profile

from st_linear.records import peak_memory_mib, reset_peak_memory

Step = Callable[[], Any]
"""One unit of a contender's work; the tensors that it returns are its outputs."""

MINIMUM_ROUNDS = 6
"""The fewest rounds whose range covers the median with a probability of at least 95 %: 1 - 2 · 0.5**6 = 0.969."""

_MINIMUM_SECONDS = 0.02
"""A timing lasts at least this long, so that the clock and the scheduler do not show."""

_SETUP_SECONDS = 1.0
"""In a call that takes longer than this, what is set up once does not show."""


class Interval(NamedTuple):
    """A median and its interval."""

    median: float
    low: float
    high: float


@dataclass
class Timings:
    """What was measured of one contender.

    Attributes:
        seconds: Of one call, by round.
        calls: Calls in each timing.
        failure: Why there are none, or None.
    """

    seconds: list[float] = field(default_factory=list)
    calls: int = 1
    failure: str | None = None


class ExtraMemory(NamedTuple):
    """Peak growth of memory during one call, beyond what is held before it and what it returns; MiB.

    Attributes:
        tensors_mib: Of live tensors.
        resident_mib: Of the process's resident memory, the allocator's holes included; None where that can't be
            measured, and on CUDA.
        outputs_mib: Size of what it returns.
    """

    tensors_mib: float
    resident_mib: float | None
    outputs_mib: float

    @property
    def total_mib(self) -> float:
        """Live tensors, outputs included."""
        return self.tensors_mib + self.outputs_mib


def measure_rounds(
    steps: Mapping[str, Step],
    *,
    rounds: int,
    device: torch.device,
    warmup: int = 1,
    seconds: float | None = None,
    seed: int = 0,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Timings]:
    """Time contenders side by side: in every round each runs once, in an order that is shuffled anew.

    What slows the machine down for a while then slows all of them down, and the ratios of a round keep their meaning.
    A timing of a fast contender holds as many calls as fill 20 ms. Python's garbage collector is off meanwhile.

    Args:
        steps: The contenders by name.
        rounds: How many rounds are timed.
        device: Where they run; on CUDA time is taken by events on the device.
        warmup: Rounds before, which are not counted; the first also sets the calls in each timing.
        seconds: No round is begun after this long, once :data:`MINIMUM_ROUNDS` are done; None = no such limit.
        seed: Of the order.
        on_round: Called after each round, warm-up included.

    Returns:
        The timings by name. A contender that ran out of memory has none, but a ``failure``.
    """
    results = {name: Timings() for name in steps}
    order = list(steps)
    shuffle = random.Random(seed).shuffle
    with _no_garbage_collection():
        for _ in range(max(warmup, 1)):
            for name in list(order):
                try:
                    elapsed = _seconds(steps[name], 1, device)
                    if elapsed < _SETUP_SECONDS:
                        # The first call pays for what is set up once.
                        elapsed = min(elapsed, _seconds(steps[name], 1, device))
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    order.remove(name)
                    results[name].failure = "out of memory"
                    continue
                results[name].calls = max(1, math.ceil(_MINIMUM_SECONDS / max(elapsed, 1e-9)))
            on_round()
        start = time.perf_counter()
        for done in range(rounds):
            if seconds is not None and done >= MINIMUM_ROUNDS and time.perf_counter() - start > seconds:
                break
            shuffle(order)
            # What the last round left; all that is older has been through a collection.
            gc.collect(1)
            for name in order:
                timings = results[name]
                timings.seconds.append(_seconds(steps[name], timings.calls, device))
            on_round()
    return results


def median_interval(values: Sequence[float]) -> Interval:
    """Median with its exact 95 % interval, from order statistics: no assumption on the distribution.

    The interval runs from the k-th lowest to the k-th highest value, k the largest number for which a binomial count
    (n, 1/2) lies in k … n - k with a probability of at least 95 %.

    Args:
        values: At least :data:`MINIMUM_ROUNDS` numbers; of fewer, the range has less than 95 % and is returned.

    Raises:
        ValueError: If there are none.

    Example:
        >>> median_interval([1, 2, 3, 4, 5, 6, 7, 8, 9])
        Interval(median=5, low=2, high=8)
    """
    if not values:
        raise ValueError("values is empty: there is no median")
    ordered = sorted(values)
    rank, outside = 1, 2 * 0.5 ** len(ordered)
    while (outside := outside + 2 * math.comb(len(ordered), rank) * 0.5 ** len(ordered)) <= 0.05:
        rank += 1
    return Interval(statistics.median(ordered), ordered[rank - 1], ordered[-rank])


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Median of ``numerator / denominator``, round by round, with its 95 % interval.

    Args:
        numerator: Figures by round.
        denominator: Figures of the same rounds.

    Raises:
        ValueError: If the numbers of rounds differ, or there are none.
    """
    if len(numerator) != len(denominator):
        raise ValueError(f"rounds must be pairs, got {len(numerator)} and {len(denominator)}")
    return median_interval([a / b for a, b in zip(numerator, denominator)])


def extra_memory(step: Step, device: torch.device) -> ExtraMemory | None:
    """Peak growth of memory during a call of ``step``, which ran before: beyond what is held and what it returns.

    On the CPU a call under PyTorch's profiler counts live tensors, exactly, and another the resident memory of the
    process, to within about 1 MiB: free heap goes back to the system first, or memory that the allocator kept from
    earlier calls would hide the growth. The two differ by what the allocator can't reuse or give back, and by scratch
    of the matrix library.

    Returns:
        None on devices other than the CPU and CUDA's.
    """
    if device.type not in ("cpu", "cuda"):
        return None
    gc.collect()
    return_free_heap()
    synchronise(device)
    reset_peak_memory()
    before = peak_memory_mib()
    resident = _resident_mib()
    outputs = step()
    synchronise(device)
    growth = peak_memory_mib() - before
    size = sum(tensor.nbytes for tensor in _tensors(outputs)) / 2**20
    del outputs
    beyond = max(growth - size, 0.0)
    if device.type == "cuda":
        return ExtraMemory(beyond, None, size)
    # The high-water mark is this process's, and was taken back.
    measured = resident is not None and before <= resident + 4 and not torch.cuda.is_initialized()
    return ExtraMemory(max(_peak_of_tensors(step) - size, 0.0), beyond if measured else None, size)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not have the memory it asked for, on the device or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(step: Step, calls: int, device: torch.device) -> float:
    """Seconds per call."""
    synchronise(device)
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            step()
        end.record()
        synchronise(device)
        return begin.elapsed_time(end) / 1000 / calls
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for tensor in outputs or () if isinstance(tensor, Tensor)]


def _peak_of_tensors(step: Step) -> float:
    """Peak growth of live tensors on the CPU, in MiB."""
    with _no_output_of_libraries(), profile(use_cpu=True, profile_memory=True) as profiled:
        step()
    results = profiled.kineto_results
    assert results is not None
    changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0)) / 2**20


@contextmanager
def _no_output_of_libraries() -> Iterator[None]:
    """PyTorch's profiler says on standard error, beneath Python, that it starts and stops."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def return_free_heap() -> None:
    """Give memory that is free but kept back to the system, where the C library can: it would hide growth."""
    try:
        # glibc's alone; other C libraries have no such function.
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return


def _resident_mib() -> float | None:
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(lines["VmRSS"].split()[0]) / 2**10 if "VmRSS" in lines else None
