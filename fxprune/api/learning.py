"""Learn which channels matter."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from fxprune.api.results import Result, Source, rewrite
from fxprune.errors import InputError, SpecError, nearest
from fxprune.gating.gates import Gates
from fxprune.gating.trail import GateTrail
from fxprune.graph.inputs import ExampleInputs, Inputs
from fxprune.graph.passes import Observer
from fxprune.report import some_of
from fxprune.runtime.masks import gates_of
from fxprune.selection import read_amount, read_patterns
from fxprune.training.history import History
from fxprune.training.learned_channels import LearnedChannels, frozen_batchnorm
from fxprune.training.loop import train
from fxprune.training.objectives import Loss, Measure
from fxprune.training.options import Training
from passes import ChannelSurgery, GateHardening, MaskInsertion

__all__ = ["CUTS", "Learned", "learn_channels"]

CUTS = ("target", "probability")
"""Where gates are cut: so that the target is met, or at a probability of 0.5 as in the paper."""


@dataclass(frozen=True)
class Learned:
    """What `learn_channels` gives back.

    Attributes:
        result: the model without the channels that the gates gave up, with the weights that it learned beside them.
        history: of the training.
        trail: what the gates said meanwhile.
    """

    result: Result
    history: History
    trail: GateTrail


def learn_channels(
    model: nn.Module,
    example_inputs: ExampleInputs,
    batches: Iterable[Any],
    loss: Loss,
    training: Training,
    *,
    macs: float | str,
    block: int = MaskInsertion.block,
    logits: str = MaskInsertion.logits,
    cut: str = CUTS[0],
    cost_weight: float = LearnedChannels.cost_weight,
    entropy_weight: float = LearnedChannels.entropy_weight,
    gate_rate: float = LearnedChannels.gate_rate,
    annealing: str = LearnedChannels.annealing,
    freeze_batchnorm: bool = LearnedChannels.freeze_batchnorm,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    allow_statistical: bool = False,
    attention: str = "dimensions",
    validation: Iterable[Any] | None = None,
    measure: Measure | None = None,
    folder: str | os.PathLike[str] | None = None,
    frontend: str = "auto",
    observers: Iterable[Observer] = (),
) -> Learned:
    """Train a copy of a model with gates on channels that may leave, and cut those that the gates give up (ACPLI).

    Paper 001. Gates and weights train together on the task's loss, the expected cost above the target and the entropy
    of the gates; the result is meant to be fine-tuned, best by `fxprune.training.distill`.

    Args:
        model: any floating-point module; it is not changed.
        example_inputs: as in `prune`.
        batches: training data, as in `fxprune.training.train`.
        loss: (module, batch) → scalar, likewise; of any task.
        training: how to train. The paper has Adam with a learning rate of 1e-4 and batches of 16, for 1 to 10 epochs.
            The last weights are kept and all epochs are run, whatever it says of that.
        macs: multiply-accumulates to leave: a share ("50%", 0.5) or a count (2e9).
        block: channels that are gated together, as 32; the best block of every orbit stays.
        logits: "predicted" from feature maps, or "trained" as parameters of their own. A predictor has a weight for
            every channel and block of its orbit, in transformers more than the model has; blocks make it small.
        cut: "target" removes the least probable channels until the target is met, "probability" those below 0.5,
            wherever that leads.
        cost_weight: of the cost above the target, in the loss.
        entropy_weight: of the entropy of the gates, in the loss.
        gate_rate: learning rate of the gates over that of the weights, but for what all logits of a gate share.
        annealing: "target" lets the target come down while training goes on, "weight" the weight of the cost go up, as
            in the paper.
        freeze_batchnorm: keep batch norms as they are meanwhile; those that are functions cannot be.
        include: layers whose output channels get gates, by name, glob or type; all by default.
        exclude: layers whose output channels get none.
        allow_statistical: also gate channels that share statistics (layer norm), where the cut is approximate.
        attention: what may leave attention, as in `prune`.
        validation: data to measure the model on after every epoch, as its gates would leave it.
        measure: what to measure.
        folder: makes the run resumable.
        frontend: "auto", "symbolic" or "export".
        observers: called after every pass.

    Raises `TargetError` before any training when the target cannot be reached, and what tracing and training raise.
    """
    if cut not in CUTS:
        raise SpecError(f"unknown cut '{cut}'; {nearest(cut, CUTS)}")
    masks = MaskInsertion(
        attention,
        "gate",
        block,
        logits,
        include=read_patterns(include),
        exclude=read_patterns(exclude),
        allow_statistical=allow_statistical,
    )
    hardening = GateHardening(macs if cut == "target" else None)
    steps = (hardening, ChannelSurgery())
    spec = ",".join(step.record() for step in (masks, *steps))
    source = Source(model, Inputs.of(example_inputs), frontend, spec, training.seed)
    gated = rewrite(source, (masks,), None, observers)
    gates = _gates(gated.module, block)
    amount = read_amount(macs, "macs", gates.whole)
    gates.within(amount)  # an unreachable target fails here, before training
    hook = LearnedChannels(amount, cost_weight, entropy_weight, annealing, gate_rate, freeze_batchnorm)
    options = replace(training, keep_best=False, tolerance=None)
    with frozen_batchnorm(gated.module) if freeze_batchnorm else nullcontext():
        history = train(
            gated.module, batches, loss, options, validation=validation, measure=measure, hooks=[hook], folder=folder
        )
    notes = (*_notes(gates, amount, cut), *(_thawed(gated.module) if freeze_batchnorm else ()))
    result = rewrite(source, steps, hardening, observers, start=gated.module)
    return Learned(replace(result, notes=notes), history, hook.trail(gated.module))


def _gates(module: fx.GraphModule, block: int) -> Gates:
    """Return the gates of a graph. Raises `InputError` where none could be put."""
    if not gates_of(module):
        raise InputError(
            "no gate can be put anywhere: of the chosen layers no channels may leave exactly, or they are one block "
            f"of {block}; choose other layers (fxprune inspect shows what is pinned), a smaller block, or "
            "allow_statistical"
        )
    return Gates(module)


def _notes(gates: Gates, target: float, cut: str) -> Iterator[str]:
    """Say where the gates were when training ended, and why, where that is not at the target."""
    logits = gates.logits().detach()
    hard, expected, undecided = gates.hard_macs(logits), float(gates.expected_macs(logits)), gates.undecided(logits)
    yield (
        f"the gates keep {hard / gates.whole:.1%} of the MACs, the target is {target / gates.whole:.1%} "
        f"({hard / target - 1:+.1%} off){_mended(gates, target) if cut == 'target' else ''}"
    )
    if expected > target * (1 + _CLOSE):
        yield (
            f"the gates had not come down to the target when training ended: {expected / gates.whole:.1%} of the MACs "
            "were expected; train for longer, or with a larger gate_rate or cost_weight"
        )
    if hard < target * (1 - _CLOSE):
        yield (
            "the gates gave up more than they had to: the task hardly needs these channels, or they moved too fast to "
            "come back; a lower gate_rate, entropy_weight or cost_weight holds them"
        )
    if undecided > _MANY:
        yield f"{undecided:.1%} of the gates had not decided; raise entropy_weight or epochs"


_CLOSE = 0.02
_MANY = 0.1
"""A target is missed by more than 2 %; gates in doubt are worth a word when they are more than a tenth."""


def _mended(gates: Gates, target: float) -> str:
    """Say what the cut to the target changes of what the gates keep."""
    own, kept = (torch.cat(list(masks.values())).bool() for masks in (gates.masks(), gates.within(target)))
    gone, back = int((own & ~kept).sum()), int((~own & kept).sum())
    changes = [f"{gone:,} more channels leave"] * bool(gone) + [f"{back:,} that they gave up stay"] * bool(back)
    return f"; to meet it {' and '.join(changes)}" if changes else ""


def _thawed(module: fx.GraphModule) -> Iterator[str]:
    """Say which batch norms could not be frozen."""
    calls = [node.name for node in module.graph.nodes if "batch_norm" in getattr(node.target, "__name__", "")]
    if calls:
        yield f"batch norms that are functions were not frozen: {some_of(calls)}"
