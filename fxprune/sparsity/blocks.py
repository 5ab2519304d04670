"""Blocks: the tiles of a weight that become zero together."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxprune.errors import SpecError

__all__ = ["Block", "Tiling"]


@dataclass(frozen=True)
class Block:
    """b_r output channels × b_c input channels; 1×1 is unstructured sparsity.

    >>> Block.of("1x4"), str(Block.of((2, 8))), Block.of("1x1").is_single
    (Block(rows=1, columns=4), '2x8', True)
    """

    rows: int = 1
    columns: int = 4

    @staticmethod
    def of(value: Block | str | tuple[int, int]) -> Block:
        """Read a block as users write it: "1x4" or (1, 4). Raises `SpecError`."""
        if isinstance(value, Block):
            return value
        read = re.fullmatch(r"(\d+)[x×](\d+)", value) if isinstance(value, str) else None
        sizes = tuple(map(int, read.groups())) if read else value
        if not isinstance(sizes, tuple) or len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
            raise SpecError(
                f"cannot read the block {value!r}; write output × input channels, as '1x4', or '1x1' for single weights"
            )
        return Block(*sizes)

    @property
    def is_single(self) -> bool:
        """Whether every weight is a block of its own."""
        return self.rows == self.columns == 1

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"


@dataclass(frozen=True)
class Tiling:
    """A weight cut into blocks along its output and input channels, each kernel tap by itself.

    Where the channels are no multiple of the block, the last blocks are smaller. Blocks are numbered output row by
    output row, then tap by tap, then along the input channels; single weights as they lie in the weight.

    Attributes:
        shape: of the weight.
        output_dim, input_dim: the two dimensions that blocks span.
    """

    shape: tuple[int, ...]
    output_dim: int
    input_dim: int
    block: Block

    @property
    def fits(self) -> bool:
        """Whether the weight has room for one whole block; a layer that has none is left dense."""
        return self.shape[self.output_dim] >= self.block.rows and self.shape[self.input_dim] >= self.block.columns

    @property
    def count(self) -> int:
        """How many blocks there are."""
        rows, taps, columns = self._arranged_shape()
        return -(-rows // self.block.rows) * taps * -(-columns // self.block.columns)

    def sizes(self) -> Tensor | int:
        """Return how many weights each block has, int64 [blocks]; one number where all are equal."""
        if self.shape[self.output_dim] % self.block.rows == 0 and self.shape[self.input_dim] % self.block.columns == 0:
            return self.block.rows * self.block.columns
        whole = torch.ones((), dtype=torch.int64).expand(self.shape)
        return self._sum(whole).flatten()

    def norms(self, weight: Tensor) -> Tensor:
        """Return the root mean square of every block, float32 [blocks]; of single weights that is their magnitude.

        Args:
            weight: floating, in `shape`.
        """
        if self.block.is_single:
            return weight.float().abs().flatten()
        sizes = self.sizes()
        return (self._sum(weight.float().square()).flatten() / sizes).sqrt()

    def expand(self, blocks: Tensor) -> Tensor:
        """Return bool in `shape`: every weight as its block in bool [blocks]."""
        if self.block.is_single:
            return blocks.view(self.shape)
        rows, taps, columns = self._arranged_shape()
        high, wide = -(-rows // self.block.rows), -(-columns // self.block.columns)
        tiles = blocks.view(high, taps, wide)
        tiles = tiles.repeat_interleave(self.block.rows, 0)[:rows]
        tiles = tiles.repeat_interleave(self.block.columns, 2)[:, :, :columns]
        return self._restore(tiles)

    def whole(self, mask: Tensor) -> Tensor | None:
        """Return bool [blocks] if every block of a mask is kept or zeroed as a whole, else None."""
        kept = self._tiles(mask).any(4).any(1).flatten()
        return kept if torch.equal(self.expand(kept), mask) else None

    def _arranged_shape(self) -> tuple[int, int, int]:
        rows, columns = self.shape[self.output_dim], self.shape[self.input_dim]
        taps = torch.Size(self.shape).numel() // max(rows * columns, 1)
        return rows, taps, columns

    def _arrange(self, weight: Tensor) -> Tensor:
        """Return a weight as [output channels, taps, input channels]."""
        moved = weight.movedim((self.output_dim, self.input_dim), (0, -1))
        return moved.reshape(self._arranged_shape())

    def _restore(self, arranged: Tensor) -> Tensor:
        taps = [size for d, size in enumerate(self.shape) if d not in (self.output_dim, self.input_dim)]
        moved = arranged.reshape(self.shape[self.output_dim], *taps, self.shape[self.input_dim])
        return moved.movedim((0, -1), (self.output_dim, self.input_dim)).contiguous()

    def _sum(self, values: Tensor) -> Tensor:
        """Return the sum over every block, [block rows, taps, block columns]."""
        return self._tiles(values).sum((1, 4))

    def _tiles(self, values: Tensor) -> Tensor:
        """Return values as [block rows, rows of one, taps, block columns, columns of one], with zeros at the ends."""
        arranged = self._arrange(values)
        down, across = -arranged.shape[0] % self.block.rows, -arranged.shape[2] % self.block.columns
        padded = nn.functional.pad(arranged, (0, across, 0, 0, 0, down))
        return padded.view(
            padded.shape[0] // self.block.rows,
            self.block.rows,
            padded.shape[1],
            padded.shape[2] // self.block.columns,
            self.block.columns,
        )
