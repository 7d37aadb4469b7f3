"""A whole study: cell after cell, each recorded when it ends, whatever happens in between."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from st_linear.records import as_json, has_bfloat16, read_json, write_json
from st_linear.study.cells import Job, OnStep, Outcome, one_line
from st_linear.study.config import STUDY, Cell, Study
from st_linear.study.engines import ENGINES
from st_linear.study.inputs import LOCKS, prepare
from st_linear.study.on_ray import check_ray, run_on_ray

_RAY = "ray"
_SECONDS_TO_WAIT = 1.0

Progress = Callable[[str, float, float], None]
"""Called with what runs, and the tokens of training that are done and that there are, of all cells."""


class StudyStopped(RuntimeError):
    """Nothing can be written any more."""


@dataclass
class Summary:
    """What became of a study's cells.

    Attributes:
        finished: Cells with figures.
        failed: Cells that failed, and why.
        unfinished: Cells that there was no time for.
    """

    finished: list[Cell] = field(default_factory=list)
    failed: dict[Cell, str] = field(default_factory=dict)
    unfinished: list[Cell] = field(default_factory=list)


def engine_names() -> list[str]:
    """The engines that :func:`run` knows."""
    return [*(name for name in ENGINES if name != "torchrun"), _RAY]


def run(
    study: Study,
    folder: Path,
    *,
    engine: str = "processes",
    retry_failed: bool = False,
    seconds: float | None = None,
    progress: Progress = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> Summary:
    """Run every cell that has no record yet.

    Several processes may do so in one folder: each cell is run by one of them.

    Args:
        study: What to do.
        folder: Of the study; new, or of the same study. More cells may be asked for than before.
        engine: ``"processes"``: a process for each cell, one at a time; ``"inline"``: all in this one; ``"ray"``:
            tasks of a Ray cluster. Under ``torchrun`` or ``accelerate launch`` the processes train a cell together.
        retry_failed: Run cells that failed again.
        seconds: After which to stop, with a checkpoint; the next call goes on.
        progress: Called now and then.
        say: Called with what a person should know.

    Raises:
        ValueError: If the folder holds another study, or the engine is unknown.
        StudyStopped: If nothing can be written any more; records that are there are whole.
        OSError: If the folder can't be written to.
        ImportError: If the engine needs a package that is missing.
    """
    deadline = None if seconds is None else time.time() + seconds
    if engine not in engine_names():
        raise ValueError(f"unknown engine {engine!r}; choose one of: {', '.join(engine_names())}")
    if engine == _RAY:
        check_ray()
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
        engine = "torchrun"
        if seconds is not None:
            raise ValueError(
                "seconds is for a process of its own: several that train together can't agree on a moment"
            )
    folder = folder.absolute()
    check_folder(folder)
    job = Job(study, prepare(study, folder), folder)
    _agree(job)
    cells = study.cells()
    states = {cell: _state(job, cell) for cell in cells}
    if retry_failed:
        for cell, state in states.items():
            if state is not None and state.status == "failed":
                job.record_path(cell).unlink(missing_ok=True)
                states[cell] = None
    if any(states.values()):
        say(f"{sum(map(bool, states.values()))} of {len(cells)} cells have a record: not run again")
    in_half = any(study.settings(c.seed, c.half).half for c, state in states.items() if state is None)
    if in_half and not torch.accelerator.is_available() and not has_bfloat16():
        say("[yellow]This processor has no instructions for bfloat16: half makes cells slower here.[/yellow]")
    board = _Board(cells, states, progress, say)
    while pending := [cell for cell in cells if board.is_pending(cell)]:
        runs = (
            run_on_ray(pending, job, deadline)
            if engine == _RAY
            else _one_by_one(pending, job, deadline, engine, board)
        )
        for cell, outcome in runs:
            if outcome.status == "stopped":
                raise StudyStopped(f"{folder} can't be written to: {outcome.message}; what is finished is kept")
            board.enter(cell, _state(job, cell) or outcome)
        if deadline is not None and time.time() > deadline:
            break
        if any(board.is_pending(cell) for cell in pending):
            # They are another process's. If that dies, they are ours.
            time.sleep(_SECONDS_TO_WAIT)
    return board.summary()


def check_folder(folder: Path) -> None:
    """Find out before the work, not after it, that nothing can be written to the folder.

    Raises:
        ValueError: If it holds other things.
        OSError: If it can't be written to.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / STUDY).is_file() and not (folder / LOCKS).is_dir():
        raise ValueError(f"{folder} holds files and no study: name another folder")
    try:
        (folder / LOCKS).mkdir(parents=True, exist_ok=True)
        write_json(folder / LOCKS / "writable.json", True)
    except OSError as error:
        raise type(error)(error.errno, f"{folder} can't be written to: {error.strerror or one_line(error)}") from error


