"""Measured latency: interleaved runs, medians, the modules left as they are."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from torch import Tensor, nn

from fxprune.errors import InputError
from fxprune.graph.inputs import Inputs
from fxprune.latency import measure_latency


class Spy(nn.Module):
    """Writes its name down whenever it runs."""

    def __init__(self, name: str, calls: list[str]) -> None:
        super().__init__()
        self.name = name
        self.calls = calls

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        assert not torch.is_grad_enabled()
        self.calls.append(self.name)
        return x * scale


def _measure(runs: int, warmup: int) -> tuple[list[str], tuple[float, float]]:
    calls: list[str] = []
    inputs = Inputs((torch.zeros(2),), {"scale": 2.0})
    return calls, measure_latency(Spy("a", calls), Spy("b", calls), inputs, runs=runs, warmup=warmup)


def test_runs_alternate() -> None:
    calls, _ = _measure(runs=3, warmup=1)
    assert calls == ["a", "b"] * 4


def test_the_median_of_each_is_given_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 2.0, 5.0, 4.0, 3.0, 9.0])  # a, b, a, b, a, b
    clock, tick = 0.0, count()

    def perf_counter() -> float:
        nonlocal clock
        clock += next(seconds) if next(tick) % 2 else 0.0
        return clock

    monkeypatch.setattr("time.perf_counter", perf_counter)
    assert _measure(runs=3, warmup=0)[1] == (3000.0, 4000.0)


def test_no_run_is_no_measurement() -> None:
    with pytest.raises(InputError, match="give at least 1"):
        _measure(runs=0, warmup=0)
