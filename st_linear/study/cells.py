"""One cell of a study: convert, transfer, distil at a length, evaluate at several, record; and resume where it was."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from safetensors.torch import load_model
from safetensors.torch import save_model as save_weights
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback, set_seed

from st_linear.benchmarks.timing import is_out_of_memory, return_free_heap
from st_linear.data import token_counts, training_sentences
from st_linear.models import save_model
from st_linear.protocols import lengthen
from st_linear.recipe import convert_student, evaluate_model, long_texts, transfer_model
from st_linear.records import (
    as_json,
    atomic_path,
    environment,
    peak_memory_mib,
    read_json,
    reset_peak_memory,
    write_json,
)
from st_linear.settings import Settings
from st_linear.study.config import Cell, Study
from st_linear.study.inputs import LOCKS, TEACHER_COLUMN, Inputs
from st_linear.study.operations import Operations
from st_linear.training import Curve, distil_pairs, last_whole_checkpoint, training_arguments

CELLS = "cells"
RECORD = "record.json"

MEASURED = ("seconds", "tokens_per_second", "peak_memory_mib", "memory_before_mib", "environment", "resumed_at")
"""Keys of a record whose values differ from run to run."""

Status = Literal["finished", "failed", "busy", "paused", "stopped"]
OnStep = Callable[[int, int], None]
"""Called with the steps that are done, and all steps of the cell."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
# What safetensors and torch make of them.
_NO_ROOM_MESSAGES = ("No space left on device", "Read-only file system", "PytorchStreamWriter failed writing")


@dataclass(frozen=True)
class Job:
    """What a process needs to know to run any cell of a study."""

    study: Study
    inputs: Inputs
    folder: Path

    def cell_folder(self, cell: Cell) -> Path:
        """Where the cell's record and its intermediate files lie."""
        return self.folder / CELLS / cell.folder

    def record_path(self, cell: Cell) -> Path:
        """The cell's record."""
        return self.cell_folder(cell) / RECORD

    def lock(self, cell: Cell) -> FileLock:
        """Held by the process that runs the cell; the system lets it go when that process ends, however it ends."""
        return FileLock(self.folder / LOCKS / cell.folder)

    def is_busy(self, cell: Cell) -> bool:
        """Whether a process runs the cell now."""
        lock = self.lock(cell)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False


@dataclass(frozen=True)
class Outcome:
    """What became of an attempt at a cell.

    Attributes:
        status: ``"finished"`` and ``"failed"`` have a record; ``"busy"`` is another process's; ``"paused"`` ran out of
            time, with a checkpoint; after ``"stopped"`` nothing can be written any more.
        message: Why it failed or stopped.
    """

    status: Status
    message: str = ""


class Paused(Exception):
    """The time is up, and a checkpoint is there to go on from."""


def attempt(cell: Cell, job: Job, on_step: OnStep = lambda *_: None, deadline: float | None = None) -> Outcome:
    """Run a cell that no other process runs, and write its record, of success or of failure.

    Args:
        cell: The cell.
        job: Its study.
        on_step: Progress.
        deadline: Time, as of ``time.time()``, at which training stops with a checkpoint.
    """
    lock = job.lock(cell)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return Outcome("busy")
    except OSError as error:
        return Outcome("stopped", one_line(error))
    try:
        return _settle(cell, job, on_step, deadline)
    finally:
        lock.release()


def _settle(cell: Cell, job: Job, on_step: OnStep, deadline: float | None) -> Outcome:
    if job.record_path(cell).is_file():
        return Outcome("finished")
    try:
        # The Trainer prints its logs.
        with open(os.devnull, "w") as void, redirect_stdout(void):
            record = run_cell(cell, job, on_step, deadline)
        finish(cell, job, record)
    except Paused:
        return Outcome("paused")
    except Exception as error:
        return Outcome("stopped", one_line(error)) if _has_no_room(error) else record_failure(cell, job, error)
    return Outcome("finished")