def _agree(job: Job) -> None:
    """Refuse to put cells of another study beside those that are there.

    Raises:
        ValueError: If the folder is another study's.
    """
    path = job.folder / STUDY
    own = as_json(
        {"study": job.study.model_dump(mode="json"), "common": job.study.common(), "inputs": job.inputs.described}
    )
    if path.is_file():
        there = read_json(path)
        for part in ("common", "inputs"):
            difference = _first_difference(there.get(part), own[part])
            if difference is not None:
                where, before, now = difference
                raise ValueError(
                    f"{job.folder} holds a study with {where}={before!r}, this one has {now!r}: name another folder"
                )
        if there == own:
            return
    write_json(path, own)


def _first_difference(before: Any, now: Any, where: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            found = _first_difference(before.get(key), now.get(key), f"{where}.{key}" if where else key)
            if found is not None:
                return found
        return None
    return None if before == now else (where, before, now)


def _state(job: Job, cell: Cell) -> Outcome | None:
    """What the cell's record says became of it; None if it has none."""
    path = job.record_path(cell)
    if not path.is_file():
        return None
    failure = read_json(path).get("failure")
    return Outcome("finished") if failure is None else Outcome("failed", failure["message"])


def _one_by_one(
    cells: Sequence[Cell], job: Job, deadline: float | None, engine: str, board: _Board
) -> Iterator[tuple[Cell, Outcome]]:
    for cell in cells:
        if deadline is not None and time.time() > deadline:
            return
        yield cell, ENGINES[engine](cell, job, board.steps_of(cell), deadline)


class _Board:
    """Keeps the count of cells, and tells of it."""

    def __init__(
        self,
        cells: Sequence[Cell],
        states: dict[Cell, Outcome | None],
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self.states = dict(states)
        self.progress = progress
        self.say = say
        # Tokens of training, of cells that this run has before it: what is done already took no time.
        self.total = float(sum(cell.length for cell in cells if states[cell] is None))
        self.done = 0.0
        self.progress("preparing", 0, self.total)

    def is_pending(self, cell: Cell) -> bool:
        state = self.states[cell]
        return state is None or state.status in ("busy", "paused")

    def steps_of(self, cell: Cell) -> OnStep:
        self.progress(cell.name, self.done, self.total)

        def on_step(step: int, steps: int) -> None:
            self.progress(f"{cell.name}, step {step} of {steps}", self.done + cell.length * step / steps, self.total)

        return on_step

    def enter(self, cell: Cell, outcome: Outcome) -> None:
        self.states[cell] = outcome
        if outcome.status in ("finished", "failed"):
            self.done += cell.length
            self.progress(cell.name, self.done, self.total)
        if outcome.status == "failed":
            self.say(f"[yellow]Failed:[/yellow] {cell.name}: {outcome.message}")

    def summary(self) -> Summary:
        made = Summary()
        for cell, state in self.states.items():
            if self.is_pending(cell):
                made.unfinished.append(cell)
            elif state is not None and state.status == "failed":
                made.failed[cell] = state.message
            else:
                made.finished.append(cell)
        return made
