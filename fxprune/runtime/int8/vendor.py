"""torch's own int8 linear layers, as backends: oneDNN's dense one and FBGEMM's block-sparse one.

Both take scales and zero points where we have a multiplier, an addend and offsets. With scale 1 and zero point 0 for
input and output, and `addend + offsets · multiplier` as bias, they compute the same but for the order of roundings.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fxprune.runtime.int8.affine import LEVELS
from fxprune.runtime.int8.blocks import BlockSparse, decompress
from fxprune.runtime.int8.layouts import PACKED, pack, to_channels_last
from fxprune.runtime.locks import ForkedLock

__all__ = ["fbgemm", "fbgemm_weights", "onednn", "onednn_weights", "why_no_fbgemm", "why_no_onednn"]

_ENGINE = ForkedLock()


class _Prepared:
    """Weights in a library's own layout: made when they are first met, and again for other or rewritten tensors.

    They live as long as the first tensor, the blocks. torch counts no writes to tensors of inference mode: whoever
    changes those of a layer that ran gives it new ones.
    """

    def __init__(self, prepare: Callable[..., Any]) -> None:
        self.prepare = prepare
        self.held: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __call__(self, width: int, *tensors: Tensor) -> Any:
        blocks, *others = tensors
        state = (width, *(0 if tensor.is_inference() else tensor._version for tensor in tensors))
        known = self.held.get(blocks)
        # The tensors are kept, so that no other can be taken for one of them.
        if known is None or known[0] != state or not all(map(operator.is_, known[1], others)):
            known = self.held[blocks] = (state, others, self.prepare(width, *tensors))
        return known[2]


def _dense(width: int, rows: int, *matrix: Tensor) -> Tensor:
    return decompress(BlockSparse(*matrix), (rows, width)).contiguous()


def _for_onednn(width: int, values: Tensor, columns: Tensor, row_pointers: Tensor, *scales: Tensor) -> Any:
    offsets, multiplier, addend = scales
    weight = _dense(width, len(multiplier), values, columns, row_pointers)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    return packed, torch.zeros_like(offsets), addend + offsets * multiplier


def _for_fbgemm(width: int, values: Tensor, columns: Tensor, row_pointers: Tensor, *scales: Tensor) -> Any:
    offsets, multiplier, addend = scales
    weight = _dense(width, len(multiplier), values, columns, row_pointers)
    zero_points = torch.zeros(len(multiplier), dtype=torch.int64)
    with warnings.catch_warnings(), _fbgemm_engine():
        warnings.simplefilter("ignore")
        quantized = torch._make_per_channel_quantized_tensor(weight, multiplier.double(), zero_points, 0)
        return torch.ops.sparse.qlinear_prepack(quantized, addend + offsets * multiplier, 1, 4)


class _fbgemm_engine:  # noqa: N801
    """The process-wide switch that torch's sparse linear layers need: of one thread at a time, then back as it was."""

    def __enter__(self) -> None:
        self.lock = _ENGINE.current
        self.lock.acquire()
        self.before = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"

    def __exit__(self, *_: object) -> None:
        torch.backends.quantized.engine = self.before
        self.lock.release()


onednn_weights, fbgemm_weights = _Prepared(_for_onednn), _Prepared(_for_fbgemm)


def onednn(input: Tensor, *arguments: Any) -> Tensor:  # noqa: A002
    """Compute the operator with torch's dense int8 linear."""
    values, columns, row_pointers, offsets, multiplier, addend, table, low, high, dtype, layout, output_layout = (
        arguments
    )
    levels = to_channels_last(input, layout)
    width = levels.shape[-1]
    packed, zeros, bias = onednn_weights(width, values, columns, row_pointers, offsets, multiplier, addend)
    output = torch.ops.onednn.qlinear_pointwise(
        levels, 1.0, 0, packed, multiplier, zeros, bias, 1.0, 0, dtype, "none", [], ""
    )
    return _finish(output, table, low, high, output_layout)


def fbgemm(input: Tensor, *arguments: Any) -> Tensor:  # noqa: A002
    """Compute the operator with torch's block-sparse int8 linear."""
    values, columns, row_pointers, offsets, multiplier, addend, table, low, high, _, layout, output_layout = arguments
    levels = to_channels_last(input, layout)
    packed = fbgemm_weights(levels.shape[-1], values, columns, row_pointers, offsets, multiplier, addend)
    with _fbgemm_engine():
        # It takes no single row of features.
        quantized = torch._make_per_tensor_quantized_tensor(torch.atleast_2d(levels).contiguous(), 1.0, 0)
        output = torch.ops.sparse.qlinear(quantized, packed, 1.0, 0).int_repr()
    return _finish(output.view(*levels.shape[:-1], len(multiplier)), table, low, high, output_layout)


def _finish(output: Tensor, table: Tensor | None, low: float, high: float, layout: str) -> Tensor:
    """Do what the libraries have no argument for."""
    if output.is_floating_point():
        output = output.clamp_(low, high)
    elif low > 0 or high < LEVELS:
        output = output.clamp_(round(low), round(min(high, LEVELS)))
    if table is not None:
        output = table[output.int()]
    return pack(output) if layout == PACKED else output


@cache
def why_no_onednn() -> str | None:
    """Return why torch has no dense int8 linear here."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    return _probe(onednn)


@cache
def why_no_fbgemm() -> str | None:
    """Return why torch has no block-sparse int8 linear here."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return "this torch was built without FBGEMM"
    return _probe(fbgemm)


def _probe(run: Callable[..., Tensor]) -> str | None:
    """Run a layer of one block; return the error of a torch whose operators have changed."""
    numbers = torch.zeros(1)
    matrix = (torch.ones(1, 1, 4, dtype=torch.int8), torch.zeros(1, dtype=torch.int16), torch.tensor([0, 1]).int())
    layer = (*matrix, torch.zeros(1, dtype=torch.int32), numbers + 1, numbers, None, 0.0, 255.0, torch.uint8)
    try:
        got = run(torch.ones(1, 4, dtype=torch.uint8), *layer, "channels-last", "channels-last")
    except (RuntimeError, AttributeError, TypeError) as error:
        return f"torch's operator does not run: {str(error).splitlines()[0]}"
    return None if got.tolist() == [[4]] else f"torch's operator gives {got.tolist()} where 4 is right"
