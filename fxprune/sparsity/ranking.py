"""How many of the least important blocks of several layers to take for an amount: a weighted selection without sorting.

Scores are float32 ≥ 0, whose bits order as they do. The cost of all blocks up to a score is a sum of histograms over
the leading bits; refining the histogram three times, each within the bin where the amount is reached, finds the exact
score of the last block. Blocks of equal score leave in the order of layers, and of positions within a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Ranked", "take_least"]

_KEY_BITS = 31
_LEVELS = ((20, 11), (10, 10), (0, 10))
"""(shift, bits) of each refinement of the bits of a score."""

_SLACK = 1e-9
"""Relative room for rounding in sums of costs."""


@dataclass(frozen=True)
class Ranked:
    """The blocks of one layer.

    Attributes:
        scores: returns them, float32 [blocks] ≥ +0, the least important lowest; asked for anew whenever they are
            needed, so that the scores of a whole model never are in memory together.
        costs: of the blocks, float64 [blocks] or one number for all.
        total: cost of all blocks.
        limit: the largest cost that may be taken.
    """

    scores: Callable[[], Tensor]
    costs: Tensor | float
    total: float
    limit: float

    def keys(self) -> Tensor:
        """Return int32 [blocks] that order as the scores do."""
        return self.scores().view(torch.int32)

    def costs_of(self, blocks: Tensor) -> Tensor:
        """Return the costs of some blocks, float64, by their numbers int64."""
        if isinstance(self.costs, Tensor):
            return self.costs[blocks]
        return torch.full(blocks.shape, self.costs, dtype=torch.float64)

    def histogram(self, bins: Tensor, chosen: Tensor | slice, count: int) -> Tensor:
        """Return the cost of the chosen blocks by bin, float64 [count]."""
        if isinstance(self.costs, Tensor):
            return torch.bincount(bins, self.costs[chosen], minlength=count)
        return torch.bincount(bins, minlength=count).double() * self.costs


def take_least(layers: Sequence[Ranked], amount: float) -> list[Tensor]:
    """Return for each layer which blocks to take, bool [blocks]: the lowest scores of all, together worth `amount`.

    No shorter prefix of them is worth `amount`; their sum is less only where all limits are reached.
    """
    if not layers:
        return []
    limits = torch.tensor([layer.limit * (1 + _SLACK) for layer in layers], dtype=torch.float64)
    amount = min(amount, sum(layer.limit for layer in layers)) * (1 - _SLACK)
    prefix = 0
    below = torch.zeros(len(layers), dtype=torch.float64)
    for shift, bits in _LEVELS:
        by_bin = torch.stack([_refine(layer, prefix, shift, bits) for layer in layers])
        reached = torch.minimum(below[:, None] + by_bin.cumsum(1), limits[:, None]).sum(0)
        place = min(int((reached < amount).sum()), len(reached) - 1)
        below += by_bin[:, :place].sum(1)
        prefix = (prefix << bits) | place
    return _take(layers, prefix, below, limits, amount)


def _refine(layer: Ranked, prefix: int, shift: int, bits: int) -> Tensor:
    """Return the costs of the blocks whose bits above these are `prefix`, by these `bits`."""
    keys = layer.keys()
    if shift + bits == _KEY_BITS:
        return layer.histogram(keys >> shift, slice(None), 1 << bits)
    chosen = (keys >> (shift + bits)) == prefix
    return layer.histogram((keys[chosen] >> shift) & ((1 << bits) - 1), chosen, 1 << bits)


def _take(layers: Sequence[Ranked], key: int, below: Tensor, limits: Tensor, amount: float) -> list[Tensor]:
    """Take every block below a key, and as many of those at it as are still needed."""
    rest = amount - float(torch.minimum(below, limits).sum())
    taken = []
    for layer, cost, limit in zip(layers, below.tolist(), limits.tolist(), strict=True):
        keys = layer.keys()
        if cost > limit:
            taken.append(_within(layer, keys, limit))
            continue
        mask = keys < key
        ties = (keys == key).nonzero().squeeze(1)
        costs = layer.costs_of(ties)
        spent = costs.cumsum(0)
        count = int((spent - costs < rest).sum()) if rest > 0 else 0
        count = min(count, int((cost + spent <= limit).sum()))
        mask[ties[:count]] = True
        rest -= float(spent[count - 1]) if count else 0.0
        taken.append(mask)
    return taken


def _within(layer: Ranked, keys: Tensor, limit: float) -> Tensor:
    """Take the lowest blocks of one layer as far as its limit goes."""
    order = keys.argsort(stable=True)
    mask = torch.zeros(len(keys), dtype=torch.bool)
    mask[order[layer.costs_of(order).cumsum(0) <= limit]] = True
    return mask
