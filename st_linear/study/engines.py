"""Where cells run: in this process, each in a process of its own, or together with others under torchrun."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import Timeout

from st_linear.quiet import quieten_libraries
from st_linear.study.cells import Job, OnStep, Outcome, attempt, finish, record_failure, run_cell
from st_linear.study.config import Cell

Engine = Callable[[Cell, Job, OnStep, "float | None"], Outcome]

_SECONDS_BETWEEN_REPORTS = 0.2


def in_process(cell: Cell, job: Job, on_step: OnStep, deadline: float | None) -> Outcome:
    """Run a cell in a process of its own: its memory is its own, and its death is not ours."""
    if job.is_busy(cell):
        return Outcome("busy")
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, cell, job, deadline), daemon=True)
    process.start()
    sender.close()
    outcome = None
    try:
        while True:
            message = receiver.recv()
            if isinstance(message, Outcome):
                outcome = message
            else:
                on_step(*message)
    except EOFError:
        process.join()
    finally:
        if process.is_alive():
            process.kill()
    return outcome or _record_death(cell, job, process.exitcode)


def together(cell: Cell, job: Job, on_step: OnStep, deadline: float | None) -> Outcome:
    """Run a cell in all processes that ``torchrun`` or ``accelerate launch`` has started; the main one writes.

    Raises:
        Exception: What made a process fail: its peers would wait for it, so all of them must end.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.num_processes == 1:
        return attempt(cell, job, on_step, deadline)
    lock = job.lock(cell)
    is_ours = [False]
    if state.is_main_process:
        try:
            lock.acquire(timeout=0)
            is_ours = [not job.record_path(cell).is_file()]
        except Timeout:
            pass
    broadcast_object_list(is_ours)
    try:
        if not is_ours[0]:
            return Outcome("finished" if job.record_path(cell).is_file() else "busy")
        try:
            record = run_cell(cell, job, on_step, deadline, world=state.num_processes, is_main=state.is_main_process)
        except Exception as error:
            record_failure(cell, job, error)
            raise
        if state.is_main_process:
            finish(cell, job, record)
        state.wait_for_everyone()
        return Outcome("finished")
    finally:
        lock.release()


ENGINES: dict[str, Engine] = {"processes": in_process, "inline": attempt, "torchrun": together}
"""Engines that run one cell after the other."""


def _context() -> Any:
    """Processes that begin with everything imported, where the system has such."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _child(sender: Connection, cell: Cell, job: Job, deadline: float | None) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    reported = 0.0

    def on_step(step: int, steps: int) -> None:
        nonlocal reported
        if time.monotonic() - reported > _SECONDS_BETWEEN_REPORTS:
            reported = time.monotonic()
            sender.send((step, steps))

    # The screen is the study's, whose progress other bars would cut through; errors are in the outcome.
    with open(os.devnull, "w") as void, redirect_stderr(void):
        quieten_libraries()
        sender.send(attempt(cell, job, on_step, deadline))
    sender.close()


def _end_with_parent() -> None:
    """A cell whose study was killed must not keep its lock."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _record_death(cell: Cell, job: Job, exit_code: int | None) -> Outcome:
    code = exit_code or 0
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    memory = ", which the system sends where memory runs out" if code == -9 else ""
    try:
        with job.lock(cell).acquire(timeout=0):
            return record_failure(cell, job, f"its process ended with {how}{memory}")
    except Timeout:
        return Outcome("busy")
