"""The operators of a lowered model in `torch.library`'s namespace `fxprune`: schema, fake kernel, kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxprune.runtime import native

__all__ = ["define"]

_LIBRARY = torch.library.Library("fxprune", "DEF")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], *, is_compiled: bool = True) -> Any:
    """Define an operator and return it.

    `kernel` is pure torch and serves every device; a kernel that is compiled for the CPU takes precedence over it.

    Args:
        schema: `name(Tensor input, …) -> Tensor`, as torch.library reads it.
        kernel: what the operator computes, bit for bit.
        fake: the same for shapes and dtypes alone.
        is_compiled: the compiled library has a kernel for it, and the first call on a CPU loads that library.
    """
    name = schema.partition("(")[0]

    def first(input: Tensor, *arguments: Any) -> Any:  # noqa: A002
        if input.device.type == "cpu" and native.load():
            return operator(input, *arguments)
        return kernel(input, *arguments)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, first if is_compiled else kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxprune::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.fxprune, name).default
    return operator
