"""MACs and parameters as exact functions of what is kept, from labels.

Every contraction and every parameter is a product of dimension sizes; a labelled size is the number of kept classes
in it. So a cost is a multilinear function of the keep-vector: on zeros and ones it is the cost after surgery, on
probabilities the differentiable expected cost of paper 001, §5.1. One MAC is one multiply-accumulate, two of
`torch.utils.flop_counter`'s FLOPs; the papers' "FLOPs" are MACs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from fxprune.graph.shapes import input_pixels
from fxprune.labels.flow import Term
from fxprune.labels.orbits import Orbit, Orbits

__all__ = ["Cost", "CostModel"]


@dataclass(frozen=True)
class Cost:
    """What a model costs: multiply-accumulates of one run on the example inputs, and parameters."""

    macs: int
    parameters: int
    kfpp: float
    """Thousand MACs per input pixel (paper 001)."""


class _Products:
    """A sum of products of label sizes, evaluated for any keep-vector over classes."""

    def __init__(self, terms: Sequence[Term], of_slot: Tensor) -> None:
        self.coefficients = torch.tensor([t.coefficient for t in terms], dtype=torch.float64)
        rows: dict[bytes, int] = {}
        held: list[Tensor] = []
        # factors[t, k] is the row of the k-th label of term t; the row after the last is the constant 1.
        factors: list[list[int]] = []
        for term in terms:
            factors.append([])
            for label in term.labels:
                classes = of_slot[label]
                row = rows.setdefault(classes.numpy().tobytes(), len(rows))
                if row == len(held):
                    held.append(classes)
                factors[-1].append(row)
        self.size = len(held)
        order = max(map(len, factors), default=0)
        self.factors = torch.tensor([f + [self.size] * (order - len(f)) for f in factors], dtype=torch.int64).view(
            len(terms), order
        )
        self.rows = torch.arange(self.size).repeat_interleave(torch.tensor([len(h) for h in held], dtype=torch.int64))
        self.classes = torch.cat([torch.zeros(0, dtype=torch.int64), *held])

    def each(self, keep: Tensor) -> Tensor:
        """float64 [terms]: every product under `keep` float64 [classes]; differentiable in `keep`."""
        return self._multiply(keep.new_zeros(self.size).index_add(0, self.rows, keep[self.classes]))

    def _multiply(self, sizes: Tensor) -> Tensor:
        sizes = torch.cat([sizes, sizes.new_ones(1)])
        return self.coefficients.to(sizes.device) * sizes[self.factors].prod(1)

    def by_width(self, orbits: Sequence[Orbit], count: int) -> Callable[[Tensor], Tensor]:
        """Return the sum as a function of the kept widths of `orbits`, float64 [orbits], all else being kept.

        The classes of an orbit occur equally often in every label, so that its width says all.
        """
        owner = torch.full((count,), len(orbits))
        for i, orbit in enumerate(orbits):
            owner[orbit.classes] = i
        table = torch.zeros(self.size, len(orbits) + 1, dtype=torch.float64)
        places = self.rows * (len(orbits) + 1) + owner[self.classes]
        table.view(-1).index_add_(0, places, torch.ones(len(places), dtype=torch.float64))
        rest = table[:, -1]
        per_class = table[:, :-1] / torch.tensor([orbit.width for orbit in orbits], dtype=torch.float64)
        return lambda widths: self._multiply(rest + per_class @ widths).sum()


class CostModel:
    """Costs of a graph as functions of a keep-vector over the classes of its orbits' partition."""

    def __init__(self, module: fx.GraphModule, orbits: Orbits) -> None:
        labelling = orbits.labelling
        self.orbits = orbits
        self.pixels = input_pixels(module)
        self.nodes = [t.node for t in labelling.flow.macs]

    @cached_property
    def _macs(self) -> _Products:
        labelling = self.orbits.labelling
        return _Products(labelling.flow.macs, labelling.partition.of_slot)

    @cached_property
    def _parameters(self) -> _Products:
        return _Products(list(_parameter_terms(self.orbits)), self.orbits.labelling.partition.of_slot)

    def all_kept(self) -> Tensor:
        """float64 [classes] of ones."""
        return torch.ones(self.orbits.labelling.partition.count, dtype=torch.float64)

    def macs(self, keep: Tensor) -> Tensor:
        """Multiply-accumulates (float64 scalar) for keep-masks or probabilities float64 [classes]."""
        return self._macs.each(keep).sum()

    def parameters(self, keep: Tensor) -> Tensor:
        """Number of parameters (float64 scalar) for keep-masks or probabilities float64 [classes]."""
        return self._parameters.each(keep).sum()

    def by_width(self, what: str, orbits: Sequence[Orbit]) -> Callable[[Tensor], Tensor]:
        """Return "macs" or "parameters" (float64 scalar) as a function of the kept widths of `orbits`.

        The function takes float64 [orbits], expected widths as well as counted ones, and is differentiable.
        """
        products = self._macs if what == "macs" else self._parameters
        return products.by_width(orbits, self.orbits.labelling.partition.count)

    def macs_by_node(self, keep: Tensor) -> dict[str, int]:
        """Multiply-accumulates of every node that has any."""
        totals: dict[str, int] = {}
        for node, macs in zip(self.nodes, self._macs.each(keep).tolist(), strict=True):
            totals[node] = totals.get(node, 0) + round(macs)
        return totals

    def cost(self, keep: Tensor | None = None) -> Cost:
        """Return all costs under a 0/1 keep-vector, of the whole graph by default."""
        keep = self.all_kept() if keep is None else keep
        macs = round(float(self.macs(keep)))
        return Cost(macs, round(float(self.parameters(keep))), macs / self.pixels / 1000)


def _parameter_terms(orbits: Orbits) -> Iterable[Term]:
    for tensor in orbits.labelling.flow.slots.tensors:
        if not tensor.is_parameter:
            continue
        # Kernel taps and other small unprunable dimensions are constants; the rest is looked up by slot.
        labels = tuple(
            torch.arange(start, start + size)
            for start, size in zip(tensor.starts, tensor.shape, strict=True)
            if size > 1
        )
        yield Term(math.prod(s for s in tensor.shape if s <= 1), labels, tensor.name)
