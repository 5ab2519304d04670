"""A small task whose training draws from every kind of random number generator, and hooks that watch it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fxprune.runtime.weight_masks import mask_weight
from fxprune.training import History, Hook, Moment, Record


class Jittered(Dataset[tuple[Tensor, Tensor]]):
    """Points and their sides of a plane; each is moved a little, by Python's, numpy's and torch's generators."""

    def __init__(self, size: int) -> None:
        self.points = torch.randn(size, 6, generator=torch.Generator().manual_seed(1))
        self.labels = (self.points.sum(dim=1) > 0).long()

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        move = 0.1 * (random.random() + np.random.rand() + torch.rand(6))
        return self.points[index] + move, self.labels[index]


def loader(size: int = 40, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    return DataLoader(Jittered(size), batch_size, shuffle=True, **options)


def exact_loader(size: int, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(TensorDataset(Jittered(size).points, Jittered(size).labels), batch_size, shuffle=shuffle)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)
    )


def masked_net(seed: int = 0) -> nn.Sequential:
    module = net(seed)
    for layer in (module[0], module[4]):
        mask_weight([(layer, "weight")], torch.rand(layer.weight.shape) > 0.5)
    return module


class Interrupt(Hook):
    """Interrupts the run after a step."""

    name = "interrupt"

    def __init__(self, step: int | None) -> None:
        self.step = step

    def after_step(self, module: nn.Module, moment: Moment) -> None:  # noqa: ARG002
        if moment.step == self.step:
            raise KeyboardInterrupt


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def untimed(history: History) -> list[dict[str, float | None]]:
    return [{name: value for name, value in one.row().items() if name != "seconds"} for one in history.records]


class Claim(Hook):
    """Claims the last bias, with options of its own."""

    name = "claim"

    def __init__(self, **options: Any) -> None:
        self.options = options

    def parameter_groups(self, module: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
        assert learning_rate == 0.1
        return [{"params": [module.get_parameter("6.bias")], **self.options}]


class Watch(Hook):
    """Notes all it sees."""

    name = "watch"

    def __init__(self, stop_after: int | None = None, measuring: bool = False) -> None:
        self.stop_after = stop_after
        self.measuring = measuring
        self.moments: list[tuple[str, int, int, float]] = []
        self.states: list[dict[str, Tensor]] = []
        self.modules: list[nn.Module] = []

    def _note(self, event: str, module: nn.Module, moment: Moment) -> None:
        self.modules.append(module)
        self.moments.append((event, moment.epoch, moment.step, moment.fraction))

    def before_epoch(self, module: nn.Module, moment: Moment) -> None:
        self._note("before epoch", module, moment)

    def penalty(self, module: nn.Module, moment: Moment) -> None:
        self._note("penalty", module, moment)

    def after_step(self, module: nn.Module, moment: Moment) -> None:
        self._note("after step", module, moment)
        if self.measuring:
            assert moment.measure().keys() == {"loss", "accuracy"}

    def after_epoch(self, module: nn.Module, moment: Moment, record: Record) -> bool:
        self._note("after epoch", module, moment)
        assert (record.epoch, record.step) == (moment.epoch, moment.step)
        self.states.append(state(module))
        return record.epoch == self.stop_after


def by_epoch(losses: list[float]) -> tuple[Hook, Callable[[nn.Module, Any], Mapping[str, Tensor]]]:
    """Return a hook and a measure that gives the loss written down for each epoch."""

    class Script(Hook):
        epoch = 1

        def before_epoch(self, module: nn.Module, moment: Moment) -> None:  # noqa: ARG002
            self.epoch = moment.epoch

    script = Script()
    return script, lambda module, batch: {"loss": torch.tensor(losses[script.epoch - 1], dtype=torch.float64)}  # noqa: ARG005


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from exact_loader(12, 1).dataset  # type: ignore[misc]
