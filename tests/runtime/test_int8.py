"""Quantised tensors and layers: the storage, the numbers, and that every backend computes the same bits."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxprune.runtime import native
from fxprune.runtime.int8 import (
    CHANNELS_LAST,
    PACKED,
    Affine,
    BlockSparseInt8Linear,
    Int8DepthwiseConv2d,
    Int8Linear,
    Requantization,
    compress,
    decompress,
    pack,
    quantize,
    quantize_weight,
    tabulate,
    unpack,
)
from fxprune.runtime.int8.backends import BACKENDS
from fxprune.runtime.int8.depthwise import _depthwise as depthwise_reference
from fxprune.runtime.int8.layer import MOST_FEATURES

SIZES = st.integers(1, 70)
BLOCKS = st.sampled_from([(1, 4), (2, 4), (4, 4)])
ANY_BLOCK = st.sampled_from([(1, 4), (2, 4), (4, 4), (1, 1), (3, 5), (8, 2), (1, 16)])
AFFINES = st.builds(Affine, st.floats(0.0009765625, 10), st.integers(0, 255))

needs_native = pytest.mark.skipif(not native.load(), reason=f"no native kernels: {native.why_not()}")


def _weight(rows: int, columns: int, block: tuple[int, int], density: float, seed: int) -> Tensor:
    """Return an int8 matrix of which about `density` of the blocks hold something."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.rand(-(-rows // block[0]), -(-columns // block[1]), generator=generator) < density
    mask = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :columns]
    return torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8) * mask


@st.composite
def layers(draw: Any, blocks: Any = BLOCKS) -> tuple[Int8Linear, tuple[int, int], Tensor]:
    """Draw a quantised layer of any shape, numbers, output and activation, a block and an input."""
    rows, columns, positions = draw(SIZES), draw(SIZES), draw(st.sampled_from([1, 2, 15, 16, 17, 49, 64, 131]))
    block, seed = draw(blocks), draw(st.integers(0, 1000))
    weight = _weight(rows, columns, block, draw(st.sampled_from([0, 0.3, 1])), seed)
    generator = torch.Generator().manual_seed(seed)
    source, target = draw(AFFINES), draw(st.none() | AFFINES)
    scales = torch.rand(rows, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 1e4])) + 1e-5
    numbers = Requantization.to_float(weight, scales, torch.randn(rows, generator=generator), source)
    if draw(st.booleans()):
        numbers = replace(numbers, low=0.0, high=6.0)
    if target is not None:
        numbers = numbers.to_levels(target)
        if draw(st.booleans()):
            numbers = replace(numbers, table=tabulate(torch.sigmoid, target, Affine(1 / 255, 0)))
    levels = torch.randint(0, 256, (positions, columns), generator=generator, dtype=torch.uint8)
    return Int8Linear(weight, numbers, source, target), block, levels


@given(layers(ANY_BLOCK))
@settings(max_examples=60, deadline=None)
def test_a_block_sparse_layer_gives_what_the_dense_one_gives(drawn: tuple[Int8Linear, tuple[int, int], Tensor]) -> None:
    dense, block, levels = drawn
    sparse = BlockSparseInt8Linear.of(dense, block, backend="reference")
    assert torch.equal(sparse.weight, dense.weight)
    assert torch.equal(sparse(levels), dense(levels))


@needs_native
@given(layers(), st.sampled_from([CHANNELS_LAST, PACKED]), st.sampled_from([CHANNELS_LAST, PACKED]))
@settings(max_examples=200, deadline=None)
def test_the_native_kernel_is_bit_exact(
    drawn: tuple[Int8Linear, tuple[int, int], Tensor], input_layout: str, output_layout: str
) -> None:
    dense, block, levels = drawn
    layer = BlockSparseInt8Linear.of(dense, block, backend="native")
    layer.input_layout = input_layout
    layer.output_layout = output_layout if dense.dtype == torch.uint8 else CHANNELS_LAST
    got = layer(pack(levels) if input_layout == PACKED else levels)
    if layer.output_layout == PACKED:
        got = unpack(got, dense.out_features)
    assert torch.equal(got, dense(levels))


