"""What a plan does to every layer, as a table, Markdown or JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate

__all__ = ["Cause", "LayerRow", "LoweredLayer", "OutputChannels", "Report", "some_of"]


@dataclass(frozen=True)
class LayerRow:
    """One layer: `channels` are those that it makes, before and after; `state` is prunable, statistical or pinned.

    `macs` and `parameters` count no masked weight; `sparsity` is the share of the weights that is masked, before and
    after.
    """

    layer: str
    kind: str
    orbits: tuple[str, ...]
    state: str
    reason: str
    channels: tuple[int, int]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    sparsity: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Cause:
    """What an operator costs: how many output channels of layers it binds, and which share of them all."""

    operator: str
    reason: str
    channels: int
    share: float


@dataclass(frozen=True)
class LoweredLayer:
    """What computes one convolution or linear layer of a lowered model.

    Attributes:
        layer: its path.
        shape: M positions, K inputs and N outputs of the product that it is, on the example inputs.
        sparsity: the share of its blocks of weights that are zero.
        runs: a backend and a form of weights, as "native 1x4", or "float".
        reason: why it computes in float.
        microseconds: by candidate, of those that were measured on this machine.
    """

    layer: str
    shape: tuple[int, int, int]
    sparsity: float
    runs: str
    reason: str = ""
    microseconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OutputChannels:
    """How many output channels of layers can leave exactly, only approximately (statistical), or not at all."""

    exact: int = 0
    statistical: int = 0
    pinned: int = 0

    @property
    def total(self) -> int:
        """All output channels."""
        return self.exact + self.statistical + self.pinned

    def __str__(self) -> str:
        shares = [f"{count / max(self.total, 1):.1%}" for count in (self.exact, self.statistical, self.pinned)]
        return (
            f"Of {self.total:,} output channels {shares[0]} can leave exactly, {shares[1]} approximately "
            f"(statistical), and {shares[2]} are pinned."
        )


@dataclass(frozen=True)
class Report:
    """Layers, totals and notes; every pair is (before, after).

    `macs` are multiply-accumulates of one run on the example inputs, without those of masked weights, `kfpp` thousands
    of them per input pixel, `parameters` those that no mask zeroes, `sparsity` the share of all that masks zero,
    `latency_ms` medians of a measurement where one was asked for. `pinning` are the operators that pin output channels,
    `statistical` those through which they leave approximately, both by what they cost, the dearest first. `lowering`
    are the layers of a lowered model.
    """

    layers: tuple[LayerRow, ...]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    kfpp: tuple[float, float]
    outputs: OutputChannels = field(default_factory=OutputChannels)
    pinning: tuple[Cause, ...] = ()
    statistical: tuple[Cause, ...] = ()
    notes: tuple[str, ...] = ()
    latency_ms: tuple[float, float] | None = None
    sparsity: tuple[float, float] = (0.0, 0.0)
    lowering: tuple[LoweredLayer, ...] = ()

    def table(self, style: str = "simple") -> str:
        """Return the layers and totals as text; `style` is any table format of tabulate."""
        header = ["layer", "type", "orbit", "state", "channels", "MACs", "parameters", "sparsity"]
        shown = len(header) if any(self.sparsity) else -1
        rows = [_cells(row)[:shown] for row in self.layers]
        parts = [tabulate(rows, header[:shown], style, disable_numparse=True)]
        parts += [self.lowered(style)] if self.lowering else []
        parts.append(self.totals(style))
        parts.append(self.causes(style))
        return "\n\n".join([*parts, *(f"Note: {note}" for note in self.notes)])

    def causes(self, style: str = "simple") -> str:
        """Return what can leave, and which operators bind the rest, as text."""
        tables = [("pinned by", self.pinning), ("statistical by", self.statistical)]
        shown = [_cause_table(title, causes, style) for title, causes in tables if causes]
        return "\n\n".join([*shown, str(self.outputs)])

    def lowered(self, style: str = "simple") -> str:
        """Return what computes every layer of a lowered model, as text, with the times of what was measured."""
        timed = list(dict.fromkeys(name for row in self.lowering for name in row.microseconds))
        header = ["layer", "M × K × N", "sparsity", "runs", *(f"{name}, µs" for name in timed), "because of"]
        rows = [_lowered_cells(row, timed) for row in self.lowering]
        align = ("left", "right", "right", "left", *("right" for _ in timed), "left")
        return tabulate(rows, header, style, disable_numparse=True, colalign=align)

    def totals(self, style: str = "simple") -> str:
        """Return the totals as text."""
        rows = [("MACs", *self.macs), ("parameters", *self.parameters), ("kFPP", *self.kfpp)]
        if self.latency_ms is not None:
            rows.append(("latency, ms", *self.latency_ms))
        cells = [(name, _number(a), _number(b), f"{b / a:.1%}" if a else "–") for name, a, b in rows]
        if any(self.sparsity):
            cells.append(("sparsity", f"{self.sparsity[0]:.1%}", f"{self.sparsity[1]:.1%}", ""))
        table = tabulate(cells, ["", "before", "after", "left"], style, disable_numparse=True, colalign=_TOTALS)
        return "\n\n".join([table, *_summary(self.lowering)])

    def markdown(self) -> str:
        """Return the report as Markdown."""
        return self.table("github")

    def json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> Report:
        """Read a report, the inverse of `json`."""
        data = json.loads(text, object_hook=lambda d: {k: _tuples(v) for k, v in d.items()})
        data["outputs"] = OutputChannels(**data["outputs"])
        for name, kind in _ROWS.items():
            data[name] = tuple(kind(**row) for row in data.get(name, ()))
        return Report(**data)


_TOTALS = ("left", "right", "right", "right")

_ROWS: dict[str, type] = {"layers": LayerRow, "pinning": Cause, "statistical": Cause, "lowering": LoweredLayer}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def _cause_table(title: str, causes: Sequence[Cause], style: str) -> str:
    rows = [(cause.operator, cause.reason, f"{cause.channels:,}", f"{cause.share:.1%}") for cause in causes]
    header = [title, "because", "output channels", "share"]
    return tabulate(rows, header, style, disable_numparse=True, colalign=("left", "left", "right", "right"))


def _cells(row: LayerRow) -> tuple[str, ...]:
    state = row.state if not row.reason else f"{row.state}: {row.reason}"
    pairs = [f"{a:,}" if a == b else f"{a:,} → {b:,}" for a, b in (row.channels, row.macs, row.parameters)]
    shown = ", ".join(row.orbits[:3]) + (f" +{len(row.orbits) - 3}" if len(row.orbits) > 3 else "")
    a, b = (f"{share:.1%}" for share in row.sparsity)
    return (row.layer, row.kind, shown, state, *pairs, a if a == b else f"{a} → {b}")


def _lowered_cells(row: LoweredLayer, timed: Sequence[str]) -> tuple[str, ...]:
    times = [f"{row.microseconds[name]:.1f}" if name in row.microseconds else "" for name in timed]
    return (row.layer, " × ".join(f"{n:,}" for n in row.shape), f"{row.sparsity:.1%}", row.runs, *times, row.reason)


def _summary(rows: Sequence[LoweredLayer]) -> Iterator[str]:
    """Say how many layers are computed by what, and what was measured of them all together."""
    if not rows:
        return
    runs = Counter(row.runs for row in rows)
    yield f"Of {len(rows)} layers " + ", ".join(f"{count} run {name}" for name, count in runs.most_common()) + "."
    timed = [row.microseconds for row in rows if row.microseconds]
    chosen = sum(row.microseconds.get(row.runs, 0.0) for row in rows)
    if timed:
        floats = sum(times["float"] for times in timed)
        yield f"By themselves, the {len(timed)} that were measured take {chosen:,.0f} µs, in float {floats:,.0f} µs."


def some_of(names: Sequence[str]) -> str:
    """Return the first five names, for a note.

    >>> some_of(["a", "b"]), some_of(list("abcdef"))
    ('a, b', 'a, b, c, d, e …')
    """
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
