"""What a plan does to every layer of a graph: counts what is there before and after."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from fxprune.cost import CostModel
from fxprune.graph.facts import trace_facts
from fxprune.labels.detection import find_orbits
from fxprune.labels.flow import Labelled, Reason, TensorSlots
from fxprune.labels.orbits import Orbits
from fxprune.narrowing.kept import Kept, kept_classes
from fxprune.report import Cause, LayerRow, OutputChannels, Report, some_of
from fxprune.runtime.weight_masks import kind_of
from fxprune.sparsity.masks import KeptWeights, kept_weights, zeros_by_parameter

__all__ = ["make_report"]


def make_report(
    module: fx.GraphModule,
    orbits: Orbits | None = None,
    kept: Tensor | None = None,
    after: fx.GraphModule | None = None,
) -> Report:
    """Report a graph before and after a cut, and before and after weights were masked.

    Args:
        module: the graph before the cut, masked or not.
        orbits: its orbits, found anew by default.
        kept: bool [classes], what stays; by default what the masks of the graph keep.
        after: the graph whose weight masks count for what is left; by default `module`.
    """
    orbits = find_orbits(module) if orbits is None else orbits
    classes = kept_classes(module, orbits) if kept is None else kept
    costs = CostModel(module, orbits)
    keep = classes.double()
    sides = _Side.of(costs, costs.all_kept(), module), _Side.of(costs, keep, module if after is None else after)
    rows = _Rows(module, orbits, Kept(orbits, classes), sides)
    facts = trace_facts(module)
    notes = [f"'{path}' was not traced into: {reason}" for path, reason in facts.opaque.items()]
    notes += facts.notes
    notes += _approximations(orbits, classes)
    notes += _emptied(sides[1])
    return Report(
        tuple(rows.layers()),
        _pair(sides, lambda side: sum(side.macs.values())),
        _pair(sides, lambda side: side.parameters),
        _pair(sides, lambda side: sum(side.macs.values()) / costs.pixels / 1000),
        *_causes(orbits),
        tuple(notes),
        sparsity=_pair(sides, lambda side: side.sparsity),
    )


@dataclass(frozen=True)
class _Side:
    """What a graph costs before or after: no masked weight counts.

    `masked` is what masks keep by node, `zeros` what they zero by parameter, `empty` the layers that they leave none.
    """

    macs: dict[str, int]
    parameters: int
    sparsity: float
    masked: dict[str, KeptWeights]
    zeros: dict[str, int]
    empty: tuple[str, ...]

    @staticmethod
    def of(costs: CostModel, keep: Tensor, module: fx.GraphModule) -> _Side:
        """Count what the kept classes cost, without the weights that the masks of `module` zero."""
        found = kept_weights(module)
        masked = {node: weights for layer, weights in found for node in layer.nodes}
        dense = costs.macs_by_node(keep)
        macs = {node: masked[node].of(count) if node in masked else count for node, count in dense.items()}
        parameters = costs.cost(keep).parameters
        zeros = sum(weights.zeros for _, weights in found)
        empty = tuple(layer.name for layer, weights in found if not weights.count)
        by_name = zeros_by_parameter(module, found)
        return _Side(macs, parameters - zeros, zeros / max(parameters, 1), masked, by_name, empty)


_T = TypeVar("_T")


def _pair(sides: tuple[_Side, _Side], read: Callable[[_Side], _T]) -> tuple[_T, _T]:
    return read(sides[0]), read(sides[1])


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
    names = some_of([orbit.name for orbit in cut])
    return [f"{len(cut)} orbits were cut through statistics of their channels and are approximate: {names}"]


def _emptied(side: _Side) -> list[str]:
    """Say which layers have no weight left."""
    return [f"layers with no weight left give the same for every input: {some_of(side.empty)}"] if side.empty else []


class _Rows:
    """Builds the rows of layers that have weights."""

    def __init__(self, module: fx.GraphModule, orbits: Orbits, kept: Kept, sides: tuple[_Side, _Side]) -> None:
        self.module = module
        self.orbits = orbits
        self.kept = kept
        self.sides = sides
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
            if weighted or self.sides[0].macs.get(node.name):
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
            kind=kind_of(self.module.get_submodule(str(node.target)))
            if is_module
            else str(getattr(node.target, "__name__", node.target)),
            orbits=names,
            state=state,
            reason=reason,
            channels=channels,
            macs=_pair(self.sides, lambda side: side.macs.get(node.name, 0)),
            parameters=self._parameters(node) if is_module and first else (0, 0),
            sparsity=_pair(
                self.sides, lambda side: side.masked[node.name].sparsity if node.name in side.masked else 0.0
            ),
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

    def _parameters(self, node: fx.Node) -> tuple[int, int]:
        before = after = 0
        for tensor in self._of_leaf(str(node.target)):
            rows = self.kept.of_tensor(tensor)
            zeros = _pair(self.sides, lambda side, name=tensor.name: side.zeros.get(name, 0))  # type: ignore[misc]
            before += math.prod(tensor.shape) - zeros[0]
            sizes = (s if row is None else row.numel() for s, row in zip(tensor.shape, rows, strict=True))
            after += math.prod(sizes) - zeros[1]
        return before, after