def run_cell(
    cell: Cell,
    job: Job,
    on_step: OnStep = lambda *_: None,
    deadline: float | None = None,
    *,
    world: int = 1,
    is_main: bool = True,
) -> dict[str, Any]:
    """Convert, transfer if the cell says so, distil at its length, evaluate; go on where an earlier run was killed.

    Args:
        cell: The cell.
        job: Its study.
        on_step: Progress.
        deadline: As in :func:`attempt`.
        world: Processes that train the cell together, under ``torchrun`` or ``accelerate``.
        is_main: Whether this one of them writes.

    Returns:
        The record.

    Raises:
        Paused: If the deadline passed in training.
    """
    study, pairs, folder = job.study, job.inputs.pairs, job.cell_folder(cell)
    settings = study.settings(cell.seed, cell.half)
    with _threads(study.threads):
        set_seed(cell.seed)
        student = cell.student()
        model = convert_student(job.inputs.base, student, settings)
        stages = {name: _Stage(folder, name, is_main) for name in ("transferred", "trained")}
        checkpoint = last_whole_checkpoint(folder / "trainer", clean=is_main)
        # Processes that train together must have seen the same before one of them writes.
        done = {name: stage.is_done() for name, stage in stages.items()}
        operations = Operations.of(model)
        transfer: dict[str, Any] | None = None
        if student.transfer != "none":
            if done["transferred"] and not done["trained"]:
                stages["transferred"].load_into(model)
            if done["transferred"]:
                transfer = stages["transferred"].figures()
            else:
                transfer = _transfer(model, cell, pairs.train, folder, settings, operations)
                stages["transferred"].save(model, transfer)
        if done["trained"]:
            stages["trained"].load_into(model)
            trained = stages["trained"].figures()
        else:
            trained = _distil(model, cell, job, settings, operations, checkpoint, on_step, deadline, world)
            stages["trained"].save(model, trained)
        final = _evaluate(model, cell, job, settings)
        if study.keep_models and is_main:
            save_model(model, folder / "model")
    return as_json(
        {
            "cell": asdict(cell),
            "study": study.common(),
            "inputs": job.inputs.described,
            "budget": trained.pop("budget"),
            "transfer": transfer,
            "curve": trained.pop("curve"),
            "training": trained,
            "final": final,
            "operations": {
                "common_per_token": operations.per_token,
                "forward": {str(tokens): operations.forward(tokens) for tokens in (cell.length, *study.lengths())},
            },
            "environment": environment(),
        }
    )


