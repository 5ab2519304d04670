"""Learned channels: gates that train with the weights, of any task, resumed, in two processes."""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.errors import ArtifactError, InputError, SpecError, TargetError
from fxprune.gating.gates import Gates
from fxprune.graph.passes import Pipeline
from fxprune.runtime.masks import gates_of
from fxprune.training import LearnedChannels, Moment, Training, classification, cross_entropy, train
from fxprune.training.learned_channels import ANNEALINGS
from passes import ChannelSurgery, GateHardening, MaskInsertion
from tests.laws import EXACT, assert_close
from tests.training.tasks import Interrupt, assert_same_state

EXAMPLE = torch.zeros(1, 3, 8, 8)
QUICK = Training(4, 0.01, optimizer="adamw", weight_decay=0.0, schedule="constant")


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.body, self.head = nn.Conv2d(12, 16, 3, padding=1), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head(self.body(x).relu().mean((2, 3)))


class Dense(nn.Module):
    """A U-shaped network: one output for every pixel."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.down, self.low = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 16, 3, stride=2, padding=1)
        self.up, self.out = nn.ConvTranspose2d(16, 12, 2, stride=2), nn.Conv2d(24, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down(x).relu()
        return self.out(torch.cat([high, self.up(self.low(high).relu()).relu()], 1))


def images() -> Tensor:
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def labelled(targets: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(images(), targets), 8, shuffle=True)


def denoising(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    noisy, clean = batch
    return functional.l1_loss(module(noisy), clean)


TASKS: dict[str, tuple[Any, Any, Any]] = {
    "classification": (Classifier, (images()[:, 0].mean((1, 2)) > 0).long(), cross_entropy),
    "segmentation": (lambda: Dense(2), (images()[:, 0] > 0).long(), cross_entropy),
    "denoising": (lambda: Dense(3), images() / 2, denoising),
}


def task(name: str = "classification") -> tuple[nn.Module, DataLoader[Any], Any]:
    build, targets, loss = TASKS[name]
    torch.manual_seed(0)
    return build().eval(), labelled(targets), loss


@pytest.mark.parametrize("logits", ["predicted", "trained"])
@pytest.mark.parametrize("name", TASKS)
def test_any_task_is_cut_to_its_target(name: str, logits: str) -> None:
    model, batches, loss = task(name)
    before = copy.deepcopy(model.state_dict())
    learned = fxprune.learn_channels(model, EXAMPLE, batches, loss, QUICK, macs="50%", logits=logits)
    macs = learned.result.report.macs
    assert 0.45 < macs[1] / macs[0] <= 0.5
    assert_same_state(model.state_dict(), before)
    assert learned.history.stopped_by == "epochs"
    assert not learned.result.module.training
    assert gates_of(learned.result.module) == {}
    assert all(parameter.requires_grad for parameter in learned.result.module.parameters())
    last = learned.history.records[-1].extras
    assert last["expected_macs"] < 0.75 < 0.85 < learned.trail.macs[0]


def test_weights_learn_beside_the_gates_and_batch_norms_stay() -> None:
    model, batches, loss = task()
    learned = fxprune.learn_channels(model, EXAMPLE, batches, loss, QUICK, macs="60%")
    slim = learned.result.module
    kept = learned.result.plan.orbits[0].kept
    norm, ours = model.norm, slim.get_submodule("norm")
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(ours, name), getattr(norm, name)[list(kept)]), name
    assert not torch.equal(slim.get_parameter("stem.weight"), model.stem.weight[list(kept)])
    thawed = fxprune.learn_channels(model, EXAMPLE, batches, loss, QUICK, macs="60%", freeze_batchnorm=False).result
    rest = list(thawed.plan.orbits[0].kept)
    assert not torch.equal(thawed.module.get_buffer("norm.running_mean"), model.norm.running_mean[rest])


def test_validation_measures_what_the_gates_would_leave() -> None:
    """Cut at a probability of 0.5, the model is the one that the last epoch measured."""
    model, batches, loss = task()
    learned = fxprune.learn_channels(
        model,
        EXAMPLE,
        batches,
        loss,
        QUICK,
        macs="50%",
        cut="probability",
        validation=batches,
        measure=classification,
    )
    inputs, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    found = float(functional.cross_entropy(learned.result.module(inputs), labels))
    assert found == pytest.approx(learned.history.records[-1].measures["loss"], rel=1e-5)
    macs = learned.result.report.macs
    assert macs[1] / macs[0] == pytest.approx(learned.history.records[-1].extras["hard_macs"])


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, loss = task()

    def learn(folder: str, **options: Any) -> fxprune.Learned:
        place = tmp_path / folder
        return fxprune.learn_channels(model, EXAMPLE, batches, loss, QUICK, macs="50%", folder=place, **options)

    whole = learn("whole")
    after_step = LearnedChannels.after_step

    def interrupted(self: LearnedChannels, module: nn.Module, moment: Moment) -> None:
        if moment.step == 21:
            raise KeyboardInterrupt
        after_step(self, module, moment)

    monkeypatch.setattr(LearnedChannels, "after_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn("killed")
    monkeypatch.undo()
    resumed = learn("killed")
    assert_same_state(resumed.result.module.state_dict(), whole.result.module.state_dict())
    assert resumed.result.plan.orbits == whole.result.plan.orbits
    assert resumed.trail.steps == whole.trail.steps
    assert resumed.trail.macs == whole.trail.macs
    for name, values in whole.trail.probabilities.items():
        assert torch.equal(resumed.trail.probabilities[name], values)
    with pytest.raises(ArtifactError, match=r"cost_weight of learned-channels was 10\.0, is now 1\.0"):
        fxprune.learn_channels(
            model, EXAMPLE, batches, loss, QUICK, macs="50%", cost_weight=1.0, folder=tmp_path / "whole"
        )


def test_the_trail_has_every_block_from_beginning_to_end() -> None:
    model, batches, loss = task()
    learned = fxprune.learn_channels(model, EXAMPLE, batches, loss, QUICK, macs="50%", block=4)
    trail = learned.trail
    assert trail.steps[0] == 0
    assert trail.steps[-1] == 32
    assert {name: tuple(values.shape) for name, values in trail.probabilities.items()} == {
        "orbit_0": (33, 3),
        "orbit_1": (33, 4),
    }
    assert trail.layers == {"orbit_0": ("stem",), "orbit_1": ("body",)}
    first = torch.cat([values[0] for values in trail.probabilities.values()])
    torch.testing.assert_close(first, torch.full((7,), 1 / (1 + math.exp(-3))))
    assert all(len(orbit.kept) % 4 == 0 for orbit in learned.result.plan.orbits)


def test_plans_of_learned_channels_replay(tmp_path: Path) -> None:
    model, batches, loss = task()
    result = fxprune.learn_channels(model, EXAMPLE, batches, loss, QUICK, macs="50%").result
    fxprune.save(result, tmp_path / "slim")
    loaded = fxprune.load(tmp_path / "slim", task()[0])
    assert_close(loaded.module(images()), result.module(images()), "loaded", 0)
    assert "mask-insertion{kind=gate}" in result.plan.spec
    assert "gate-hardening{macs=50%}" in result.plan.spec


def test_a_run_that_misses_its_target_says_so() -> None:
    model, batches, loss = task()
    short = Training(1, 1e-5, optimizer="adamw", steps_per_epoch=1)
    result = fxprune.learn_channels(model, EXAMPLE, batches, loss, short, macs="50%").result
    notes = " ".join(result.report.notes)
    assert "the gates keep 100.0% of the MACs, the target is 50.0% (+100.0% off)" in notes
    gone = sum(orbit.width - len(orbit.kept) for orbit in result.plan.orbits)
    assert f"to meet it {gone} more channels leave" in notes
    assert "the gates had not come down to the target when training ended: 9" in notes
    kept = fxprune.learn_channels(model, EXAMPLE, batches, loss, short, macs="50%", cut="probability").result
    assert kept.report.macs[0] == kept.report.macs[1]
    assert "to meet it" not in " ".join(kept.report.notes)


def test_gates_that_gave_up_too_much_get_channels_back() -> None:
    model, batches, loss = task()
    wild = Training(2, 1e-3, optimizer="adamw", schedule="constant")
    learned = fxprune.learn_channels(
        model, EXAMPLE, batches, loss, wild, macs="50%", gate_rate=1000.0, entropy_weight=0.0, annealing="weight"
    )
    notes, macs = " ".join(learned.result.report.notes), learned.result.report.macs
    assert learned.history.records[-1].extras["hard_macs"] < 0.4
    assert 0.45 < macs[1] / macs[0] <= 0.5
    assert "that they gave up stay" in notes
    assert "the gates gave up more than they had to" in notes


def test_batch_norms_that_are_functions_are_named() -> None:
    model, batches, loss = task()
    notes = [
        " ".join(
            fxprune.learn_channels(
                model, EXAMPLE, batches, loss, replace(QUICK, epochs=1), macs="50%", frontend=frontend
            ).result.report.notes
        )
        for frontend in ("export", "symbolic")
    ]
    assert "batch norms that are functions were not frozen: batch_norm" in notes[0]
    assert "batch norm" not in notes[1]


def test_a_hook_that_is_used_again_begins_anew() -> None:
    _, batches, loss = task()
    hook = LearnedChannels(1e4)
    for _ in range(2):
        module = gated()
        train(module, batches, loss, replace(QUICK, epochs=1), hooks=[hook])
        assert hook.trail(module).steps == tuple(range(9))


def test_a_target_out_of_reach_fails_before_training(tmp_path: Path) -> None:
    model, _, loss = task()
    with pytest.raises(TargetError, match="cannot be reached: the minimum is"):
        fxprune.learn_channels(model, EXAMPLE, _untouchable(), loss, QUICK, macs="0.1%", folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _untouchable() -> Any:
    class Batches:
        def __iter__(self) -> Any:
            raise AssertionError("training began")

        def __len__(self) -> int:
            raise AssertionError("training began")

    return Batches()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cut": "half"}, SpecError, r"unknown cut 'half'; known: target, probability"),
        ({"logits": "free"}, SpecError, r"unknown logits 'free'; .*trained"),
        ({"cost_weight": -1.0}, SpecError, r"cost_weight is -1\.0; give a number, 0 or more"),
        ({"gate_rate": 0.0}, SpecError, r"gate_rate is 0\.0; give a number above 0"),
        ({"macs": "150%"}, TargetError, r"macs=150% is more than the model has"),
        ({"annealing": "linear"}, SpecError, r"unknown annealing 'linear'; known: target, weight"),
        ({"include": "nothing"}, SpecError, r"no layer matches 'nothing'"),
        ({"block": 64}, InputError, r"no gate can be put anywhere: .* one block of 64; choose"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model, batches, loss = task()
    with pytest.raises(error, match=message):
        fxprune.learn_channels(model, EXAMPLE, batches, loss, QUICK, **{"macs": "50%", **options})


def gated(**options: Any) -> Any:
    model, _, _ = task()
    return Pipeline((MaskInsertion(kind="gate", **options),))(fxprune.trace(model, EXAMPLE)).graph_module


@pytest.mark.parametrize("annealing", ANNEALINGS)
def test_the_penalty_by_definition(annealing: str) -> None:
    module = gated()
    gates = Gates(module)
    logits = gates.logits()
    target, expected = 0.5 * gates.whole, float(gates.expected_macs(logits).detach())
    hook = LearnedChannels(target, cost_weight=2.0, entropy_weight=0.25, annealing=annealing)
    hook.before_epoch(module, Moment(1, 0, 10, dict))
    for step in (0, 3, 7, 10):
        if annealing == "weight":
            reached = (1 - math.exp(-5 * step / 10)) / (1 - math.exp(-5))
            cost = reached * (expected / target - 1)
        else:
            reached = min(step / 7, 1)
            cost = expected / (expected + reached * (target - expected)) - 1
        wanted = 2 * cost + reached * 0.25 * float(gates.entropy(logits).detach())
        found = float(hook.penalty(module, Moment(1, step, 10, dict)).detach())
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-9), step
    assert wanted > 1.5
    within = LearnedChannels(gates.whole, entropy_weight=0.0, annealing="weight")
    assert float(within.penalty(module, Moment(1, 10, 10, dict)).detach()) == 0


@pytest.mark.parametrize("logits", ["predicted", "trained"])
def test_what_logits_share_learns_at_the_rate_of_the_weights(logits: str) -> None:
    module = gated(logits=logits)
    groups = LearnedChannels(1e4, gate_rate=20.0).parameter_groups(module, 0.01)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    rates = {names[id(p)].rpartition(".")[2]: group["lr"] for group in groups for p in group["params"]}
    if logits == "trained":
        assert rates == {"logit": 0.2}
    else:
        shared = dict.fromkeys(("depthwise", "depthwise_bias"), 0.01)
        assert rates == {"pointwise": 0.2, "pointwise_bias": 0.2} | shared
    assert len(names) - sum(len(group["params"]) for group in groups) == len(list(task()[0].parameters()))


def test_other_modules_are_refused() -> None:
    model, batches, loss = task()
    with pytest.raises(SpecError, match=r"run mask-insertion\{kind=gate\}"):
        train(model, batches, loss, QUICK, hooks=[LearnedChannels(1e5)])


def test_interrupts_of_others_leave_the_model_alone(tmp_path: Path) -> None:
    module = gated()
    _, batches, loss = task()
    hook = LearnedChannels(0.5 * Gates(module).whole)
    with contextlib.suppress(KeyboardInterrupt):
        train(module, batches, loss, QUICK, hooks=[hook, Interrupt(5)], folder=tmp_path)
    assert not module.training


def test_exactness_after_learning() -> None:
    """In float64 the slim model equals the gated one in evaluation, weights and gates as training left them."""
    model, batches, loss = task("segmentation")
    doubled = [(x.double(), y) for x, y in batches]
    module = Pipeline((MaskInsertion(kind="gate"),))(fxprune.trace(model.double(), EXAMPLE.double())).graph_module
    train(module, doubled, loss, QUICK, hooks=[LearnedChannels(0.5 * Gates(module).whole, 10.0, gate_rate=10.0)])
    cut = Pipeline((GateHardening(), ChannelSurgery()))(module).graph_module
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())
    assert_close(cut(doubled[0][0]), module(doubled[0][0]), "after learning", EXACT)
