"""Schedules: which part of the final sparsity is reached at which part of the way."""

from __future__ import annotations

from collections.abc import Callable

from fxprune.errors import SpecError, nearest

__all__ = ["SCHEDULES", "Schedule", "find_schedule"]

Schedule = Callable[[float], float]
"""Part of the way, in [0, 1] → part of what shall be removed in the end, in [0, 1] and never falling."""

SCHEDULES: dict[str, Schedule] = {
    "one-shot": lambda way: 1.0,  # noqa: ARG005
    "cubic": lambda way: 1 - (1 - way) ** 3,
    "linear": lambda way: way,
}
"""By name: all at once; from no sparsity by the cubic of Zhu & Gupta 2017, s_f + (s_i − s_f)(1 − t)³; steadily."""


def find_schedule(schedule: str | Schedule) -> Schedule:
    """Return a schedule by name; a callable is one already. Raises `SpecError` with the nearest name.

    >>> find_schedule("cubic")(0.5)
    0.875
    """
    if callable(schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise SpecError(f"unknown schedule '{schedule}'; {nearest(schedule, SCHEDULES)}, or give a function")
    return SCHEDULES[schedule]
