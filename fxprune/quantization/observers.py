"""How the range of a value is found in data: torchao's observers, by name."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fxprune.errors import InputError, SpecError, nearest
from fxprune.quantization.ranges import Range
from fxprune.runtime.int8.affine import LEVELS

__all__ = ["EXTREMES", "OBSERVERS", "Observed", "check_observer"]

EXTREMES = "min-max"
"""The observer that leaves nothing out."""

_TAIL = 1e-4
"""The share of the values that "percentile" leaves out at either end."""


@dataclass(frozen=True)
class _Way:
    """A class of torchao's observers, and how a range is read from one that has seen data."""

    kind: str
    read: Callable[[Any], tuple[float, float]]


def _extremes(observer: Any) -> tuple[float, float]:
    """Return the smallest and the largest value that was seen."""
    return float(observer.min_val), float(observer.max_val)


def _least_squares(observer: Any) -> tuple[float, float]:
    """Return the range in which quantising the values of a histogram has the least squared error."""
    if observer.min_val == observer.max_val:
        return _extremes(observer)
    scale, zero_point = (float(number) for number in observer.calculate_qparams())
    return -zero_point * scale, (LEVELS - zero_point) * scale


def _percentile(observer: Any) -> tuple[float, float]:
    """Return the range of a histogram's values but for the smallest and the largest of them."""
    counts = observer.histogram.double()
    below = counts.cumsum(0) / counts.sum()
    edges = torch.linspace(*_extremes(observer), len(counts) + 1, dtype=torch.float64)
    first, last = (below <= _TAIL).sum(), (below < 1 - _TAIL).sum()
    return float(edges[first]), float(edges[last + 1])


OBSERVERS = {
    EXTREMES: _Way("MinMaxObserver", _extremes),
    "histogram": _Way("HistogramObserver", _least_squares),
    "percentile": _Way("HistogramObserver", _percentile),
}
"""By name: everything; what has the least squared error; all but a ten-thousandth of the values at either end."""


def check_observer(name: str) -> None:
    """Raise `SpecError` unless there is such an observer."""
    if name not in OBSERVERS:
        raise SpecError(f"unknown observer '{name}'; {nearest(name, OBSERVERS)}")


class Observed:
    """The values of one node, as an observer has seen them."""

    def __init__(self, name: str) -> None:
        self._way = OBSERVERS[name]
        kind = getattr(_torchao(), self._way.kind)
        self._observer = kind(dtype=torch.uint8, quant_min=0, quant_max=LEVELS, eps=1e-30)

    def update(self, values: Tensor) -> None:
        """Look at values, float32 of any shape."""
        with _quiet():
            self._observer.to(values.device)(values)

    @property
    def range(self) -> Range:
        """The range of all values that were seen."""
        with _quiet():
            return Range(*self._way.read(self._observer))


@cache
def _torchao() -> ModuleType:
    try:
        with _quiet():
            from torchao.quantization.pt2e import observer
    except ImportError as error:
        raise InputError(
            f"observers come from torchao, which cannot be imported ({error}); pip install 'fxprune[quantize]'"
        ) from error
    return observer


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torchao says of itself: deprecations in torch, extensions that it was built without."""
    loggers = [logging.getLogger(name) for name in ("torch.utils._pytree", "torchao")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
