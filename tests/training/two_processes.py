"""What test_distributed launches in two processes: six runs, whose ends each process writes to a file of its own."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from fxprune.gating.gates import Gates
from fxprune.graph.passes import Pipeline
from fxprune.training import (
    History,
    Hook,
    LearnedChannels,
    Moment,
    Training,
    classification,
    cross_entropy,
    train,
)
from passes import MaskInsertion
from tests.training.tasks import Interrupt, exact_loader, loader, masked_net, net, state

OPTIONS = Training(3, 0.1, tolerance=None, keep_best=False)


class Shrink(Hook):
    """A penalty that is computed beside the wrapped module, on a parameter with a group of its own."""

    name = "shrink"

    def parameter_groups(self, module: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
        return [{"params": [module.get_parameter("6.bias")], "lr": learning_rate / 2}]

    def penalty(self, module: nn.Module, moment: Moment) -> Tensor:  # noqa: ARG002
        return module.get_parameter("6.bias").pow(2).sum()

    def after_step(self, module: nn.Module, moment: Moment) -> None:
        if moment.step == 2:
            assert moment.measure().keys() == {"loss", "accuracy"}
        assert isinstance(module, nn.Sequential)


def smooth_net() -> nn.Module:
    """Return a network whose gradient is the mean of its samples' gradients."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def exact_loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(module, (batch[0].double(), batch[1]))


def train_masked(module: nn.Module, folder: Path, interrupted: int | None) -> History:
    hooks = [Shrink(), Interrupt(interrupted)]
    validation = exact_loader(21, 5)
    return train(
        module,
        loader(48, 4),
        cross_entropy,
        OPTIONS,
        validation=validation,
        measure=classification,
        hooks=hooks,
        folder=folder,
    )


def train_gated() -> nn.Module:
    """Train gates, whose averages each process moves by its own share of the data."""
    masks = MaskInsertion(kind="gate")
    module = Pipeline((masks,))(fxprune.trace(net().eval(), torch.zeros(2, 6))).graph_module
    hook = LearnedChannels(0.5 * Gates(module).whole)
    train(module, loader(48, 4), cross_entropy, OPTIONS, validation=exact_loader(21, 5), hooks=[hook])
    return module


def main(folder: Path) -> None:
    whole, resumed, exact = masked_net(), masked_net(), smooth_net()
    history = train_masked(whole, folder / "whole", None)
    with contextlib.suppress(KeyboardInterrupt):
        train_masked(resumed, folder / "resumed", 9)
    train_masked(resumed, folder / "resumed", None)
    train(exact, exact_loader(48, 4, shuffle=True), exact_loss, OPTIONS)
    listed, unvalidated = smooth_net(), masked_net()
    train(listed, list(exact_loader(52, 4)), exact_loss, OPTIONS)
    train(unvalidated, loader(48, 4), cross_entropy, OPTIONS)
    modules = {
        "whole": whole,
        "resumed": resumed,
        "exact": exact,
        "listed": listed,
        "unvalidated": unvalidated,
        "gated": train_gated(),
    }
    states = {name: state(module) for name, module in modules.items()}
    rank = torch.distributed.get_rank()
    torch.save({**states, "measures": dict(history.records[-1].measures)}, folder / f"process-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
