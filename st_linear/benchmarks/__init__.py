"""Speed and memory, side by side with the peers: what ``st-linear bench`` runs."""

from __future__ import annotations

from st_linear.benchmarks.report import markdown, table, write_report
from st_linear.benchmarks.runner import check, run
from st_linear.benchmarks.settings import LEVELS, MIXED_PARTS, Settings

__all__ = ["LEVELS", "MIXED_PARTS", "Settings", "check", "markdown", "run", "table", "write_report"]
