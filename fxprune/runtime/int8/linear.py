"""Quantised linear layers: dense as quantisation makes them, and block-sparse as lowering does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxprune.runtime.int8.affine import Affine
from fxprune.runtime.int8.blocks import BlockSparse, compress, decompress
from fxprune.runtime.int8.layer import Int8Layer
from fxprune.runtime.int8.layouts import CHANNELS_LAST
from fxprune.runtime.int8.linear_operator import block_sparse_int8_linear
from fxprune.runtime.int8.reference import accumulate
from fxprune.runtime.int8.requantization import Requantization, requantize

__all__ = ["BlockSparseInt8Linear", "Int8Linear"]


class _Linear(Int8Layer):
    """What both layers are.

    Attributes:
        in_features: K.
        out_features: N.
    """

    def __init__(
        self, requantization: Requantization, in_features: int, source: Affine, target: Affine | None, activation: str
    ) -> None:
        super().__init__(requantization, in_features, source, target, activation)
        self.in_features, self.out_features = in_features, requantization.multiplier.numel()


class Int8Linear(_Linear):
    """A linear layer on uint8 values with an int8 weight, and the activation behind it.

    Takes uint8 […, K] channels-last, gives uint8 or float32 […, N]. It computes by the integer reference: what it
    gives is what every lowered layer must give, bit for bit.
    """

    weight: Tensor

    def __init__(
        self,
        weight: Tensor,
        requantization: Requantization,
        source: Affine,
        target: Affine | None = None,
        activation: str = "",
    ) -> None:
        super().__init__(requantization, weight.shape[1], source, target, activation)
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return uint8 or float32 […, N] of uint8 […, K]."""
        return requantize(accumulate(input, self.weight), self.requantization)

    def extra_repr(self) -> str:
        """Name the features, the activation and what comes out."""
        return f"{self.in_features}, {self.out_features}, {traits(self)}"


class BlockSparseInt8Linear(_Linear):
    """A linear layer on uint8 values whose int8 weight is stored in blocks, those that are all zero left out.

    Its state is plain buffers (`fxprune.runtime.int8.blocks`), so it saves as safetensors, exports and pickles; a
    state of another sparsity loads too. `backend` may be changed at any time.
    """

    values: Tensor
    columns: Tensor
    row_pointers: Tensor

    def __init__(
        self,
        matrix: BlockSparse,
        requantization: Requantization,
        in_features: int,
        source: Affine,
        target: Affine | None = None,
        activation: str = "",
        backend: str = "native",
    ) -> None:
        super().__init__(requantization, in_features, source, target, activation)
        self.input_layout = self.output_layout = CHANNELS_LAST
        self.backend = backend
        for name in ("values", "columns", "row_pointers"):
            self.register_buffer(name, getattr(matrix, name))

    @staticmethod
    def of(layer: Int8Linear, block: tuple[int, int] = (1, 4), backend: str = "native") -> BlockSparseInt8Linear:
        """Return a layer that gives what `layer` gives, bit for bit."""
        matrix = compress(layer.weight, block)
        facts = (layer.in_features, layer.source, layer.target, layer.activation, backend)
        return BlockSparseInt8Linear(matrix, layer.requantization, *facts)

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        rows, columns = self.values.shape[1:]
        return rows, columns

    @property
    def weight(self) -> Tensor:
        """The int8 [N, K] weight, decompressed."""
        matrix = BlockSparse(self.values, self.columns, self.row_pointers)
        return decompress(matrix, (self.out_features, self.in_features))

    @property
    def sparsity(self) -> float:
        """The share of weights that are not stored."""
        return 1 - min(self.values.numel() / max(self.in_features * self.out_features, 1), 1.0)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return uint8 or float32 […, N] in `output_layout` of uint8 […, K] in `input_layout`."""
        held: Mapping[str, Any] = self._buffers
        return block_sparse_int8_linear(
            input,
            held["values"],
            held["columns"],
            held["row_pointers"],
            *self.numbers,
            self.input_layout,
            self.output_layout,
            self.backend,
        )

    def extra_repr(self) -> str:
        """Name the features, the blocks, the activation, what comes out and the backend."""
        return f"{self.in_features}, {self.out_features}, {traits(self)}"

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Make room for as many blocks as the state has, where it has another number."""
        for name in ("values", "columns"):
            given, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(given, Tensor) and given.shape[1:] == own.shape[1:] and len(given) != len(own):
                self._buffers[name] = own.new_empty(given.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def traits(layer: Int8Linear | BlockSparseInt8Linear) -> str:
    """Say what a quantised layer is, for dumps: activation, sparsity and block, layouts, backend, output."""
    words = [layer.activation] if layer.activation else []
    if isinstance(layer, BlockSparseInt8Linear):
        rows, columns = layer.block
        words.append(f"{layer.sparsity:.1%} sparse in {rows}x{columns}" if layer.sparsity else f"{rows}x{columns}")
        words.append(f"{layer.input_layout}→{layer.output_layout}")
        words.append(layer.backend)
    words.append("u8" if layer.dtype == torch.uint8 else "f32")
    return ", ".join(words)
