"""Hooks of users on the layers of a graph."""

from __future__ import annotations

from torch import nn

__all__ = ["is_hooked"]


def is_hooked(leaf: nn.Module) -> bool:
    """Whether hooks may change what a module takes or gives: another module in its place would not run them."""
    return bool(leaf._forward_hooks or leaf._forward_pre_hooks)