def finish(cell: Cell, job: Job, record: dict[str, Any]) -> None:
    """Write the record, and remove what only an unfinished cell needs."""
    write_json(job.record_path(cell), record)
    folder = job.cell_folder(cell)
    for path in folder.iterdir():
        if path.name not in (RECORD, "model"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def record_failure(cell: Cell, job: Job, error: BaseException | str) -> Outcome:
    """Write down why a cell failed."""
    message = error if isinstance(error, str) else one_line(error)
    failure = {
        "error": "died" if isinstance(error, str) else type(error).__name__,
        "message": message,
        "out_of_memory": not isinstance(error, str) and _is_out_of_memory(error),
    }
    record = {
        "cell": asdict(cell),
        "study": job.study.common(),
        "inputs": job.inputs.described,
        "failure": failure,
        "environment": environment(),
    }
    try:
        finish(cell, job, as_json(record))
    except OSError as second:
        return Outcome("stopped", one_line(second))
    return Outcome("failed", message)


def without_measurements(value: Any) -> Any:
    """A record without what differs from run to run: times, speed, memory, environment."""
    if isinstance(value, dict):
        return {key: without_measurements(part) for key, part in value.items() if key not in MEASURED}
    return [without_measurements(part) for part in value] if isinstance(value, list) else value


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


class _Stage:
    """Weights and figures that a cell has come to, so that what came before is not done again."""

    def __init__(self, folder: Path, name: str, is_main: bool) -> None:
        self.weights = folder / f"{name}.safetensors"
        self.json = folder / f"{name}.json"
        self.is_main = is_main

    def is_done(self) -> bool:
        # Written last.
        return self.json.is_file()

    def figures(self) -> dict[str, Any]:
        return read_json(self.json)

    def load_into(self, model: SentenceTransformer) -> None:
        load_model(model, self.weights)

    def save(self, model: SentenceTransformer, figures: dict[str, Any]) -> None:
        if self.is_main:
            with atomic_path(self.weights) as path:
                save_weights(model, str(path))
            write_json(self.json, figures)


class _Watch(TrainerCallback):
    """Tells of progress, asks for checkpoints, and stops training at the deadline."""

    def __init__(self, on_step: OnStep, checkpoint_seconds: float, deadline: float | None) -> None:
        self.on_step = on_step
        self.checkpoint_seconds = checkpoint_seconds
        self.deadline = deadline
        self.saved = time.monotonic()
        self.is_paused = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step(state.global_step, state.max_steps)
        if state.global_step == state.max_steps:
            return
        self.is_paused = self.deadline is not None and time.time() > self.deadline
        if self.is_paused:
            control.should_training_stop = True
        if self.is_paused or time.monotonic() - self.saved >= self.checkpoint_seconds:
            control.should_save = True

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.saved = time.monotonic()


def _transfer(
    model: SentenceTransformer, cell: Cell, train: Dataset, folder: Path, settings: Settings, operations: Operations
) -> dict[str, Any]:
    """Transfer, and say what it cost."""
    student, sentences = cell.student(), training_sentences(train)
    if student.transfer == "maps":
        texts, epochs = long_texts(model, sentences, student.window, settings), 1.0
    else:
        texts, epochs = sentences, settings.transfer_epochs
    counts = token_counts(texts, model.tokenizer)
    started = time.perf_counter()
    transfer_model(model, student, sentences, folder / "transfer", settings, False)
    return {
        "kind": student.transfer,
        "texts": round(len(texts) * epochs),
        "tokens": round(sum(counts) * epochs),
        "operations": operations.training(counts) * epochs,
        "seconds": time.perf_counter() - started,
    }


def _distil(
    model: SentenceTransformer,
    cell: Cell,
    job: Job,
    settings: Settings,
    operations: Operations,
    checkpoint: Path | None,
    on_step: OnStep,
    deadline: float | None,
    world: int,
) -> dict[str, Any]:
    study, pairs = job.study, job.inputs.pairs
    train, dev = (
        lengthen(split, model.tokenizer, cell.length, cell.protocol, seed=study.data.seed)
        for split in (pairs.train, pairs.dev)
    )
    counts = [count for c in ("sentence1", "sentence2") for count in token_counts(train[c], model.tokenizer)]
    per_pair = {
        "examples": 1.0,
        "tokens": sum(counts) / len(train),
        "operations": operations.training(counts) / len(train),
    }
    batch_size = settings.batch_size
    steps = int(study.budget.amount // (batch_size * per_pair[study.budget.unit]))
    if not steps:
        raise ValueError(
            f"budget.{study.budget.unit}={study.budget.amount:g} has no room for a step of {batch_size} pairs"
        )
    at_once = cell.pairs_at_once or batch_size
    if at_once % world:
        name = "pairs_at_once" if cell.pairs_at_once else "batch_size"
        raise ValueError(f"{name}={at_once} can't be divided among {world} processes")
    if at_once < batch_size and len(train) % batch_size:
        raise ValueError(
            f"with pairs_at_once the training pairs must make whole steps of batch_size={batch_size}, got {len(train)}"
        )

    def measure() -> dict[str, Any]:
        return evaluate_model(model, dev, settings, show_progress_bar=False)["natural"]

    at = {max(1, round(share * steps)) for share in study.evaluation.shares} - {steps}
    curve = Curve(model, measure, train, batch_size, drop_last=True, at=at)
    watch = _Watch(on_step, study.checkpoint_seconds, deadline)
    arguments = training_arguments(
        job.cell_folder(cell),
        settings,
        max_steps=steps,
        per_device_train_batch_size=at_once // world,
        gradient_accumulation_steps=batch_size // at_once,
        dataloader_drop_last=True,
        save_total_limit=2,
        disable_tqdm=True,
    )
    set_seed(cell.seed)
    before = _memory_before()
    distil_pairs(curve, _labelled(train), arguments, settings, callbacks=[watch], checkpoint=checkpoint)
    if watch.is_paused:
        raise Paused
    for point in curve.points:
        point["operations"] = point["examples"] * per_pair["operations"]
    last = curve.points[-1]
    return {
        "budget": {"steps": steps, **{unit: steps * batch_size * cost for unit, cost in per_pair.items()}},
        "curve": curve.points,
        "seconds": last["seconds"],
        "tokens_per_second": last["tokens"] / last["seconds"],
        "peak_memory_mib": peak_memory_mib(),
        "memory_before_mib": before,
        "resumed_at": None if checkpoint is None else int(checkpoint.name.partition("-")[2]),
    }


def _memory_before() -> float:
    """What is held now, from which the peak is counted."""
    gc.collect()
    return_free_heap()
    reset_peak_memory()
    return peak_memory_mib()


def _labelled(train: Dataset) -> Dataset:
    """With ``[gold, teacher]`` as labels, where there is a teacher."""
    if TEACHER_COLUMN not in train.column_names:
        return train
    labels = [list(both) for both in zip(train["score"], train[TEACHER_COLUMN])]
    return train.remove_columns(["score", TEACHER_COLUMN]).add_column("score", labels)


def _evaluate(model: SentenceTransformer, cell: Cell, job: Job, settings: Settings) -> dict[str, dict[str, Any]]:
    """Figures on test at natural length, at the training length and at all that the study names."""
    study, final = job.study, {}
    for length in (None, *sorted({cell.length, *study.evaluation.lengths})):
        test = job.inputs.pairs.test
        if length is not None:
            test = lengthen(test, model.tokenizer, length, cell.protocol, seed=study.data.seed)
        before = _memory_before()
        try:
            figures = evaluate_model(model, test, settings, show_progress_bar=False)["natural"]
        except (MemoryError, RuntimeError) as error:
            # A length that the machine can't read says nothing against the others.
            if not _is_out_of_memory(error) or length in (None, cell.length):
                raise
            figures = {"failure": f"out of memory: {one_line(error)}"}
        if figures.get("undefined"):
            if length in (None, cell.length):
                where = "natural length" if length is None else f"{length} tokens"
                raise ValueError(f"no correlation at {where}: {figures['undefined']}")
            figures = {"failure": f"no correlation: {figures['undefined']}"}
        final["natural" if length is None else str(length)] = {
            **figures,
            "memory_before_mib": before,
            "peak_memory_mib": peak_memory_mib(),
        }
    return final


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_out_of_memory(error))


def _has_no_room(error: BaseException) -> bool:
    """Whether nothing can be written any more, which is no fault of the cell's."""
    return any(
        (isinstance(reason, OSError) and reason.errno in _NO_ROOM)
        or any(message in str(reason) for message in _NO_ROOM_MESSAGES)
        for reason in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
