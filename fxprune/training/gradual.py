"""Gradual sparsity: masks that grow while a module trains (Zhu & Gupta 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import SpecError
from fxprune.sparsity.layers import mask_of
from fxprune.sparsity.masks import SparseGraph
from fxprune.sparsity.schedules import Schedule, find_schedule
from fxprune.sparsity.selection import Sparsifier
from fxprune.training.hooks import Hook, Moment

__all__ = ["GradualSparsity"]


class GradualSparsity(Hook):
    """Masks more and more of a graph's weights as a schedule says; what is masked stays masked.

    Every time the least important of the weights as they are then leave, so that the rest can adapt in between.

    Args:
        module: the graph to be trained, with a mask on every layer that shall become sparse, all ones at first
            (`sparsify(…, sparsity=0)` makes them).
        sparsifier: what to reach in the end, and how.
        schedule: a name of `SCHEDULES`, or a function from the part of the way to the part of the amount.
        start: the part of the planned steps at which the way begins.
        end: that at which it ends.
        interval: steps from one growth to the next.

    Raises `SpecError` for options out of range.
    """

    name = "gradual-sparsity"

    def __init__(
        self,
        module: fx.GraphModule,
        sparsifier: Sparsifier,
        schedule: str | Schedule = "cubic",
        start: float = 0.0,
        end: float = 0.75,
        interval: int = 50,
    ) -> None:
        if not 0 <= start < end <= 1:
            raise SpecError(f"the way from start={start} to end={end} is none; give 0 ≤ start < end ≤ 1")
        if interval < 1:
            raise SpecError(f"interval is {interval}; give 1 step or more")
        self.graph = SparseGraph(module)
        self.sparsifier = sparsifier
        self.schedule = find_schedule(schedule)
        self.start, self.end, self.interval, self.reached = start, end, interval, 0.0
        # An unreachable target fails here, before training.
        sparsifier.masks(module, self.graph.layers, self.graph.whole, 0.0)

    def settings(self) -> dict[str, Any]:
        """Return the way and the interval; a schedule that is a function is not told from another."""
        return {name: getattr(self, name) for name in ("start", "end", "interval")}

    def after_step(self, module: nn.Module, moment: Moment) -> None:  # noqa: ARG002
        """Let the masks grow to what the schedule asks for now."""
        way = (moment.fraction - self.start) / (self.end - self.start)
        if way >= 1 or (way >= 0 and moment.step % self.interval == 0):
            wanted = min(self.schedule(min(way, 1.0)), 1.0)
            if wanted > self.reached:
                self._grow(wanted)

    def columns(self, module: nn.Module, moment: Moment) -> Mapping[str, float]:  # noqa: ARG002
        """Return the sparsity of the masked weights."""
        masks = [mask for layer in self.graph.layers if (mask := mask_of(layer)) is not None]
        kept, total = sum(int(mask.count_nonzero()) for mask in masks), sum(mask.numel() for mask in masks)
        return {"sparsity": 1 - kept / max(total, 1)}

    @torch.no_grad()
    def _grow(self, fraction: float) -> None:
        masks = self.sparsifier.masks(self.graph.module, self.graph.layers, self.graph.whole, fraction)
        for layer in self.graph.layers:
            mask = mask_of(layer)
            if layer.name in masks and mask is not None:
                mask.copy_(masks[layer.name])  # in place: the buffer that other processes know
        self.reached = fraction

    def state_dict(self) -> dict[str, Any]:
        """Return how far the masks have grown."""
        return {"reached": self.reached}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.reached = float(state["reached"])
