"""One whole pruning job by each tool, and what it left."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from fxprune import Inputs

__all__ = ["Job", "count_macs", "prune_by_fxprune", "prune_by_peer"]

Job = Callable[[nn.Module, Inputs], nn.Module]

CLASSES = frozenset({1000, 21, 91, 400})
"""Outputs of the heads of ImageNet, VOC, COCO and Kinetics."""


def prune_by_fxprune(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Trace, find orbits, select, cut and report."""
    return fxprune.prune(model, inputs, macs="50%", criterion="l2").module


def prune_by_peer(ratio: float) -> Job:
    """Return Torch-Pruning's job as its README shows it: group magnitude, every layer by `ratio`, heads left alone."""
    import torch_pruning

    def job(model: nn.Module, inputs: Inputs) -> nn.Module:
        pruner = torch_pruning.pruner.BasePruner(
            model,
            inputs.kwargs or inputs.args,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=heads(model),
        )
        pruner.step()
        return model

    return job


def heads(model: nn.Module) -> list[nn.Module]:
    """Return the layers that make a model's outputs, told by how many there are."""
    return [
        m
        for m in model.modules()
        if getattr(m, "out_features", None) in CLASSES or getattr(m, "out_channels", None) in CLASSES
    ]


def count_macs(model: nn.Module, inputs: Inputs) -> float:
    """Run a model once and return its multiply-accumulates."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs.args, **inputs.kwargs)
    return counter.get_total_flops() / 2
