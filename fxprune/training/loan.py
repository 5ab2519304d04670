"""Give a module and loaders back as they came, but for the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.data import BatchSampler, DataLoader

from fxprune.training.validation import modes_kept

__all__ = ["on_loan"]

LEFT_BY_ACCELERATE = ("forward", "_original_forward", "_is_accelerate_prepared")


@contextmanager
def on_loan(module: nn.Module, loaders: list[Any]) -> Iterator[None]:
    """Undo what Accelerate and training leave on a module and its loaders.

    1. The modes of all submodules.
    2. The device.
    3. Attributes of the instance: a `forward` for mixed precision, which would hide that of a rewritten graph, and a
       mark, with which the module would never be prepared again.
    4. Gradients.
    5. The sampler of a DataLoader's batch sampler, which a seedable one replaces.
    """
    device = next((parameter.device for parameter in module.parameters()), None)
    attributes = {name: module.__dict__[name] for name in LEFT_BY_ACCELERATE if name in module.__dict__}
    owners = [loader.batch_sampler for loader in loaders if isinstance(loader, DataLoader)]
    samplers = [(owner, owner.sampler) for owner in owners if isinstance(owner, BatchSampler)]
    try:
        with modes_kept(module):  # (1)
            yield
    finally:
        for name in LEFT_BY_ACCELERATE:  # (3)
            module.__dict__.pop(name, None)
        module.__dict__.update(attributes)
        module.zero_grad(set_to_none=True)  # (4)
        if device is not None:
            module.to(device)  # (2)
        for owner, sampler in samplers:  # (5)
            owner.sampler = sampler
