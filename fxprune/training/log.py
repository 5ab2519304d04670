"""The log of a run: log.csv for spreadsheets, log.json for programs."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from fxprune.training.files import replace_file
from fxprune.training.history import History

__all__ = ["LOGS", "write_log"]

LOGS = ("log.csv", "log.json")


def write_log(folder: Path, history: History) -> None:
    """Write one row per epoch to log.csv, and to log.json also why the run stopped and its best epoch."""
    rows = [record.row() for record in history.records]
    summary = {"stopped_by": history.stopped_by, "best_epoch": history.best_epoch}
    text = json.dumps({**summary, "epochs": [_strict(row) for row in rows]}, indent=2)
    replace_file(folder / "log.csv", lambda file: file.write(_table(rows).encode()))
    replace_file(folder / "log.json", lambda file: file.write(f"{text}\n".encode()))


def _table(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _strict(row: dict[str, Any]) -> dict[str, Any]:
    """Spell numbers that JSON lacks as null."""
    return {name: value if value is None or math.isfinite(value) else None for name, value in row.items()}
