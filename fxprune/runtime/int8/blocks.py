"""Block-sparse storage of an int8 matrix: the blocks that are not all zero, row by row (block compressed rows).

| buffer | dtype, shape | what it holds |
| --- | --- | --- |
| `values` | int8 `[blocks, b_r, b_c]` | the blocks, ascending by column within a block row |
| `columns` | int16 `[blocks]` | the block column of each: its first column is `b_c` times that |
| `row_pointers` | int32 `[ceil(N / b_r) + 1]` | where each block row begins in the two above |

A matrix whose sizes are no multiples of the block's is filled up with zeros; a dense one has every block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["BlockSparse", "compress", "decompress"]

_COLUMNS = torch.iinfo(torch.int16).max


@dataclass(frozen=True)
class BlockSparse:
    """A block-sparse int8 matrix; the module's docstring says what the buffers hold."""

    values: Tensor
    columns: Tensor
    row_pointers: Tensor


def compress(weight: Tensor, block: tuple[int, int], *, keep_zeros: bool = False) -> BlockSparse:
    """Return the blocks of a matrix that hold anything.

    Args:
        weight: int8 [N, K].
        block: (b_r, b_c), rows and columns of a block.
        keep_zeros: store every block, also those that are all zero.

    Raises `ValueError` for a weight of other rank or dtype, an impossible block, or more than 32,768 block columns.

    >>> matrix = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4], [0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int8)
    >>> sparse = compress(matrix, (1, 4))
    >>> sparse.values.tolist(), sparse.columns.tolist(), sparse.row_pointers.tolist()
    ([[[1, 2, 3, 4]]], [1], [0, 1, 1])
    """
    rows, columns = block
    if weight.dim() != 2 or weight.dtype != torch.int8:
        raise ValueError(f"expected an int8 matrix, got {weight.dtype} with {weight.dim()} dimensions")
    if rows < 1 or columns < 1:
        raise ValueError(f"a block of {rows}x{columns} is empty; both sizes are at least 1")
    if -(-weight.shape[1] // columns) - 1 > _COLUMNS:
        raise ValueError(f"{weight.shape[1]} columns are more than {_COLUMNS + 1} blocks of {columns}")
    padded = functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
    tiles = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2)
    kept = torch.ones_like(tiles[..., 0, 0], dtype=torch.bool) if keep_zeros else (tiles != 0).flatten(2).any(2)
    pointers = functional.pad(kept.sum(1).cumsum(0), (1, 0))
    return BlockSparse(tiles[kept].contiguous(), kept.nonzero()[:, 1].to(torch.int16), pointers.to(torch.int32))


def decompress(matrix: BlockSparse, shape: tuple[int, int]) -> Tensor:
    """Return the int8 matrix of `shape` [N, K], the inverse of `compress`."""
    count, rows, columns = matrix.values.shape
    height, width = len(matrix.row_pointers) - 1, -(-shape[1] // columns)
    tiles = matrix.values.new_zeros(height, width, rows, columns)
    block_rows = torch.arange(height, device=tiles.device)
    owner = block_rows.repeat_interleave(matrix.row_pointers.diff(), output_size=count)
    tiles[owner, matrix.columns.long()] = matrix.values
    return tiles.transpose(1, 2).flatten(2).flatten(0, 1)[: shape[0], : shape[1]]
