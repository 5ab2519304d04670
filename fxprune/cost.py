"""MACs and parameters as exact functions of what is kept, from labels.

Every contraction and every parameter is a product of dimension sizes; a labelled size is the number of kept classes
in it. So a cost is a multilinear function of the keep-vector: on zeros and ones it is the cost after surgery, on
probabilities the differentiable expected cost of paper 001, §5.1. One MAC is one multiply-accumulate, two of
`torch.utils.flop_counter`'s FLOPs; the papers' "FLOPs" are MACs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from fxprune.graph.shapes import input_pixels
from fxprune.labels.flow import Term
from fxprune.labels.orbits import Orbits

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
        distinct: dict[int, tuple[int, Tensor]] = {}
        for term in terms:
            for label in term.labels:
                distinct.setdefault(id(label), (len(distinct), label))
        self.rows = torch.cat(
            [torch.full((label.numel(),), row) for row, label in distinct.values()]
            or [torch.zeros(0, dtype=torch.int64)]
        )
        self.classes = of_slot[
            torch.cat([label for _, label in distinct.values()] or [torch.zeros(0, dtype=torch.int64)])
        ]
        self.size = len(distinct)
        # factors[t, k] is the row of the k-th label of term t; row `size` is the constant 1.
        order = max((len(t.labels) for t in terms), default=0)
        self.factors = torch.full((len(terms), order), self.size)
        for i, term in enumerate(terms):
            for k, label in enumerate(term.labels):
                self.factors[i, k] = distinct[id(label)][0]

    def each(self, keep: Tensor) -> Tensor:
        """float64 [terms]: every product under `keep` float64 [classes]; differentiable in `keep`."""
        sizes = keep.new_zeros(self.size).index_add(0, self.rows, keep[self.classes])
        sizes = torch.cat([sizes, keep.new_ones(1)])
        return self.coefficients.to(keep.device) * sizes[self.factors].prod(1)


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
