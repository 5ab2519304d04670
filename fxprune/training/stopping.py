"""When to stop early, and which epoch was best.

The FBNetV3 paper (§3.2) stops fine-tuning by "a smoothed validation loss … after a convergence tolerance (0.01%) is
reached between two consecutive epochs". Where it is silent, this is ours:

1. The smoothing is exponential: s₁ = v₁ and s_t = smoothing · s_{t−1} + (1 − smoothing) · v_t, for the validation loss
   v_t of epoch t. With the default of 0.9 the noise of one epoch moves s by a tenth of itself.
2. The tolerance is relative, and a loss that grows has converged too: stop after epoch t ≥ 2 when
   s_{t−1} − s_t ≤ tolerance · |s_{t−1}|. With a tolerance of 0 training goes on for as long as s falls at all.
3. Hooks' penalties are no part of v.
"""

from __future__ import annotations

from collections.abc import Sequence

from fxprune.training.history import Record

__all__ = ["best_epoch", "has_converged", "smoothed"]


def smoothed(records: Sequence[Record], loss: float, smoothing: float) -> float:
    """Return the smoothed validation loss after an epoch of validation loss `loss` that follows `records`."""
    previous = records[-1].smoothed_loss if records else None
    return loss if previous is None else smoothing * previous + (1 - smoothing) * loss


def has_converged(records: Sequence[Record], tolerance: float | None) -> bool:
    """Say whether the smoothed loss has ceased to fall by more than the tolerance; never where there is none."""
    last = [record.smoothed_loss for record in records[-2:]]
    if tolerance is None or len(last) < 2:
        return False
    before, now = last
    return before is not None and now is not None and before - now <= tolerance * abs(before)


def best_epoch(records: Sequence[Record]) -> int | None:
    """Return the first epoch with the lowest validation loss; None without validation."""
    measured = [record for record in records if record.measures]
    return min(measured, key=lambda record: record.measures["loss"]).epoch if measured else None
