"""A function that was not traced into, as a leaf module of the graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["OpaqueFunction"]


class OpaqueFunction(nn.Module):
    """Calls a function or method as it stands; nothing that it takes may be pruned.

    A method sees its owner as it was when the call was recorded. Of a module it sees no parameters, buffers and
    submodules: those are part of the graph and are called there.
    """

    def __init__(self, function: Callable[..., Any], *owner: Any) -> None:
        super().__init__()
        self.function = function
        self.owner = tuple(_bare(o) for o in owner)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function, its owner first where it is a method."""
        for owner in self.owner:
            if isinstance(owner, nn.Module):
                owner.training = self.training
        return self.function(*self.owner, *args, **kwargs)

    def stands_for(self, function: Callable[..., Any], *owner: Any) -> bool:
        """Whether a call of `function` by `owner` as it is now is a call of this leaf."""
        if self.function is not function or len(owner) != len(self.owner):
            return False
        return all(_state(mine) == _state(other) for mine, other in zip(self.owner, owner, strict=True))

    def extra_repr(self) -> str:
        """Name the function."""
        return str(self.function.__qualname__)


_IN_THE_GRAPH = ("_parameters", "_buffers", "_modules")


def _bare(owner: Any) -> Any:
    """Return a shallow copy, that of a module without parameters, buffers and submodules."""
    bare = copy.copy(owner)
    if isinstance(owner, nn.Module):
        vars(bare).update((name, {}) for name in _IN_THE_GRAPH)
    return bare


def _state(owner: Any) -> Any:
    """Return what a method can see of its owner, by identity, but for its mode."""
    if not hasattr(owner, "__dict__"):
        return id(owner)
    aside = (*_IN_THE_GRAPH, "training") if isinstance(owner, nn.Module) else ()
    return type(owner), {name: id(value) for name, value in vars(owner).items() if name not in aside}
