"""What computes a quantised layer, and the form in which its weight is stored for that."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxprune.errors import SpecError, nearest
from fxprune.runtime.int8 import BlockSparse, BlockSparseInt8Linear, Int8Linear, compress
from fxprune.runtime.int8.backends import BACKENDS
from fxprune.sparsity.blocks import Block

__all__ = ["DENSE", "SPARSE_FROM", "Choice", "read_form", "zero_blocks"]

DENSE = "dense"
"""The form of a weight that has few blocks of zeros: blocks of 4×4, all of them."""

_DENSE_BLOCK = (4, 4)

SPARSE_FROM = 0.3
"""The share of zero blocks from which skipping them is worth what it costs, where nothing was measured."""


@dataclass(frozen=True)
class Choice:
    """A backend, and the form in which weights are stored for it: blocks without zero ones ("1x4"), or "dense".

    >>> str(Choice.of("native 1x4")), Choice.of("onednn").form
    ('native 1x4', '')
    """

    backend: str
    form: str = ""

    @staticmethod
    def of(text: str) -> Choice:
        """Read a choice, the inverse of `str`; one without a form takes that which fits the weight.

        Raises `SpecError` for a backend or a form that does not exist.
        """
        backend, _, form = text.partition(" ")
        if backend == "auto":
            known = ", ".join(BACKENDS)
            raise SpecError(f"backend 'auto' is chosen by measuring, which fxprune.lower does; known here: {known}")
        if backend not in BACKENDS:
            raise SpecError(f"unknown backend '{backend}'; {nearest(backend, BACKENDS)}")
        return Choice(backend, read_form(form) if form else "")

    def fitting(self, weight: Tensor, block: str) -> Choice:
        """Return the choice with a form: its own, else `block`, or dense where few such blocks are zero."""
        if self.form:
            return self
        blocks = BACKENDS[self.backend].blocks
        if blocks is not None and _DENSE_BLOCK not in blocks:
            return Choice(self.backend, str(Block(*blocks[0])))
        is_sparse = block != DENSE and zero_blocks(weight, block) >= SPARSE_FROM
        return Choice(self.backend, block if is_sparse else DENSE)

    def lower(self, layer: Int8Linear) -> BlockSparseInt8Linear:
        """Return the layer that gives what `layer` gives, bit for bit."""
        facts = (layer.in_features, layer.source, layer.target, layer.activation, self.backend)
        lowered = BlockSparseInt8Linear(_stored(layer.weight, self.form), layer.requantization, *facts)
        return lowered.train(layer.training)

    @staticmethod
    def of_layer(layer: BlockSparseInt8Linear) -> Choice:
        """Return what computes a lowered layer; one that stores all of its 4×4 blocks is dense."""
        rows, columns = layer.block
        blocks = -(-layer.out_features // rows) * -(-layer.in_features // columns)
        is_dense = layer.block == _DENSE_BLOCK and len(layer.values) == blocks
        return Choice(layer.backend, DENSE if is_dense else str(Block(rows, columns)))

    def __str__(self) -> str:
        return f"{self.backend} {self.form}".strip()


def read_form(form: str | tuple[int, int]) -> str:
    """Return a form as it is spelled: "1x4", which may be given as (1, 4), or "dense". Raises `SpecError`."""
    return DENSE if form == DENSE else str(Block.of(form))


def zero_blocks(weight: Tensor, block: str) -> float:
    """Return the share of an int8 [N, K] weight's blocks that are all zero; 0 where it has none.

    >>> import torch
    >>> zero_blocks(torch.tensor([[0, 0, 0, 0, 1, 0]], dtype=torch.int8), "1x4")
    0.5
    """
    rows, columns = _sizes(block)
    count = -(-weight.shape[0] // rows) * -(-weight.shape[1] // columns)
    return 1 - len(_stored(weight, block).values) / count if count else 0.0


def _sizes(form: str) -> tuple[int, int]:
    if form == DENSE:
        return _DENSE_BLOCK
    block = Block.of(form)
    return block.rows, block.columns


def _stored(weight: Tensor, form: str) -> BlockSparse:
    return compress(weight, _sizes(form), keep_zeros=form == DENSE)
