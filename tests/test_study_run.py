"""Running a study: cells, records, what is left after kills, failures and full disks."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused, slow
from test_recipe import write_pairs

from st_linear.records import read_json, write_json
from st_linear.study import cells as cells_module
from st_linear.study import runner
from st_linear.study.cells import Job, Outcome, attempt, without_measurements
from st_linear.study.config import Study
from st_linear.study.inputs import prepare
from st_linear.study.runner import StudyStopped, run

# 5 cells of 8 steps.
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "base": "bert",
    "data": {"source": "pairs", "dev": 6},
    "teacher": {"scores": "pairs/teacher"},
    "grid": [
        {"attention": ["softmax", "hedgehog@4"], "length": [16, 24], "seed": 0},
        {"attention": "elu", "length": 16, "transfer": True},
    ],
    "budget": {"examples": 64},
    "training": {"batch_size": 8, "learning_rate": 1e-3},
    "transfer": {"epochs": 1, "steps": 2},
    "evaluation": {"shares": [0.25, 0.5], "lengths": [40]},
    "threads": 1,
    "checkpoint_seconds": 0,
}

# A study in a process of its own, which is killed with SIGKILL where "kill" says.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from st_linear.study import cells, runner
from st_linear.study.config import Study

config, engine, kill, step = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

if kill == "training":
    before = cells._Watch.on_step_end
    def on_step_end(self, args, state, control, **kwargs):
        before(self, args, state, control, **kwargs)
        if state.global_step == step:
            die()
    cells._Watch.on_step_end = on_step_end
elif kill:
    setattr(cells, kill, die)
if __name__ == "__main__":
    print("ready", flush=True)
    runner.run(Study.model_validate(config), Path("out"), engine=engine)
    print("done", flush=True)
"""


