"""Quantised linear layers: dense as quantisation makes them, and block-sparse as lowering does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.runtime.int8.affine import Affine
from fxprune.runtime.int8.blocks import BlockSparse, compress, decompress
from fxprune.runtime.int8.layouts import CHANNELS_LAST
from fxprune.runtime.int8.linear_operator import block_sparse_int8_linear
from fxprune.runtime.int8.reference import accumulate
from fxprune.runtime.int8.requantization import Requantization, requantize

__all__ = ["MOST_FEATURES", "BlockSparseInt8Linear", "Int8Linear", "quantize_weight"]

MOST_FEATURES = (2**31 - 1) // (255 * 127)
"""How many products an int32 accumulator surely holds."""


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a float [N, K] weight as int8 levels in −127 … 127 and the float32 [N] scales of its rows.

    Symmetric, per output channel, by the largest magnitude; a row of zeros gets scale 1.

    >>> quantize_weight(torch.tensor([[127.0, -64.0], [0.0, 0.0]]))
    (tensor([[127, -64],
            [  0,   0]], dtype=torch.int8), tensor([1., 1.]))
    """
    exact = weight.detach().double()
    peak = exact.abs().amax(1)
    scales = torch.where(peak > 0, peak / 127, 1.0)
    return (exact / scales[:, None]).round().clamp(-127, 127).to(torch.int8), scales.float()


class _Int8Layer(nn.Module):
    """What both layers hold: how accumulators become outputs, and what inputs and outputs stand for.

    Attributes:
        in_features: K.
        out_features: N.
        source: quantisation of the input.
        target: of the output, None where it is float32.
        activation: name of the activation that the layer computes, "" for none.
    """

    offsets: Tensor
    multiplier: Tensor
    addend: Tensor
    table: Tensor | None

    def __init__(
        self, requantization: Requantization, in_features: int, source: Affine, target: Affine | None, activation: str
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, requantization.multiplier.numel()
        if in_features > MOST_FEATURES:
            raise ValueError(f"{in_features} input features may overflow int32 sums; {MOST_FEATURES} are the most")
        self.source, self.target, self.activation = source, target, activation
        self.low, self.high, self.dtype = requantization.low, requantization.high, requantization.dtype
        for name in ("offsets", "multiplier", "addend", "table"):
            self.register_buffer(name, getattr(requantization, name))

    @property
    def requantization(self) -> Requantization:
        """How accumulators become outputs."""
        numbers = (self.offsets, self.multiplier, self.addend, self.table)
        return Requantization(*numbers, self.low, self.high, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Int8Layer:
        """Move to other devices, but keep the float32 numbers float32 in `module.double()` and `module.half()`."""
        before = {name: getattr(self, name) for name in ("multiplier", "addend")}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if self._buffers[name] is not None and self._buffers[name].dtype != tensor.dtype:  # type: ignore[union-attr]
                self._buffers[name] = tensor.to(self.offsets.device)
        return self


class Int8Linear(_Int8Layer):
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
        numbers = (self.offsets, self.multiplier, self.addend, self.table)
        return requantize(accumulate(input, self.weight), *numbers, self.low, self.high, self.dtype)

    def extra_repr(self) -> str:
        """Name the features, the activation and what comes out."""
        return f"{self.in_features}, {self.out_features}, {traits(self)}"


class BlockSparseInt8Linear(_Int8Layer):
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
        return 1 - min(self.values.numel() / (self.in_features * self.out_features), 1.0)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return uint8 or float32 […, N] in `output_layout` of uint8 […, K] in `input_layout`."""
        held: Mapping[str, Any] = self._buffers
        return block_sparse_int8_linear(
            input,
            held["values"],
            held["columns"],
            held["row_pointers"],
            held["offsets"],
            held["multiplier"],
            held["addend"],
            held["table"],
            self.low,
            self.high,
            self.dtype,
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
