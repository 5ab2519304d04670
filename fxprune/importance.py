"""Criteria: how much each class of an orbit matters. One function each; `CRITERIA` names them.

A criterion takes a `Subject` (an orbit and the tensors of its members) and returns a float [width], higher is more
important, or None where it has nothing to go by in this orbit. To add one, write a function and decorate it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import InputError, SpecError, nearest
from fxprune.labels.orbits import Orbit, Orbits
from fxprune.runtime.weight_masks import effective_parameters

__all__ = ["CRITERIA", "Criterion", "Evidence", "Subject", "find_criterion", "mask_saliency", "score_orbits"]


@dataclass(frozen=True)
class Subject:
    """One orbit as a criterion sees it: the parameters by name, and |∂L/∂mask| [width] where data was given."""

    orbit: Orbit
    tensors: Mapping[str, Tensor]
    generator: torch.Generator
    saliency: Tensor | None = None

    def slices(self, role: str) -> list[Tensor]:
        """Return for every member that plays `role` its values by class: float [width, values]."""
        found = []
        for member in self.orbit.members:
            if member.role == role and member.parameter in self.tensors:
                tensor = self.tensors[member.parameter].detach().float().movedim(member.dimension, 0)
                values = tensor.reshape(len(tensor), -1)
                found.append(values if member.is_whole(len(values)) else _rows(values, member.indices))
        return found


def _rows(values: Tensor, indices: Tensor) -> Tensor:
    return values[indices.to(values.device)].flatten(1)


Criterion = Callable[[Subject], Tensor | None]

CRITERIA: dict[str, Criterion] = {}


def criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Register a criterion under the name that users write."""

    def register(function: Criterion) -> Criterion:
        CRITERIA[name] = function
        return function

    return register


def _mean_over_members(scores: list[Tensor]) -> Tensor | None:
    """Average the scores of several members, each scaled to a maximum of 1 so that no layer outweighs the others."""
    if not scores:
        return None
    return torch.stack([s.cpu() / s.max().clamp_min(1e-30).cpu() for s in scores]).mean(0)


@criterion("l1")
def l1(subject: Subject) -> Tensor | None:
    """Sum of absolute weights of the filters that make a channel (Li et al. 2017)."""
    return _mean_over_members([v.abs().sum(1) for v in subject.slices("output")])


@criterion("l2")
def l2(subject: Subject) -> Tensor | None:
    """Euclidean norm of the filters that make a channel."""
    return _mean_over_members([v.norm(dim=1) for v in subject.slices("output")])


@criterion("fpgm")
def fpgm(subject: Subject) -> Tensor | None:
    """Distance to the other filters of the layer: those near the geometric median are redundant (He et al. 2019)."""
    return _mean_over_members([torch.cdist(v, v).sum(1) for v in subject.slices("output")])


@criterion("bn-scale")
def bn_scale(subject: Subject) -> Tensor | None:
    """Absolute scales of the batch norms on a channel (network slimming, Liu et al. 2017), summed as they are."""
    scales = [v.abs().sum(1).cpu() for v in subject.slices("scale")]
    return torch.stack(scales).sum(0) if scales else None


@criterion("taylor")
def taylor(subject: Subject) -> Tensor | None:
    """Absolute first-order change of the loss when the channel's mask goes from one to zero.

    The gate form of Molchanov et al. 2019, |∂L/∂mask|, summed over the batches; comparable across orbits as it is.
    """
    return subject.saliency


@criterion("random")
def random(subject: Subject) -> Tensor:
    """Uniform in [0, 1), from the seed."""
    return torch.rand(subject.orbit.width, generator=subject.generator)


def find_criterion(name: str | Criterion) -> Criterion:
    """Return a criterion by name; a callable is one already. Raises `SpecError` with the nearest name."""
    if callable(name):
        return name
    if name not in CRITERIA:
        raise SpecError(f"unknown criterion '{name}'; {nearest(name, CRITERIA)}")
    return CRITERIA[name]


