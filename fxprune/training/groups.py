"""Parameter groups: what hooks claim, and one main group for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from fxprune.errors import InputError, SpecError
from fxprune.training.hooks import Hook
from fxprune.training.options import Training

__all__ = ["make_optimizer"]


def make_optimizer(module: nn.Module, hooks: Sequence[Hook], options: Training) -> Optimizer:
    """Return the optimizer over the main group and those of the hooks.

    Raises `InputError` when nothing requires a gradient, `SpecError` when hooks claim what is not theirs to claim or
    the optimizer's callable returns something else.
    """
    claimed = _claimed(module, hooks, options.learning_rate)
    taken = {id(parameter) for group in claimed for parameter in group["params"]}
    rest = [parameter for parameter in module.parameters() if parameter.requires_grad and id(parameter) not in taken]
    common: dict[str, Any] = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    groups = [{**common, **group} for group in ({"params": rest}, *claimed) if group["params"]]
    if not any(parameter.requires_grad for group in groups for parameter in group["params"]):
        raise InputError(
            "no parameter of the module requires a gradient; call module.requires_grad_() on what to train"
        )
    if options.optimizer == "sgd":
        return SGD(groups, lr=options.learning_rate, momentum=options.momentum, nesterov=options.nesterov)
    if options.optimizer == "adamw":
        return AdamW(groups, lr=options.learning_rate)
    assert callable(options.optimizer)
    optimizer = options.optimizer(groups)
    if not isinstance(optimizer, Optimizer):
        raise SpecError(f"the optimizer's callable returned a {type(optimizer).__name__}; return a torch Optimizer")
    return optimizer


def _claimed(module: nn.Module, hooks: Sequence[Hook], learning_rate: float) -> list[dict[str, Any]]:
    """Return the groups of all hooks, each parameter of the module in at most one."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    owners: dict[int, str] = {}
    groups = []
    for hook in hooks:
        for group in hook.parameter_groups(module, learning_rate):
            parameters = list(group["params"])
            for parameter in parameters:
                if id(parameter) not in names:
                    raise SpecError(
                        f"hook '{hook.name}' claims a parameter that is not the module's; register it there"
                    )
                if id(parameter) in owners:
                    raise SpecError(
                        f"hook '{hook.name}' claims '{names[id(parameter)]}', which hook '{owners[id(parameter)]}' has"
                    )
                owners[id(parameter)] = hook.name
            groups.append({**group, "params": parameters})
    return groups
