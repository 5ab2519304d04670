from __future__ import annotations

from pathlib import Path

import pytest

import fxprune
from fxprune.errors import PlanError, UsageError
from fxprune.plan import read_plan
from passes import PlanApplication
from tests.passes.nets import Concatenation, Residual, masked, traced


def test_a_plan_is_read_and_written_back(tmp_path: Path) -> None:
    plan = read_plan(masked(Residual(), orbit_0=[1, 0, 0, 1]))
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    for given in (plan, str(path)):
        module = masked(Residual())
        assert PlanApplication(given)(module).modified
        assert module.get_buffer("channel_masks.orbit_0").tolist() == [1, 0, 0, 1]
        assert read_plan(module) == plan


def test_bad_input(tmp_path: Path) -> None:
    plan = read_plan(masked(Concatenation()))
    with pytest.raises(UsageError, match="run mask-insertion before"):
        PlanApplication(plan)(traced(Residual()))
    with pytest.raises(PlanError, match="for another model"):
        PlanApplication(plan)(masked(Residual()))
    with pytest.raises(PlanError, match="cannot read the plan"):
        PlanApplication(str(tmp_path / "absent.json"))(masked(Residual()))


def test_round_trip() -> None:
    plan = read_plan(masked(Residual()), model="Residual", spec="mask-insertion", seed=3)
    assert fxprune.Plan.from_json(plan.to_json()) == plan