@dataclass(frozen=True)
class Evidence:
    """Data for the criteria that need it: batches, and `loss(module, batch)` returning a scalar tensor."""

    batches: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor]


def mask_saliency(module: nn.Module, masks: list[str], evidence: Evidence) -> dict[str, Tensor]:
    """Return |∂L/∂mask| of every mask of a masked graph, float64 [width], summed over the batches.

    The module runs in evaluation mode; its mode, parameters and gradients are left as they were. Raises `InputError`
    when there is no batch or the loss is not finite.
    """
    buffers = [module.get_buffer(name) for name in masks]
    saliency = [torch.zeros(b.shape, dtype=torch.float64) for b in buffers]
    training = [(m, m.training) for m in module.modules()]
    module.eval()
    count = 0
    try:
        for buffer in buffers:
            buffer.requires_grad_(True)
        for batch in evidence.batches:
            loss = evidence.loss(module, batch)
            if not bool(torch.isfinite(loss)):
                raise InputError(f"the loss of batch {count} is {loss.item()}; no criterion can rank by it")
            if not loss.requires_grad:
                raise InputError("the loss has no gradient; compute it from module(…) without no_grad or detach")
            gradients = torch.autograd.grad(loss, buffers, allow_unused=True)
            for total, gradient in zip(saliency, gradients, strict=True):
                if gradient is not None:
                    total += gradient.detach().double().abs().cpu()
            count += 1
    finally:
        for buffer in buffers:
            buffer.requires_grad_(False)
        for part, mode in training:
            part.training = mode
    if count == 0:
        raise InputError("no batch was given; criterion 'taylor' needs at least one")
    return dict(zip(masks, saliency, strict=True))


def score_orbits(
    module: nn.Module, orbits: Orbits, criterion: str | Criterion, seed: int, evidence: Evidence | None
) -> dict[str, Tensor]:
    """Return orbit name → float64 [width] scores; orbits that the criterion cannot score are absent.

    Raises `InputError` when a weight is NaN or data is missing, `SpecError` for an unknown criterion or a callable
    that returns another shape.
    """
    judge = find_criterion(criterion)
    tensors = effective_parameters(module)
    _refuse_nan(tensors)
    if judge is taylor and evidence is None:
        raise InputError(
            "criterion 'taylor' needs data: give batches=… and loss=…, a function (module, batch) → scalar"
        )
    masks = [orbit.mask for orbit in orbits if orbit.mask is not None]
    saliency = mask_saliency(module, masks, evidence) if evidence is not None else {}
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for orbit in orbits:
        if orbit.mask is not None:
            found = _judge(judge, Subject(orbit, tensors, generator, saliency.get(orbit.mask)))
            if found is not None:
                scores[orbit.name] = found
    return scores


def _judge(judge: Criterion, subject: Subject) -> Tensor | None:
    """Return checked scores of one orbit, float64 [width]."""
    orbit = subject.orbit
    try:
        found = judge(subject)
    except Exception as error:
        if judge in CRITERIA.values():
            raise
        raise SpecError(f"the criterion failed on {orbit.name}: {type(error).__name__}: {error}") from error
    if found is None:
        return None
    if not isinstance(found, Tensor) or tuple(found.shape) != (orbit.width,):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise SpecError(
            f"the criterion returned {shape} for {orbit.name}; return a tensor with one score for each of its "
            f"{orbit.width} classes"
        )
    if not torch.isfinite(found).all():
        raise InputError(f"the criterion gave a score that is not finite for {orbit.name} ({', '.join(orbit.layers)})")
    return found.detach().double().cpu()


def _refuse_nan(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and bool(torch.isnan(tensor.detach().sum())):
            raise InputError(f"parameter '{name}' holds NaN; no criterion can rank it. Restore a sound checkpoint")
