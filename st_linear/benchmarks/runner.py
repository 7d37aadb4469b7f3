"""A whole benchmark: workload after workload, with a record that keeps what is finished."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from st_linear.benchmarks.contenders import Shape, check_attention
from st_linear.benchmarks.encoders import PADDED, check_encoder, encoder_workloads, mixed_models, mixed_workloads
from st_linear.benchmarks.settings import Settings
from st_linear.benchmarks.timing import (
    ExtraMemory,
    Step,
    Timings,
    extra_memory,
    is_out_of_memory,
    measure_rounds,
    median_interval,
    paired_ratio,
)
from st_linear.benchmarks.workloads import Workload, attention_workloads
from st_linear.kernels import cpu
from st_linear.recipe import base_name, packaged_base
from st_linear.records import environment, read_json, write_json

INTERVAL = "95 %, exact from order statistics of the rounds (st_linear.benchmarks.timing.median_interval)"

_NOT_COMPARED = ("time_utc", "git_dirty")
"""Of the environment: what may differ between parts of one record, the record's own file being tracked for one."""

Progress = Callable[[str, int, int], None]
"""Called with a workload's name, the rounds that are done, and all rounds of the run."""


def check(settings: Settings) -> None:
    """Find out before the work, not after it, that a contender can't take part.

    Raises:
        ValueError: If a name is unknown, or a contender does not run on the device or in the number format.
        ImportError: If a package is missing.
    """
    for name in settings.models:
        if settings.level == "attention":
            assert settings.heads is not None
            assert settings.head_dim is not None
            device, dtype = torch.device(settings.device), settings.torch_dtype()
            check_attention(name, Shape(settings.heads, settings.head_dim, device, dtype, settings.features))
        else:
            check_encoder(name, settings)
    if settings.level != "attention" and not settings.base:
        packaged_base()


