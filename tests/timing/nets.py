"""Small models, and a clock that advances by what is asked of it."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

IMAGE = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)


class Clock:
    """Stands still until it is told that something took milliseconds; stands for wall and processor time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        self.stolen = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.seconds)
        monkeypatch.setattr(time, "process_time", lambda: self.seconds - self.stolen)

    def spend(self, milliseconds: float, *, stolen: bool = False) -> None:
        self.seconds += milliseconds / 1000
        self.stolen += milliseconds / 1000 * stolen


class Slow(nn.Module):
    """Gives back what it takes after some milliseconds of a clock; it is a leaf of a traced graph."""

    def __init__(self, clock: Clock, *milliseconds: float) -> None:
        super().__init__()
        self.function = Spending(clock, milliseconds)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Spending:
    """A callable that spends each of its milliseconds in turn, over and over."""

    def __init__(self, clock: Clock, milliseconds: tuple[float, ...]) -> None:
        self.clock = clock
        self.milliseconds = milliseconds
        self.calls = 0

    def __deepcopy__(self, _: Any) -> Spending:
        return self

    def __call__(self, x: Tensor) -> Tensor:
        self.clock.spend(self.milliseconds[self.calls % len(self.milliseconds)])
        self.calls += 1
        return x


def net() -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(144, 5)]
    return nn.Sequential(*layers).eval()


class Named(nn.Module):
    """Takes tensors and numbers by name, two of equal shape, and gives a dict of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, a: Tensor, *, b: Tensor, scale: float = 1.0, unused: Tensor | None = None) -> Any:  # noqa: ARG002
        return {"y": self.first(a) * scale, "z": [self.second(b), None]}
