"""What a comparison found, as tables and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from fxprune.latency import Times
from fxprune.machine import Machine
from fxprune.timing.agreement import Agreement
from fxprune.timing.layers import LayerTimes

__all__ = ["Comparison", "VariantTimes"]


@dataclass(frozen=True)
class VariantTimes:
    """One way to run the model.

    Attributes:
        variant: what it is called.
        memory_format: of the inputs, and of the weights where they follow: "contiguous" or "channels-last".
        times: of its runs; None where it cannot run here.
        agreement: of its outputs with those of the eager model.
        remark: what a reader must know about how it was made.
        reason: why it cannot run here.
    """

    variant: str
    memory_format: str = ""
    times: Times | None = None
    agreement: Agreement | None = None
    remark: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """Times of one model run in several ways, in alternation, and of the calls in its graphs.

    `threads` are those of every variant, `runs` the timed ones of each after `warmup` others.
    """

    model: str
    threads: int
    runs: int
    warmup: int
    machine: Machine
    variants: tuple[VariantTimes, ...]
    layers: tuple[LayerTimes, ...] = ()
    notes: tuple[str, ...] = ()

    def __getitem__(self, variant: str) -> VariantTimes:
        """Return the row of a variant. Raises `KeyError`."""
        return {row.variant: row for row in self.variants}[variant]

    def speedup(self, row: VariantTimes) -> float | None:
        """Return how many times as fast as eager a variant is, where both ran."""
        eager = next((other.times for other in self.variants if other.variant == "eager"), None)
        return eager.median / row.times.median if eager and row.times and row.times.median else None

    def table(self, style: str = "simple") -> str:
        """Return times and kinds of layers as text; `style` is any table format of tabulate."""
        header = ["variant", "median, ms", "quartiles, ms", "speed-up", "difference", "cosine", "layout", "remark"]
        cells = [self._cells(row) for row in self.variants]
        shown = tabulate(cells, header, style, disable_numparse=True, colalign=_ALIGNED)
        kinds = [_kind_table(times, style) for times in self.layers]
        return "\n\n".join([shown, self._circumstances(), *kinds, *self._lowered(), *self._notes()])

    def layer_table(self, style: str = "simple") -> str:
        """Return the time of every call as text."""
        return "\n\n".join(_layer_table(times, style) for times in self.layers)

    def json(self) -> str:
        """Return everything as JSON; a number that is not finite is null."""
        variants = [asdict(row) | self._facts(row) for row in self.variants]
        layers = [asdict(times) | _layer_facts(times) for times in self.layers]
        return json.dumps(_finite(asdict(self) | {"variants": variants, "layers": layers}), indent=2) + "\n"

    def _cells(self, row: VariantTimes) -> tuple[str, ...]:
        if row.times is None or row.agreement is None:
            return (row.variant, *("–",) * 5, row.memory_format, row.reason)
        lower, upper = row.times.quartiles
        speedup = self.speedup(row)
        return (
            row.variant,
            f"{row.times.median:.3f}",
            f"{lower:.3f} to {upper:.3f}",
            "–" if speedup is None else f"{speedup:.2f}×",
            f"{row.agreement.difference:.1e}",
            f"{row.agreement.cosine:.5f}",
            row.memory_format,
            row.remark,
        )

    def _facts(self, row: VariantTimes) -> dict[str, Any]:
        if row.times is None:
            return {"median_ms": None, "quartiles_ms": None, "speedup": None}
        return {"median_ms": row.times.median, "quartiles_ms": row.times.quartiles, "speedup": self.speedup(row)}

    def _circumstances(self) -> str:
        counts = f"{_counted(self.runs, 'run')} of each in alternation after {self.warmup}"
        return (
            f"{self.model}: {counts}, {_counted(self.threads, 'thread')}, on {self.machine}\n"
            "difference: largest max |y − y₀| / max |y₀| of any output y, where y₀ is what the eager model gives"
        )

    def _lowered(self) -> list[str]:
        shares = [
            f"{times.share(times.lowered):.1%} of {times.variant} ({times.lowered:.3f} ms)"
            for times in self.layers
            if times.lowered
        ]
        return [f"Layers that lowering touched take {', '.join(shares)}, each call timed alone"] if shares else []

    def _notes(self) -> list[str]:
        return ["\n".join(f"Note: {note}" for note in self.notes)] if self.notes else []


_ALIGNED = ("left", "right", "right", "right", "right", "right", "left", "left")


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def _kind_table(times: LayerTimes, style: str) -> str:
    rows: list[Sequence[str]] = [
        (kind.kind, str(kind.calls), f"{kind.milliseconds:.3f}", f"{times.share(kind.milliseconds):.1%}")
        for kind in times.kinds
    ]
    rows.append(("all", str(len(times.layers)), f"{times.total:.3f}", ""))
    header = [f"{times.variant}, by kind", "calls", "ms", "share"]
    return tabulate(rows, header, style, disable_numparse=True, colalign=("left", "right", "right", "right"))


def _layer_table(times: LayerTimes, style: str) -> str:
    rows = [
        (
            layer.layer or layer.node,
            layer.kind,
            "lowered" if layer.is_lowered else "",
            f"{layer.milliseconds:.4f}",
            f"{times.share(layer.milliseconds):.2%}",
        )
        for layer in times.layers
    ]
    header = [f"{times.variant}, call by call", "kind", "", "ms", "share"]
    return tabulate(rows, header, style, disable_numparse=True, colalign=("left", "left", "left", "right", "right"))


def _layer_facts(times: LayerTimes) -> dict[str, Any]:
    layers = [asdict(layer) | {"share": times.share(layer.milliseconds)} for layer in times.layers]
    return {"total_ms": times.total, "lowered_share": times.share(times.lowered), "layers": layers}


def _finite(facts: Any) -> Any:
    """Replace what JSON has no word for."""
    if isinstance(facts, dict):
        return {name: _finite(value) for name, value in facts.items()}
    if isinstance(facts, (list, tuple)):
        return [_finite(value) for value in facts]
    return None if isinstance(facts, float) and not math.isfinite(facts) else facts
