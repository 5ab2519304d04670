"""What quantisation left in float, kept with the graph."""

from __future__ import annotations

from torch import fx

__all__ = ["float_layers", "keep_float_layers"]

_KEY = "fxprune.float_layers"


def float_layers(module: fx.GraphModule) -> tuple[tuple[str, str], ...]:
    """Return (path, reason) of the convolutions and linear layers that the last quantisation left in float."""
    return tuple(module.meta.get(_KEY, ()))


def keep_float_layers(module: fx.GraphModule, layers: tuple[tuple[str, str], ...]) -> None:
    """Keep (path, reason) with `module`; copies of it keep them too."""
    module.meta[_KEY] = layers
