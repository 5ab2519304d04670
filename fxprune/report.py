"""What a plan does to every layer, as a table, Markdown or JSON."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx

from fxprune.cost import CostModel
from fxprune.graph.facts import trace_facts
from fxprune.labels.detection import find_orbits
from fxprune.labels.flow import Labelled, Reason, TensorSlots
from fxprune.labels.orbits import Orbits
from fxprune.narrowing.kept import Kept, kept_classes

__all__ = ["Cause", "LayerRow", "OutputChannels", "Report", "make_report"]


@dataclass(frozen=True)
class LayerRow:
    """One layer: `channels` are those that it makes, before and after; `state` is prunable, statistical or pinned."""

    layer: str
    kind: str
    orbits: tuple[str, ...]
    state: str
    reason: str
    channels: tuple[int, int]
    macs: tuple[int, int]
    parameters: tuple[int, int]


@dataclass(frozen=True)
class Cause:
    """What an operator costs: how many output channels of layers it binds, and which share of them all."""

    operator: str
    reason: str
    channels: int
    share: float


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

    `macs` are multiply-accumulates of one run on the example inputs, `kfpp` thousands of them per input pixel,
    `latency_ms` medians of a measurement where one was asked for. `pinning` are the operators that pin output channels,
    `statistical` those through which they leave approximately, both by what they cost, the dearest first.
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

    def table(self, style: str = "simple") -> str:
        """Return the layers and totals as text; `style` is any table format of tabulate."""
        header = ["layer", "type", "orbit", "state", "channels", "MACs", "parameters"]
        parts = [tabulate([_cells(row) for row in self.layers], header, style, disable_numparse=True)]
        parts.append(self.totals(style))
        parts.append(self.causes(style))
        return "\n\n".join([*parts, *(f"Note: {note}" for note in self.notes)])

    def causes(self, style: str = "simple") -> str:
        """Return what can leave, and which operators bind the rest, as text."""
        tables = [("pinned by", self.pinning), ("statistical by", self.statistical)]
        shown = [_cause_table(title, causes, style) for title, causes in tables if causes]
        return "\n\n".join([*shown, str(self.outputs)])

    def totals(self, style: str = "simple") -> str:
        """Return the totals as text."""
        rows = [("MACs", *self.macs), ("parameters", *self.parameters), ("kFPP", *self.kfpp)]
        if self.latency_ms is not None:
            rows.append(("latency, ms", *self.latency_ms))
        cells = [(name, _number(a), _number(b), f"{b / a:.1%}" if a else "–") for name, a, b in rows]
        return tabulate(cells, ["", "before", "after", "left"], style, disable_numparse=True, colalign=_TOTALS)

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
        for name, kind in (("layers", LayerRow), ("pinning", Cause), ("statistical", Cause)):
            data[name] = tuple(kind(**row) for row in data[name])
        return Report(**data)


_TOTALS = ("left", "right", "right", "right")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def _cause_table(title: str, causes: Sequence[Cause], style: str) -> str:
    rows = [(cause.operator, cause.reason, f"{cause.channels:,}", f"{cause.share:.1%}") for cause in causes]
    header = [title, "because", "output channels", "share"]
    return tabulate(rows, header, style, disable_numparse=True, colalign=("left", "left", "right", "right"))


def _cells(row: LayerRow) -> Sequence[str]:
    state = row.state if not row.reason else f"{row.state}: {row.reason}"
    pairs = [f"{a:,}" if a == b else f"{a:,} → {b:,}" for a, b in (row.channels, row.macs, row.parameters)]
    shown = ", ".join(row.orbits[:3]) + (f" +{len(row.orbits) - 3}" if len(row.orbits) > 3 else "")
    return (row.layer, row.kind, shown, state, *pairs)


def make_report(module: fx.GraphModule, orbits: Orbits | None = None, kept: Tensor | None = None) -> Report:
    """Report a graph before and after a cut.

    Args:
        module: the graph before the cut, masked or not.
        orbits: its orbits, found anew by default.
        kept: bool [classes], what stays; by default what the masks of the graph keep.
    """
    orbits = find_orbits(module) if orbits is None else orbits
    classes = kept_classes(module, orbits) if kept is None else kept
    costs = CostModel(module, orbits)
    keep = classes.double()
    before, after = costs.cost(), costs.cost(keep)
    macs = (costs.macs_by_node(costs.all_kept()), costs.macs_by_node(keep))
    rows = _Rows(module, orbits, Kept(orbits, classes), macs)
    facts = trace_facts(module)
    notes = [f"'{path}' was not traced into: {reason}" for path, reason in facts.opaque.items()]
    notes += facts.notes
    notes += _approximations(orbits, classes)
    return Report(
        tuple(rows.layers()),
        (before.macs, after.macs),
        (before.parameters, after.parameters),
        (before.kfpp, after.kfpp),
        *_causes(orbits),
        tuple(notes),
    )


def _causes(orbits: Orbits) -> tuple[OutputChannels, tuple[Cause, ...], tuple[Cause, ...]]:
    """Count the output channels of all layers: in total, pinned by operator, and statistical by operator."""
    part, roles = orbits.labelling.partition, orbits.labelling.flow.roles
    places = (c for tensor, dim, c in orbits.places.dimensions if roles.get(tensor.starts[dim]) == "output")
    classes = torch.cat([torch.empty(0, dtype=torch.int64), *places])
    widths = torch.tensor([orbit.width for orbit in orbits] + [0])
    is_free = widths[orbits.of_class[classes]] > 1
    pins, statistics = part.pinned[classes[~is_free]], part.statistical[classes[is_free]]
    total, statistical = classes.numel(), int((statistics >= 0).sum())
    channels = OutputChannels(total - pins.numel() - statistical, statistical, pins.numel())
    alone = Reason("", "–", "leave only all together")
    return (
        channels,
        _counted(pins, [*part.pins, alone], total),
        _counted(statistics[statistics >= 0], part.statistics, total),
    )


def _counted(events: Tensor, reasons: Sequence[Reason], total: int) -> tuple[Cause, ...]:
    """Count events by operator and text, the most frequent first; event −1 is the last of the `reasons`."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for event, count in zip(*(found.tolist() for found in events.unique(return_counts=True)), strict=True):
        counts[reasons[event].operator, reasons[event].text] += count
    causes = (Cause(*key, count, count / total) for key, count in counts.items())
    return tuple(sorted(causes, key=lambda cause: -cause.channels))


