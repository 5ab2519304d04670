"""Re-estimate batch-norm statistics after channels left."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fxprune.errors import InputError
from fxprune.graph.inputs import Inputs

__all__ = ["recalibrate_batchnorm"]


def recalibrate_batchnorm(module: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Replace the running statistics of every batch norm by averages over `batches`, in place; return the module.

    No weight is trained. Adaptive batch normalisation, as in EagleEye (Li et al. 2020).

    Args:
        module: any model, usually a slim GraphModule. Its mode is left as it was.
        batches: model inputs, each as `fxprune.trace` takes them; labels are not needed.

    Raises `InputError` when `batches` is empty; the module is unchanged then.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return module
    data = iter(batches)
    first = next(data, None)
    if first is None:
        raise InputError("no batch was given to re-estimate batch-norm statistics from; give at least one batch")
    momenta = [m.momentum for m in norms]
    training = [(m, m.training) for m in module.modules()]
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    try:
        _run(module, itertools.chain([first], data))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for part, mode in training:
            part.training = mode
    return module


@torch.no_grad()
def _run(module: nn.Module, batches: Iterable[Any]) -> None:
    for batch in batches:
        inputs = Inputs.of(batch)
        module(*inputs.args, **inputs.kwargs)
