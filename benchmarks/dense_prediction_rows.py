"""The rows of `benchmarks.dense_prediction`, and the tables that they make."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tabulate import tabulate

__all__ = ["Job", "Row", "read_rows", "summary", "table", "write_rows"]


@dataclass(frozen=True)
class Job:
    """A network to train: its task, its seed, how it is made, how much of the MACs is left (percent), and settings."""

    task: str
    seed: int
    method: str
    target: int
    settings: str


@dataclass(frozen=True)
class Row:
    """One trained network.

    Attributes:
        job: which one.
        kfpp: thousand multiply-accumulates per input pixel.
        left: the share of the multiply-accumulates that is left.
        alone: the share that gates leave where they are cut at a probability of 0.5.
        cut: loss right after the cut, before fine-tuning.
        loss: on held-out data.
        metric: likewise, in the task's unit.
        epochs: of training in all.
        seconds: of them.
    """

    job: Job
    kfpp: float
    left: float
    alone: float | None
    cut: float | None
    loss: float
    metric: float
    epochs: int
    seconds: float

    @property
    def off(self) -> float:
        """How far the network is from its target, in percent of that."""
        return 100 * (100 * self.left / self.job.target - 1)

    @property
    def off_alone(self) -> float | None:
        """How far it would be, cut at a probability of 0.5."""
        return None if self.alone is None else 100 * (100 * self.alone / self.job.target - 1)


def read_rows(file: Path | None) -> list[Row]:
    """Read rows, none where there is no file yet."""
    if file is None or not file.exists():
        return []
    return [Row(**{**row, "job": Job(**row["job"])}) for row in json.loads(file.read_text())]


def write_rows(file: Path | None, rows: Sequence[Row]) -> None:
    """Write rows where a file is wanted."""
    if file is not None:
        file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


COLUMNS: dict[str, tuple[Callable[[Row], float | None], str]] = {
    "kFPP": (lambda row: row.kfpp, "{:.3f}"),
    "off target, %": (lambda row: row.off, "{:+.2f}"),
    "gates alone, %": (lambda row: row.off_alone, "{:+.1f}"),
    "loss when cut": (lambda row: row.cut, "{:.4f}"),
    "loss": (lambda row: row.loss, "{:.4f}"),
    "metric": (lambda row: row.metric, "{:.2f}"),
    "epochs": (lambda row: row.epochs, "{:.0f}"),
    "seconds": (lambda row: row.seconds, "{:.0f}"),
}


def table(rows: Sequence[Row], methods: Sequence[str], unit: str) -> str:
    """Return the rows of one task as Markdown: means over the seeds, with the least and the most."""
    cells = []
    for target, method in sorted({(-row.job.target, methods.index(row.job.method)) for row in rows}):
        same = [row for row in rows if (row.job.target, row.job.method) == (-target, methods[method])]
        found = ([value for row in same if (value := read(row)) is not None] for read, _ in COLUMNS.values())
        forms = (form for _, form in COLUMNS.values())
        cells.append((methods[method], f"{-target} %", *map(_spread, found, forms)))
    header = ["network", "target", *(unit if name == "metric" else name for name in COLUMNS)]
    return tabulate(cells, header, "github", disable_numparse=True, colalign=("left", *["right"] * (len(header) - 1)))


def _spread(values: Sequence[float], form: str) -> str:
    """Return the mean, and in brackets the least and the most where they differ."""
    if not values:
        return "–"
    mean, least, most = (form.format(value) for value in (statistics.fmean(values), min(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"


def summary(rows: Sequence[Row]) -> str:
    """Say how near gates came to their targets, and how often they beat narrower networks."""
    gates = [row for row in rows if row.alone is not None]
    if not gates:
        return ""
    lines = [
        f"Networks cut by gates are within {max(abs(row.off) for row in gates):.2f} % of their targets; cut at a "
        f"probability of 0.5 they would be within {max(abs(row.off_alone or 0.0) for row in gates):.1f} %."
    ]
    for method in sorted({row.job.method for row in rows if row.job.method.startswith("scaled")}):
        peers = {(row.job.seed, row.job.target): row.loss for row in rows if row.job.method == method}
        pairs = [(row.loss, peers[key]) for row in gates if (key := (row.job.seed, row.job.target)) in peers]
        lines.append(f'Their loss is below that of "{method}" in {sum(a < b for a, b in pairs)} of {len(pairs)} pairs.')
    return " ".join(lines)
