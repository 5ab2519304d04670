"""The operators of a lowered model in `torch.library`'s namespace `fxprune`: schema, fake kernel, kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["define"]

_LIBRARY = torch.library.Library("fxprune", "DEF")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator and return it.

    `kernel` is pure torch and serves every device; a kernel that is compiled for the CPU takes precedence over it.

    Args:
        schema: `name(Tensor input, …) -> Tensor`, as torch.library reads it.
        kernel: what the operator computes, bit for bit.
        fake: the same for shapes and dtypes alone.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxprune::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fxprune, name).default
