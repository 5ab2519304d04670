"""Ranges of values, as data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fxprune.errors import PlanError
from fxprune.runtime.int8 import Affine
from fxprune.runtime.int8.affine import LEVELS

__all__ = ["Range", "Ranges"]

_SMALLEST_SCALE = 1e-30
"""A step whose inverse float32 holds; what is smaller is zero."""


@dataclass(frozen=True)
class Range:
    """The smallest and the largest value that uint8 levels shall tell apart.

    >>> Range(-64.0, 63.5).affine, Range(2.0, 255.0).affine
    (Affine(scale=0.5, zero_point=128), Affine(scale=1.0, zero_point=0))
    """

    low: float
    high: float

    @property
    def affine(self) -> Affine:
        """The quantisation to 256 levels; one of them is zero, also where the range leaves it out."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if low == high:
            return Affine(1.0, 0)
        scale = max((high - low) / LEVELS, _SMALLEST_SCALE)
        return Affine(scale, min(round(-low / scale), LEVELS))


@dataclass(frozen=True)
class Ranges:
    """The ranges of a graph's values by the names of their nodes, and the observer that found them."""

    observer: str
    by_name: Mapping[str, Range]

    def as_rows(self) -> list[dict[str, Any]]:
        """Return the ranges as JSON has them; `of_rows` is the inverse."""
        return [{"value": name, "low": found.low, "high": found.high} for name, found in self.by_name.items()]

    @staticmethod
    def of_rows(observer: str, rows: Iterable[Mapping[str, Any]]) -> Ranges:
        """Read what `as_rows` gave.

        Raises `PlanError` for a row that is no range.

        >>> rows = [{"value": "relu", "low": 0.0, "high": 6.0}]
        >>> Ranges.of_rows("min-max", rows).as_rows() == rows
        True
        """
        return Ranges(observer, dict(_read(row) for row in rows))


def _read(row: Mapping[str, Any]) -> tuple[str, Range]:
    try:
        name, low, high = str(row["value"]), float(row["low"]), float(row["high"])
    except (KeyError, TypeError, ValueError):
        raise PlanError(f"{row!r} is no range; write {{'value': name, 'low': number, 'high': number}}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise PlanError(f"the range of '{name}' is {low} … {high}; give finite numbers, the lower one first")
    return name, Range(low, high)
