from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxprune.errors import SpecError
from fxprune.sparsity.blocks import Block, Tiling

SHAPES = st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple)
BLOCKS = st.builds(Block, st.integers(1, 4), st.integers(1, 5))


def _tiling(shape: tuple[int, ...], block: Block, transposed: bool) -> Tiling:
    return Tiling(shape, *((1, 0) if transposed else (0, 1)), block)


def _block_of(tiling: Tiling, index: tuple[int, ...]) -> tuple[int, ...]:
    """Return which block a weight is in, by the definition."""
    taps = tuple(i for d, i in enumerate(index) if d not in (tiling.output_dim, tiling.input_dim))
    return (index[tiling.output_dim] // tiling.block.rows, *taps, index[tiling.input_dim] // tiling.block.columns)


@given(SHAPES, BLOCKS, st.booleans())
def test_norms_and_sizes_are_those_of_the_definition(shape: tuple[int, ...], block: Block, transposed: bool) -> None:
    tiling, weight = _tiling(shape, block, transposed), torch.rand(shape, dtype=torch.float64)
    blocks: dict[tuple[int, ...], list[float]] = {}
    for index in map(tuple, torch.ones(shape).nonzero().tolist()):
        blocks.setdefault(_block_of(tiling, index), []).append(float(weight[index]))
    sizes = tiling.sizes()
    sizes = torch.full((tiling.count,), sizes) if isinstance(sizes, int) else sizes
    assert tiling.count == len(blocks)
    norms = tiling.norms(weight)
    if block.is_single:
        assert torch.allclose(norms, weight.flatten().float())
        return
    expected = [blocks[key] for key in sorted(blocks)]
    assert sizes.tolist() == [len(values) for values in expected]
    roots = [(sum(v * v for v in values) / len(values)) ** 0.5 for values in expected]
    assert torch.allclose(norms.double(), torch.tensor(roots, dtype=torch.float64), atol=1e-6)


@given(SHAPES, BLOCKS, st.booleans(), st.integers(0, 1000))
def test_every_weight_follows_its_block(shape: tuple[int, ...], block: Block, transposed: bool, seed: int) -> None:
    tiling = _tiling(shape, block, transposed)
    kept = torch.rand(tiling.count, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = tiling.expand(kept)
    assert mask.shape == shape
    found: dict[tuple[int, ...], set[bool]] = {}
    for index in map(tuple, torch.ones(shape).nonzero().tolist()):
        found.setdefault(_block_of(tiling, index), set()).add(bool(mask[index]))
    assert all(len(values) == 1 for values in found.values())
    if not block.is_single:
        assert [found[key].pop() for key in sorted(found)] == kept.tolist()
        whole = tiling.whole(mask)
        assert whole is not None
        assert torch.equal(whole, kept)


def test_a_mask_that_splits_a_block_is_not_whole() -> None:
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 5] = False
    assert Tiling((2, 8), 0, 1, Block(1, 4)).whole(mask) is None


def test_a_layer_has_room_for_a_block_or_not() -> None:
    assert Tiling((8, 4, 3, 3), 0, 1, Block(1, 4)).fits
    assert not Tiling((8, 3, 7, 7), 0, 1, Block(1, 4)).fits
    assert not Tiling((8, 1, 3, 3), 0, 1, Block(1, 4)).fits
    assert not Tiling((1, 8), 0, 1, Block(2, 4)).fits


@pytest.mark.parametrize("value", ["", "4", "1x", "0x4", "1x4x4", "axb", (0, 4), 4])
def test_what_is_no_block_is_refused(value: object) -> None:
    with pytest.raises(SpecError, match="output × input channels, as '1x4'"):
        Block.of(value)  # type: ignore[arg-type]
