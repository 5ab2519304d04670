"""A plan: which classes of every orbit and which weights stay, as data to save, edit by hand, compare and replay."""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.errors import PlanError, SpecError
from fxprune.labels.attention import POLICIES, attention_of, check_attention
from fxprune.labels.detection import find_orbits
from fxprune.labels.orbits import Orbit, Orbits
from fxprune.sparsity.blocks import Block, Tiling
from fxprune.sparsity.layers import SparseLayer, find_layers, mask_of
from fxprune.sparsity.masks import mask_layers

__all__ = [
    "SCHEMA",
    "Plan",
    "PlannedOrbit",
    "PlannedWeight",
    "keep_plan",
    "load_plan",
    "plan_of",
    "read_plan",
    "read_weight_masks",
    "write_masks",
    "write_weight_masks",
]

SCHEMA = 1


@dataclass(frozen=True)
class PlannedOrbit:
    """What one orbit keeps.

    `places` (`conv1.weight[0]`, …) say which dimensions the orbit has, so that a plan is refused by another model.
    `kept` are the classes that stay, ascending, each in 0 … width − 1.
    """

    name: str
    width: int
    kept: tuple[int, ...]
    places: tuple[str, ...]


@dataclass(frozen=True)
class PlannedWeight:
    """Which weights of one layer stay.

    `shape` is the weight's after channels left, `dims` its output and input dimension. `kept` has one bit a block, in
    the order of `Tiling`, packed eight to a byte, compressed by zlib, in base64.
    """

    layer: str
    shape: tuple[int, ...]
    dims: tuple[int, int]
    block: str
    kept: str

    @staticmethod
    def of(layer: SparseLayer, mask: Tensor) -> PlannedWeight:
        """Describe a layer's mask: in blocks of 1×4 where it consists of those, else in single weights."""
        shape, dims = tuple(mask.shape), (layer.output_dim, layer.input_dim)
        block = Block(1, 4)
        kept = Tiling(shape, *dims, block).whole(mask.cpu())
        if kept is None:
            block = Block(1, 1)
            kept = mask.cpu().flatten()
        packed = zlib.compress(np.packbits(kept.numpy()).tobytes(), 1)
        return PlannedWeight(layer.name, shape, dims, str(block), base64.b64encode(packed).decode("ascii"))

    def mask(self) -> Tensor:
        """Return bool in `shape`. Raises `ValueError` when `kept` is damaged."""
        tiling = Tiling(self.shape, *self.dims, Block.of(self.block))
        try:
            packed = np.frombuffer(zlib.decompress(base64.b64decode(self.kept, validate=True)), np.uint8)
        except (zlib.error, binascii.Error) as error:
            raise ValueError(f"'kept' of {self.layer} is damaged: {error}") from None
        if packed.size != math.ceil(tiling.count / 8):
            raise ValueError(f"'kept' of {self.layer} has {packed.size} bytes, its {tiling.count} blocks need another")
        return tiling.expand(torch.from_numpy(np.unpackbits(packed, count=tiling.count).astype(bool)))