def run(
    settings: Settings,
    record_path: Path | None = None,
    *,
    progress: Progress = lambda *_: None,
    on_record: Callable[[dict[str, Any]], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure everything that the settings ask for and the record does not hold yet.

    Args:
        settings: From :meth:`Settings.for_level`.
        record_path: The record, written after every workload; None = kept in memory. One that is there is continued:
            workloads in it are not measured again.
        progress: Called after each round.
        on_record: Called with the record after each workload.
        say: Called with what a person should know.

    Returns:
        The record: ``level``, ``settings``, ``environment``, ``interval`` and ``results``, one for each workload with
        its ``contenders``: every timing, medians, ratios to the baselines with intervals, and memory.

    Raises:
        ValueError: If the record there was made with other settings, or elsewhere, or the settings can't be met.
    """
    check(settings)
    with _threads(settings.threads):
        record = _start(settings, record_path)
        workloads = [workload for workload in _workloads(settings) if not _holds(record, workload.name)]
        if record["results"]:
            there = ", ".join(result["name"] for result in record["results"])
            say(f"{record_path} holds {there}: not measured again")
        groups = [workloads] if settings.across_lengths and workloads else [[workload] for workload in workloads]
        rounds = sum(settings.rounds + max(settings.warmup, 1) for _ in groups)
        done = 0
        for group in groups:
            label = group[0].name if len(group) == 1 else f"{group[0].name} … {group[-1].name}"

            def on_round(label: str = label) -> None:
                nonlocal done
                done += 1
                progress(label, done, rounds)

            progress(label, done, rounds)
            record["results"] += _measure(group, settings, on_round)
            record["results"].sort(key=lambda result: _order(settings, result))
            if record_path is not None:
                write_json(record_path, record)
            on_record(record)
            # The next one's inputs may need the room.
            if settings.device.startswith("cuda"):
                torch.cuda.empty_cache()
    return record


def _workloads(settings: Settings) -> Iterator[Workload]:
    if settings.level == "attention":
        return attention_workloads(settings)
    return mixed_workloads(settings) if settings.level == "mixed" else encoder_workloads(settings)


def _start(settings: Settings, record_path: Path | None) -> dict[str, Any]:
    """The record to continue, or a new one."""
    values = settings.to_json()
    if "base" in values:
        values["base"] = base_name(settings.base or packaged_base())
    record: dict[str, Any] = {
        "level": settings.level,
        "settings": values,
        "environment": {**environment(), "cpu_kernel": cpu.is_built()},
        "interval": INTERVAL,
        "results": [],
    }
    if record_path is None or not record_path.exists():
        return record
    found = read_json(record_path)
    if not isinstance(found, dict) or not {"settings", "environment", "results"} <= found.keys():
        raise ValueError(f"{record_path} is no record of a benchmark: name another folder")
    for part, own in (("settings", values), ("environment", record["environment"])):
        # Through JSON, as the other was.
        for name, value in json.loads(json.dumps(own)).items():
            # More lengths may be asked for than before: what is there stays.
            if name in (*_NOT_COMPARED, "lengths", "parts") and not settings.across_lengths:
                continue
            there = found[part].get(name)
            if there != value and name not in _NOT_COMPARED:
                raise ValueError(
                    f"{record_path} was made with {name}={there!r}, this run has {value!r}: name another folder, or "
                    "delete it"
                )
    found["environment"]["git_dirty"] = found["environment"].get("git_dirty") or record["environment"]["git_dirty"]
    for name in ("lengths", "parts"):
        if name in values:
            found["settings"][name] = list(dict.fromkeys([*found["settings"][name], *values[name]]))
    return found


def _holds(record: dict[str, Any], name: str) -> bool:
    return any(result["name"] == name for result in record["results"])


def _order(settings: Settings, result: dict[str, Any]) -> tuple[int, int, str]:
    parts = list(settings.parts or ())
    part = result.get("part")
    return (parts.index(part) if part in parts else len(parts), result["longest"], result["name"])


def _measure(group: Sequence[Workload], settings: Settings, on_round: Callable[[], None]) -> list[dict[str, Any]]:
    """Measure workloads in the same rounds: memory first, then time."""
    device = torch.device(settings.device)
    steps: dict[tuple[str, str], Step] = {}
    failed: dict[tuple[str, str], str] = {}
    for workload in group:
        failed.update({(workload.name, name): reason for name, reason in workload.skipped.items()})
        steps.update({(workload.name, name): step for name, step in workload.build().items()})
    memory: dict[tuple[str, str], ExtraMemory | None] = {}
    for key, step in list(steps.items()):
        try:
            # The first call sets up what stays, an optimizer's state for one.
            step()
            memory[key] = extra_memory(step, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failed[key] = "out of memory"
            del steps[key]
    # Keys of the timing are text, as the order of contenders alone depends on them.
    named = {f"{workload}\n{name}": step for (workload, name), step in steps.items()}
    measured = measure_rounds(
        named,
        rounds=settings.rounds,
        device=device,
        warmup=settings.warmup,
        seconds=settings.seconds * len(group) or None,
        seed=settings.seed,
        on_round=on_round,
    )
    timings: dict[tuple[str, str], Timings] = {}
    for (workload_name, name), timing in zip(steps, measured.values()):
        timings[workload_name, name] = timing
        if timing.failure is not None:
            failed[workload_name, name] = timing.failure
    names = mixed_models(settings) if settings.level == "mixed" else settings.models
    return [_result(workload, group[0], names, settings, timings, memory, failed) for workload in group]


def _result(
    workload: Workload,
    first: Workload,
    names: Sequence[str],
    settings: Settings,
    timings: dict[tuple[str, str], Timings],
    memory: dict[tuple[str, str], ExtraMemory | None],
    failed: dict[tuple[str, str], str],
) -> dict[str, Any]:
    contenders = {}
    for name in names:
        key = (workload.name, name)
        if key in failed:
            contenders[name] = {"skipped": failed[key]}
            continue
        seconds = timings[key].seconds
        middle = median_interval(seconds)
        figures: dict[str, Any] = {
            "median_seconds": middle.median,
            "seconds_low": middle.low,
            "seconds_high": middle.high,
            "tokens_per_second": workload.tokens / middle.median,
            "documents_per_second": workload.documents / middle.median,
            "speed": {},
        }
        for baseline in [*settings.baselines, *([f"{name}{PADDED}"] if f"{name}{PADDED}" in names else [])]:
            other = (workload.name, baseline)
            if other not in failed:
                ratio = paired_ratio(timings[other].seconds, seconds)
                figures["speed"][baseline] = ratio._asdict()
        if workload.bytes_moved:
            figures["bytes_per_second"] = workload.bytes_moved / middle.median
        extra = memory[key]
        figures["memory"] = None if extra is None else extra._asdict()
        if settings.across_lengths:
            figures["growth_per_token"] = _growth(workload, first, name, timings, memory, failed)
        figures["calls"] = timings[key].calls
        figures["seconds"] = seconds
        contenders[name] = figures
    return {
        "name": workload.name,
        "longest": workload.longest,
        "tokens": workload.tokens,
        "documents": workload.documents,
        **workload.about,
        "contenders": contenders,
    }


def _growth(
    workload: Workload,
    first: Workload,
    name: str,
    timings: dict[tuple[str, str], Timings],
    memory: dict[tuple[str, str], ExtraMemory | None],
    failed: dict[tuple[str, str], str],
) -> dict[str, Any] | None:
    """Cost per token against that of the run's first length: time with an interval, and peak memory."""
    key, other = (workload.name, name), (first.name, name)
    if other in failed:
        return None
    time = paired_ratio(
        [value / workload.tokens for value in timings[key].seconds],
        [value / first.tokens for value in timings[other].seconds],
    )
    own, before = memory[key], memory[other]
    ratio = None
    if own is not None and before is not None and before.total_mib:
        # The outputs grow with the length as well: they are part of the cost.
        ratio = (own.total_mib / workload.tokens) / (before.total_mib / first.tokens)
    return {"since": first.name, "time": time._asdict(), "memory": ratio}


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
