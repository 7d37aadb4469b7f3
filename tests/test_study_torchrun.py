"""A study under torchrun: the processes train each cell together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_recipe import write_pairs

from st_linear.records import read_json

CONFIG = """\
name: two processes
base: {base}
data:
  source: pairs
teacher:
  scores: pairs/teacher
grid:
  - attention: [softmax, hedgehog@4]
    length: 16
    transfer: on
budget:
  examples: 32
training:
  batch_size: 8
transfer:
  steps: 2
evaluation:
  shares: [0.5]
threads: 1
checkpoint_seconds: 0
"""


@pytest.mark.slow
def test_two_processes_train_each_cell_together(bert: str, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs")
    (tmp_path / "study.yaml").write_text(CONFIG.format(base=bert))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "st_linear.cli", "study", "run", "study.yaml", "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = [read_json(path) for path in (tmp_path / "out").glob("cells/*/record.json")]
    assert len(records) == 2
    for record in records:
        assert record["budget"]["steps"] == 4
        assert [point["examples"] for point in record["curve"]] == [0, 16, 32]
    assert (tmp_path / "out/report/report.html").is_file()