@pytest.mark.parametrize("backend", ["onednn", "fbgemm"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_backends_of_torch_agree_within_a_level(backend: str, dtype: torch.dtype) -> None:
    reason = BACKENDS[backend].refusal((1, 4), dtype)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    target = Affine(0.1, 120) if dtype == torch.uint8 else None
    dense = _layer(nn.Linear(37, 21), Affine(0.02, 100), target)
    levels = torch.randint(0, 64, (5, 3, 37), dtype=torch.uint8)  # Small enough for FBGEMM's 16-bit sums.
    got = BlockSparseInt8Linear.of(dense, backend=backend)(levels)
    assert got.dtype == dtype
    assert (got.double() - dense(levels).double()).abs().max() <= (1 if target else 1e-4)


def _layer(linear: nn.Linear, source: Affine, target: Affine | None) -> Int8Linear:
    weight, scales = quantize_weight(linear.weight)
    numbers = Requantization.to_float(weight, scales, linear.bias, source)
    return Int8Linear(weight, numbers if target is None else numbers.to_levels(target), source, target)


def test_a_quantised_layer_is_near_the_float_one() -> None:
    torch.manual_seed(0)
    linear, source, target = nn.Linear(64, 32), Affine(2 / 255, 0), Affine(6 / 255, 128)
    x = torch.rand(100, 64) * 2
    exact = linear(x)
    assert (_layer(linear, source, None)(source.quantize(x)) - exact).abs().max() < 0.03
    assert (target.dequantize(_layer(linear, source, target)(source.quantize(x))) - exact).abs().max() < 0.05


@given(SIZES, SIZES, ANY_BLOCK, st.sampled_from([0, 0.4, 1]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_compression_round_trips(
    rows: int, columns: int, block: tuple[int, int], density: float, keep_zeros: bool
) -> None:
    weight = _weight(rows, columns, block, density, 1)
    matrix = compress(weight, block, keep_zeros=keep_zeros)
    assert torch.equal(decompress(matrix, (rows, columns)), weight)
    stored = math.ceil(rows / block[0]) * math.ceil(columns / block[1])
    assert len(matrix.values) == stored if keep_zeros else bool((matrix.values != 0).flatten(1).any(1).all())


@given(st.lists(st.integers(1, 9), min_size=0, max_size=3), SIZES, AFFINES, st.booleans())
@settings(max_examples=80, deadline=None)
def test_layouts_round_trip_and_hold_the_same_levels(
    positions: list[int], channels: int, affine: Affine, first: bool
) -> None:
    x = torch.randn(*positions, channels) * 3
    if first and x.dim() > 1:
        x = x.movedim(-1, 1).contiguous().movedim(1, -1)
    levels = affine.quantize(x)
    expected = ((x * (1 / torch.tensor(affine.scale, dtype=torch.float64)).float()).round() + affine.zero_point).clamp(
        0, 255
    )
    assert torch.equal(levels.float(), expected)
    packed = quantize(x, affine.scale, affine.zero_point, PACKED)
    assert torch.equal(unpack(packed, channels), levels)
    assert torch.equal(unpack(pack(levels), channels), levels)
    assert torch.equal(affine.dequantize(levels), (levels.int() - affine.zero_point).float() * affine.scale)


def test_what_is_not_a_number_becomes_zero() -> None:
    assert Affine(1.0, 7).quantize(torch.tensor([math.nan, math.inf, -math.inf])).tolist() == [0, 255, 0]


OPERATORS = {
    "quantize": lambda: (torch.randn(2, 3, 6), 0.1, 3, PACKED),
    "dequantize": lambda: (torch.zeros(2, 5, 4, dtype=torch.uint8), 0.1, 3, PACKED, 7),
    "pack": lambda: (torch.zeros(2, 3, 6, dtype=torch.uint8),),
    "unpack": lambda: (torch.zeros(2, 5, 4, dtype=torch.uint8), 7),
    "depthwise_int8_conv2d": lambda: (
        *(torch.zeros(1, 3, 5, 6, dtype=torch.uint8), torch.ones(9, 3, dtype=torch.int8), torch.zeros(3).int()),
        *(torch.ones(3), torch.zeros(3), None, 0.0, 255.0, torch.uint8, [3, 3], [2, 1], [1, 1], [1, 1], 4),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_keep_what_torch_asks_of_them(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.fxprune, name).default, OPERATORS[name]())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_linear_operator_keeps_what_torch_asks_of_it(backend: str) -> None:
    layer = BlockSparseInt8Linear.of(_layer(nn.Linear(9, 6), Affine(0.1, 3), Affine(0.1, 3)), backend=backend)
    held = [layer._buffers[name] for name in ("values", "columns", "row_pointers", "offsets", "multiplier", "addend")]
    levels = torch.randint(0, 60, (5, 9), dtype=torch.uint8)
    arguments = (levels, *held, None, 0.0, 255.0, torch.uint8, CHANNELS_LAST, PACKED, backend)
    torch.library.opcheck(torch.ops.fxprune.block_sparse_int8_linear.default, arguments)


def test_a_layer_survives_copies_pickles_and_a_state_of_another_sparsity() -> None:
    linear = nn.Linear(16, 8)
    dense = BlockSparseInt8Linear.of(_layer(linear, Affine(0.1, 3), None))
    with torch.no_grad():
        linear.weight[:, :12] = 0
    sparse = BlockSparseInt8Linear.of(_layer(linear, Affine(0.1, 3), None))
    levels = torch.randint(0, 256, (5, 16), dtype=torch.uint8)
    expected = sparse(levels)
    for other in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(other(levels), expected)
    assert not torch.equal(dense(levels), expected)
    dense.load_state_dict(sparse.state_dict())
    assert torch.equal(dense(levels), expected)
    assert dense.sparsity == sparse.sparsity == 0.75


def test_numbers_stay_float32_in_other_precisions() -> None:
    layer = BlockSparseInt8Linear.of(_layer(nn.Linear(8, 8), Affine(0.1, 3), None))
    before = layer.multiplier.clone()
    for convert in (layer.half, layer.double, layer.bfloat16):
        convert()
        assert layer.multiplier.dtype == layer.addend.dtype == torch.float32
        assert torch.equal(layer.multiplier, before)


def test_dumps_say_what_a_layer_is() -> None:
    layer = BlockSparseInt8Linear.of(_layer(nn.Linear(8, 8), Affine(0.1, 3), Affine(0.1, 3)))
    assert repr(layer) == "BlockSparseInt8Linear(8, 8, 1x4, channels-last→channels-last, native, u8)"


def _damaged(name: str, value: int) -> BlockSparseInt8Linear:
    layer = BlockSparseInt8Linear.of(_layer(nn.Linear(16, 8), Affine(0.1, 3), None))
    getattr(layer, name)[3] = value
    return layer


@needs_native
@pytest.mark.parametrize(
    ("name", "value"), [("columns", 900), ("columns", -1), ("row_pointers", 30), ("row_pointers", 1)]
)
def test_damaged_weights_are_refused_before_they_are_read(name: str, value: int) -> None:
    with pytest.raises(RuntimeError, match="columns or row pointers of a block-sparse weight are damaged"):
        _damaged(name, value)(torch.zeros(2, 16, dtype=torch.uint8))


@needs_native
def test_an_input_of_another_width_is_refused() -> None:
    layer = BlockSparseInt8Linear.of(_layer(nn.Linear(16, 8), Affine(0.1, 3), None))
    with pytest.raises(RuntimeError, match="do not fit 8 input features"):
        layer(torch.zeros(2, 8, dtype=torch.uint8))


BAD: dict[str, tuple[Any, str]] = {
    "scale": (lambda: Affine(0.0, 3), "a scale of 0.0 quantises nothing"),
    "infinite scale": (lambda: Affine(math.inf, 3), "must be positive and finite"),
    "zero point": (lambda: Affine(1.0, 256), "zero point 256 is not in 0 … 255"),
    "dtype": (lambda: compress(torch.zeros(2, 2), (1, 4)), "expected an int8 matrix, got torch.float32"),
    "block": (lambda: compress(torch.zeros(2, 2, dtype=torch.int8), (0, 4)), "a block of 0x4 is empty"),
    "columns": (lambda: compress(torch.zeros(1, 2**17 + 1, dtype=torch.int8), (1, 4)), "more than 32768 blocks of 4"),
    "overflow": (lambda: _layer(nn.Linear(MOST_FEATURES + 1, 1), Affine(0.1, 3), None), "may overflow int32 sums"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_refused(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()


@needs_native
@given(
    st.integers(1, 150),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    *(st.tuples(st.integers(1, 5), st.integers(1, 5)), st.tuples(st.integers(1, 3), st.integers(1, 3))),
    *(st.booleans(), AFFINES, st.none() | AFFINES),
)
@settings(max_examples=100, deadline=None)
def test_the_native_depthwise_kernel_is_bit_exact(
    channels: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    is_tabulated: bool,
    source: Affine,
    target: Affine | None,
) -> None:
    taps = kernel[0] * kernel[1]
    weight = torch.randint(-127, 128, (channels, taps), dtype=torch.int8)
    numbers = Requantization.to_float(weight, torch.rand(channels) * 0.01 + 1e-4, torch.randn(channels), source)
    if target is not None:
        numbers = numbers.to_levels(target)
        if is_tabulated:
            numbers = replace(numbers, table=tabulate(torch.sigmoid, target, Affine(1 / 255, 0)))
    window = (kernel, stride, [k // 2 for k in kernel], (1, 1))
    layer = Int8DepthwiseConv2d(weight.t().contiguous(), numbers, window, source, target)
    images = torch.randint(0, 256, (2, channels, *size), dtype=torch.uint8)
    held = (layer.weight, *layer.numbers, *layer.window, source.zero_point)
    got = layer(images)
    assert torch.equal(got, depthwise_reference(images, *held))
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_a_depthwise_layer_is_near_the_float_one() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    source, x = Affine(2 / 255, 40), torch.rand(1, 8, 6, 6) * 1.5
    weight, scales = quantize_weight(convolution.weight.flatten(1))
    numbers = Requantization.to_float(weight, scales, convolution.bias, source)
    layer = Int8DepthwiseConv2d(weight.t().contiguous(), numbers, ([3, 3], [1, 1], [1, 1], [1, 1]), source)
    assert (layer(source.quantize(x)) - convolution(x)).abs().max() < 0.02
    assert repr(layer) == "Int8DepthwiseConv2d(8, 3x3 by 1x1, f32)"
