"""Plans in the masks of graphs: channel masks and weight masks, read and written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from fxprune.errors import PlanError
from fxprune.labels.attention import attention_of
from fxprune.labels.detection import find_orbits
from fxprune.labels.orbits import Orbit, Orbits
from fxprune.plan.plan import Plan
from fxprune.plan.records import PlannedOrbit, PlannedWeight
from fxprune.runtime.masks import mask_values
from fxprune.sparsity.layers import find_layers, mask_of
from fxprune.sparsity.masks import mask_layers

__all__ = ["read_plan", "read_weight_masks", "write_masks", "write_weight_masks"]


def places_of(orbit: Orbit) -> tuple[str, ...]:
    """Return the dimensions that an orbit occupies."""
    return tuple(f"{m.parameter}[{m.dimension}]" for m in orbit.members)


def _signature(places: Iterable[str]) -> frozenset[str]:
    """Return what tells orbits apart: parametrised tensors come in another order than plain ones."""
    return frozenset(places)


def read_plan(module: fx.GraphModule, orbits: Orbits | None = None, **how: Any) -> Plan:
    """Read the plan that the masks of a masked graph hold; `how` are the other fields of `Plan`."""
    orbits = find_orbits(module) if orbits is None else orbits
    rows = []
    for orbit in orbits:
        if orbit.mask is not None:
            kept = mask_values(module, orbit.mask).nonzero().squeeze(1).tolist()
            rows.append(PlannedOrbit(orbit.name, orbit.width, tuple(kept), places_of(orbit)))
    return Plan(tuple(rows), attention=attention_of(module), **how)


def write_masks(module: fx.GraphModule, plan: Plan) -> None:
    """Write a plan into the masks of a masked graph. Raises `PlanError` when it is a plan for another model."""
    if plan.attention != attention_of(module):
        raise PlanError(
            f"the plan is for attention={plan.attention}, the graph is masked for attention={attention_of(module)}; "
            f"insert masks with mask-insertion{{attention={plan.attention}}}"
        )
    masked = {_signature(places_of(orbit)): orbit for orbit in find_orbits(module) if orbit.mask is not None}
    for row in plan.orbits:
        orbit = masked.pop(_signature(row.places), None)
        if orbit is None or orbit.width != row.width:
            found = "no such orbit" if orbit is None else f"width {orbit.width}"
            raise PlanError(
                f"the plan is for another model: it has {row.name} of width {row.width} at {row.places[0]}, "
                f"this model has {found} there; {plan.remedy}"
            )
        assert orbit.mask is not None
        mask = torch.zeros(orbit.width)
        mask[list(row.kept)] = 1
        module.get_buffer(orbit.mask).copy_(mask)
    if masked:
        left = next(iter(masked.values()))
        raise PlanError(
            f"the plan is for another model: it says nothing of {left.name} ({', '.join(left.layers)}); {plan.remedy}"
        )


def read_weight_masks(module: fx.GraphModule) -> tuple[PlannedWeight, ...]:
    """Describe the weight masks of a graph."""
    layers = [(layer, mask_of(layer)) for layer in find_layers(module, {})]
    return tuple(PlannedWeight.of(layer, mask) for layer, mask in layers if mask is not None)


def write_weight_masks(module: fx.GraphModule, plan: Plan) -> bool:
    """Mask the weights of a graph as a plan says; return whether that changed anything.

    Raises `PlanError` when it is a plan for another model.
    """
    layers = {layer.name: layer for layer in find_layers(module, {})}
    masks = {}
    for row in plan.weights:
        layer = layers.get(row.layer)
        if layer is None or tuple(layer.shape) != row.shape:
            found = "no such layer" if layer is None else f"shape {tuple(layer.shape)}"
            raise PlanError(
                f"the plan is for another model: it has a mask of shape {row.shape} for '{row.layer}', this model has "
                f"{found} there; {plan.remedy}, and cut its channels first"
            )
        masks[row.layer] = row.mask()
    return mask_layers(layers.values(), masks)
