"""All gates of a graph together: the expected cost, how undecided they are, and what they leave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional

from fxprune.budget import Search, Steps
from fxprune.cost import CostModel
from fxprune.errors import TargetError, UsageError
from fxprune.labels.detection import find_orbits
from fxprune.labels.orbits import Orbit
from fxprune.runtime.gates import Gate
from fxprune.runtime.masks import gates_of
from fxprune.selection import unreachable

__all__ = ["Gates"]

_DECIDED = 0.1
"""A gate has decided when its probability is nearer than this to 0 or 1."""


@dataclass(frozen=True)
class _Block:
    """Channels that leave together: their logit, the number of their orbit, and their classes."""

    logit: float
    orbit: int
    classes: Tensor


class Gates:
    """The gates of a graph, and what they say of its channels.

    Raises `UsageError` where there is none.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        found = gates_of(module)
        if not found:
            raise UsageError("the graph has no gates; run mask-insertion{kind=gate} first")
        self.orbits = find_orbits(module)
        costs = CostModel(module, self.orbits)
        self.all_kept = costs.all_kept()
        self.whole = float(costs.macs(self.all_kept))
        self.pairs: list[tuple[Orbit, Gate]] = [(o, found[o.mask]) for o in self.orbits if o.mask in found]
        self._measure = costs.by_width("macs", [orbit for orbit, _ in self.pairs])
        sizes = [[len(block) for block in orbit.classes.split(gate.block)] for orbit, gate in self.pairs]
        self.sizes = torch.tensor([size for row in sizes for size in row], dtype=torch.float64)
        self.owners = torch.arange(len(sizes)).repeat_interleave(torch.tensor([len(row) for row in sizes]))

    def logits(self) -> Tensor:
        """Return the logits of all blocks, orbit by orbit, float64 [blocks] on the CPU, with a gradient."""
        return torch.cat([gate.logits() for _, gate in self.pairs]).cpu().double()

    def expected_macs(self, logits: Tensor) -> Tensor:
        """Return the expected multiply-accumulates, float64 scalar with a gradient (§5.1).

        The cost as a polynomial of widths, on the expected ones. It is the expected cost where the dimensions of a
        product belong to different orbits; of products of an orbit with itself it leaves out the variance of the width,
        which is gone when the gates have decided.
        """
        return self._macs(logits.sigmoid())

    def hard_macs(self, logits: Tensor) -> float:
        """Return the multiply-accumulates of the network that evaluation shows."""
        stays = [gate.stays(part) for (_, gate), part in zip(self.pairs, self.by_orbit(logits), strict=True)]
        return float(self._macs(torch.cat(stays).double()))

    def by_orbit(self, values: Tensor) -> tuple[Tensor, ...]:
        """Split values of all blocks, the last dimension, by orbit."""
        return values.split([gate.units for _, gate in self.pairs], -1)

    def _macs(self, kept: Tensor) -> Tensor:
        """Return the cost where `kept` says how much of every block stays."""
        return self._measure(kept.new_zeros(len(self.pairs)).index_add(0, self.owners, kept * self.sizes))

    def entropy(self, logits: Tensor) -> Tensor:
        """Return the mean entropy of the gates in nats, float64 scalar with a gradient: 0 when all have decided."""
        return functional.binary_cross_entropy_with_logits(logits, logits.sigmoid())

    def undecided(self, logits: Tensor) -> float:
        """Return the share of the blocks whose probability is neither near 0 nor near 1."""
        probabilities = logits.detach().sigmoid()
        return float(((probabilities > _DECIDED) & (probabilities < 1 - _DECIDED)).double().mean())

    def within(self, macs: float) -> dict[str, Tensor]:
        """Return the masks that keep the most within a budget.

        Blocks leave in the order of their logits, whatever orbit they belong to; the best one of every orbit stays.
        The last ones before the budget are rearranged to meet it closely, as those of every selection are.

        Raises `TargetError` when even the best blocks alone cost more.
        """
        rows = sorted(self._removable(), key=lambda row: row.logit)
        orbits = [orbit for orbit, _ in self.pairs]
        ends = torch.tensor([0, *(row.classes.numel() for row in rows)]).cumsum(0).tolist()
        classes = torch.cat([torch.zeros(0, dtype=torch.int64), *(row.classes for row in rows)])
        steps = Steps(classes, ends, [row.orbit for row in rows])
        search = Search(steps, orbits, self._measure)
        if search.cost_of(len(steps)) > macs * (1 + 1e-12):
            raise TargetError(unreachable("macs", f"{macs:,.0f}", search, self.whole, self.orbits, orbits))
        keep = self.all_kept.clone()
        keep[steps.removed_by(search.meet(macs))] = 0
        return {str(orbit.mask): keep[orbit.classes] for orbit in orbits}

    def masks(self) -> dict[str, Tensor]:
        """Return the masks of evaluation."""
        return {str(orbit.mask): gate.mask().cpu() for orbit, gate in self.pairs}

    def _removable(self) -> Iterator[_Block]:
        """Yield every block but the best one of each orbit."""
        for number, (orbit, gate) in enumerate(self.pairs):
            logits = gate.logits().detach().cpu().double()
            best = int(logits.argmax())
            for unit, classes in enumerate(orbit.classes.split(gate.block)):
                if unit != best:
                    yield _Block(float(logits[unit]), number, classes)
