from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch

from st_linear import records
from st_linear.records import (
    atomic_path,
    environment,
    has_bfloat16,
    read_json,
    write_json,
    write_text,
)


def test_environment_is_json_and_says_where_we_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in records._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    told = environment()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["torch"] == torch.__version__
    assert told["python"] == ".".join(map(str, sys.version_info[:3]))
    assert told["threads"] == torch.get_num_threads()
    assert told["device"]
    assert told["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert told["bfloat16"] is has_bfloat16()
    assert told["variables"] == {"THP_MEM_ALLOC_ENABLE": "1"}
    assert datetime.fromisoformat(told["time_utc"]).utcoffset() == timedelta(0)
    assert all(told[name][0].isdigit() for name in ("transformers", "sentence_transformers"))


def test_git_commit_is_that_of_the_checkout_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "inner" / "st_linear"
    package.mkdir(parents=True)
    monkeypatch.setattr(records, "__file__", str(package / "records.py"))

    def git(*arguments: str, folder: Path) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(folder), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def told() -> tuple[object, object]:
        here = environment()
        return here["git_commit"], here["git_dirty"]

    git("init", folder=tmp_path)
    git("commit", "--allow-empty", "-m", "outer", folder=tmp_path)
    assert told() == (None, None)
    git("init", folder=tmp_path / "inner")
    assert told() == (None, None)
    (package / "a.txt").write_text("a")
    git("add", ".", folder=tmp_path / "inner")
    git("commit", "-m", "inner", folder=tmp_path / "inner")
    commit = git("rev-parse", "HEAD", folder=tmp_path / "inner")
    assert told() == (commit, False)
    (package / "a.txt").write_text("b")
    assert told() == (commit, True)
    monkeypatch.setenv("PATH", "")
    assert told() == (None, None)


@pytest.mark.slow
def test_peak_memory_grows_with_what_is_allocated_and_never_shrinks() -> None:
    # In a process of its own: what other tests leave to be freed, or hold, moves the peak of this one.
    script = """
from st_linear.records import peak_memory_mib, reset_peak_memory
peaks = [peak_memory_mib()]
block = bytearray(b"1") * (512 << 20)
peaks.append(peak_memory_mib())
del block
peaks.append(peak_memory_mib())
reset_peak_memory()
print(*peaks, peak_memory_mib())
"""
    told = subprocess.check_output([sys.executable, "-c", script], text=True)
    before, held, freed, reset = map(float, told.split())
    assert held >= before + 448
    # The kernel counts pages per processor and adds them up now and then.
    assert freed >= held - 4
    assert reset <= held - 448 or sys.platform != "linux"


def test_json_round_trip_makes_parents(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "record.json"
    value = {"name": "é", "figures": [1, 2.5, None, True]}
    write_json(path, value)
    assert read_json(str(path)) == value
    assert "é" in path.read_text(encoding="utf-8")
    assert os.listdir(path.parent) == ["record.json"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {1, 2}, object(), {(1, 2): 3}])
def test_write_json_refuses_and_leaves_the_old_file(tmp_path: Path, bad: object) -> None:
    path = tmp_path / "record.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match=r"value can't be written to .*record\.json as JSON: ") as caught:
        write_json(path, {"figure": bad})
    assert "\n" not in str(caught.value)
    assert read_json(path) == 1
    assert os.listdir(tmp_path) == ["record.json"]


@pytest.mark.parametrize("damaged", [b"", b'{"a": 1', b'{"a": NaN}', b"[Infinity]", b'"\xff"'])
def test_read_json_names_a_damaged_file(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"record\.json is damaged: not JSON .*; restore it, or delete it") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_read_json_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent.json")


def test_write_text_keeps_text_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    write_text(path, "old")
    write_text(path, "é\r\n\n")
    assert path.read_bytes() == "é\r\n\n".encode()


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    write_text(path, "old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            assert temporary.parent == tmp_path
            assert temporary.suffix == ".md"
            temporary.write_text("half")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.md"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "a")
    (tmp_path / "b.txt").write_text("b")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == stat.S_IMODE((tmp_path / "b.txt").stat().st_mode)


def test_layer_imports_nothing_of_ours() -> None:
    assert "st_linear" not in Path(records.__file__).read_text(encoding="utf-8").partition("def environment")[0]
