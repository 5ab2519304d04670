"""Rows of measured models in a CSV file, of which every finished one is on disk at once."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["COLUMNS", "Row", "Rows"]

Row = dict[str, Any]
"""Column → value; what was not measured is absent or empty. Numbers that were read back are numbers again."""

TEXTS = (
    *("suite", "model", "tool", "outcome", "stage", "reason", "input", "frontend", "pinned_by", "target", "stages"),
    *("laws_input", "macs_counted"),
)

COLUMNS = (
    *("suite", "model", "tool", "outcome", "stage", "reason", "input", "parameters", "macs"),
    *("frontend", "notes", "opaque", "exact", "statistical", "pinned", "pinned_by"),
    *("least_exact", "least_statistical", "target", "macs_left"),
    *("seconds", "stages", "memory_mb", "memory_ratio"),
    *("laws_input", "error_traced", "error_slim", "effect_of_masks", "macs_counted", "laws_seconds"),
)


class Rows:
    """The rows of a file by (model, tool). Iterates over rows in the order in which they were measured."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._rows: dict[tuple[str, str], Row] = {}
        if file.is_file():
            with file.open(newline="", encoding="utf-8") as stream:
                self._rows = {_key(row): row for row in map(_read, csv.DictReader(stream))}

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def drop(self, is_unwanted: Callable[[Row], bool]) -> None:
        """Forget rows, on disk too."""
        self._rows = {key: row for key, row in self._rows.items() if not is_unwanted(row)}
        self._write("w", list(self))

    def append(self, row: Row) -> None:
        """Add a row to the end of the file."""
        self._rows[_key(row)] = row
        self._write("a", [row])

    def _write(self, mode: str, rows: list[Row]) -> None:
        with self.file.open(mode, newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            if mode == "w":
                writer.writeheader()
            writer.writerows({key: _spell(value) for key, value in row.items()} for row in rows)


def _key(row: Row) -> tuple[str, str]:
    return row["model"], row["tool"]


def _spell(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def _read(row: dict[str, str]) -> Row:
    return {key: value if key in TEXTS else float(value) for key, value in row.items() if value}