def _approximations(orbits: Orbits, classes: Tensor) -> list[str]:
    cut = [o for o in orbits if o.statistical is not None and not bool(classes[o.classes].all())]
    if not cut:
        return []
    names = ", ".join(o.name for o in cut[:5]) + (" …" if len(cut) > 5 else "")
    return [f"{len(cut)} orbits were cut through statistics of their channels and are approximate: {names}"]


class _Rows:
    """Builds the rows of layers that have weights."""

    def __init__(
        self, module: fx.GraphModule, orbits: Orbits, kept: Kept, macs: tuple[dict[str, int], dict[str, int]]
    ) -> None:
        self.module = module
        self.orbits = orbits
        self.kept = kept
        self.macs = macs
        self.tensors = {t.name: t for t in orbits.labelling.flow.slots.tensors}
        self.parameters: dict[str, list[TensorSlots]] = defaultdict(list)
        for tensor in self.tensors.values():
            if tensor.is_parameter:
                self.parameters[tensor.name.rpartition(".")[0]].append(tensor)

    def layers(self) -> list[LayerRow]:
        rows = []
        seen: set[str] = set()
        for node in self.module.graph.nodes:
            weighted = node.op == "call_module" and any(len(t.shape) > 1 for t in self._of_leaf(str(node.target)))
            if weighted or self.macs[0].get(node.name):
                rows.append(self._row(node, first=str(node.target) not in seen))
                seen.add(str(node.target))
        return rows

    def _of_leaf(self, path: str) -> list[TensorSlots]:
        """Return the parameters of a leaf, those of modules inside it included."""
        own = list(self.parameters.get(path, ()))
        if any(True for _ in self.module.get_submodule(path).children()):
            own += [t for owner, held in self.parameters.items() if owner.startswith(f"{path}.") for t in held]
        return own

    def _row(self, node: fx.Node, *, first: bool) -> LayerRow:
        is_module = node.op == "call_module"
        value = self.orbits.labelling.values[node.name]
        label_of, channels = self._channels(value)
        state, reason, names = self._state(label_of)
        return LayerRow(
            layer=str(node.target) if is_module else node.name,
            kind=type(self.module.get_submodule(str(node.target))).__name__
            if is_module
            else str(getattr(node.target, "__name__", node.target)),
            orbits=names,
            state=state,
            reason=reason,
            channels=channels,
            macs=(self.macs[0].get(node.name, 0), self.macs[1].get(node.name, 0)),
            parameters=self._parameters(str(node.target)) if is_module and first else (0, 0),
        )

    def _channels(self, value: Any) -> tuple[Tensor | None, tuple[int, int]]:
        """Return the label of a value's channels (the first labelled dimension, or dimension 1) and its sizes."""
        if not isinstance(value, Labelled):
            return None, (0, 0)
        dim = next((d for d, label in enumerate(value.labels) if label is not None), min(1, len(value.shape) - 1))
        return value.labels[dim], (value.shape[dim], self.kept.shape(value)[dim])

    def _state(self, label: Tensor | None) -> tuple[str, str, tuple[str, ...]]:
        if label is None:
            return "pinned", "nothing of its output is a channel that can leave", ()
        part = self.orbits.labelling.partition
        classes = part.of_slot[label]
        owners = [self.orbits.orbits[i] for i in self.orbits.of_class[classes].unique().tolist() if i >= 0]
        names = tuple(orbit.name for orbit in owners)
        events = part.pinned[classes]
        events = events[events >= 0]
        if not owners:
            return "pinned", str(part.pins[int(events.min())]) if events.numel() else "", names
        statistics = [o.statistical for o in owners if o.statistical is not None]
        if statistics:
            return "statistical", str(statistics[0]), names
        return "prunable", "", names

    def _parameters(self, path: str) -> tuple[int, int]:
        before = after = 0
        for tensor in self._of_leaf(path):
            rows = self.kept.of_tensor(tensor)
            before += math.prod(tensor.shape)
            after += math.prod(s if row is None else row.numel() for s, row in zip(tensor.shape, rows, strict=True))
        return before, after
