"""What a run may disturb and must leave as it was: attributes of modules, settings of torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["undisturbed", "without_fast_path"]


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Keep transformers of torch.nn from fused kernels and nested tensors, which hide what they compute."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Restore the attributes of all submodules afterwards, containers with what they held: modes, caches, hooks."""
    before = [(part.__dict__, dict(part.__dict__)) for part in module.modules()]
    containers = [value for _, kept in before for value in kept.values() if type(value) in _CONTAINERS]
    held = [(container, container.copy()) for container in containers if container]
    empty = [container for container in containers if not container]
    try:
        yield
    finally:
        for attributes, kept in before:
            attributes.clear()
            attributes.update(kept)
        for container in filter(None, empty):
            container.clear()
        for container, kept in held:
            container.clear()
            (container.extend if type(container) is list else container.update)(kept)


_CONTAINERS = frozenset([dict, OrderedDict, list, set])
"""Types of attributes that a forward fills in place."""
