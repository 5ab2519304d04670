"""Measure how long calls take, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fxprune.errors import InputError
from fxprune.graph.inputs import Inputs

__all__ = ["Times", "barrier", "check_runs", "measure_latency", "time_in_turn", "with_threads"]


@dataclass(frozen=True)
class Times:
    """Milliseconds of single runs, in the order in which they were taken."""

    milliseconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the runs took longer."""
        return statistics.median(self.milliseconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Half of the runs lie between these two.

        >>> Times((5.0, 1.0, 2.0, 4.0, 3.0)).quartiles
        (2.0, 4.0)
        """
        if len(self.milliseconds) == 1:
            return self.milliseconds * 2
        lower, _, upper = statistics.quantiles(self.milliseconds, method="inclusive")
        return lower, upper

    @property
    def spread(self) -> float:
        """Distance of the quartiles, as a share of the median."""
        lower, upper = self.quartiles
        return (upper - lower) / self.median if self.median else 0.0


def measure_latency(
    before: nn.Module, after: nn.Module, inputs: Inputs, *, runs: int = 15, warmup: int = 3
) -> tuple[float, float]:
    """Return the median milliseconds of one run of each module.

    Threads are as torch is set, and the modules run in the mode that they are in.

    Raises `InputError` unless `runs` is at least 1.
    """
    calls = {"before": partial(before, *inputs.args, **inputs.kwargs)}
    calls["after"] = partial(after, *inputs.args, **inputs.kwargs)
    times = time_in_turn(calls, runs=runs, warmup=warmup, wait=barrier(inputs))
    return times["before"].median, times["after"].median


@torch.no_grad()
def time_in_turn(
    calls: Mapping[str, Callable[[], Any]],
    *,
    runs: int,
    warmup: int,
    settle: int = 0,
    wait: Callable[[], None] = lambda: None,
) -> dict[str, Times]:
    """Time every call, in alternation, so that a change of the machine's load meets all alike.

    Args:
        calls: what to time, without gradients, by name.
        runs: timed rounds, each call once in each of them.
        warmup: rounds before those, not timed.
        settle: runs of a call right before each timed one: its weights are in the caches again then, as they are
            where nothing else runs, and threads that the call before it left spinning have gone to sleep.
        wait: called before and after each run; it returns when the run's kernels are done (see `barrier`).

    Raises `InputError` unless `runs` is at least 1.
    """
    check_runs(runs, warmup)
    for _ in range(warmup):
        for call in calls.values():
            _milliseconds(call, wait)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            for _ in range(settle):
                call()
            taken[name].append(_milliseconds(call, wait))
    return {name: Times(tuple(milliseconds)) for name, milliseconds in taken.items()}


def check_runs(runs: int, warmup: int) -> None:
    """Raise `InputError` unless there is something to take a median of."""
    if runs < 1:
        raise InputError(f"latency was asked for with {runs} runs; give at least 1")
    if warmup < 0:
        raise InputError(f"latency was asked for with {warmup} runs to warm up; give 0 or more")


def barrier(inputs: Inputs) -> Callable[[], None]:
    """Return what waits for kernels in flight: a GPU works behind the caller's back, a CPU does not."""
    if any(tensor.is_cuda for tensor in inputs.tensors()):
        return torch.cuda.synchronize
    return lambda: None


@contextmanager
def with_threads(count: int) -> Iterator[None]:
    """Let torch compute on so many threads, and on as many as before afterwards. Raises `InputError` below 1."""
    if count < 1:
        raise InputError(f"latency was asked for on {count} threads; give at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _milliseconds(call: Callable[[], Any], wait: Callable[[], None]) -> float:
    wait()
    start = time.perf_counter()
    call()
    wait()
    return (time.perf_counter() - start) * 1000
