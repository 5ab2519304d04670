"""The zoo's rows survive a stop, and its tables say what the rows say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.zoo import Limits, watch
from benchmarks.zoo_rows import Row, Rows
from benchmarks.zoo_tables import tables


def row(model: str, tool: str = "fxprune", **more: Any) -> Row:
    measured = {"least_exact": 0.25, "least_statistical": 0.25, "seconds": 0.5, "memory_ratio": 1.5, "macs_left": 0.5}
    return {"suite": "timm", "model": model, "tool": tool, "outcome": "ok", **measured, **more}


def refused(model: str, tool: str = "fxprune") -> Row:
    return {"model": model, "tool": tool, "outcome": "refused", "reason": "TraceError: no | way\n in"}


def test_rows_are_on_disk_at_once_and_are_read_back(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.csv")
    rows.drop(lambda _: False)
    rows.append(row("a", macs=1234))
    rows.append(refused("b"))
    again = Rows(tmp_path / "rows.csv")
    assert ("a", "fxprune") in again
    assert ("a", "torch-pruning") not in again
    assert list(again) == [row("a", macs=1234), refused("b")]


def test_dropped_rows_are_measured_anew(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.csv")
    rows.drop(lambda _: False)
    rows.append(row("a"))
    rows.append(refused("b"))
    rows.drop(lambda r: r["outcome"] != "ok")
    rows.append(row("b", seconds=2.0))
    assert [(r["model"], r["seconds"]) for r in Rows(tmp_path / "rows.csv")] == [("a", 0.5), ("b", 2.0)]


def test_totals_count_float_models_and_both_tools() -> None:
    peer = [row("a", "torch-pruning", seconds=1.0), refused("b", "torch-pruning")]
    text = "\n".join(tables([row("a"), row("b", least_exact=0.75), refused("quantized_c"), *peer]))
    assert "2 models: 2 ok" in text
    assert "half of the MACs can leave exactly: 1 of 2 (50.0%); with statistical orbits: 2 of 2 (100.0%)" in text
    assert "Torch-Pruning slims 1 of 2 (50.0%)" in text
    assert "geometric mean over 1 models that both slim: 0.50" in text


def test_what_is_not_ok_has_its_reason_in_one_cell() -> None:
    text = "\n".join(tables([refused("a")]))
    assert "slimmer and lawful: 0 of 1 (0.0%)" in text
    assert "TraceError: no / way in" in text


def test_a_process_beyond_its_limits_is_killed() -> None:
    def run(code: str, limits: Limits) -> tuple[Row, int]:
        process = subprocess.Popen([sys.executable, "-c", code])
        return watch(process, limits), process.returncode

    forever = "while True: pass"
    assert run(forever, Limits(1e12, 0.0)) == ({"outcome": "timeout", "reason": "more than 0 s"}, -9)
    assert run(forever, Limits(1.0, 1e6)) == ({"outcome": "memory", "reason": "more than 1e-09 GB"}, -9)
    assert run("", Limits(1e12, 1e6)) == ({}, 0)
