"""Put gates where the masks of a graph are, and masks where the gates of a graph are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.errors import SpecError, UsageError, nearest
from fxprune.gating.placement import View, Views
from fxprune.labels.detection import find_orbits
from fxprune.labels.orbits import Orbit
from fxprune.narrowing.kept import kept_classes
from fxprune.runtime.gates import INITIAL, MOMENTUM, TEMPERATURE, Gate, PredictedGate, TrainedGate
from fxprune.runtime.masks import gates_of

__all__ = ["LOGITS", "GateOptions", "insert_gates", "refuse_gates", "replace_gates"]

LOGITS = ("predicted", "trained")
"""Where logits come from: a predictor for every orbit, or parameters of their own."""


@dataclass(frozen=True)
class GateOptions:
    """What all gates of a graph have in common.

    `block`: channels that share a logit. `logits`: "predicted" from feature maps or "trained" as parameters.
    `initial`: the logits at first. `temperature`: of the samples. `momentum`: of the average of predictions.
    """

    block: int = 1
    logits: str = LOGITS[0]
    initial: float = INITIAL
    temperature: float = TEMPERATURE
    momentum: float = MOMENTUM

    def __post_init__(self) -> None:
        if self.logits not in LOGITS:
            raise SpecError(f"unknown logits '{self.logits}'; {nearest(self.logits, LOGITS)}")
        for name, sound, legal in (
            ("block", isinstance(self.block, int) and self.block >= 1, "a whole number, 1 or more"),
            ("initial", math.isfinite(self.initial), "a number"),
            ("temperature", 0 < self.temperature < math.inf, "a number above 0"),
            ("momentum", 0 <= self.momentum < 1, "a number in [0, 1)"),
        ):
            if not sound:
                raise SpecError(f"{name} of gates is {getattr(self, name)}; give {legal}")


def insert_gates(module: fx.GraphModule, chosen: Iterable[Orbit], options: GateOptions) -> bool:
    """Replace the masks of some orbits by gates, in place; return whether there was anything to gate.

    An orbit that is one block has nothing to choose and keeps its mask. One that no feature map shows before it is
    masked, as one that only parameters make, gets trained logits.

    Raises `UsageError` where channels are masked already: a gate would forget it.
    """
    orbits = find_orbits(module)
    if not bool(kept_classes(module, orbits).all()):
        raise UsageError("the masks of the graph hold zeros, which gates would forget; insert gates before selecting")
    gated = [orbit for orbit in chosen if orbit.mask is not None and orbit.width > options.block]
    views = Views(module, orbits)
    for orbit in gated:
        read = _reader(module, str(orbit.mask))
        view = views.best(orbit, read) if options.logits == "predicted" else None
        _insert_gate(module, orbit, read, view, options)
    return bool(gated)


def _insert_gate(module: fx.GraphModule, orbit: Orbit, read: fx.Node, view: View | None, options: GateOptions) -> None:
    name = str(orbit.mask)
    mask = module.get_buffer(name)
    common: dict[str, Any] = {
        "block": options.block,
        "initial": options.initial,
        "temperature": options.temperature,
        "dtype": torch.promote_types(mask.dtype, torch.float32),
    }
    if view is None:
        gate: Gate = TrainedGate(orbit.width, **common)
    else:
        shape = (view.channels, view.spatial, view.dim, view.index)
        gate = PredictedGate(orbit.width, *shape, momentum=options.momentum, **common)
        view.node.append(read)
    _replace(module, name, gate.to(mask.device).train(module.training))
    read.op, read.args = "call_module", () if view is None else (view.node,)


def replace_gates(module: fx.GraphModule, masks: Mapping[str, Tensor] | None = None) -> bool:
    """Replace every gate by a mask, in place: by default the one that it is in evaluation.

    Returns whether there was any gate.
    """
    gates = gates_of(module)
    for name, gate in gates.items():
        mask = gate.mask()
        _replace(module, name, mask if masks is None else masks[name].to(mask))
        read = _reader(module, name)
        read.op, read.args = "get_attr", ()
    return bool(gates)


def _reader(module: fx.GraphModule, name: str) -> fx.Node:
    """Return the node that reads a mask or samples a gate; there is one of each."""
    return next(node for node in module.graph.nodes if node.target == name)


def _replace(module: fx.GraphModule, name: str, value: Gate | Tensor) -> None:
    """Put a gate or a mask in the place of the other."""
    owner, _, attribute = name.rpartition(".")
    masks = module.get_submodule(owner)
    delattr(masks, attribute)
    if isinstance(value, Gate):
        masks.add_module(attribute, value)
    else:
        masks.register_buffer(attribute, value)


def refuse_gates(module: fx.GraphModule, step: str) -> None:
    """Raise `UsageError` where a graph has gates, whose masks are not for others to write."""
    if gates_of(module):
        raise UsageError(f"the graph has gates, which decide themselves; run gate-hardening before {step}")
