"""What a step does, and what hooks see and decide."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fxprune.errors import InputError
from fxprune.training import Hook, Moment, Training, classification, cross_entropy, train
from tests.training.tasks import (
    Claim,
    Stream,
    Watch,
    assert_same_state,
    exact_loader,
    loader,
    masked_net,
    net,
    state,
)

PLAIN: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "tolerance": None}


def test_it_learns() -> None:
    module = net()
    history = train(
        module, loader(80), cross_entropy, Training(15, 0.1), validation=exact_loader(80, 16), measure=classification
    )
    assert history.records[-1].measures["accuracy"] > 0.9
    assert history.records[-1].measures["loss"] < history.records[0].measures["loss"] / 2


def test_the_seed_decides_the_weights() -> None:
    first, again, other = net(), net(), net()
    for module, seed in ((first, 3), (again, 3), (other, 4)):
        train(module, loader(), cross_entropy, Training(2, seed=seed))
    assert_same_state(state(first), state(again))
    assert not torch.equal(first[0].weight, other[0].weight)


@pytest.mark.parametrize("optimizer", ["sgd", lambda groups: torch.optim.SGD(groups)])
def test_a_step_is_gradient_descent_on_loss_and_penalty(optimizer: Any) -> None:
    """By hand: w ← w − η (∇loss + ∇penalty + λ w), the gradient clipped as a whole before the decay."""
    module = nn.Linear(6, 2).double()
    batch = (torch.randn(8, 6).double(), torch.randint(2, (8,)))
    by_hand = copy.deepcopy(module)
    (cross_entropy(by_hand, batch) + by_hand.weight.pow(2).sum()).backward()
    norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.1)
    assert norm > 0.1
    expected = [p.detach() - 0.5 * (p.grad + 0.01 * p.detach()) for p in by_hand.parameters() if p.grad is not None]

    class Shrink(Hook):
        def penalty(self, module: nn.Module, moment: Moment) -> Tensor:
            assert moment.step == 0
            return module.get_parameter("weight").pow(2).sum()

    options = Training(1, 0.5, optimizer, **{**PLAIN, "weight_decay": 0.01}, clip_norm=0.1)
    history = train(module, [batch], cross_entropy, options, hooks=[Shrink()])
    for parameter, value in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-12, atol=0)
    assert history.records[0].train_loss == pytest.approx(cross_entropy(by_hand, batch).item())
    assert history.records[0].penalty == pytest.approx(by_hand.weight.pow(2).sum().item())


def test_claimed_parameters_have_their_own_rate_and_decay() -> None:
    options = Training(2, 0.1, weight_decay=0.5)
    free, still, undecayed = net(), net(), net()
    train(free, loader(), cross_entropy, options)
    train(still, loader(), cross_entropy, options, hooks=[Claim(lr=0.0)])
    train(undecayed, loader(), cross_entropy, options, hooks=[Claim(weight_decay=0.0)])
    assert torch.equal(still[6].bias, net()[6].bias)
    assert not torch.equal(still[6].weight, net()[6].weight)
    assert not torch.equal(undecayed[6].bias, free[6].bias)
    defaults = net()
    train(defaults, loader(), cross_entropy, options, hooks=[Claim()])
    assert_same_state(state(defaults), state(free))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_masked_weights_stay_zero(optimizer: str) -> None:
    module = masked_net()
    before = state(module)
    train(module, loader(), cross_entropy, Training(3, 0.05, optimizer, nesterov=True, weight_decay=0.1))
    for layer in (module[0], module[4]):
        mask = layer.parametrizations.weight[0].mask
        assert 0 < mask.sum() < mask.numel()
        assert torch.all(layer.weight[~mask] == 0)
        assert torch.all(layer.weight[mask] != 0)
    assert not torch.equal(module[0].parametrizations.weight.original, before["0.parametrizations.weight.original"])


def test_hooks_get_the_module_itself_at_the_right_moments() -> None:
    module, watch = net(), Watch()
    train(module, loader(16, 8), cross_entropy, Training(2), hooks=[watch])
    assert all(seen is module for seen in watch.modules)
    epochs = [
        [
            ("before epoch", epoch, start),
            ("penalty", epoch, start),
            ("after step", epoch, start + 1),
            ("penalty", epoch, start + 1),
            ("after step", epoch, start + 2),
            ("after epoch", epoch, start + 2),
        ]
        for epoch, start in ((1, 0), (2, 2))
    ]
    assert [moment[:3] for moment in watch.moments] == [*epochs[0], *epochs[1]]
    assert all(moment[3] == moment[2] / 4 for moment in watch.moments)


def test_a_hook_stops_the_run() -> None:
    one, other = Watch(stop_after=2), Watch()
    other.name = "other"
    history = train(net(), loader(), cross_entropy, Training(5), hooks=[one, other])
    assert history.stopped_by == "watch"
    assert len(history.records) == len(other.states) == 2


class Frozen(Hook):
    def before_epoch(self, module: nn.Module, moment: Moment) -> None:  # noqa: ARG002
        assert all(part.training for part in module.modules())
        module.get_submodule("1").eval()

    def after_step(self, module: nn.Module, moment: Moment) -> None:
        moment.measure()
        assert [name for name, part in module.named_children() if not part.training] == ["1"]


def test_a_hook_can_freeze_batch_norms() -> None:
    module = net()
    before = state(module)
    train(module, loader(), cross_entropy, Training(2), validation=loader(8), hooks=[Frozen()])
    assert torch.equal(module[1].running_mean, before["1.running_mean"])
    assert not torch.equal(module[1].weight, before["1.weight"])


def test_the_learning_rate_follows_the_schedule() -> None:
    seen: list[float] = []

    def halve(fraction: float) -> float:
        seen.append(fraction)
        return 0.5**fraction

    for schedule, factor in (("cosine", lambda f: (1 + math.cos(math.pi * f)) / 2), (halve, lambda f: 0.5**f)):
        history = train(net(), loader(16, 4), cross_entropy, Training(2, 0.1, schedule=schedule))
        assert [record.learning_rate for record in history.records] == pytest.approx(
            [0.1 * factor(3 / 8), 0.1 * factor(7 / 8)]
        )
    assert sorted(set(seen)) == [step / 8 for step in range(8)]


def test_every_epoch_sees_every_sample_in_an_order_of_its_own() -> None:
    seen: list[Tensor] = []

    def note(module: nn.Module, batch: Any) -> Tensor:
        seen.append(batch[0])
        return cross_entropy(module, batch)

    data = exact_loader(20, 4, shuffle=True)
    train(net(), data, note, Training(2))
    first, second = torch.cat(seen[:5]), torch.cat(seen[5:])
    points = data.dataset.tensors[0]  # type: ignore[attr-defined]
    assert not torch.equal(first, second)
    for epoch in (first, second):
        assert torch.equal(epoch[epoch[:, 0].argsort()], points[points[:, 0].argsort()])


@pytest.mark.parametrize("batches", [[next(iter(loader()))] * 3, DataLoader(Stream(), 4)], ids=["list", "stream"])
def test_batches_of_other_kinds(batches: Any) -> None:
    for limit, steps in ((2, 4), (3, 6), (9, 6)):
        history = train(net(), batches, cross_entropy, Training(2, steps_per_epoch=limit))
        assert history.records[-1].step == steps


def test_data_that_break_later_are_the_users_to_mend() -> None:
    class Breaking:
        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Iterator[Any]:
            yield next(iter(exact_loader(8, 4)))
            raise OSError("the disk is gone")

    with pytest.raises(InputError, match="reading the batches failed in epoch 1: OSError: the disk is gone"):
        train(net(), Breaking(), cross_entropy, Training(1))
