"""The state that propagation builds: slots, unions, pins and costs, in the words that rules speak.

A *slot* is one position of one dimension of a parameter or buffer. A *label* is a vector of slots, one for each
position of a tensor's dimension, or None where nothing can be pruned (batch, space, tokens). Rules state facts about
labels: `unite`, `pin`, `mark_statistical`, `absorb`, `count_macs`. Nothing is decided while labels flow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = [
    "Absorption",
    "Choice",
    "Flow",
    "Label",
    "Labelled",
    "Labels",
    "Reason",
    "SlotTable",
    "TensorSlots",
    "Term",
]

Label = Tensor | None
"""int64 [positions], or None for a dimension of which nothing can be pruned."""

Labels = tuple[Label, ...]
"""One label for each dimension of a tensor."""

Choice = tuple[int, str, int]
"""Where a reshape must choose which of several dimensions keeps its label: number of the operator in the run, "merge"
or "divide", and the first of the dimensions."""


@dataclass(frozen=True)
class Labelled:
    """One tensor value of a node: its size and its labels."""

    shape: tuple[int, ...]
    labels: Labels


@dataclass(frozen=True)
class Reason:
    """Why slots are pinned or statistical: at which node, by which ATen operator, in words."""

    node: str
    operator: str
    text: str

    def __str__(self) -> str:
        return f"{self.text} ({self.operator} at {self.node})"


@dataclass(frozen=True)
class TensorSlots:
    """Where the slots of one parameter or buffer lie: dimension d has `shape[d]` slots from `starts[d]` on."""

    name: str
    shape: tuple[int, ...]
    starts: tuple[int, ...]
    is_parameter: bool

    def labels(self) -> Labels:
        """Return the slots of every dimension."""
        return tuple(torch.arange(start, start + size) for start, size in zip(self.starts, self.shape, strict=True))


class SlotTable:
    """Gives every position of every dimension of every floating parameter and buffer a slot.

    Tied tensors (one object under several names) have one set of slots, under the first name.
    """

    def __init__(self) -> None:
        self.tensors: list[TensorSlots] = []
        self.count = 0
        self._fresh: list[tuple[int, int]] = []

    def add(self, name: str, shape: Sequence[int], *, is_parameter: bool) -> TensorSlots:
        """Give slots to a tensor of `shape`."""
        starts = []
        for size in shape:
            starts.append(self.count)
            self.count += size
        slots = TensorSlots(name, tuple(shape), tuple(starts), is_parameter)
        self.tensors.append(slots)
        return slots

    def fresh(self, size: int) -> Tensor:
        """Return `size` new slots that belong to no tensor: constants that the graph itself makes."""
        self.count += size
        self._fresh.append((self.count - size, self.count))
        return torch.arange(self.count - size, self.count)

    def is_fresh(self, label: Tensor) -> bool:
        """Whether every slot of a label was made by `fresh`, so that removing its positions costs nothing.

        >>> table = SlotTable()
        >>> _ = table.add("weight", [2], is_parameter=True)
        >>> made = table.fresh(2)
        >>> _ = table.add("bias", [2], is_parameter=True)
        >>> table.is_fresh(made.flip(0)), table.is_fresh(torch.tensor([1, 2])), table.is_fresh(torch.tensor([3, 4]))
        (True, False, False)
        """
        starts, ends = torch.tensor(self._fresh or [(0, 0)]).t().contiguous()
        place = torch.searchsorted(starts, label, right=True) - 1
        return bool(((place >= 0) & (label < ends[place])).all())


@dataclass(frozen=True)
class Term:
    """One product of a cost: `coefficient` × the number of kept positions of every label."""

    coefficient: int
    labels: tuple[Tensor, ...]
    node: str


@dataclass(frozen=True)
class Absorption:
    """Node `node` sums over `label`, reading the value of its input node `source`."""

    label: Tensor
    node: str
    source: str


@dataclass
class Flow:
    """Facts gathered in one propagation; `node`, `operator` and `step` say where the interpreter is.

    `axes` are decisions: which of the dimensions that a reshape divides or merges keeps its label. Where it is None the
    propagation is a probe: every axis of a divided dimension gets slots of its own, so that it can be followed.
    """

    axes: Mapping[Choice, int] | None = field(default_factory=dict)
    slots: SlotTable = field(default_factory=SlotTable)
    node: str = ""
    operator: str = ""
    step: int = 0
    choices: dict[Choice, Labels] = field(default_factory=dict)
    """Labels of the dimensions among which a reshape chose, None for those that lost theirs."""
    products: list[tuple[Labels, Labels]] = field(default_factory=list)
    """Labels of both operands of every matrix product of two activations."""
    unions: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    pins: list[tuple[Tensor, Reason]] = field(default_factory=list)
    statistics: list[tuple[Tensor, Reason]] = field(default_factory=list)
    absorbed: list[Absorption] = field(default_factory=list)
    macs: list[Term] = field(default_factory=list)
    roles: dict[int, str] = field(default_factory=dict)
    """First slot of a label → the part it plays: `output` or `input` of a weight, `scale` of a batch norm."""

    def _reason(self, text: str) -> Reason:
        return Reason(self.node, self.operator, text)

    def unite(self, a: Label, b: Label) -> Label:
        """State that equal positions of two equally long labels are kept or removed together; return their label.

        A None is a dimension that must stay whole: it pins the other.
        """
        if a is None or b is None:
            self.pin(a if b is None else b, "joined with a dimension that cannot be pruned")
            return None
        if a is not b:
            self.unions.append((a, b))
        return a

    def unite_rows(self, rows: Tensor) -> None:
        """State that each row of a [classes, members] table of slots is kept or removed together."""
        if rows.shape[1] > 1:
            self.unions.append((rows[:, :1].expand(-1, rows.shape[1] - 1).reshape(-1), rows[:, 1:].reshape(-1)))

    def choose(self, choice: Choice, labels: Sequence[Label], best: int) -> int:
        """Return which of several dimensions keeps its label, as it must be one: the one decided on, else `best`."""
        axis = best if self.axes is None else self.axes.get(choice, best)
        axis = best if labels[axis] is None else axis
        self.choices[choice] = tuple(label if d == axis or self.is_probe else None for d, label in enumerate(labels))
        return axis

    def divide(self, dim: int, ways: Sequence[Tensor], best: int) -> Labels:
        """State that the current operator divides a labelled dimension; return the labels of dimensions `dim` on.

        Row i of `ways[d]` are the slots at position i of axis d. The kept positions must stay a rectangle, so one axis
        keeps the label, and the slots of each of its rows unite. A probe gives every axis slots of its own.
        """
        labels: Labels = tuple(rows[:, 0] for rows in ways)
        if self.is_probe:
            labels = self.slots.add(self.node, [rows.shape[0] for rows in ways], is_parameter=False).labels()
        axis = self.choose((self.step, "divide", dim), labels, best)
        if not self.is_probe:
            self.unite_rows(ways[axis])
        return self.choices[self.step, "divide", dim]

    @property
    def is_probe(self) -> bool:
        """Whether no axis loses its label."""
        return self.axes is None

    def pin(self, label: Label, text: str) -> None:
        """State that no position of `label` may be removed, and why."""
        if label is not None:
            self.pins.append((label, self._reason(text)))

    def mark_statistical(self, label: Label, text: str) -> None:
        """State that removing a position of `label` changes the statistics of the others."""
        if label is not None:
            self.statistics.append((label, self._reason(text)))

    def absorb(self, label: Label, source: str) -> None:
        """State that the current node sums over `label` of its input `source`: a zero there equals a removal."""
        if label is not None:
            self.absorbed.append(Absorption(label, self.node, source))

    def play(self, label: Label, role: str) -> None:
        """State which part a dimension of a parameter plays; scores are taken by it."""
        if label is not None:
            self.roles.setdefault(int(label[0]), role)

    def count_macs(self, coefficient: int, *labels: tuple[Label, int]) -> None:
        """Count `coefficient` × the product of the label lengths as multiply-accumulates of the current node.

        Each label comes with its length, which is a constant factor where the label is None.
        """
        known = []
        for label, size in labels:
            if label is None:
                coefficient *= size
            else:
                known.append(label)
        if coefficient:
            self.macs.append(Term(coefficient, tuple(known), self.node))

    def recount_macs(self, total: int) -> None:
        """Count `total` for the current node instead of what was counted before it was found to defeat propagation."""
        while self.macs and self.macs[-1].node == self.node:
            self.macs.pop()
        self.count_macs(total)
