"""`fxprune::block_sparse_int8_linear`: one operator, computed by the backend that its last argument names.

| argument | dtype, shape | |
| --- | --- | --- |
| `input` | uint8, in `input_layout` | |
| `values`, `columns`, `row_pointers` | int8, int16, int32 | `fxprune.runtime.int8.blocks` |
| `offsets`, `multiplier`, `addend`, `table`, `low`, `high`, `dtype` | | `fxprune.runtime.int8.requantization` |
| `input_layout`, `output_layout` | | `fxprune.runtime.int8.layouts`; float32 is given channels-last only |
| `backend` | | `fxprune.runtime.int8.backends` |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxprune.runtime.int8.backends import compute
from fxprune.runtime.int8.layouts import PACKED, packed_shape
from fxprune.runtime.library import define

__all__ = ["block_sparse_int8_linear"]

_ARGUMENTS = (
    "(Tensor input, Tensor values, Tensor columns, Tensor row_pointers, Tensor offsets, Tensor multiplier, "
    "Tensor addend, Tensor? table, float low, float high, ScalarType dtype, str input_layout, str output_layout, "
    "str backend) -> Tensor"
)


def _fake(input: Tensor, *arguments: Any) -> Tensor:  # noqa: A002
    multiplier, dtype, input_layout, output_layout = (arguments[i] for i in (4, 9, 10, 11))
    positions = input.shape[1:-1] if input_layout == PACKED else input.shape[:-1]
    shape = [*positions, multiplier.shape[0]]
    return input.new_empty(packed_shape(torch.Size(shape)) if output_layout == PACKED else shape, dtype=dtype)


block_sparse_int8_linear = define(f"block_sparse_int8_linear{_ARGUMENTS}", compute, _fake, is_compiled=False)
"""Its backend loads what it needs."""

define(f"block_sparse_int8_linear_by_name{_ARGUMENTS}", compute, _fake, is_compiled=False)
"""What the compiled kernel, which takes the place of the one above on CPUs, calls for every backend but itself."""
