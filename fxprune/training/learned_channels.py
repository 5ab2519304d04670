"""Learned channel importance: gates that train with the weights until the network costs what it may (paper 001, §5.1).

The graph has gates (mask-insertion{kind=gate}). Training minimises loss + λ_c·ReLU(kFPP/target − 1) + λ_e·H, where H is
the entropy of the gates and both penalties are annealed; gate-hardening and channel-surgery cut what they gave up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.errors import SpecError, nearest
from fxprune.gating.gates import Gates
from fxprune.gating.trail import GateTrail
from fxprune.training.hooks import Hook, Moment

__all__ = ["ANNEALINGS", "LearnedChannels", "frozen_batchnorm"]

ANNEALINGS: dict[str, Callable[[float], float]] = {
    "target": lambda fraction: min(fraction / 0.7, 1.0),
    "weight": lambda fraction: math.expm1(-5 * fraction) / math.expm1(-5),
}
"""How far annealing has come, from 0 to 1, when a fraction of the planned steps has been taken."""

_LOOKS = 100
"""How often in a run the probabilities are kept for the trail, at most, besides at its beginning and end."""


@dataclass
class LearnedChannels(Hook):
    """Trains the gates of a graph towards a cost: what they keep, and that they decide.

    Two penalties join the task's loss at every step: ReLU(kFPP/target − 1), where MACs stand for kFPP since both have
    one ratio, and the mean entropy of the gates. Annealing keeps the network from losing all at once; its r goes from 0
    to 1:

    * "weight" is the paper's (§5.1): r is a factor on both penalties and approaches 1 exponentially.
    * "target" has r on the entropy, and the target itself come down from the cost at first: kFPP/goal for a goal of
      start + r·(target − start), with r linear, 1 after 0.7 of the steps. The network follows closely. In runs of some
      hundred steps, where gates must move fast, the factor lets them swing below the target, from where those that have
      decided do not come back.

    Train with `keep_best=False` and `tolerance=None`: the loss of a network that loses channels rises.

    Attributes:
        macs: the target, in multiply-accumulates of one run on the example inputs.
        cost_weight: λ_c, against the task's loss as it is: less for losses of some hundredths, as of images. The paper
            does not tell its own; with cross-entropy 1 can leave the network above its target.
        entropy_weight: λ_e.
        annealing: a name of `ANNEALINGS`, as above.
        gate_rate: learning rate of the gates over that of the weights, but for what all logits of a gate share; none of
            it gets weight decay. The paper's is 1, for an epoch of ImageNet; 10 to 30 decide in a few hundred steps.
        freeze_batchnorm: keep batch norms, where they are modules, in evaluation mode, "quite importantly" (§6.2);
            `frozen_batchnorm` keeps their scales and shifts, which no hook can.
    """

    macs: float
    cost_weight: float = 10.0
    entropy_weight: float = 0.1
    annealing: str = "target"
    gate_rate: float = 10.0
    freeze_batchnorm: bool = True
    _steps: list[int] = field(default_factory=list, init=False, repr=False)
    _looks: list[Tensor] = field(default_factory=list, init=False, repr=False)
    _shares: list[float] = field(default_factory=list, init=False, repr=False)
    _gates: Gates | None = field(default=None, init=False, repr=False)

    name = "learned-channels"

    def __post_init__(self) -> None:
        if self.annealing not in ANNEALINGS:
            raise SpecError(f"unknown annealing '{self.annealing}'; {nearest(self.annealing, ANNEALINGS)}")
        for option in ("macs", "gate_rate"):
            if not 0 < getattr(self, option) < math.inf:
                raise SpecError(f"{option} is {getattr(self, option)}; give a number above 0")
        for option in ("cost_weight", "entropy_weight"):
            if not 0 <= getattr(self, option) < math.inf:
                raise SpecError(f"{option} is {getattr(self, option)}; give a number, 0 or more")

    def settings(self) -> dict[str, Any]:
        """Return all options."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init}

    def parameter_groups(self, module: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
        """Claim what the gates learn with: `gate_rate` times the learning rate, and no weight decay.

        What the logits of a gate share learns at the plain rate: it moves all of them, and as fast as the rest it
        would decide on whole orbits at once.
        """
        self._gates, self._steps, self._looks, self._shares = None, [], [], []  # a run begins
        gates = [gate for _, gate in self._of(module).pairs]
        shared = [parameter for gate in gates for parameter in gate.shared()]
        known = {id(parameter) for parameter in shared}
        own = [parameter for gate in gates for parameter in gate.parameters() if id(parameter) not in known]
        return [
            {"params": parameters, "lr": rate, "weight_decay": 0.0}
            for parameters, rate in ((own, learning_rate * self.gate_rate), (shared, learning_rate))
            if parameters
        ]

    def before_epoch(self, module: nn.Module, moment: Moment) -> None:
        """Freeze the statistics of batch norms, which `module.train()` has thawed."""
        if moment.step == 0:
            self._look(module, moment)
        if self.freeze_batchnorm:
            for part in _batch_norms(module):
                part.eval()

    def penalty(self, module: nn.Module, moment: Moment) -> Tensor:
        """Return what the expected cost above the target and the entropy of the gates add to the loss."""
        gates = self._of(module)
        logits = gates.logits()
        reached = ANNEALINGS[self.annealing](moment.fraction)
        factor, goal = reached, self.macs
        if self.annealing == "target":
            start = self._shares[0] * gates.whole
            factor, goal = 1.0, start + reached * (self.macs - start)
        excess = (gates.expected_macs(logits) / goal - 1).relu()
        total = factor * self.cost_weight * excess + reached * self.entropy_weight * gates.entropy(logits)
        return total.float().to(next(module.parameters()).device)

    def after_step(self, module: nn.Module, moment: Moment) -> None:
        """Look at the gates now and then."""
        if moment.step % math.ceil(moment.steps / _LOOKS) == 0 or moment.step == moment.steps:
            self._look(module, moment)

    def columns(self, module: nn.Module, moment: Moment) -> Mapping[str, float]:  # noqa: ARG002
        """Return the expected share of the MACs, that of the network in evaluation, and the undecided gates'."""
        gates = self._of(module)
        logits = gates.logits().detach()
        return {
            "expected_macs": float(gates.expected_macs(logits)) / gates.whole,
            "hard_macs": gates.hard_macs(logits) / gates.whole,
            "undecided": gates.undecided(logits),
        }

    def trail(self, module: nn.Module) -> GateTrail:
        """Return what the gates of a module said in training."""
        gates = self._of(module)
        parts = gates.by_orbit(torch.stack(self._looks))
        probabilities = {orbit.name: part for (orbit, _), part in zip(gates.pairs, parts, strict=True)}
        layers = {orbit.name: orbit.layers for orbit, _ in gates.pairs}
        return GateTrail(tuple(self._steps), probabilities, tuple(self._shares), layers)

    def state_dict(self) -> dict[str, Any]:
        """Return what the gates have said so far; their logits are in the module."""
        return {"steps": self._steps, "looks": self._looks, "shares": self._shares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._steps, self._looks = list(state["steps"]), list(state["looks"])
        self._shares = list(state["shares"])

    def _of(self, module: nn.Module) -> Gates:
        """Return the gates of the module in training; what is coupled there does not change in a run."""
        if self._gates is None:
            if not isinstance(module, fx.GraphModule):
                raise SpecError("learned-channels trains a graph with gates; run mask-insertion{kind=gate} on it first")
            self._gates = Gates(module)
        return self._gates

    def _look(self, module: nn.Module, moment: Moment) -> None:
        gates = self._of(module)
        logits = gates.logits().detach()
        self._steps.append(moment.step)
        self._looks.append(logits.sigmoid().float())
        self._shares.append(float(gates.expected_macs(logits)) / gates.whole)


def _batch_norms(module: nn.Module) -> Iterator[nn.Module]:
    return (part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))


@contextmanager
def frozen_batchnorm(module: nn.Module) -> Iterator[None]:
    """Keep the scales and shifts of batch norms from being trained inside the block."""
    ours = [parameter for part in _batch_norms(module) for parameter in part.parameters() if parameter.requires_grad]
    for parameter in ours:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in ours:
            parameter.requires_grad_(True)
