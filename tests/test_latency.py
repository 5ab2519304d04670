"""Measured latency: interleaved runs, medians, the modules left as they are."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
import torch
from torch import Tensor, nn

from fxprune.errors import InputError
from fxprune.graph.inputs import Inputs
from fxprune.latency import Times, measure_latency, time_in_turn, with_threads


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


@pytest.mark.parametrize(("runs", "warmup"), [(0, 0), (1, -1)])
def test_nothing_to_measure_is_refused(runs: int, warmup: int) -> None:
    with pytest.raises(InputError, match=r"give (at least 1|0 or more)"):
        time_in_turn({}, runs=runs, warmup=warmup)


def test_any_number_of_calls_alternate_and_settle_untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []

    def call(name: str, seconds: list[float]) -> Callable[[], None]:
        def run() -> None:
            calls.append(name)
            clock[0] += seconds.pop(0)

        return run

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    three = {"a": call("a", [9, 9, 1, 9, 2]), "b": call("b", [9, 9, 3, 9, 4]), "c": call("c", [9, 9, 5, 9, 6])}
    times = time_in_turn(three, runs=2, warmup=1, settle=1)
    assert calls == [*"abc", *"aabbcc", *"aabbcc"]
    expected = {"a": (1e3, 2e3), "b": (3e3, 4e3), "c": (5e3, 6e3)}
    assert {name: taken.milliseconds for name, taken in times.items()} == expected


def test_medians_and_quartiles() -> None:
    times = Times((1.0, 4.0, 2.0, 3.0, 100.0))
    assert (times.median, times.quartiles) == (3.0, (2.0, 4.0))
    assert times.spread == pytest.approx(2 / 3)
    assert Times((5.0,)).quartiles == (5.0, 5.0)


def test_threads_are_given_back_whatever_happens() -> None:
    before = torch.get_num_threads()

    def fail() -> None:
        with with_threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == before
    with pytest.raises(InputError, match="on 0 threads; give at least 1"), with_threads(0):
        pass
