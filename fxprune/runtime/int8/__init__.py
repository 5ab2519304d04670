"""Quantised tensors and layers: how values, layouts and weights are stored, and the operators that compute on them.

| module | what it holds |
| --- | --- |
| `affine` | what a uint8 activation stands for; `quantize` and `dequantize` |
| `layouts` | how channels lie in memory; `pack` and `unpack` |
| `blocks` | storage of block-sparse int8 matrices |
| `requantization` | from int32 accumulators to outputs |
| `linear_operator`, `backends` | the one operator, and what computes it |
| `layer`, `linear`, `depthwise` | the layers |
"""

from __future__ import annotations

from fxprune.runtime.int8.affine import Affine, dequantize, quantize
from fxprune.runtime.int8.blocks import BlockSparse, compress, decompress
from fxprune.runtime.int8.depthwise import Int8DepthwiseConv2d
from fxprune.runtime.int8.layer import quantize_weight
from fxprune.runtime.int8.layouts import CHANNELS_LAST, PACKED, pack, unpack
from fxprune.runtime.int8.linear import BlockSparseInt8Linear, Int8Linear
from fxprune.runtime.int8.linear_operator import block_sparse_int8_linear
from fxprune.runtime.int8.requantization import Requantization, tabulate

__all__ = [
    "CHANNELS_LAST",
    "PACKED",
    "Affine",
    "BlockSparse",
    "BlockSparseInt8Linear",
    "Int8DepthwiseConv2d",
    "Int8Linear",
    "Requantization",
    "block_sparse_int8_linear",
    "compress",
    "decompress",
    "dequantize",
    "pack",
    "quantize",
    "quantize_weight",
    "tabulate",
    "unpack",
]