@pytest.fixture(scope="session")
def config(bert: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("study-data")
    pairs = write_pairs(folder / "pairs")
    return {
        **CONFIG,
        "base": bert,
        "data": {**CONFIG["data"], "source": str(pairs)},
        "teacher": {"scores": str(pairs / "teacher")},
    }


@pytest.fixture(scope="session")
def done(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that ran to its end, to be read and not written to."""
    folder = tmp_path_factory.mktemp("study")
    run(Study.model_validate(config), folder, engine="inline")
    return folder


def records(folder: Path) -> dict[str, Any]:
    return {path.parent.name: read_json(path) for path in sorted(folder.glob("cells/*/record.json"))}


def comparable(folder: Path) -> dict[str, Any]:
    return without_measurements(records(folder))


def start(folder: Path, config: dict[str, Any], engine: str = "inline", kill: str = "", step: int = 0) -> Any:
    script = folder / "study_script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), json.dumps(config), engine, kill, str(step)]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


class TestRecords:
    def test_each_cell_has_one(self, done: Path, config: dict[str, Any]) -> None:
        study = Study.model_validate(config)
        assert list(records(done)) == sorted(cell.folder for cell in study.cells())
        assert len(records(done)) == 5
        assert all({path.name for path in folder.iterdir()} == {"record.json"} for folder in done.glob("cells/*"))

    def test_what_one_holds(self, done: Path) -> None:
        record = records(done)["00016-repeat-elu-transfer-seed-0"]
        assert record["cell"] == {
            "attention": "elu",
            "length": 16,
            "protocol": "repeat",
            "seed": 0,
            "transfer": True,
            "half": None,
            "pairs_at_once": None,
        }
        assert [point["step"] for point in record["curve"]] == [0, 2, 4, 8]
        assert [point["examples"] for point in record["curve"]] == [0, 16, 32, 64]
        assert record["budget"]["steps"] == 8
        for unit in ("examples", "tokens", "operations"):
            assert record["curve"][-1][unit] == pytest.approx(record["budget"][unit], rel=1e-3)
        assert list(record["final"]) == ["natural", "16", "40"]
        assert record["final"]["40"]["mean_tokens"] > 30
        assert record["transfer"]["kind"] == "all"
        assert record["transfer"]["operations"] > 0
        assert record["training"]["tokens_per_second"] > 0
        assert record["training"]["peak_memory_mib"] >= record["training"]["memory_before_mib"] > 0
        assert record["inputs"]["pairs"] == {"train": 20, "dev": 6, "test": 10}

    def test_budgets_are_equal_in_the_unit_they_are_given_in(self, done: Path) -> None:
        budgets = [record["budget"] for record in records(done).values()]
        assert {budget["examples"] for budget in budgets} == {64}
        assert len({budget["operations"] for budget in budgets}) == len(budgets)

    @pytest.mark.slow
    def test_fewer_pairs_at_once_train_the_same(self, config: dict[str, Any], tmp_path: Path) -> None:
        # Dropout draws otherwise for other shapes.
        still = tmp_path / "still"
        shutil.copytree(config["base"], still)
        settings = read_json(still / "config.json")
        dropout = {key: 0.0 for key in settings if key.endswith("dropout_prob")}
        assert len(dropout) == 2
        write_json(still / "config.json", {**settings, **dropout})
        curves = []
        for parts in (None, 2):
            grid = {"attention": "softmax", "length": 16, "pairs_at_once": parts}
            few = {**config, "base": str(still), "data": {**config["data"], "train": 16}, "grid": grid}
            run(Study.model_validate(few), tmp_path / f"{parts}", engine="inline")
            (record,) = records(tmp_path / f"{parts}").values()
            assert record["cell"]["pairs_at_once"] == parts
            curves.append([[point[key] for key in ("step", "examples", "pearson")] for point in record["curve"]])
        assert curves[0][0] != curves[0][-1]
        assert curves[1] == [pytest.approx(point, abs=1e-4) for point in curves[0]]

    @pytest.mark.parametrize("has", [False, True])
    def test_half_precision_without_instructions_for_it_is_told(
        self, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: bool
    ) -> None:
        monkeypatch.setattr(runner, "has_bfloat16", lambda: has)
        half = {**config, "training": {**config["training"], "half": True}}
        said: list[str] = []
        assert len(run(Study.model_validate(half), tmp_path, engine="inline", seconds=0, say=said.append).unfinished)
        assert any("has no instructions for bfloat16" in line for line in said) != has

    def test_parts_of_steps_need_whole_steps(self, config: dict[str, Any], tmp_path: Path) -> None:
        few = {**config, "grid": {"attention": "softmax", "length": 16, "pairs_at_once": 2}}
        (message,) = run(Study.model_validate(few), tmp_path, engine="inline").failed.values()
        assert message == "with pairs_at_once the training pairs must make whole steps of batch_size=8, got 20"

    def test_finished_cells_are_not_run_again(self, done: Path, config: dict[str, Any]) -> None:
        before = {path: path.stat().st_mtime_ns for path in done.glob("cells/*/record.json")}
        summary = run(Study.model_validate(config), done, engine="inline")
        assert len(summary.finished) == 5
        assert before == {path: path.stat().st_mtime_ns for path in done.glob("cells/*/record.json")}

    def test_out_of_time(self, done: Path, config: dict[str, Any], tmp_path: Path) -> None:
        study = Study.model_validate(config)
        job = Job(study, prepare(study, tmp_path), tmp_path)
        cell = study.cells()[0]
        assert attempt(cell, job, deadline=time.time()) == Outcome("paused")
        assert attempt(cell, job) == Outcome("finished")
        assert records(tmp_path)[cell.folder]["training"]["resumed_at"] == 1
        assert comparable(tmp_path)[cell.folder] == comparable(done)[cell.folder]

    def test_another_study_is_refused(self, done: Path, config: dict[str, Any]) -> None:
        other = Study.model_validate({**config, "budget": {"examples": 72}})
        with refused(f"{done} holds a study with budget.examples=64, this one has 72: name another folder"):
            run(other, done, engine="inline")

    def test_a_folder_of_other_things_is_refused(self, config: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").touch()
        with refused(f"{tmp_path} holds files and no study: name another folder"):
            run(Study.model_validate(config), tmp_path, engine="inline")

    def test_an_unknown_engine_lists_the_choices(self, config: dict[str, Any], tmp_path: Path) -> None:
        with refused("unknown engine 'slurm'; choose one of: processes, inline, ray"):
            run(Study.model_validate(config), tmp_path, engine="slurm")


class TestKills:
    @pytest.mark.slow
    def test_killed_in_training_and_before_the_record(
        self, done: Path, config: dict[str, Any], tmp_path: Path
    ) -> None:
        for kill, step in (("training", 5), ("_evaluate", 0)):
            process = start(tmp_path, config, kill=kill, step=step)
            process.communicate(timeout=600)
            assert process.returncode == -signal.SIGKILL
        # The first cell: a checkpoint of its fourth step, then its trained weights.
        assert (tmp_path / "out/cells/00016-repeat-softmax-seed-0/trained.json").is_file()
        assert records(tmp_path / "out") == {}
        summary = run(Study.model_validate(config), tmp_path / "out", engine="inline")
        assert len(summary.finished) == 5
        assert comparable(tmp_path / "out") == comparable(done)
        resumed = records(tmp_path / "out")["00016-repeat-softmax-seed-0"]["training"]["resumed_at"]
        assert resumed == 4

    @pytest.mark.slow
    def test_killed_at_ten_random_moments(self, config: dict[str, Any], tmp_path: Path) -> None:
        longer = {**config, "budget": {"examples": 640}}
        whole, broken = tmp_path / "whole", tmp_path / "broken"
        whole.mkdir()
        broken.mkdir()
        process = start(whole, longer)
        assert process.stdout.readline() == b"ready\n"
        started = time.monotonic()
        process.communicate(timeout=900)
        assert process.returncode == 0
        duration = time.monotonic() - started
        draw = random.Random(0)
        for _ in range(10):
            process = start(broken, longer)
            assert process.stdout.readline() == b"ready\n"
            # On average half of the work is done when the last kill comes.
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(draw.uniform(0, duration / 10))
            process.kill()
            process.communicate()
        assert len(records(broken / "out")) < 5
        process = start(broken, longer)
        process.communicate(timeout=900)
        assert process.returncode == 0
        assert comparable(broken / "out") == comparable(whole / "out")

    @pytest.mark.slow
    def test_a_cell_ends_with_the_study_that_started_it(
        self, done: Path, config: dict[str, Any], tmp_path: Path
    ) -> None:
        process = start(tmp_path, config, engine="processes")
        trainer = tmp_path / "out/cells/00016-repeat-softmax-seed-0/trainer"
        while not list(trainer.glob("checkpoint-*/curve.json")):
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
        process.communicate()
        summary = run(Study.model_validate(config), tmp_path / "out", engine="inline")
        assert len(summary.finished) == 5
        assert comparable(tmp_path / "out") == comparable(done)

    @pytest.mark.slow
    def test_two_runs_of_one_folder_share_its_cells(self, done: Path, config: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "second").mkdir()
        (tmp_path / "out").mkdir()
        (tmp_path / "second/out").symlink_to(tmp_path / "out")
        processes = [start(tmp_path, config), start(tmp_path / "second", config, engine="processes")]
        for process in processes:
            out, err = process.communicate(timeout=600)
            assert (process.returncode, out) == (0, b"ready\ndone\n"), err
        assert comparable(tmp_path / "out") == comparable(done)

    def test_another_process_has_the_cell(self, config: dict[str, Any], tmp_path: Path) -> None:
        study = Study.model_validate(config)
        job = Job(study, prepare(study, tmp_path), tmp_path)
        cell = study.cells()[0]
        with job.lock(cell):
            assert attempt(cell, job) == Outcome("busy")
        assert not job.record_path(cell).exists()


class TestFailures:
    @pytest.fixture
    def fail(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
        """Let the evaluation of purely linear cells raise an error."""

        def set_up(error: Exception) -> None:
            before = cells_module._evaluate

            def evaluate(model: Any, cell: Any, *rest: Any) -> Any:
                if cell.attention == "elu":
                    raise error
                return before(model, cell, *rest)

            monkeypatch.setattr(cells_module, "_evaluate", evaluate)

        return set_up

    @pytest.mark.parametrize(
        ("error", "out_of_memory"),
        [
            slow(ValueError("too\nbad"), False),
            (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        ],
    )
    def test_a_failing_cell_is_recorded_and_the_rest_go_on(
        self,
        config: dict[str, Any],
        tmp_path: Path,
        fail: Callable[[Exception], None],
        error: Exception,
        out_of_memory: bool,
    ) -> None:
        few = {**config, "grid": [{"attention": ["elu", "relu"], "length": 16}]}
        fail(error)
        said: list[str] = []
        summary = run(Study.model_validate(few), tmp_path, engine="inline", say=said.append)
        assert [cell.attention for cell in summary.finished] == ["relu"]
        assert [cell.attention for cell in summary.failed] == ["elu"]
        failure = records(tmp_path)["00016-repeat-elu-seed-0"]["failure"]
        assert failure["error"] == type(error).__name__
        assert failure["out_of_memory"] == out_of_memory
        assert "\n" not in failure["message"]
        assert failure["message"] in said[-1]

    @pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
    def test_errors_that_tell_of_too_little_memory(self, error: Exception) -> None:
        assert cells_module._is_out_of_memory(error)
        assert not cells_module._is_out_of_memory(ValueError("too bad"))

    def test_failed_cells_are_run_again_when_asked(
        self,
        config: dict[str, Any],
        tmp_path: Path,
        fail: Callable[[Exception], None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        few = Study.model_validate({**config, "grid": [{"attention": ["elu"], "length": 16}]})
        fail(ValueError("bad"))
        assert len(run(few, tmp_path, engine="inline").failed) == 1
        monkeypatch.undo()
        assert len(run(few, tmp_path, engine="inline").failed) == 1
        assert len(run(few, tmp_path, engine="inline", retry_failed=True).finished) == 1

    @pytest.mark.slow
    def test_a_cell_whose_process_dies(self, config: dict[str, Any], tmp_path: Path) -> None:
        few = {**config, "grid": [{"attention": ["softmax"], "length": 16}]}
        # Of the child alone: forkserver imports the script, too.
        process = start(tmp_path, few, engine="processes", kill="_evaluate")
        out, err = process.communicate(timeout=600)
        assert (process.returncode, out) == (0, b"ready\ndone\n"), err
        failure = records(tmp_path / "out")["00016-repeat-softmax-seed-0"]["failure"]
        assert failure["message"].startswith("its process ended with signal 9")

    def test_a_full_disk_stops_the_study_and_keeps_what_is_there(
        self, config: dict[str, Any], tmp_path: Path, fail: Callable[[Exception], None]
    ) -> None:
        fail(OSError(28, "No space left on device", "checkpoint"))
        with refused("can't be written to: [Errno 28] No space left on device", StudyStopped):
            run(Study.model_validate(config), tmp_path, engine="inline")
        there = records(tmp_path)
        assert len(there) == 1
        assert not any("failure" in record for record in there.values())

    @pytest.mark.slow
    def test_a_full_disk_as_safetensors_tells_it(
        self, config: dict[str, Any], tmp_path: Path, fail: Callable[[Exception], None]
    ) -> None:
        few = {**config, "grid": {"attention": "elu", "length": 16}}
        fail(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
        with refused("No space left on device", StudyStopped):
            run(Study.model_validate(few), tmp_path, engine="inline")

    def test_a_read_only_folder(self, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Tests may run as root, who may write anywhere.
        def refuse(path: Path, value: Any) -> None:
            raise OSError(30, "Read-only file system", str(path))

        monkeypatch.setattr(runner, "write_json", refuse)
        with refused(f"[Errno 30] {tmp_path} can't be written to: Read-only file system", OSError):
            run(Study.model_validate(config), tmp_path, engine="inline")


class TestEngines:
    @pytest.mark.slow
    def test_two_ray_workers_give_the_same_records(self, done: Path, config: dict[str, Any], tmp_path: Path) -> None:
        ray = pytest.importorskip("ray")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            summary = run(Study.model_validate(config), tmp_path, engine="ray")
        finally:
            ray.shutdown()
        assert len(summary.finished) == 5
        assert comparable(tmp_path) == comparable(done)
