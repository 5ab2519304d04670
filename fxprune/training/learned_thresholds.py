"""Learned threshold pruning: thresholds that train with the weights, and the trail of sparser networks they leave.

Azarian et al. 2020 (arXiv:2003.00075). The whole of it, with equations as numbered there:

    attach_thresholds(model, [("layer1.0.conv1", "weight"), …])      soft pruning, Eq. 2; temperatures, Eq. 15
    train(model, …, hooks=[LearnedThresholds("trace")])              Eq. 6, 9, 11, 13; writes the trace
    load_checkpoint(plain, Trace.read("trace").at(sparsity=0.8).path)    or: masks = harden(model)
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fxprune.errors import ArtifactError, InputError, SpecError, nearest
from fxprune.runtime.thresholds import LearnedThreshold, hard_pruning
from fxprune.runtime.weight_masks import full_name, own_class, parametrized, place_of, unparametrize
from fxprune.training.history import Record
from fxprune.training.hooks import Hook, Moment
from fxprune.training.traces import Checkpoint, Trace

__all__ = ["LearnedThresholds", "attach_thresholds", "hard_state", "harden", "layer_sparsities"]

_ROUNDING = 1e-9
"""Added before rounding down: 0.15 / 0.05 is less than 3."""


def attach_thresholds(
    module: nn.Module, layers: Iterable[tuple[str, str]], temperature: float = 1e-3, exact: bool = False
) -> None:
    """Give every listed tensor a threshold of its own, 0 at first: its module uses it softly pruned from now on.

    Any floating parameter will do. Tied parameters share one threshold, wherever they are used, and stay tied.

    Args:
        module: the model, changed in place.
        layers: (path of the owner, name of the tensor), such as ("layer1.0.conv1", "weight").
        temperature: T₀ of Eq. 15.
        exact: see `LearnedThreshold`.

    Raises:
        InputError: for a tensor that is absent, parametrised already, not floating, empty or not finite.
        SpecError: for a temperature that is not positive.
    """
    if not temperature > 0:
        raise SpecError(f"a temperature of {temperature} prunes nothing softly; give a positive one, such as 1e-3")
    tensors = [_parameter(module, path, name) for path, name in layers]
    made = {id(tensor): LearnedThreshold(tensor, temperature, exact) for tensor in tensors}
    for owner in list(module.modules()):
        for name, tensor in list(owner.named_parameters(recurse=False)):
            if id(tensor) in made and not isinstance(owner, parametrize.ParametrizationList):
                own_class(owner)
                parametrize.register_parametrization(owner, name, made[id(tensor)], unsafe=True)


def _parameter(module: nn.Module, path: str, name: str) -> Tensor:
    """Return a parameter that can have a threshold."""
    full = full_name(path, name)
    owners = dict(module.named_modules(remove_duplicate=False))
    if path not in owners:
        raise InputError(f"the model has no module '{path}'; {nearest(path, owners)}")
    if parametrize.is_parametrized(owners[path], name):
        raise InputError(f"'{full}' is parametrised already; bake that in first, as weight_masks.finalize does")
    tensors = dict(owners[path].named_parameters(recurse=False))
    if name not in tensors:
        raise InputError(f"module '{path}' has no parameter '{name}'; {nearest(name, tensors)}")
    tensor = tensors[name]
    if not tensor.is_floating_point() or tensor.numel() == 0:
        raise InputError(f"'{full}' is {tensor.dtype} {tuple(tensor.shape)}; thresholds need floating values")
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"'{full}' holds a value that is not finite; restore a sound checkpoint")
    return tensor


def harden(module: nn.Module) -> dict[str, Tensor]:
    """Replace every threshold by what it prunes, in place: weights are kept where w² > τ, else zero (Eq. 1).

    Returns the masks of what is kept, bool by the weight's name. Copies of the module keep their thresholds.
    """
    masks = {}
    with hard_pruning(module):
        for path, owner, name, threshold in list(parametrized(module, LearnedThreshold)):
            masks[full_name(path, name)] = threshold.hard_mask(_original(owner, name))
            unparametrize(owner, name)
    return masks


def hard_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state_dict that `harden` would leave, without changing the module."""
    state = module.state_dict()
    with hard_pruning(module), torch.no_grad():
        for path, owner, name, _ in parametrized(module, LearnedThreshold):
            ours = full_name(path, f"parametrizations.{name}.")
            state = {key: value for key, value in state.items() if not key.startswith(ours)}
            state[full_name(path, name)] = getattr(owner, name)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def layer_sparsities(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (weights that hard pruning zeroes, all weights) of every tensor with a threshold, tied ones once."""
    masks: dict[int, tuple[str, Tensor]] = {}
    for path, owner, name, threshold in parametrized(module, LearnedThreshold):
        masks.setdefault(id(threshold), (full_name(path, name), threshold.hard_mask(_original(owner, name))))
    return {name: (mask.numel() - int(mask.sum()), mask.numel()) for name, mask in masks.values()}


def _original(owner: nn.Module, name: str) -> Tensor:
    place, attribute = place_of(owner, name)
    return getattr(place, attribute)


@dataclass
class LearnedThresholds(Hook):
    """Trains the thresholds of a model and writes its trace: one checkpoint each time sparsity has grown by a step.

    The thresholds get a parameter group of their own, the loss gets λ·ΣL0 (Eq. 9), and no threshold falls below 0.
    The first checkpoint is the network as it came, the last one as the planned steps or the target left it. All are
    measured hard-pruned. Train with `keep_best=False` and `tolerance=None`, for the loss of a network that is being
    pruned rises, and without `clip_norm`: the gradient of a threshold is many times that of the weights.

    Attributes:
        folder: where the trace goes; a run that is resumed goes on with the one that it began.
        regularization: λ, which decides the sparsity that is reached. L0 counts weights, so the more weights a model
            has, the smaller; table 1 has 5e-8 to 2e-6.
        threshold_rate: η_τ/η, the learning rate of thresholds over that of weights. 1e-7 to 1e-5 work (§4.1) with
            plain or momentum SGD; methods that scale each gradient by its size need a rate of the order of squared
            weights.
        ramp: λ grows with the planned steps, as their fraction to this power. 0 is the paper's constant λ, which at
            once prunes all that it can of a network whose weights crowd around zero; 2 passes through the sparsities
            evenly, for runs too short to recover from that.
        growth: how much sparser each checkpoint is than the one before.
        target: the sparsity at which to stop, at the end of that epoch; None trains on.
        interval: steps from one look at the sparsity to the next.
    """

    folder: str | os.PathLike[str]
    regularization: float = 2e-6
    threshold_rate: float = 1e-5
    ramp: float = 0.0
    growth: float = 0.05
    target: float | None = None
    interval: int = 10
    trace: Trace = field(init=False, repr=False)

    name = "learned-thresholds"

    def __post_init__(self) -> None:
        for option, sound in (
            ("regularization", self.regularization >= 0),
            ("threshold_rate", self.threshold_rate > 0),
            ("ramp", self.ramp >= 0),
            ("growth", 0 < self.growth <= 1),
            ("target", self.target is None or 0 < self.target < 1),
            ("interval", self.interval >= 1),
        ):
            if not sound:
                raise SpecError(f"{option}={getattr(self, option)} is out of range; see LearnedThresholds")
        self.trace = Trace(Path(self.folder), uuid.uuid4().hex)

    def settings(self) -> dict[str, Any]:
        """Return all options but the folder."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init and one.name != "folder"}

    def parameter_groups(self, module: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
        """Claim the thresholds: `threshold_rate` times the learning rate, and no weight decay."""
        thresholds = [part.threshold for part in _thresholds(module)]
        if not thresholds:
            raise InputError("the model has no thresholds to learn; call attach_thresholds(model, layers) first")
        return [{"params": thresholds, "lr": learning_rate * self.threshold_rate, "weight_decay": 0.0}]

    def before_epoch(self, module: nn.Module, moment: Moment) -> None:
        """Begin the trace with the network as it came."""
        if moment.step == 0:
            self.trace = self._on_disk().until(-1)
            self._record(module, moment)

    def penalty(self, module: nn.Module, moment: Moment) -> Tensor | None:
        """Return λ·ΣL0 over all tensors with a threshold (Eq. 6 and 9), tied ones once."""
        found = {id(part): (owner, name, part) for _, owner, name, part in parametrized(module, LearnedThreshold)}
        norms = [part.soft_norm(_original(owner, name)) for owner, name, part in found.values()]
        return self.regularization * moment.fraction**self.ramp * torch.stack(norms).sum()

    @torch.no_grad()
    def after_step(self, module: nn.Module, moment: Moment) -> None:
        """Keep the thresholds at 0 or above; write a checkpoint where sparsity has grown enough."""
        for part in _thresholds(module):
            part.threshold.clamp_(min=0)
        if moment.step % self.interval == 0 and self._has_grown(_sparsity(module)):
            self._record(module, moment)

    def columns(self, module: nn.Module, moment: Moment) -> Mapping[str, float]:  # noqa: ARG002
        """Return the sparsity that hard pruning would give."""
        return {"sparsity": _sparsity(module)}

    def after_epoch(self, module: nn.Module, moment: Moment, record: Record) -> bool:  # noqa: ARG002
        """Stop at the target sparsity; end the trace with the network as training left it."""
        stop = self.target is not None and _sparsity(module) >= self.target
        if (stop or moment.step == moment.steps) and self._last_step() < moment.step:
            self._record(module, moment)
        return stop

    def state_dict(self) -> dict[str, Any]:
        """Return which run this is, and the last step of its trace; the rest is in the folder."""
        return {"run": self.trace.run, "step": self._last_step()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the trace as it was then: what was written later is going to be written anew."""
        self.trace = Trace(self.trace.folder, str(state["run"]))
        self.trace = self._on_disk().until(int(state["step"]))

    def _on_disk(self) -> Trace:
        """Return the trace in the folder. Raises `ArtifactError` when it is another run's."""
        found = Trace.read(self.folder)
        if found.checkpoints and found.run != self.trace.run:
            raise ArtifactError(
                f"'{self.folder}' holds the trace of another run, and nothing is overwritten; give another folder"
            )
        return replace(found, run=self.trace.run)

    def _record(self, module: nn.Module, moment: Moment) -> None:
        with hard_pruning(module):
            measures = dict(moment.measure())
        counts = layer_sparsities(module)
        path = self.trace.folder / f"step-{moment.step:07d}.safetensors"
        layers = {name: zeros / total for name, (zeros, total) in counts.items()}
        checkpoint = Checkpoint(path, moment.step, moment.epoch, _total(counts), layers, measures)
        if _writes():
            self.trace = self.trace.add(checkpoint, hard_state(module))
        else:
            self.trace = replace(self.trace, checkpoints=(*self.trace.checkpoints, checkpoint))

    def _has_grown(self, sparsity: float) -> bool:
        """Whether a multiple of `growth` lies between the sparsest checkpoint and `sparsity`."""
        levels = [math.floor(one.sparsity / self.growth + _ROUNDING) for one in self.trace.checkpoints]
        return math.floor(sparsity / self.growth + _ROUNDING) > max(levels, default=-1)

    def _last_step(self) -> int:
        return self.trace.checkpoints[-1].step if self.trace.checkpoints else -1


def _thresholds(module: nn.Module) -> list[LearnedThreshold]:
    return [part for part in module.modules() if isinstance(part, LearnedThreshold)]


def _sparsity(module: nn.Module) -> float:
    return _total(layer_sparsities(module))


def _total(counts: Mapping[str, tuple[int, int]]) -> float:
    return sum(zeros for zeros, _ in counts.values()) / sum(total for _, total in counts.values())


def _writes() -> bool:
    """Whether this process is the one that writes files."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
