"""The cells of a study as tasks of a Ray cluster (extra: ray)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from st_linear.quiet import quieten_libraries
from st_linear.study.cells import Job, Outcome, attempt, record_failure
from st_linear.study.config import Cell


def run_on_ray(cells: Sequence[Cell], job: Job, deadline: float | None) -> Iterator[tuple[Cell, Outcome]]:
    """Hand cells to the cluster that ``RAY_ADDRESS`` names or that runs here, else to one that is started here.

    Each cell is a task with as many CPUs as the study has threads, and a GPU where the cluster has some. The workers
    must see the study's folder, its data and its base model under the same paths.

    Yields:
        Each cell with its outcome, as they end.

    Raises:
        ImportError: If Ray is not installed.
    """
    ray = _ray()
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    # A fresh worker for every cell: memory is its own.
    task = ray.remote(max_calls=1, max_retries=0)(_attempt)
    task = task.options(
        num_cpus=job.study.threads or 1, num_gpus=1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    )
    shared = ray.put(job)
    running = {task.remote(cell, shared, deadline): cell for cell in cells}
    try:
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            cell = running.pop(done)
            try:
                outcome = ray.get(done)
            except ray.exceptions.RayError as error:
                reason = " ".join(str(error).split())[:200]
                outcome = record_failure(cell, job, f"its Ray worker ended: {reason}")
            yield cell, outcome
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def check_ray() -> None:
    """Find out before the work, not after it, that Ray is missing.

    Raises:
        ImportError: If it is.
    """
    _ray()


def _attempt(cell: Cell, job: Job, deadline: float | None) -> Outcome:
    quieten_libraries()
    return attempt(cell, job, deadline=deadline)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError('--engine ray needs Ray: pip install "st-linear[study,ray]"') from error
    return ray
