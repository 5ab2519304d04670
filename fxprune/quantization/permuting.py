"""Where the channels of values lie, which permutes change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxprune.quantization.values import is_tensor, operand

__all__ = ["LAST", "dimension_before", "inverse", "permutation", "to_last"]

LAST = -1
"""The dimension in which the channels of most values lie, counted from the last."""


def permutation(node: fx.Node) -> tuple[int, ...] | None:
    """Return the dimensions that a node permutes, as torch takes them, counted from 0; None where it does not."""
    if node.target not in ("permute", torch.permute):
        return None
    given: Any = node.kwargs.get("dims", node.args[1:])
    dims = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    return tuple(dim % len(dims) for dim in dims) if all(isinstance(dim, int) for dim in dims) else None


def dimension_before(node: fx.Node, dimension: int) -> int:
    """Return the dimension of a node's input that is one, counted from the last, of its value, as far as is known."""
    dims = permutation(node)
    if dims is not None:
        return dims[dimension] - len(dims)
    known = is_tensor(node) and is_tensor(operand(node))
    return dimension if known and node.meta["val"].dim() == operand(node).meta["val"].dim() else LAST


def to_last(rank: int, dimension: int) -> tuple[int, ...]:
    """Return the permutation that puts a dimension, counted from the last, behind the others.

    >>> to_last(4, -3), inverse(to_last(4, -3))
    ((0, 2, 3, 1), (0, 3, 1, 2))
    """
    moved = rank + dimension
    return (*(dim for dim in range(rank) if dim != moved), moved)


def inverse(dims: Sequence[int]) -> tuple[int, ...]:
    """Return the permutation that undoes one."""
    return tuple(dims.index(dim) for dim in range(len(dims)))
