"""The order in which classes would leave, and how far to go for a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.labels.orbits import Orbit

__all__ = ["Search", "Steps", "order_steps"]

_CLOSE = 0.002
"""A budget is met this closely where the granularity of the channels allows."""

_LOOKAHEAD = 64
_BACKTRACK = 6
"""How far the last steps before a budget are rearranged to meet it."""

_NONE = torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class Steps:
    """Removals in order: step i removes `classes[ends[i] : ends[i + 1]]` from orbit number `orbit[i]`."""

    classes: Tensor
    ends: list[int]
    orbit: list[int]

    def __len__(self) -> int:
        return len(self.orbit)

    def removed_by(self, taken: Sequence[int]) -> Tensor:
        """Return the classes that some of the steps remove."""
        starts, ends = torch.tensor(self.ends[:-1]), torch.tensor(self.ends[1:])
        mask = torch.zeros(len(self), dtype=torch.bool)
        mask[list(taken)] = True
        return self.classes[mask.repeat_interleave(ends - starts)]


def order_steps(orbits: Sequence[Orbit], scores: Mapping[str, Tensor], widths: Sequence[Tensor], scope: str) -> Steps:
    """Put the removals of all orbits into one order.

    Each step takes an orbit from one of its allowed `widths` (descending) to the next, least important classes first.
    Steps come by the fraction of their orbit that is gone ("uniform") or by the mean score of what they remove
    ("global").
    """
    keys, sizes, owners, classes = [torch.zeros(0)], [_NONE], [_NONE], [_NONE]
    for i, (orbit, allowed) in enumerate(zip(orbits, widths, strict=True)):
        order = scores[orbit.name].argsort(stable=True)
        gone = orbit.width - allowed
        totals = torch.cat([torch.zeros(1), scores[orbit.name][order].cumsum(0)])[gone]
        if scope == "global":
            # Within an orbit keys never fall, so that a prefix of all steps is a prefix of each orbit's.
            keys.append((totals.diff() / gone.diff()).cummax(0).values if len(gone) > 1 else totals[:0])
        else:
            keys.append(gone[1:] / orbit.width)
        sizes.append(gone.diff())
        owners.append(torch.full_like(gone[1:], i))
        classes.append(orbit.classes[order[: int(gone[-1])]])
    size = torch.cat(sizes)
    order = torch.cat(keys).argsort(stable=True)
    step_of_class = torch.arange(size.numel()).repeat_interleave(size)
    return Steps(
        torch.cat(classes)[order.argsort()[step_of_class].argsort(stable=True)],
        [0, *size[order].cumsum(0).tolist()],
        torch.cat(owners)[order].tolist(),
    )


class Search:
    """Finds the shortest prefix of steps whose cost is within a budget.

    `measure` is the cost as a function of the widths that the orbits keep, float64 [orbits].
    """

    def __init__(self, steps: Steps, orbits: Sequence[Orbit], measure: Callable[[Tensor], Tensor]) -> None:
        self.steps = steps
        self.measure = measure
        self.widths = torch.tensor([orbit.width for orbit in orbits], dtype=torch.float64)
        self.owner = torch.tensor(steps.orbit, dtype=torch.int64)
        self.sizes = torch.tensor(steps.ends).diff().double()

    def after(self, count: int) -> Tensor:
        """Return the widths that are kept after the first `count` steps."""
        return self.widths.index_add(0, self.owner[:count], -self.sizes[:count])

    def cost_of(self, count: int) -> float:
        """Return the cost after the first `count` steps."""
        return float(self.measure(self.after(count)))

    def meet(self, amount: float) -> list[int]:
        """Return the steps to take for the largest cost within `amount`."""
        low, high = 0, len(self.steps)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.cost_of(middle) <= amount else (middle + 1, high)
        best, cost = list(range(low)), self.cost_of(low)
        for back in range(1, min(low, _BACKTRACK) + 1):
            if cost >= amount * (1 - _CLOSE):
                break
            best, cost = self._finer(low - back, amount, best, cost)
        return best

    def _finer(self, without: int, amount: float, best: list[int], cost: float) -> tuple[list[int], float]:
        """Leave out the step `without` and its orbit, and look for later ones that come closer to the budget.

        Steps that stay above the budget are taken; of those that cross it, the one that lands highest is kept.
        """
        taken, widths = list(range(without)), self.after(without)
        skipped = {self.steps.orbit[without]}
        for i in range(without + 1, min(without + _LOOKAHEAD, len(self.steps))):
            if self.steps.orbit[i] in skipped:
                continue
            narrower = widths.clone()
            narrower[self.steps.orbit[i]] -= self.sizes[i]
            found = float(self.measure(narrower))
            if found > amount:
                taken, widths = [*taken, i], narrower
                continue
            skipped.add(self.steps.orbit[i])
            if found > cost:
                best, cost = [*taken, i], found
        return best, cost
