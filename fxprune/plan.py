"""A plan: which classes of every orbit stay, as data that can be saved, edited by hand, compared and replayed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import fx

from fxprune.errors import PlanError, SpecError
from fxprune.labels.attention import POLICIES, attention_of, check_attention
from fxprune.labels.detection import find_orbits
from fxprune.labels.orbits import Orbit, Orbits

__all__ = ["SCHEMA", "Plan", "PlannedOrbit", "read_plan", "write_masks"]

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
class Plan:
    """The kept classes of all orbits of a model, and how they were chosen.

    `spec` is the pass pipeline that made the plan, `seed` its seed, `versions` those of fxprune and torch. `frontend`
    and `training` say how the model was traced, since a graph has other orbits in another mode; so does `attention`,
    which says whether head dimensions or whole heads leave attention.
    """

    orbits: tuple[PlannedOrbit, ...]
    model: str = ""
    frontend: str = "auto"
    training: bool = False
    attention: str = POLICIES[0]
    spec: str = ""
    seed: int = 0
    versions: Mapping[str, str] | None = None

    def to_json(self) -> str:
        """Return the plan as JSON with its schema version, one line per orbit."""
        head = {"schema": SCHEMA} | {k: v for k, v in asdict(self).items() if k != "orbits"}
        lines = ",\n    ".join(json.dumps(asdict(orbit)) for orbit in self.orbits)
        return json.dumps(head, indent=2)[:-2] + f',\n  "orbits": [\n    {lines}\n  ]\n}}\n'

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
            head = {field.name: data[field.name] for field in fields(Plan) if field.name in data}
            plan = Plan(**head | {"orbits": orbits})
            check_attention(plan.attention)
            return plan
        except (KeyError, TypeError, ValueError, SpecError) as error:
            raise PlanError(f"the plan is malformed: {type(error).__name__}: {error}") from None


def _orbit(row: Mapping[str, Any]) -> PlannedOrbit:
    kept = tuple(int(i) for i in row["kept"])
    width = int(row["width"])
    if not kept or len(set(kept)) != len(kept) or min(kept) < 0 or max(kept) >= width:
        raise ValueError(f"'kept' of {row['name']} must be distinct classes in 0 … {width - 1}, and at least one")
    if not row["places"]:
        raise ValueError(f"{row['name']} has no places")
    return PlannedOrbit(str(row["name"]), width, tuple(sorted(kept)), tuple(row["places"]))


def places_of(orbit: Orbit) -> tuple[str, ...]:
    """Return the dimensions that an orbit occupies."""
    return tuple(f"{m.parameter}[{m.dimension}]" for m in orbit.members)


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
    masked = {places_of(orbit): orbit for orbit in find_orbits(module) if orbit.mask is not None}
    for row in plan.orbits:
        orbit = masked.pop(row.places, None)
        if orbit is None or orbit.width != row.width:
            found = "no such orbit" if orbit is None else f"width {orbit.width}"
            raise PlanError(
                f"the plan is for another model: it has {row.name} of width {row.width} at {row.places[0]}, "
                f"this model has {found} there; build the model as it was when the plan was made"
            )
        assert orbit.mask is not None
        mask = torch.zeros(orbit.width)
        mask[list(row.kept)] = 1
        module.get_buffer(orbit.mask).copy_(mask)
    if masked:
        left = next(iter(masked.values()))
        raise PlanError(f"the plan is for another model: it says nothing of {left.name} ({', '.join(left.layers)})")
