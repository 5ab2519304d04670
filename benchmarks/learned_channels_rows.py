"""What `learned_channels` measures, as rows in a file and as Markdown."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from tabulate import tabulate

from fxprune.training.files import replace_file

__all__ = ["ALONE", "Job", "Row", "add_row", "distillation_table", "pruning_tables", "read_rows", "spelled"]

ALONE = "none"
"""The teachers of a network that has none; several are joined by "+", in turn."""

CLOSE = 0.01
"""Networks of a level are compared when their MACs are this near to it, relative."""


@dataclass(frozen=True)
class Job:
    """A network to measure: `level` percent of the MACs stay; `settings` are all else that the row depends on."""

    model: str
    level: int
    method: str
    seed: int
    teachers: str
    learn_steps: int
    tune_steps: int
    settings: str

    @property
    def taught_by(self) -> tuple[str, ...]:
        """The teachers, one after the other."""
        return () if self.teachers == ALONE else tuple(self.teachers.split("+"))

    @property
    def folder(self) -> str:
        """A name for the folder of a run that depends on this job."""
        digest = hashlib.sha256(repr(self).encode()).hexdigest()
        return f"{self.model}-{self.level}-{self.method}-{self.seed}-{digest[:12]}"


@dataclass(frozen=True)
class Row(Job):
    """What was measured: shares of the dense model's in [0, 1], accuracies in percent; `notes` are the gates'."""

    macs: float
    parameters: float
    before: float
    recalibrated: float
    tuned: float
    learn_seconds: float
    tune_seconds: float
    notes: tuple[str, ...]

    @property
    def job(self) -> Job:
        """What was to be measured."""
        return Job(**{field.name: getattr(self, field.name) for field in fields(Job)})


def spelled(settings: Mapping[str, Any]) -> str:
    """Return settings as text.

    >>> spelled({"limit": 200, "batch_size": 16})
    'batch_size=16 limit=200'
    """
    return " ".join(f"{name}={value}" for name, value in sorted(settings.items()))


def read_rows(file: Path | None) -> list[Row]:
    """Read the rows of a file; there are none where there is no file yet."""
    if file is None or not file.exists():
        return []
    return [Row(**{**row, "notes": tuple(row["notes"])}) for row in json.loads(file.read_text())]


def add_row(file: Path, row: Row) -> None:
    """Add a row to those that the file holds by now: two runs may share one."""
    text = json.dumps([asdict(one) for one in [*read_rows(file), row]], indent=1)
    replace_file(file, lambda stream: stream.write(text.encode() + b"\n"))


def pruning_tables(rows: Sequence[Row], methods: Sequence[str]) -> str:
    """Return what the methods make of one model: means over the seeds, how near the MACs are, every run."""
    ordered = sorted(rows, key=lambda row: (-row.level, methods.index(row.method), row.tune_steps, row.seed))
    alike = _grouped(ordered, lambda row: (row.level, row.method, row.learn_steps, row.tune_steps))
    means = [(*_named(some[0]), *_accuracies(some), *_seconds(some)) for some in alike]
    every = [(*_named(row), *_accuracies([row]), *_seconds([row]), str(row.seed)) for row in ordered]
    parts = (_table(means, _HEADER), _distance(rows), "Every run:", _table(every, (*_HEADER, "seed")))
    return "\n\n".join(parts)


def distillation_table(rows: Sequence[Row], teachers: Sequence[str]) -> str:
    """Return what teachers make of each network: means over the seeds, and over those without a teacher."""
    ordered = sorted(rows, key=lambda row: (row.level, teachers.index(row.teachers), row.seed))
    alone = {(row.method, row.seed): row.tuned for row in rows if row.teachers == ALONE}
    cells = []
    for some in _grouped(ordered, lambda row: (row.method, row.teachers)):
        gains = [row.tuned - alone[row.method, row.seed] for row in some if (row.method, row.seed) in alone]
        first, shares = some[0], [row.macs for row in some]
        cells.append(
            (
                f"{first.model}, {first.method}, {_mean(shares, '.1%')}",
                first.teachers.replace("+", ", then "),
                str(first.tune_steps),
                _mean([row.before for row in some], ".2f"),
                _mean([row.tuned for row in some], ".2f"),
                _mean(gains, "+.2f") if gains else "–",
                ", ".join(f"{row.tuned:.2f}" for row in some),
                f"{fmean(row.tune_seconds for row in some):.0f}",
            )
        )
    header = ("network, MACs left", "teachers", "steps", "top-1 before", "fine-tuned", "gain", "by seed", "seconds")
    return _table(cells, header, left=2)


_HEADER = (
    "method",
    "target",
    "learned, steps",
    "tuned, steps",
    "MACs left",
    "parameters left",
    "top-1",
    "BN re-estimated",
    "fine-tuned",
    "learning, s",
    "tuning, s",
)


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[list[Row]]:
    """Gather rows of one key, in the order in which the keys come."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _named(row: Row) -> tuple[str, ...]:
    return row.method, f"{row.level} %", str(row.learn_steps), str(row.tune_steps)


def _accuracies(rows: Sequence[Row]) -> tuple[str, ...]:
    names = {"macs": ".1%", "parameters": ".1%", "before": ".2f", "recalibrated": ".2f", "tuned": ".2f"}
    return tuple(_mean([getattr(row, name) for row in rows], form) for name, form in names.items())


def _seconds(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(f"{fmean(getattr(row, name) for row in rows):.0f}" for name in ("learn_seconds", "tune_seconds"))


def _mean(values: Sequence[float], form: str) -> str:
    """Return the mean ± half of the range; the latter only where values differ as they are shown.

    >>> _mean([91.25, 91.75], ".2f"), _mean([0.5, 0.5], ".1%")
    ('91.50 ± 0.25', '50.0%')
    """
    mean, half = format(fmean(values), form), (max(values) - min(values)) / 2
    if format(min(values), form) == format(max(values), form):
        return mean
    return f"{mean} ± {format(half, form.lstrip('+'))}"


def _distance(rows: Sequence[Row]) -> str:
    """Say how near the MACs of all networks are to their targets, and which are not near enough to compare."""
    far = {row: abs(100 * row.macs / row.level - 1) for row in rows}
    worst = f"The MACs of all networks are within {max(far.values(), default=0.0):.2%} of their target."
    names = sorted({f"{row.method} at {row.level} % ({row.macs:.1%})" for row in rows if far[row] > CLOSE})
    return worst + (f" Not the same within {CLOSE:.0%}: {', '.join(names)}." if names else "")


def _table(cells: Sequence[Sequence[str]], header: Sequence[str], left: int = 1) -> str:
    align = (*["left"] * left, *["right"] * (len(header) - left))
    return tabulate(cells, header, "github", disable_numparse=True, colalign=align if cells else None)
