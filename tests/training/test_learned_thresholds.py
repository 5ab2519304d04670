"""Learned threshold pruning as a whole: any layer, the penalty, where training stops, what is left at the end."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from fxprune.errors import InputError, SpecError
from fxprune.runtime.thresholds import hard_pruning
from fxprune.training import cross_entropy
from fxprune.training.learned_thresholds import (
    LearnedThresholds,
    attach_thresholds,
    hard_state,
    harden,
    layer_sparsities,
)
from tests.training.thresholded import PRUNED, Net, batches, moment, raise_thresholds, run, thresholded, thresholds


def test_every_kind_of_layer_is_pruned_and_keeps_its_name() -> None:
    model = thresholded()
    raise_thresholds(model, 0.5)
    before, effective = dict(Net().named_parameters()), hard_state(model)
    masks = harden(model)
    assert set(masks) == {"conv.weight", "depthwise.weight", "squeeze.weight", "excite.weight", "head.weight"}
    assert {name: value.shape for name, value in model.named_parameters()} == {k: v.shape for k, v in before.items()}
    state = model.state_dict()
    assert state.keys() == Net().state_dict().keys()
    assert effective.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(value, effective[name])
    for name, mask in masks.items():
        assert torch.equal(mask, state[name] != 0)
        assert float(mask.float().mean()) == pytest.approx(0.5, abs=0.07)


def test_hardening_a_copy_leaves_the_original_pruned_softly() -> None:
    model = thresholded(temperature=0.1)
    raise_thresholds(model, 0.5)
    twin, x = copy.deepcopy(model).eval(), torch.randn(2, 1, 8, 8)
    model.eval()
    before = model(x)
    with hard_pruning(model):
        hard = model(x)
    harden(twin)
    assert not thresholds(twin)
    assert torch.equal(twin(x), hard)
    assert torch.equal(model(x), before)
    assert not torch.equal(hard, before)
    harden(model)
    assert torch.equal(model(x), hard)


def test_a_hardened_parameter_is_the_one_that_the_optimizer_has() -> None:
    model = Net()
    weight = model.conv.weight
    attach_thresholds(model, PRUNED)
    harden(model)
    assert model.conv.weight is weight
    assert type(model.conv) is nn.Conv2d


def test_tied_weights_share_a_threshold_and_stay_tied() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    attach_thresholds(model, [("embed", "weight")])
    assert len(thresholds(model)) == 1
    raise_thresholds(model, 0.5)
    assert layer_sparsities(model) == {"embed.weight": (12, 24)}
    assert torch.equal(model["embed"].weight, model["head"].weight)
    masks = harden(model)
    assert torch.equal(masks["embed.weight"], masks["head.weight"])
    assert model["embed"].weight is model["head"].weight
    assert int((model["head"].weight == 0).sum()) == 12


def test_a_layer_used_twice_in_a_step_is_penalised_once(tmp_path: Path) -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    attach_thresholds(model, [("0", "weight"), ("2", "weight")])
    hook = LearnedThresholds(tmp_path, regularization=1.0)
    penalty = hook.penalty(model, moment(0, dict))
    assert penalty is not None
    kept = thresholds(model)["0.parametrizations.weight.0"].soft_norm(shared.parametrizations.weight.original)
    assert float(penalty.detach()) == pytest.approx(float(kept.detach()))
    (model(torch.ones(1, 4)).sum() + penalty).backward()
    assert shared.parametrizations.weight[0].threshold.grad is not None


def test_regularization_grows_where_it_is_told_to(tmp_path: Path) -> None:
    model = thresholded()

    def penalty(step: int, ramp: float) -> float:
        found = LearnedThresholds(tmp_path, ramp=ramp).penalty(model, moment(step, dict))  # of 100 steps
        assert found is not None
        return float(found.detach())

    whole = penalty(0, 0.0)
    assert whole > 0
    assert penalty(50, 0.0) == whole
    assert [penalty(step, 2.0) / whole for step in (0, 50, 100)] == pytest.approx([0, 0.25, 1])


def test_the_penalty_has_its_gradient_whatever_ran_before(tmp_path: Path) -> None:
    model, hook = thresholded(temperature=0.1), LearnedThresholds(tmp_path)
    with torch.no_grad():
        model.eval()(torch.ones(1, 1, 8, 8))
    penalty = hook.penalty(model, moment(0, dict))
    assert penalty is not None
    penalty.backward()
    assert all(part.threshold.grad is not None and part.threshold.grad < 0 for part in thresholds(model).values())


def test_gradients_are_the_same_under_data_parallelism(tmp_path: Path) -> None:
    alone, together = thresholded(temperature=0.1), thresholded(temperature=0.1)
    hook = LearnedThresholds(tmp_path / "trace", regularization=1.0)
    distributed.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        for module, wrapped in ((alone, alone), (together, nn.parallel.DistributedDataParallel(together))):
            penalty = hook.penalty(module, moment(0, dict))
            assert penalty is not None
            (cross_entropy(wrapped, batches(1)[0]) + penalty).backward()
    finally:
        distributed.destroy_process_group()
    for mine, theirs in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_thresholds_get_their_own_rate_and_no_weight_decay_and_stay_above_zero(tmp_path: Path) -> None:
    model, hook = thresholded(), LearnedThresholds(tmp_path, threshold_rate=1e-6)
    (group,) = hook.parameter_groups(model, 0.1)
    assert (group["lr"], group["weight_decay"]) == (pytest.approx(1e-7), 0.0)
    assert {id(p) for p in group["params"]} == {id(part.threshold) for part in thresholds(model).values()}
    for part in thresholds(model).values():
        part.threshold.data.fill_(-1.0)
    hook.after_step(model, moment(1, dict))
    assert all(float(part.threshold.detach()) == 0 for part in thresholds(model).values())


def test_the_penalty_makes_networks_sparse_and_a_larger_one_sparser(tmp_path: Path) -> None:
    found = []
    for strength in (0.0, 1e-3, 1e-2):
        _, hook, _ = run(tmp_path / str(strength), regularization=strength)
        found.append(hook.trace.checkpoints[-1].sparsity)
    assert found == sorted(found)
    assert found[0] < 0.2
    assert found[1] > found[0] + 0.1
    assert found[2] > found[1] + 0.1


def test_training_stops_at_the_target(tmp_path: Path) -> None:
    _, hook, history = run(tmp_path, target=0.3, regularization=1e-2)
    *earlier, last = [record.extras["sparsity"] for record in history.records]
    assert history.stopped_by == hook.name
    assert all(sparsity < 0.3 for sparsity in earlier)
    assert last >= 0.3
    assert hook.trace.checkpoints[-1].step == history.records[-1].step < 32
    assert hook.trace.checkpoints[-1].sparsity == last


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([("cone", "weight")], r"no module 'cone'; did you mean 'conv'\?"),
        ([("conv", "wait")], r"module 'conv' has no parameter 'wait'; did you mean 'weight'\?"),
        ([("conv", "bias")], "module 'conv' has no parameter 'bias'"),
        ([("head", "weight")], r"'head\.weight' is parametrised already"),
        ([("squeeze", "weight")], r"'squeeze\.weight' holds a value that is not finite"),
    ],
)
def test_what_cannot_have_a_threshold_is_refused_and_nothing_changes(
    layers: list[tuple[str, str]], message: str
) -> None:
    model = thresholded([("head", "weight")])
    model.squeeze.weight.data[0] = torch.nan
    with pytest.raises(InputError, match=message):
        attach_thresholds(model, [("excite", "weight"), *layers])
    assert len(thresholds(model)) == 1


@pytest.mark.parametrize(
    "options",
    [{"regularization": -1}, {"threshold_rate": 0}, {"ramp": -1}, {"growth": 0}, {"target": 1.0}, {"interval": 0}],
    ids=str,
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: dict[str, float]) -> None:
    with pytest.raises(SpecError, match=next(iter(options))):
        LearnedThresholds(tmp_path, **options)
    with pytest.raises(SpecError, match="temperature"):
        thresholded(temperature=0.0)


def test_a_model_without_thresholds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="attach_thresholds"):
        LearnedThresholds(tmp_path).parameter_groups(Net(), 0.1)
