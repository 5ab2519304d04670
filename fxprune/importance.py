"""Criteria: how much each class of an orbit matters. One function each; `CRITERIA` names them.

A criterion takes a `Subject` (an orbit and the tensors of its members) and returns a float [width], higher is more
important, or None where it has nothing to go by in this orbit. To add one, write a function and decorate it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import InputError, SpecError, nearest
from fxprune.labels.orbits import Orbit, Orbits

__all__ = ["CRITERIA", "Criterion", "Evidence", "Subject", "find_criterion", "gather_evidence", "score_orbits"]


@dataclass(frozen=True)
class Subject:
    """One orbit as a criterion sees it."""

    orbit: Orbit
    tensors: Mapping[str, Tensor]
    generator: torch.Generator
    saliency: Mapping[str, Tensor] = field(default_factory=dict)

    def slices(self, role: str, tensors: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Return for every member that plays `role` its values by class: float [width, values]."""
        source = self.tensors if tensors is None else tensors
        found = []
        for member in self.orbit.members:
            if member.role == role and member.parameter in source:
                tensor = source[member.parameter].detach().float().movedim(member.dimension, 0)
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
    """Average the scores of several members, each scaled to mean 1 so that no layer outweighs the others."""
    if not scores:
        return None
    return torch.stack([s.cpu() / s.mean().clamp_min(1e-30).cpu() for s in scores]).mean(0)


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
    """Absolute scale of the batch norms on a channel (network slimming, Liu et al. 2017)."""
    return _mean_over_members([v.abs().mean(1) for v in subject.slices("scale")])


@criterion("taylor")
def taylor(subject: Subject) -> Tensor | None:
    """Absolute first-order change of the loss when a channel's filters go to zero (Molchanov et al. 2019)."""
    return _mean_over_members([v.sum(1).abs() for v in subject.slices("output", subject.saliency)])


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


def gather_evidence(module: nn.Module, evidence: Evidence | None) -> dict[str, Tensor]:
    """Return weight × gradient of every parameter, summed over the batches, as `taylor` needs it.

    The module's mode and gradients are left as they were. Raises `InputError` without data.
    """
    if evidence is None:
        raise InputError(
            "criterion 'taylor' needs data: give batches=… and loss=…, a function (module, batch) → scalar"
        )
    parameters = dict(module.named_parameters())
    before = {name: p.grad for name, p in parameters.items()}
    wanted = {name: p.requires_grad for name, p in parameters.items()}
    saliency = {name: torch.zeros_like(p) for name, p in parameters.items()}
    training = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        for batch in evidence.batches:
            for p in parameters.values():
                p.requires_grad_(True).grad = None
            evidence.loss(module, batch).backward()
            for name, p in parameters.items():
                if p.grad is not None:
                    saliency[name] += p.detach() * p.grad
    finally:
        for name, p in parameters.items():
            p.requires_grad_(wanted[name]).grad = before[name]
        for part, mode in training:
            part.training = mode
    return saliency


def score_orbits(
    module: nn.Module, orbits: Orbits, criterion: str | Criterion, seed: int, evidence: Evidence | None
) -> dict[str, Tensor]:
    """Return orbit name → float64 [width] scores; orbits that the criterion cannot score are absent.

    Raises `InputError` when a weight is NaN or data is missing, `SpecError` for an unknown criterion or a callable
    that returns another shape.
    """
    judge = find_criterion(criterion)
    tensors = dict(module.named_parameters())
    _refuse_nan(tensors)
    saliency = gather_evidence(module, evidence) if judge is taylor else {}
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for orbit in orbits:
        found = judge(Subject(orbit, tensors, generator, saliency))
        if found is None:
            continue
        if tuple(found.shape) != (orbit.width,):
            raise SpecError(
                f"the criterion returned shape {tuple(found.shape)} for {orbit.name}; return one score for each of "
                f"its {orbit.width} classes"
            )
        if not torch.isfinite(found).all():
            raise InputError(
                f"the criterion gave a score that is not finite for {orbit.name} ({', '.join(orbit.layers)})"
            )
        scores[orbit.name] = found.detach().double().cpu()
    return scores


def _refuse_nan(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and bool(torch.isnan(tensor.detach().sum())):
            raise InputError(f"parameter '{name}' holds NaN; no criterion can rank it. Restore a sound checkpoint")
