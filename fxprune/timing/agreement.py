"""How far the outputs of one way to run a model are from those of another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.errors import InputError

__all__ = ["Agreement", "agreement", "tensors_of"]


@dataclass(frozen=True)
class Agreement:
    """How close outputs are.

    Attributes:
        difference: the largest max |y − y₀| / max |y₀| of any output.
        cosine: of the angle between all outputs and all expected ones, as vectors; 1 where they point alike.
    """

    difference: float
    cosine: float


def tensors_of(outputs: Any) -> list[Tensor]:
    """Return all tensors of nested outputs, arrays of numpy as tensors."""
    leaves = pytree.tree_leaves(outputs)
    arrays = [torch.from_numpy(leaf) if isinstance(leaf, numpy.ndarray) else leaf for leaf in leaves]
    return [leaf for leaf in arrays if isinstance(leaf, Tensor)]


def agreement(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Agreement:
    """Compare outputs, of any real or boolean type; infinities and NaN agree where both have the same.

    Raises `InputError` where they have other shapes, or are finite elsewhere.

    >>> agreement([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 5.0])]).difference
    0.2
    """
    shapes = [[tuple(y.shape) for y in outputs] for outputs in (found, expected)]
    if shapes[0] != shapes[1]:
        raise InputError(f"its outputs have shapes {_spell(shapes[0])}, those of the model {_spell(shapes[1])}")
    pairs = [_finite(y, y0) for y, y0 in zip(found, expected, strict=True)]
    difference = max((_difference(y, y0) for y, y0 in pairs), default=0.0)
    return Agreement(difference, _cosine(*(torch.cat(side) for side in zip(*pairs, strict=True))))


def _spell(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join("×".join(map(str, shape)) or "scalar" for shape in shapes) or "none"


def _finite(found: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Return the finite values of both as float64 [n]."""
    y, y0 = (side.detach().cpu().double().flatten() for side in (found, expected))
    kinds = [torch.where(side.isfinite(), 0.0, side.nan_to_num(1.0, 2.0, 3.0)) for side in (y, y0)]
    if not torch.equal(*kinds):
        raise InputError("its outputs are finite where those of the model are not, or the other way round")
    return y[y.isfinite()], y0[y0.isfinite()]


def _difference(y: Tensor, y0: Tensor) -> float:
    if torch.equal(y, y0):
        return 0.0
    whole = float(y0.abs().max())
    return float((y - y0).abs().max()) / whole if whole else math.inf


def _cosine(y: Tensor, y0: Tensor) -> float:
    if torch.equal(y, y0):
        return 1.0
    norms = float(y.norm()) * float(y0.norm())
    return min(float(y @ y0) / norms, 1.0) if norms else 0.0
