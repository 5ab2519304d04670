"""Markdown tables and totals of measured models."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence

from tabulate import tabulate

from benchmarks.surgery import geometric_mean
from benchmarks.zoo_rows import Row

__all__ = ["tables"]

HALF = 0.5


def tables(rows: Sequence[Row]) -> list[str]:
    """Return Markdown: totals, a row a model, and what is not ok with its reason."""
    ours = [row for row in rows if row["tool"] == "fxprune" and not is_quantised(row)]
    theirs = {row["model"]: row for row in rows if row["tool"] == "torch-pruning" and not is_quantised(row)}
    parts = [totals(ours), peer_totals(ours, theirs), model_table(ours, theirs), failures(rows)]
    return [part for part in parts if part]


def is_quantised(row: Row) -> bool:
    """Whether the constructor gives integer weights, which are refused by design."""
    return str(row["model"]).startswith("quantized_")


def is_ok(row: Row) -> bool:
    """Whether a model became slimmer and, by fxprune, passed the laws."""
    return row["outcome"] == "ok"


def totals(rows: Sequence[Row]) -> str:
    """Return fxprune's totals as a list."""
    if not rows:
        return ""
    outcomes = Counter(row["outcome"] for row in rows)
    good = [row for row in rows if is_ok(row)]
    exact = [row for row in good if row["least_exact"] <= HALF]
    either = [row for row in good if row["least_statistical"] <= HALF]
    lines = [
        f"{len(rows)} models: " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()),
        f"slimmer and lawful: {share(good, rows)}",
        f"half of the MACs can leave exactly: {share(exact, rows)}; with statistical orbits: {share(either, rows)}",
    ]
    if good:
        seconds, memory = [row["seconds"] for row in good], [row["memory_ratio"] for row in good]
        slowest = max(good, key=lambda row: float(row["seconds"]))
        lines += [
            f"seconds: median {statistics.median(seconds):.2f}, most {slowest['seconds']:.2f} ({slowest['model']})",
            f"peak memory added, as a multiple of the model: median {statistics.median(memory):.1f}, "
            f"most {max(memory):.1f}; at most 2 for {share([m for m in memory if m <= 2], memory)}",
        ]
    return "\n".join(f"* {line}" for line in lines)


def share(part: Sequence[object], whole: Sequence[object]) -> str:
    """Return a fraction as users read it.

    >>> share([1], [1, 2])
    '1 of 2 (50.0%)'
    """
    return f"{len(part)} of {len(whole)} ({len(part) / len(whole):.1%})"


def peer_totals(ours: Sequence[Row], theirs: dict[str, Row]) -> str:
    """Return how many models Torch-Pruning handles, and the ratio of times where both do."""
    if not theirs:
        return ""
    good = [row for row in theirs.values() if is_ok(row)]
    ratios = [r for r in (ratio(row, theirs.get(row["model"])) for row in ours) if r is not None]
    mean = f"{geometric_mean(ratios):.2f}" if ratios else "–"
    return (
        f"* Torch-Pruning slims {share(good, list(theirs.values()))}\n"
        f"* time of fxprune over that of Torch-Pruning, geometric mean over {len(ratios)} models that both slim: {mean}"
    )


def ratio(ours: Row, theirs: Row | None) -> float | None:
    """Return how long fxprune takes relative to Torch-Pruning, None where one of them fails."""
    if theirs is None or not is_ok(ours) or not is_ok(theirs):
        return None
    return float(ours["seconds"]) / float(theirs["seconds"])


def model_table(ours: Sequence[Row], theirs: dict[str, Row]) -> str:
    """Return one line for every model."""
    headers = [name for name, _ in CELLS]
    if theirs:
        headers += ["Torch-Pruning", "s (TP)", "ratio"]
    cells = [[cell(row) for _, cell in CELLS] + (peer_cells(row, theirs) if theirs else []) for row in ours]
    align = ("left", "left", "left", *["right"] * (len(headers) - 3))
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True, colalign=align) if cells else ""


def peer_cells(row: Row, theirs: dict[str, Row]) -> list[str]:
    """Return what Torch-Pruning did with the model of a row."""
    peer = theirs.get(row["model"])
    if peer is None:
        return ["–"] * 3
    both = ratio(row, peer)
    outcome = percent("macs_left")(peer) if is_ok(peer) else peer["outcome"]
    return [outcome, number("seconds", 2)(peer), "–" if both is None else f"{both:.2f}"]


def failures(rows: Sequence[Row]) -> str:
    """Return every model that is not ok with its reason."""
    cells = [
        [row["model"], row["tool"], row["outcome"], row.get("stage", ""), first_words(row.get("reason", ""))]
        for row in rows
        if not is_ok(row)
    ]
    headers = ["model", "tool", "outcome", "stage", "reason"]
    return "## Not ok\n\n" + tabulate(cells, headers, tablefmt="github", disable_numparse=True) if cells else ""


def first_words(text: str, most: int = 200) -> str:
    """Return the beginning of a reason, fit for a cell."""
    flat = " ".join(text.replace("|", "/").split())
    return flat if len(flat) <= most else f"{flat[:most]}…"


Cell = Callable[[Row], str]


def percent(column: str) -> Cell:
    """Return a cell that shows a share."""
    return lambda row: f"{row[column]:.0%}" if column in row else "–"


def number(column: str, digits: int) -> Cell:
    """Return a cell that shows a number."""
    return lambda row: f"{row[column]:.{digits}f}" if column in row else "–"


def text(column: str) -> Cell:
    """Return a cell that shows a word."""
    return lambda row: str(row.get(column, "–"))


CELLS: tuple[tuple[str, Cell], ...] = (
    ("model", text("model")),
    ("outcome", text("outcome")),
    ("front end", text("frontend")),
    ("exact", percent("exact")),
    ("statistical", percent("statistical")),
    ("pinned", percent("pinned")),
    ("least MACs", percent("least_exact")),
    ("least, statistical", percent("least_statistical")),
    ("MACs left", percent("macs_left")),
    ("slim off by", lambda row: f"{row['error_slim']:.0e}" if "error_slim" in row else "–"),
    ("s", number("seconds", 2)),
    ("memory", number("memory_ratio", 1)),
)
