"""Masks that grow while a model trains, and thresholds that learn: from a model to a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.errors import SpecError, TargetError, UsageError
from fxprune.plan import read_weight_masks
from fxprune.runtime.weight_masks import masked_weights
from fxprune.sparsity.schedules import SCHEDULES, find_schedule
from fxprune.sparsity.selection import Sparsifier
from fxprune.training import Hook, Moment, Training, classification, cross_entropy, train
from fxprune.training.gradual import GradualSparsity
from tests.sparsity.nets import Bottleneck, Tied, image


def _model() -> nn.Module:
    torch.manual_seed(0)
    return Bottleneck().eval()


def _batches(count: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(4 * count, 3, 8, 8, generator=generator)
    labels = (10 * images.mean((1, 2, 3)) + 5 * images[:, 0].amax((1, 2))).long() % 10
    return DataLoader(TensorDataset(images, labels), 4, shuffle=True)


class Watch(Hook):
    """Writes down the masks after every step."""

    name = "watch"

    def __init__(self) -> None:
        self.masks: list[dict[str, Tensor]] = []

    def after_step(self, module: nn.Module, moment: Moment) -> None:  # noqa: ARG002
        self.masks.append({name: mask.mask.clone() for name, mask in masked_weights(module).items()})


def _sparsity(masks: dict[str, Tensor]) -> float:
    return 1 - sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_never_falls_and_ends_at_one(name: str) -> None:
    schedule = SCHEDULES[name]
    values = [schedule(way / 20) for way in range(21)]
    assert values == sorted(values)
    assert values[-1] == 1


def test_the_cubic_schedule_is_that_of_zhu_and_gupta() -> None:
    initial, final, steps = 0.0, 0.9, 10
    for step in range(steps + 1):
        published = final + (initial - final) * (1 - step / steps) ** 3
        assert final * find_schedule("cubic")(step / steps) == pytest.approx(published)


@pytest.mark.parametrize("schedule", [*SCHEDULES, lambda way: way**2])
def test_masks_grow_as_the_schedule_says_and_never_shrink(schedule: Any) -> None:
    watch = Watch()
    result = fxprune.sparsify(_model(), image(), sparsity=0, block="1x1")
    sparsifier = Sparsifier(sparsity=0.8, block="1x1")
    hook = GradualSparsity(result.module, sparsifier, schedule, start=0.25, end=0.75, interval=2)
    train(result.module, _batches(), cross_entropy, Training(2), hooks=[hook, watch], progress=False)
    found = [_sparsity(masks) for masks in watch.masks]
    assert found[:3] == [0, 0, 0]
    assert found == sorted(found)
    assert found[11:] == [pytest.approx(0.8)] * 5
    expected = find_schedule(schedule)((8 - 4) / 8)
    assert found[7] == pytest.approx(0.8 * expected, abs=0.01)
    for before, after in zip(watch.masks, watch.masks[1:], strict=False):
        assert not any((after[name] & ~before[name]).any() for name in after)


def test_sparsify_gradually_gives_a_result(tmp_path: Path) -> None:
    model, x = _model(), image()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result, history = fxprune.sparsify_gradually(
        model, x, _batches(), cross_entropy, Training(2, tolerance=0.5), macs="70%", interval=3,
        validation=_batches(2), measure=classification,
    )  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the model changed"
    assert [record.epoch for record in history.records] == [1, 2]
    assert result.report.macs[1] <= 0.7 * result.report.macs[0]
    assert result.report.macs[1] > 0.69 * result.report.macs[0]
    assert result.plan.spec == "weight-sparsification{macs=70%}"
    assert result.plan.weights == read_weight_masks(result.module)
    fxprune.save(result, tmp_path / "saved")
    assert torch.equal(fxprune.load(tmp_path / "saved", _model()).module(x), result.module.eval()(x))


def test_the_plan_of_a_gradual_run_goes_back_to_the_model_before_all_cuts(tmp_path: Path) -> None:
    x, slim = image(), fxprune.prune(_model(), image(), ratio=0.2)
    result, _ = fxprune.sparsify_gradually(slim.module, x, _batches(2), cross_entropy, Training(1), sparsity=0.5)
    assert result.plan.spec == f"{slim.plan.spec},weight-sparsification{{sparsity=0.5}}"
    fxprune.save(result, tmp_path / "saved")
    assert torch.equal(fxprune.load(tmp_path / "saved", _model()).module(x), result.module.eval()(x))


def test_a_killed_gradual_run_goes_on(tmp_path: Path) -> None:
    class Kill(Hook):
        name = "kill"
        at = 13

        def after_step(self, module: nn.Module, moment: Moment) -> None:  # noqa: ARG002
            if moment.step == self.at:
                raise KeyboardInterrupt

    def run(folder: Path, at: int) -> nn.Module:
        result = fxprune.sparsify(_model(), image(), sparsity=0, block="1x1")
        sparsifier = Sparsifier(sparsity=0.8, block="1x1")
        kill = Kill()
        kill.at = at
        hooks = [GradualSparsity(result.module, sparsifier, interval=2), kill]
        train(result.module, _batches(), cross_entropy, Training(3), hooks=hooks, folder=folder, progress=False)
        return result.module

    whole = run(tmp_path / "whole", -1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", 13)
    again = run(tmp_path / "killed", -1)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"schedule": "cubical"}, SpecError, "did you mean 'cubic'"),
        ({"start": 0.8, "end": 0.5}, SpecError, "give 0 ≤ start < end ≤ 1"),
        ({"interval": 0}, SpecError, "interval is 0"),
        ({"sparsity": None, "macs": "1%"}, TargetError, "cannot be reached"),
        ({"sparsity": None}, TargetError, "exactly one target"),
        ({"layers": ["conv9"]}, SpecError, "conv9"),
    ],
)
def test_bad_options_fail_before_training(options: dict[str, Any], kind: type[UsageError], message: str) -> None:
    def never(*_: Any) -> Tensor:
        raise AssertionError("trained")

    with pytest.raises(kind, match=message):
        fxprune.sparsify_gradually(_model(), image(), _batches(), never, Training(1), **{"sparsity": 0.5} | options)


def test_thresholds_are_learned_from_a_model_to_a_result(tmp_path: Path) -> None:
    model, x = _model(), image()
    trace = fxprune.learn_thresholds(
        model, x, _batches(), cross_entropy, Training(4, learning_rate=0.05), folder=tmp_path, validation=_batches(2),
        measure=classification, regularization=1e-2, threshold_rate=1e-3, interval=1, growth=0.1,
    )  # fmt: skip
    assert not masked_weights(model)
    last = trace.checkpoints[-1]
    assert last.sparsity > 0.2
    assert {"loss", "accuracy"} <= last.measures.keys()
    result = fxprune.apply_checkpoint(model, x, trace.at(sparsity=0.2))
    zeros = sum(int((~mask.mask).sum()) for mask in masked_weights(result.module).values())
    total = sum(mask.mask.numel() for mask in masked_weights(result.module).values())
    assert zeros / total == pytest.approx(trace.at(sparsity=0.2).sparsity)
    tuned = {name: mask.mask.clone() for name, mask in masked_weights(result.module).items()}
    train(result.module, _batches(), cross_entropy, Training(1), progress=False)
    for name, mask in tuned.items():
        weight: Tensor = result.module.get_submodule(name.removesuffix(".weight")).weight  # type: ignore[assignment]
        assert not weight[~mask].any()
    fxprune.save(result, tmp_path / "saved")
    assert torch.equal(fxprune.load(tmp_path / "saved", _model()).module(x), result.module.eval()(x))


def test_thresholds_of_tied_weights_become_masks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokens = [(torch.randint(12, (4, 6)),) for _ in range(4)]
    trace = fxprune.learn_thresholds(
        Tied(), tokens[0], tokens, lambda module, batch: module(batch[0]).square().mean(), Training(2), folder=tmp_path,
        validation=tokens, regularization=1e-2, threshold_rate=1e-2, interval=1, growth=0.1,
    )  # fmt: skip
    module = fxprune.apply_checkpoint(Tied(), tokens[0], trace.checkpoints[-1]).module
    assert {"embedding.weight", "head.weight"} <= masked_weights(module).keys()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trace = fxprune.learn_thresholds(
        _model(), image(), _batches(2), cross_entropy, Training(1), folder=tmp_path, validation=_batches(2)
    )
    with pytest.raises(UsageError, match="does not fit the model"):
        fxprune.apply_checkpoint(nn.Sequential(nn.Conv2d(3, 8, 1)).eval(), image(), trace.checkpoints[-1])


def test_thresholds_refuse_a_clipped_gradient(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="clip_norm would scale"):
        fxprune.learn_thresholds(
            _model(), image(), [], cross_entropy, Training(1, clip_norm=1.0), folder=tmp_path, validation=[]
        )
    assert not list(tmp_path.iterdir())
