"""What can compute `fxprune::block_sparse_int8_linear`, in order of preference.

| backend | what it is | results |
| --- | --- | --- |
| `native` | our C++ kernels, compiled on first use for this CPU | equal to `reference`, bit for bit |
| `onednn` | torch's dense int8 linear; zero blocks are multiplied like others | within one level of `reference` |
| `fbgemm` | torch's block-sparse int8 linear, for uint8 output | the same while sums of two products fit int16 |
| `reference` | plain torch, slow; runs on every device with float64 | the specification |

A backend that this machine does not have, or that cannot compute a layer, passes it on to the next that is exact.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fxprune.errors import SpecError, nearest
from fxprune.runtime import native
from fxprune.runtime.int8 import reference, vendor
from fxprune.runtime.library import run_on_cpu

__all__ = ["BACKENDS", "Backend", "compute", "refusal"]

_LOG = logging.getLogger("fxprune")


@dataclass(frozen=True)
class Backend:
    """One way to compute the operator.

    Attributes:
        run: takes the operator's arguments but the last.
        why_not: returns why this machine cannot run it, None where it can.
        blocks: the blocks (b_r, b_c) that it multiplies; None for any.
        dtypes: what it can give.
        is_exact: whether it gives what `reference` gives, but for the rounding of halves, whatever the input.
    """

    run: Callable[..., Tensor]
    why_not: Callable[[], str | None] = lambda: None
    blocks: tuple[tuple[int, int], ...] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.uint8, torch.float32)
    is_exact: bool = True

    def refusal(self, block: tuple[int, int], dtype: torch.dtype) -> str | None:
        """Return why it cannot compute a layer of this block and output here, None where it can."""
        if self.blocks is not None and block not in self.blocks:
            return f"it has no kernel for blocks of {block[0]}x{block[1]}"
        if dtype not in self.dtypes:
            return f"it gives no {str(dtype).removeprefix('torch.')}"
        return self.why_not()


def _native(*arguments: Any) -> Tensor:
    """Run the compiled kernel: since the library is loaded, it is the operator's own on CPUs."""
    return run_on_cpu(torch.ops.fxprune.block_sparse_int8_linear.default, *arguments, "native")


BACKENDS = {
    "native": Backend(_native, native.why_not, blocks=((1, 4), (2, 4), (4, 4))),
    "onednn": Backend(vendor.onednn, vendor.why_no_onednn),
    "fbgemm": Backend(vendor.fbgemm, vendor.why_no_fbgemm, blocks=((1, 4),), dtypes=(torch.uint8,), is_exact=False),
    "reference": Backend(reference.linear),
}


def refusal(backend: str, block: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Return why a backend cannot compute a layer on this machine, None where it can."""
    return BACKENDS[backend].refusal(block, dtype)


@cache
def _resolve(backend: str, block: tuple[int, int], dtype: torch.dtype) -> Backend:
    """Return the backend, or the first after it that can; says so once for each kind of layer.

    Raises `SpecError` for one that does not exist.
    """
    if backend not in BACKENDS:
        raise SpecError(f"unknown backend '{backend}'; {nearest(backend, BACKENDS)}")
    reason = refusal(backend, block, dtype)
    if reason is None:
        return BACKENDS[backend]
    names = list(BACKENDS)
    behind = [name for name in names[names.index(backend) + 1 :] if BACKENDS[name].is_exact]
    taken = next(name for name in behind if refusal(name, block, dtype) is None)
    _LOG.info("backend '%s' cannot compute %dx%d blocks here, '%s' does: %s", backend, *block, taken, reason)
    return BACKENDS[taken]


def compute(input: Tensor, values: Tensor, *arguments: Any) -> Tensor:  # noqa: A002
    """Compute the operator in the backend that its last argument names, or the next that this machine has."""
    *rest, backend = arguments
    multiplier = rest[3]
    if input.device.type != "cpu" or not (input.numel() and multiplier.numel()):  # torch's own divide by what is empty.
        return reference.linear(input, values, *rest)
    rows, columns = values.shape[1:]
    return _resolve(backend, (rows, columns), rest[8]).run(input, values, *rest)
