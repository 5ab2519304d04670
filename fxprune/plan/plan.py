"""A whole plan, and its JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import fx, nn

from fxprune.errors import PlanError, SpecError
from fxprune.labels.attention import POLICIES, check_attention
from fxprune.plan.records import PlannedLowering, PlannedOrbit, PlannedWeight

__all__ = ["SCHEMA", "Plan", "keep_plan", "load_plan", "plan_of"]

SCHEMA = 1


@dataclass(frozen=True)
class Plan:
    """The kept classes of all orbits and the kept weights of sparse layers, and how they were chosen.

    `weights` are masks of the model as the orbits leave it.

    `spec` is the pass pipeline that made the plan, `seed` its seed, `versions` those of fxprune and torch. `frontend`
    and `training` say how the model was traced, since a graph has other orbits in another mode; so does `attention`,
    which says whether head dimensions or whole heads leave attention. `given` is the spec of what had cut the model
    before, where channels left twice: the plan is for the model as that left it. `lowering` says what computes on
    uint8, where anything does.
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
    lowering: PlannedLowering | None = None

    @property
    def remedy(self) -> str:
        """What to do where the plan is for another model than the one that it was given."""
        if not self.given:
            return "build the model as it was when the plan was made"
        return f"it was made of a model that had been cut before: give the module of that result ({self.given})"

    def to_json(self) -> str:
        """Return the plan as JSON with its schema version, a line for every orbit, sparse weight and lowered layer."""
        rows: dict[str, tuple[Any, ...]] = {"orbits": self.orbits, "weights": self.weights}
        head = {"schema": SCHEMA} | {k: v for k, v in asdict(self).items() if k not in (*rows, "lowering")}
        text = json.dumps(head, indent=2)[:-2]
        for name, held in rows.items():
            lines = ",\n    ".join(json.dumps(asdict(row)) for row in held)
            text += f',\n  "{name}": [\n    {lines}\n  ]'
        if self.lowering is not None:
            text += f',\n  "lowering": {self.lowering.as_json()}'
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
            head = {field.name: _fact(data[field.name], field.default) for field in fields(Plan) if field.name in data}
            parts: dict[str, Any] = {"orbits": tuple(PlannedOrbit.of_row(row) for row in data["orbits"])}
            parts["weights"] = tuple(PlannedWeight.of_row(row) for row in data.get("weights", ()))
            if data.get("lowering") is not None:
                parts["lowering"] = PlannedLowering.of_row(data["lowering"])
            plan = Plan(**head | parts)
            check_attention(plan.attention)
            return plan
        except (KeyError, TypeError, ValueError, AttributeError, SpecError) as error:
            raise PlanError(f"the plan is malformed: {type(error).__name__}: {error}") from None


def _fact(value: Any, default: Any) -> Any:
    """Return a value of the type that its field has by default."""
    if isinstance(default, (str, int)) and type(value) is not type(default):
        raise TypeError(f"{value!r} is no {type(default).__name__}")
    return value


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan from its file. Raises `PlanError`."""
    try:
        return Plan.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise PlanError(f"cannot read the plan '{path}': {reason}") from None


_KEY = "fxprune.plan"


def plan_of(module: nn.Module) -> Plan | None:
    """Return the plan that made a graph, None where nothing is known of it."""
    return module.meta.get(_KEY) if isinstance(module, fx.GraphModule) else None


def keep_plan(module: fx.GraphModule, plan: Plan) -> None:
    """Keep the plan that made a graph with it; copies of it keep it too."""
    module.meta[_KEY] = plan
