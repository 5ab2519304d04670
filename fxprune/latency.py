"""Measure how long two modules take, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from fxprune.errors import InputError
from fxprune.graph.inputs import Inputs

__all__ = ["measure_latency"]


@torch.no_grad()
def measure_latency(
    before: nn.Module, after: nn.Module, inputs: Inputs, *, runs: int = 15, warmup: int = 3
) -> tuple[float, float]:
    """Return the median milliseconds of one run of each module.

    Runs alternate between the two, so that a change of the machine's load meets both alike; threads are as torch is
    set, and the modules run in the mode that they are in.

    Raises `InputError` unless `runs` is at least 1.
    """
    if runs < 1:
        raise InputError(f"latency was asked for with {runs} runs; give at least 1")
    wait = _barrier(inputs)
    for _ in range(warmup):
        _milliseconds(before, inputs, wait)
        _milliseconds(after, inputs, wait)
    pairs = [(_milliseconds(before, inputs, wait), _milliseconds(after, inputs, wait)) for _ in range(runs)]
    first, second = zip(*pairs, strict=True)
    return statistics.median(first), statistics.median(second)


def _barrier(inputs: Inputs) -> Callable[[], None]:
    """Return what waits for kernels in flight: a GPU works behind the caller's back, a CPU does not."""
    if any(tensor.is_cuda for tensor in inputs.tensors()):
        return torch.cuda.synchronize
    return lambda: None


def _milliseconds(module: nn.Module, inputs: Inputs, wait: Callable[[], None]) -> float:
    wait()
    start = time.perf_counter()
    module(*inputs.args, **inputs.kwargs)
    wait()
    return (time.perf_counter() - start) * 1000
