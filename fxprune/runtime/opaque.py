"""A function that was not traced into, as a leaf module of the graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["OpaqueFunction"]


class OpaqueFunction(nn.Module):
    """Calls a function or method as it stands; nothing that it takes may be pruned.

    A method of a module sees that module without parameters, buffers and submodules: those are part of the graph and
    are called there.
    """

    def __init__(self, function: Callable[..., Any], *owner: Any) -> None:
        super().__init__()
        self.function = function
        self.owner = tuple(_bare(o) if isinstance(o, nn.Module) else o for o in owner)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function, its owner first where it is a method."""
        for owner in self.owner:
            if isinstance(owner, nn.Module):
                owner.training = self.training
        return self.function(*self.owner, *args, **kwargs)

    def extra_repr(self) -> str:
        """Name the function."""
        return str(self.function.__qualname__)


def _bare(module: nn.Module) -> nn.Module:
    """Return a shallow copy without parameters, buffers and submodules."""
    bare = copy.copy(module)
    bare._parameters, bare._buffers, bare._modules = {}, {}, {}
    return bare
