"""``convert``, ``export`` and ``distill``, killed at random moments and called again, end as if they never were."""

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
from conftest import WORDS
from test_recipe import write_pairs

import st_linear
from st_linear.adapters import CONFIG_NAME

pytestmark = pytest.mark.slow

KILLS = 10

# The command line, which says when it has been imported: kills are to fall into its work.
SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
import st_linear.export, st_linear.recipe, st_linear.transfer
from st_linear import cli
print("ready", flush=True)
cli.main(sys.argv[1:])
"""

CONVERT = "convert bert out --texts book.txt --steps 60 --train-lengths 48,96 --window 8 --num-features 12"
DISTILL = (
    "distill bert out --data pairs --teacher-scores pairs/teacher --students softmax,hedgehog@4 --seeds 0,1 "
    "--epochs 12 --batch-size 8 --evaluations 4 --max-seq-length 64"
)


@pytest.fixture
def place(bert: str, tmp_path: Path) -> Callable[[str], Path]:
    """A function that makes a folder with all that the commands read."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        write_pairs(folder / "pairs")
        shutil.copytree(bert, folder / "bert")
        draw = random.Random(0)
        (folder / "book.txt").write_text("\n".join(" ".join(draw.choices(WORDS, k=20)) for _ in range(150)))
        return folder

    return make


def start(folder: Path, command: str) -> subprocess.Popen[bytes]:
    """The command in a process of its own, imported and about to begin."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", SCRIPT, *command.split(), "--json"]
    process = subprocess.Popen(line, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def finish(folder: Path, command: str) -> tuple[dict[str, Any], float]:
    """What the command says, and how long it took."""
    process, begun = start(folder, command), time.monotonic()
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    return json.loads(out), time.monotonic() - begun


def kill(folder: Path, command: str, seconds: float) -> bool:
    """Whether the command was still at work when it was killed."""
    process = start(folder, command)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def model_folders(folder: Path) -> list[Path]:
    """Models that a user would find: not what lies in hidden folders, half written."""
    found = (path.parent for path in folder.rglob(CONFIG_NAME))
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def assert_whole(folder: Path) -> None:
    """Every model loads, and every JSON file of a finished part can be read."""
    for path in model_folders(folder):
        st_linear.load(str(path))
    for path in folder.rglob("record.json"):
        json.loads(path.read_text())


def assert_same_models(folder: Path, other: Path) -> None:
    paths = model_folders(folder)
    assert sorted(path.relative_to(folder) for path in paths) == sorted(
        path.relative_to(other) for path in model_folders(other)
    )
    for path in paths:
        own, others = (st_linear.load(str(root / path.relative_to(folder))) for root in (folder, other))
        for name, tensor in own.state_dict().items():
            torch.testing.assert_close(tensor, others.state_dict()[name], msg=f"{path}: {name}")


# A conversion that was finished is trained anew when it is asked for again; finished students are kept.
@pytest.mark.parametrize(("command", "longest"), [(CONVERT, 1.1), (DISTILL, 0.3)], ids=["convert", "distill"])
def test_killed_at_random_moments(command: str, longest: float, place: Callable[[str], Path]) -> None:
    whole, broken = place("whole"), place("broken")
    expected, duration = finish(whole, command)
    draw, killed = random.Random(0), 0
    for _ in range(KILLS):
        killed += kill(broken, command, draw.uniform(0, longest * duration))
        assert_whole(broken)
    assert killed >= KILLS // 2
    assert model_folders(broken / "out")
    result, _ = finish(broken, command)
    assert result.keys() == expected.keys()
    assert model_folders(whole / "out")
    assert_same_models(broken / "out", whole / "out")
    assert not [path.name for path in broken.iterdir() if path.name.startswith(".")]


def test_an_export_that_is_killed_leaves_the_old_model_or_the_new_one(place: Callable[[str], Path]) -> None:
    folder = place("export")
    finish(folder, "convert bert out --feature-map elu --window 6 --max-seq-length 64")
    finish(folder, "convert bert other --feature-map relu --window 6 --max-seq-length 64")
    _, duration = finish(folder, "export other out")
    finish(folder, "convert bert out --feature-map elu --window 6 --max-seq-length 64")
    draw = random.Random(0)
    for _ in range(KILLS):
        kill(folder, "export other out", draw.uniform(0, 1.2 * duration))
        found = st_linear.load(str(folder / "out"))[0].feature_map
        assert (found, (folder / "out/onnx").exists()) in {("elu", False), ("relu", True)}
        if found == "relu":
            st_linear.load(str(folder / "out"), backend="onnx")
            finish(folder, "convert bert out --feature-map elu --window 6 --max-seq-length 64")
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) in ([], [".out.new"])
