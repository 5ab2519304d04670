"""Example inputs: what a model is called with, in one normal form."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.errors import InputError
from fxprune.runtime.int8.layer import Int8Layer

__all__ = ["ExampleInputs", "Inputs", "check_model", "on_meta"]


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments of one call of the model."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(example_inputs: ExampleInputs) -> Inputs:
        """Normalise what users write: a tensor, a tuple of arguments, a dict of keyword arguments, or `Inputs`.

        A list is one argument (as detectors take their images), not several.
        """
        if isinstance(example_inputs, Inputs):
            return example_inputs
        if isinstance(example_inputs, Mapping):
            return Inputs(kwargs=dict(example_inputs))
        if isinstance(example_inputs, tuple):
            return Inputs(args=example_inputs)
        if isinstance(example_inputs, (Tensor, list)):
            return Inputs(args=(example_inputs,))
        raise InputError(
            f"example inputs of type {type(example_inputs).__name__}; give a tensor, a tuple of positional "
            "arguments, a dict of keyword arguments, or fxprune.Inputs(args, kwargs)"
        )

    def tensors(self) -> list[Tensor]:
        """All tensors, however deeply nested."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def bind(self, forward: Any) -> dict[str, Any]:
        """Name every given argument by the parameter of `forward` it binds to.

        Raises `InputError` with the signature when the model needs other inputs.
        """
        signature = inspect.signature(forward)
        try:
            return dict(signature.bind(*self.args, **self.kwargs).arguments)
        except TypeError as error:
            raise InputError(
                f"the example inputs do not fit the model: {error}; it is called as forward{signature}"
            ) from None


ExampleInputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any] | Inputs


def on_meta(value: Any) -> Any:
    """Return `value` with every tensor replaced by a meta tensor of equal size, stride and dtype."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    return pytree.tree_map_only(Tensor, on_meta, value)


_REFUSED = (torch.jit.ScriptModule, Int8Layer)


def check_model(model: nn.Module, inputs: Inputs) -> None:
    """Refuse what no pass can work on: quantised, compiled and lazy models, inputs without tensors or elsewhere."""
    for name, module in model.named_modules():
        if ".quantized" in type(module).__module__ or isinstance(module, _REFUSED):
            kind = "TorchScript" if isinstance(module, torch.jit.ScriptModule) else "quantised"
            raise InputError(
                f"module '{name or type(module).__name__}' is {kind}; fxprune prunes floating-point eager models: "
                "prune first, then quantise or script"
            )
        if isinstance(getattr(module, "_orig_mod", None), nn.Module):
            raise InputError(
                f"module '{name or type(module).__name__}' is compiled by torch.compile; give the module that was "
                "compiled (its attribute _orig_mod), and compile the result"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if torch.nn.parameter.is_lazy(tensor):
            raise InputError(f"'{name}' has no shape yet; call the model once, which initialises lazy modules")
    tensors = inputs.tensors()
    if not tensors:
        raise InputError("the example inputs hold no tensor; give at least one tensor as the model takes it")
    devices = {str(t.device) for t in (*model.parameters(), *model.buffers())}
    foreign = {str(t.device) for t in tensors} - devices
    if devices and foreign:
        raise InputError(
            f"the example inputs are on {', '.join(sorted(foreign))} but the model is on "
            f"{', '.join(sorted(devices))}; move one to the other with .to(device)"
        )
