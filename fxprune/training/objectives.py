"""What training minimises and what validation measures; ready-made ones for batches (inputs, wanted outputs)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "Loss",
    "Measure",
    "classification",
    "cross_entropy",
    "mean_absolute_error",
    "mean_squared_error",
    "reconstruction",
]

Loss = Callable[[nn.Module, Any], Tensor]
"""(module, batch) → the scalar to minimise, a mean over the batch."""

Measure = Callable[[nn.Module, Any], Mapping[str, Tensor]]
"""(module, batch) → by name a value per sample, [samples], or a scalar, their mean over the batch."""


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy of logits [samples, classes, …] and labels, int64 [samples, …]."""
    inputs, labels = batch
    return functional.cross_entropy(module(inputs), labels)


def classification(module: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return the cross-entropy ("loss") and the top-1 hit, 0 or 1 ("accuracy"), of every label."""
    inputs, labels = batch
    logits = module(inputs)
    hits = logits.argmax(dim=1) == labels
    return {"loss": functional.cross_entropy(logits, labels, reduction="none"), "accuracy": hits.float()}


def mean_squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean squared error of outputs, beside wanted ones of their shape."""
    inputs, wanted = batch
    return functional.mse_loss(module(inputs), wanted)


def mean_absolute_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean absolute error of outputs, beside wanted ones of their shape."""
    inputs, wanted = batch
    return functional.l1_loss(module(inputs), wanted)


def reconstruction(module: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return the mean squared error ("loss") and the peak signal-to-noise ratio ("psnr", dB) of every sample.

    The peak is 1: values are taken to be in [0, 1]. At most 100 dB.
    """
    inputs, wanted = batch
    squares = (module(inputs) - wanted).square().flatten(1).mean(1)
    return {"loss": squares, "psnr": -10 * squares.clamp_min(1e-10).log10()}
