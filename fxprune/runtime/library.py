"""The operators of a lowered model in `torch.library`'s namespace `fxprune`: schema, fake kernel, kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxprune.runtime import native

__all__ = ["define", "run_on_cpu"]

_LIBRARY = torch.library.Library("fxprune", "DEF")

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], *, is_compiled: bool = True) -> Any:
    """Define an operator and return it.

    `kernel` is pure torch and serves every device with float64; one that is compiled for the CPU takes precedence.

    Args:
        schema: `name(Tensor input, …) -> Tensor`, as torch.library reads it.
        kernel: what the operator computes, bit for bit.
        fake: the same for shapes and dtypes alone.
        is_compiled: the compiled library has a kernel for it, and the first call on a CPU loads that library.
    """
    name = schema.partition("(")[0]

    def first(input: Tensor, *arguments: Any) -> Any:  # noqa: A002
        if input.device.type == "cpu" and native.load():
            return run_on_cpu(operator, input, *arguments)
        return kernel(input, *arguments)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, first if is_compiled else kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxprune::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.fxprune, name).default
    return operator


def run_on_cpu(operator: Any, *arguments: Any) -> Any:
    """Run the CPU's own kernel, the compiled one once that is loaded, wherever torch would send these arguments.

    Another tensor than the input may be on another device, by which torch chooses; called as usual, the operator would
    come back to whoever called it.
    """
    return operator.redispatch(_CPU, *arguments)