@dataclass(frozen=True)
class Plan:
    """The kept classes of all orbits and the kept weights of sparse layers, and how they were chosen.

    `weights` are masks of the model as the orbits leave it.

    `spec` is the pass pipeline that made the plan, `seed` its seed, `versions` those of fxprune and torch. `frontend`
    and `training` say how the model was traced, since a graph has other orbits in another mode; so does `attention`,
    which says whether head dimensions or whole heads leave attention. `given` is the spec of what had cut the model
    before, where channels left twice: the plan is for the model as that left it.
    """

    orbits: tuple[PlannedOrbit, ...]
    weights: tuple[PlannedWeight, ...] = ()
    model: str = ""
    frontend: str = "auto"
    training: bool = False
    attention: str = POLICIES[0]
    spec: str = ""
    seed: int = 0
    versions: Mapping[str, str] | None = None
    given: str = ""

    def to_json(self) -> str:
        """Return the plan as JSON with its schema version, one line per orbit and per sparse weight."""
        rows: dict[str, tuple[Any, ...]] = {"orbits": self.orbits, "weights": self.weights}
        head = {"schema": SCHEMA} | {k: v for k, v in asdict(self).items() if k not in rows}
        text = json.dumps(head, indent=2)[:-2]
        for name, held in rows.items():
            lines = ",\n    ".join(json.dumps(asdict(row)) for row in held)
            text += f',\n  "{name}": [\n    {lines}\n  ]'
        return f"{text}\n}}\n"

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan. Raises `PlanError` when the text is truncated, foreign, or of a newer schema."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"the plan is not valid JSON ({error}); it may be truncated: save it again") from None
        if not isinstance(data, dict) or not isinstance(data.get("schema"), int) or "orbits" not in data:
            raise PlanError("the file is not a plan of fxprune: it has no 'schema' and 'orbits'")
        if data["schema"] < 1:
            raise PlanError(f"the plan has schema {data['schema']}; schemas count from 1, so the file is damaged")
        if data["schema"] > SCHEMA:
            raise PlanError(
                f"the plan has schema {data['schema']}, newer than {SCHEMA} which this fxprune reads; upgrade fxprune"
            )
        try:
            orbits = tuple(_orbit(row) for row in data["orbits"])
            head = {field.name: _fact(data[field.name], field.default) for field in fields(Plan) if field.name in data}
            weights = tuple(_weight(row) for row in data.get("weights", ()))
            plan = Plan(**head | {"orbits": orbits, "weights": weights})
            check_attention(plan.attention)
            return plan
        except (KeyError, TypeError, ValueError, SpecError) as error:
            raise PlanError(f"the plan is malformed: {type(error).__name__}: {error}") from None


def _fact(value: Any, default: Any) -> Any:
    """Return a value of the type that its field has by default."""
    if isinstance(default, (str, int)) and type(value) is not type(default):
        raise TypeError(f"{value!r} is no {type(default).__name__}")
    return value


def _orbit(row: Mapping[str, Any]) -> PlannedOrbit:
    kept = tuple(int(i) for i in row["kept"])
    width = int(row["width"])
    if not kept or len(set(kept)) != len(kept) or min(kept) < 0 or max(kept) >= width:
        raise ValueError(f"'kept' of {row['name']} must be distinct classes in 0 … {width - 1}, and at least one")
    if not row["places"]:
        raise ValueError(f"{row['name']} has no places")
    return PlannedOrbit(str(row["name"]), width, tuple(sorted(kept)), tuple(row["places"]))


def _weight(row: Mapping[str, Any]) -> PlannedWeight:
    shape, (output, input_) = tuple(int(size) for size in row["shape"]), row["dims"]
    if min(shape, default=0) < 1 or output == input_ or not {output, input_} <= set(range(len(shape))):
        raise ValueError(f"'shape' and 'dims' of {row['layer']} must be sizes of a weight and two of its dimensions")
    planned = PlannedWeight(str(row["layer"]), shape, (int(output), int(input_)), str(row["block"]), str(row["kept"]))
    planned.mask()
    return planned


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan from its file. Raises `PlanError`."""
    try:
        return Plan.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise PlanError(f"cannot read the plan '{path}': {reason}") from None


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
            kept = module.get_buffer(orbit.mask).nonzero().squeeze(1).tolist()
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
                f"this model has {found} there; {_remedy(plan)}"
            )
        assert orbit.mask is not None
        mask = torch.zeros(orbit.width)
        mask[list(row.kept)] = 1
        module.get_buffer(orbit.mask).copy_(mask)
    if masked:
        left = next(iter(masked.values()))
        raise PlanError(
            f"the plan is for another model: it says nothing of {left.name} ({', '.join(left.layers)}); {_remedy(plan)}"
        )


def _remedy(plan: Plan) -> str:
    if not plan.given:
        return "build the model as it was when the plan was made"
    return f"it was made of a model that had been cut before: give the module of that result ({plan.given})"


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
                f"{found} there; {_remedy(plan)}, and cut its channels first"
            )
        masks[row.layer] = row.mask()
    return mask_layers(layers.values(), masks)


_KEY = "fxprune.plan"


def plan_of(module: nn.Module) -> Plan | None:
    """Return the plan that made a graph, None where nothing is known of it."""
    return module.meta.get(_KEY) if isinstance(module, fx.GraphModule) else None


def keep_plan(module: fx.GraphModule, plan: Plan) -> None:
    """Keep the plan that made a graph with it; copies of it keep it too."""
    module.meta[_KEY] = plan
