"""What a shipped graph needs to behave differently in training and in evaluation."""

from __future__ import annotations

from typing import TypeVar

__all__ = ["by_mode"]

T = TypeVar("T")


def by_mode(training: bool, in_training: T, in_evaluation: T) -> T:
    """Return the second argument in training mode and the third in evaluation."""
    return in_training if training else in_evaluation
