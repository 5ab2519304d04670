"""Bad input: one clear message each."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from fxprune.errors import InputError, SpecError, UsageError
from fxprune.training import Hook, Moment, Training, classification, cross_entropy, train
from tests.training.tasks import (
    Claim,
    Stream,
    Watch,
    by_epoch,
    loader,
    net,
    state,
)


class Empty(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(())


def _frozen() -> nn.Module:
    return net().requires_grad_(False)


class Clash(Hook):
    name = "clash"

    def columns(self, module: nn.Module, moment: Moment) -> Mapping[str, float]:  # noqa: ARG002
        return {"step": 1.0}


class Foreign(Hook):
    name = "foreign"

    def parameter_groups(self, module: nn.Module, learning_rate: float) -> list[dict[str, Any]]:  # noqa: ARG002
        return [{"params": [nn.Parameter(torch.ones(1))]}]


class Other(Claim):
    name = "other"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batches": iter([1])}, InputError, "the batches are a list_iterator, used up after one epoch; give a Data"),
        ({"validation": iter([1])}, InputError, "used up after one epoch"),
        ({"batches": []}, InputError, "there are too few batches: each of the 1 processes needs one"),
        ({"batches": DataLoader(Stream(), 4)}, InputError, r"no length; set Training\(steps_per_epoch=…\)"),
        ({"batches": DataLoader(Empty(), 4), "options": Training(1, steps_per_epoch=1)}, InputError, "gave nothing in"),
        ({"module": _frozen()}, InputError, "no parameter of the module requires a gradient; call"),
        ({"loss": lambda m, b: m(b[0])}, InputError, r"the loss returned a tensor \[8, 2\]; return a scalar"),
        ({"loss": lambda m, b: 1.0}, InputError, "the loss returned a float; return a scalar"),  # noqa: ARG005
        ({"validation": []}, InputError, "the validation data give no batch"),
        ({"measure": classification}, SpecError, "there is a measure but nothing to measure on"),
        ({"validation": loader(), "measure": lambda m, b: {"top1": 1}}, SpecError, "measure returned top1; return a"),  # noqa: ARG005
        ({"hooks": [Watch(), Watch()]}, SpecError, "2 hooks have the name 'watch'; give each its own"),
        ({"hooks": [Watch(measuring=True)]}, UsageError, "there are no validation data; give validation="),
        ({"hooks": [Clash()]}, SpecError, "hook 'clash' adds a column 'step', which the log has; rename it"),
        ({"hooks": [Foreign()]}, SpecError, "hook 'foreign' claims a parameter that is not the module's"),
        ({"hooks": [Claim(), Other()]}, SpecError, "hook 'other' claims '6.bias', which hook 'claim' has"),
        ({"options": Training(1, 0.1, lambda g: "sgd")}, SpecError, "callable returned a str; return a torch"),  # noqa: ARG005
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"module": net(), "batches": loader(), "loss": cross_entropy, "options": Training(1, 0.1), **arguments}
    with pytest.raises(error, match=message):
        train(**given)


def _broken(module: nn.Module, batch: Any) -> Tensor:
    """Return a loss that is NaN from a marked batch on."""
    loss = cross_entropy(module, batch)
    return loss * math.nan if loss.item() < 0.67 else loss


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    module = net()
    with pytest.raises(InputError, match=r"the loss is nan at step \d+ of 50 \(epoch \d+\); lower learning_rate"):
        train(module, loader(), _broken, Training(10, 0.1))
    assert all(torch.isfinite(value).all() for value in state(module).values())
    with pytest.raises(InputError, match=r"the validation loss is nan after epoch 1"):
        train(net(), loader(), cross_entropy, Training(1), validation=loader(), measure=by_epoch([math.nan])[1])


def test_the_extra_is_needed_only_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, fxprune, fxprune.training; sys.exit('accelerate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UsageError, match=r"training needs the extra: pip install 'fxprune\[train\]'"):
        train(net(), loader(), cross_entropy, Training(1))


def test_sharded_training_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = pytest.importorskip("accelerate")
    monkeypatch.setattr(accelerate.Accelerator, "distributed_type", accelerate.DistributedType.FSDP)
    with pytest.raises(UsageError, match="a whole module in every process, but this was launched for FSDP"):
        train(net(), loader(), cross_entropy, Training(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0; give a whole number, 1 or more"),
        ({"epochs": 1.5}, "epochs is 1.5; give a whole number, 1 or more"),
        ({"epochs": "3"}, "epochs is '3'; give a whole number"),
        ({"learning_rate": 0}, "learning_rate is 0; give a number above 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan; give a number above 0"),
        ({"momentum": 1}, r"momentum is 1; give a number in \[0, 1\)"),
        ({"momentum": 0, "nesterov": True}, "nesterov is True; give False where momentum is 0"),
        ({"weight_decay": -1}, "weight_decay is -1; give a number, 0 or more"),
        ({"clip_norm": 0}, "clip_norm is 0; give a number above 0, or None"),
        ({"steps_per_epoch": 0}, "steps_per_epoch is 0; give a whole number, 1 or more, or None"),
        ({"tolerance": math.inf}, "tolerance is inf; give a number, 0 or more, or None"),
        ({"smoothing": 1.0}, r"smoothing is 1.0; give a number in \[0, 1\)"),
        ({"seed": -1}, r"seed is -1; give a whole number in \[0, 2\*\*32\)"),
        ({"optimizer": "sdg"}, "optimizer is 'sdg'; did you mean 'sgd'"),
        ({"schedule": 3}, "schedule is 3; known: cosine, constant; or give a callable"),
        ({"mixed_precision": "bf61"}, "mixed_precision is 'bf61'; did you mean 'bf16'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Training(**{"epochs": 1, **options})
