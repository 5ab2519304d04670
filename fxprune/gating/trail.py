"""How gates came to decide: their probabilities while they learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["GateTrail"]


@dataclass(frozen=True)
class GateTrail:
    """What the gates of a graph said, again and again in training.

    Attributes:
        steps: the optimizer steps at which they were looked at, ascending.
        probabilities: orbit → float32 [len(steps), blocks], how probable each block of channels was to stay.
        macs: the expected share of the multiply-accumulates at each of the steps, in [0, 1].
        layers: orbit → the layers that make its channels.
    """

    steps: tuple[int, ...]
    probabilities: Mapping[str, Tensor]
    macs: tuple[float, ...]
    layers: Mapping[str, tuple[str, ...]]
