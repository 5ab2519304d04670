from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fxprune
from fxprune.errors import SpecError, TargetError
from fxprune.graph.passes import Pipeline, parse_spec
from fxprune.plan import read_weight_masks
from passes import PASSES, WeightPlanApplication, WeightSparsification
from tests.passes.nets import Residual, traced


def test_golden(golden: Callable[[str, str], None]) -> None:
    torch.manual_seed(0)
    module = traced(Residual())
    sparse = Pipeline((WeightSparsification(sparsity=0.5, layers=("all",)),))(module).graph_module
    golden("weight_sparsification_residual", fxprune.diff(module, sparse))


def test_a_pass_tells_whether_it_changed_anything() -> None:
    step = WeightSparsification(sparsity=0.5, layers=("all",))
    first = Pipeline((step,))(traced(Residual()))
    assert first.modified
    again = Pipeline((step,))(first.graph_module)
    assert not again.modified, "the pass is not idempotent"
    assert fxprune.dump(again.graph_module) == fxprune.dump(first.graph_module)


def test_the_input_is_untouched() -> None:
    module = traced(Residual())
    before = fxprune.dump(module)
    Pipeline((WeightSparsification(sparsity=0.5, layers=("all",)),))(module)
    assert fxprune.dump(module) == before
    assert not read_weight_masks(module)


def test_spec_strings() -> None:
    spec = "weight-sparsification{macs=50%,block=2x4,scope=global,layers=conv|head,max_sparsity=0.9}"
    (step,) = parse_spec(spec, PASSES)
    assert step == WeightSparsification(
        macs="50%", block="2x4", scope="global", layers=("conv", "head"), max_sparsity=0.9
    )
    assert str(step) == spec


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ("sparsity=2", TargetError, "outside"),
        ("scope=uniform", TargetError, "exactly one target"),
        ("sparsity=0.5,blocks=1x4", SpecError, "did you mean 'block'"),
    ],
)
def test_bad_options(options: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Pipeline(parse_spec(f"weight-sparsification{{{options}}}", PASSES))(traced(Residual()))


def test_a_plan_is_applied_by_a_pass_of_its_own() -> None:
    sparse = Pipeline((WeightSparsification(sparsity=0.5, layers=("all",)),))(traced(Residual())).graph_module
    plan = fxprune.Plan((), read_weight_masks(sparse))
    again = Pipeline((WeightPlanApplication(plan),))(traced(Residual())).graph_module
    assert fxprune.dump(again) == fxprune.dump(sparse)
    assert read_weight_masks(again) == plan.weights
