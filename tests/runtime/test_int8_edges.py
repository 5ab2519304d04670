"""Quantised operators where shapes are empty, tensors lie elsewhere, buffers are wrong, and several threads call."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.errors import SpecError
from fxprune.runtime import native
from fxprune.runtime.im2col import _im2col, im2col
from fxprune.runtime.int8 import (
    CHANNELS_LAST,
    PACKED,
    Affine,
    BlockSparse,
    BlockSparseInt8Linear,
    Int8DepthwiseConv2d,
    Int8Linear,
    Requantization,
    compress,
    dequantize,
    pack,
    quantize,
    quantize_weight,
    unpack,
)
from fxprune.runtime.int8.affine import _dequantize, _quantize
from fxprune.runtime.int8.backends import BACKENDS
from fxprune.runtime.int8.depthwise import depthwise_int8_conv2d
from fxprune.runtime.int8.layouts import _unpack
from tests.runtime.native import in_processes

needs_native = pytest.mark.skipif(not native.load(), reason=f"no native kernels: {native.why_not()}")
needs_fbgemm = pytest.mark.skipif(BACKENDS["fbgemm"].why_not() is not None, reason="this torch has no FBGEMM")

SOURCE, TARGET = Affine(0.02, 100), Affine(0.1, 120)

CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def _dense(inputs: int, outputs: int, target: Affine | None = TARGET) -> Int8Linear:
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    numbers = Requantization.to_float(weight, torch.rand(outputs) * 0.01 + 1e-4, torch.randn(outputs), SOURCE)
    return Int8Linear(weight, numbers if target is None else numbers.to_levels(target), SOURCE, target)


def _depthwise(channels: int) -> Int8DepthwiseConv2d:
    weight = torch.randint(-127, 128, (9, channels), dtype=torch.int8)
    numbers = Requantization.to_float(weight.t(), torch.full((channels,), 0.01), None, SOURCE).to_levels(TARGET)
    return Int8DepthwiseConv2d(weight, numbers, ([3, 3], [1, 1], [1, 1], [1, 1]), SOURCE, TARGET)


def _levels(*shape: int) -> Tensor:
    return torch.randint(0, 64, shape, dtype=torch.uint8)  # Small enough for FBGEMM's 16-bit sums.


@pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_native), "reference"])
@pytest.mark.parametrize("layout", [CHANNELS_LAST, PACKED])
@pytest.mark.parametrize("target", [TARGET, None])
@pytest.mark.parametrize("block", [(1, 4), (2, 4), (4, 4)])
@pytest.mark.parametrize(
    ("positions", "inputs", "outputs"),
    [((0,), 9, 6), ((2, 0, 3), 9, 6), ((), 9, 6), ((), 8, 1), ((3,), 0, 6), ((1,), 0, 6), ((3,), 9, 0), ((0,), 0, 0)],
)
def test_empty_shapes(
    backend: str, layout: str, target: Affine | None, block: tuple[int, int],
    positions: tuple[int, ...], inputs: int, outputs: int,
) -> None:  # fmt: skip
    dense, levels = _dense(inputs, outputs, target), _levels(*positions, inputs)
    layer = BlockSparseInt8Linear.of(dense, block, backend=backend)
    assert torch.equal(layer(levels), dense(levels))
    layer.input_layout = layout
    layer.output_layout = layout if target else CHANNELS_LAST
    got = layer(pack(levels) if layout == PACKED else levels)
    assert torch.equal(unpack(got, outputs) if layer.output_layout == PACKED else got, dense(levels))
    assert repr(layer).startswith(f"BlockSparseInt8Linear({inputs}, {outputs}, ")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positions", [(0,), (2, 0), ()])
def test_every_backend_takes_no_positions_and_a_single_one(backend: str, positions: tuple[int, ...]) -> None:
    dense, levels = _dense(9, 6), _levels(*positions, 9)
    got = BlockSparseInt8Linear.of(dense, backend=backend)(levels)
    assert got.shape == (*positions, 6)
    assert ((got.int() - dense(levels).int()).abs() <= 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [CHANNELS_LAST, PACKED])
def test_inputs_may_lie_in_any_order(backend: str, layout: str) -> None:
    dense = _dense(12, 6)
    layer = BlockSparseInt8Linear.of(dense, backend=backend)
    layer.input_layout = layout
    wide = _levels(5, 7, 24)
    for levels in (wide[..., ::2], wide[..., 8:20], wide[1:, 2:, :12], wide.transpose(0, 1)[..., :12]):
        given = pack(levels) if layout == PACKED else levels
        assert ((layer(given).int() - dense(levels).int()).abs() <= 1).all()
        if layout == PACKED:
            beside = torch.stack([given, given + 1], 2)[:, :, 0]
            assert not beside.is_contiguous()
            assert torch.equal(layer(beside), layer(given))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, 6, 5, 3).permute(0, 2, 3, 1),
        lambda: torch.randn(4, 6, 1, 1).permute(0, 2, 3, 1),
        lambda: torch.randn(4, 1, 7, 1).permute(0, 2, 3, 1),
        lambda: torch.randn(1, 6).expand(5, 6),
        lambda: torch.randn(6, 1, 1).expand(6, 4, 6),
        lambda: torch.randn(3, 8, 12)[:, ::2, ::3],
        lambda: torch.randn(8, 3, 2).transpose(0, 2),
        lambda: torch.randn(0, 5),
        lambda: torch.randn(5, 0),
        lambda: torch.randn(70, 7, dtype=torch.float64).t(),
    ],
)
@pytest.mark.parametrize("layout", [CHANNELS_LAST, PACKED])
def test_floats_may_lie_in_any_order(make: Callable[[], Tensor], layout: str) -> None:
    x = make()
    assert torch.equal(quantize(x, 0.02, 100, layout), _quantize(x, 0.02, 100, layout))


def test_windows_of_no_images_are_none() -> None:
    assert _depthwise(5)(_levels(0, 5, 6, 7)).shape == (0, 5, 6, 7)
    assert im2col(_levels(0, 4, 5, 3), [2, 2], [1, 1], [0, 0], [1, 1], 0).shape == (0, 3, 4, 12)


def test_padding_may_be_larger_than_the_kernel() -> None:
    images, sizes = _levels(1, 3, 2, 5), ([2, 2], [2, 3], [4, 5], [1, 1], 9)
    assert torch.equal(im2col(images, *sizes), _im2col(images, *sizes))


def _buffers(layer: nn.Module) -> dict[str, Any]:
    return dict(layer._buffers)


@pytest.mark.parametrize("which", ["first", "last"])
def test_one_matrix_may_serve_layers_of_other_numbers(which: str) -> None:
    """Layers that share blocks get their own scales and bias in backends that prepare weights."""
    dense = _dense(12, 6)
    matrix = compress(dense.weight, (1, 4))
    scales = dense.multiplier * (0.5 if which == "first" else 2)
    other = Int8Linear(dense.weight, replace(dense.requantization, multiplier=scales), SOURCE, TARGET)
    levels = _levels(7, 12)
    for backend in BACKENDS:
        for layer in (dense, other, dense):
            lowered = BlockSparseInt8Linear(matrix, layer.requantization, 12, SOURCE, TARGET, backend=backend)
            assert ((lowered(levels).int() - layer(levels).int()).abs() <= 1).all(), backend


def test_rewritten_weights_are_prepared_anew() -> None:
    for backend in BACKENDS:
        layer, levels = BlockSparseInt8Linear.of(_dense(12, 6), backend=backend), _levels(7, 12)
        layer(levels)
        layer.values.neg_()
        layer.addend.add_(3)
        expected = Int8Linear(layer.weight, layer.requantization, SOURCE, TARGET)
        assert ((layer(levels).int() - expected(levels).int()).abs() <= 1).all(), backend


UNUSUAL: dict[str, Callable[[], Any]] = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", UNUSUAL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_modes_change_nothing(mode: str, backend: str) -> None:
    layer, x = BlockSparseInt8Linear.of(_dense(12, 6, None), backend=backend), torch.rand(7, 12)
    with torch.no_grad():
        expected = layer(SOURCE.quantize(x))
    with UNUSUAL[mode]():
        inside = BlockSparseInt8Linear(
            BlockSparse(layer.values.clone(), layer.columns.clone(), layer.row_pointers.clone()),
            layer.requantization, 12, SOURCE, backend=backend,
        )  # fmt: skip
        for each in (layer, inside):
            got = each(SOURCE.quantize(x))
            assert got.dtype == torch.float32
            assert torch.equal(got, expected)


@pytest.mark.parametrize("bounds", [(-math.inf, math.inf), (-300.0, 900.0), (140.0, 200.0), (0.0, 255.0)])
def test_levels_stay_levels_whatever_the_bounds(bounds: tuple[float, float]) -> None:
    dense, levels = _dense(12, 6), _levels(40, 12)
    numbers = replace(dense.requantization, multiplier=dense.multiplier * 1e6, low=bounds[0], high=bounds[1])
    layer = Int8Linear(dense.weight, numbers, SOURCE, TARGET)
    expected = layer(levels)
    low, high = max(bounds[0], 0), min(bounds[1], 255)
    assert (expected.min(), expected.max()) == (low, high)
    for backend in BACKENDS:
        assert torch.equal(BlockSparseInt8Linear.of(layer, backend=backend)(levels), expected), backend


def test_an_unknown_backend_is_named() -> None:
    layer = BlockSparseInt8Linear.of(_dense(4, 4), backend="natif")
    with pytest.raises(SpecError, match=r"unknown backend .natif.; did you mean .native."):
        layer(_levels(1, 4))


TOO_MANY = {
    "unpack": (lambda: unpack(_levels(2, 3, 4), 9), lambda: _unpack(_levels(2, 3, 4), 9)),
    "negative": (lambda: unpack(_levels(2, 3, 4), -1), lambda: _unpack(_levels(2, 3, 4), -1)),
    "dequantize": (
        lambda: dequantize(_levels(3, 8), 0.1, 0, CHANNELS_LAST, 9),
        lambda: _dequantize(_levels(3, 8), 0.1, 0, CHANNELS_LAST, 9),
    ),
    "packed": (
        lambda: dequantize(_levels(2, 3, 4), 0.1, 0, PACKED, 100),
        lambda: _dequantize(_levels(2, 3, 4), 0.1, 0, PACKED, 100),
    ),
}


@pytest.mark.parametrize("case", TOO_MANY)
def test_channels_that_are_not_there_are_refused(case: str) -> None:
    for call in TOO_MANY[case]:
        with pytest.raises(ValueError, match="there are 8 channels, not "):
            call()


def test_a_number_without_dimensions_is_refused() -> None:
    for call in (quantize, _quantize):
        with pytest.raises(ValueError, match="a number without dimensions has no channels"):
            call(torch.tensor(1.0), 0.1, 0, CHANNELS_LAST)


@needs_native
@pytest.mark.parametrize(
    "sizes",
    [
        ([0, 3], [1, 1], [0, 0], [1, 1]),
        ([3], [1, 1], [0, 0], [1, 1]),
        ([3, 3], [0, 1], [0, 0], [1, 1]),
        ([3, 3], [1, 1], [-1, 0], [1, 1]),
        ([3, 3], [1, 1], [0, 0], [1, 0]),
    ],
)
def test_impossible_windows_are_refused(sizes: tuple[list[int], ...]) -> None:
    layer = _depthwise(3)
    with pytest.raises(ValueError, match="kernel, stride and dilation are two numbers from 1, padding two from 0"):
        im2col(_levels(1, 5, 5, 3), *sizes, 0)
    with pytest.raises(ValueError, match="kernel, stride and dilation are two numbers from 1, padding two from 0"):
        depthwise_int8_conv2d(_levels(1, 3, 5, 5), layer.weight, *layer.numbers, *sizes, 0)


@needs_native
def test_images_of_other_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected images \[batch, channels, height, width\], not \[3, 5, 5\]"):
        _depthwise(3)(_levels(3, 5, 5))


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "device": (lambda buffer: buffer.to("meta"), "is on meta, the input on the CPU; move both to one device"),
    "dtype": (lambda buffer: buffer.double(), "must be .*, not Double"),
    "order": (lambda buffer: torch.stack([buffer, buffer], -1)[..., 0], "numbers side by side"),
}


@needs_native
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["values", "columns", "row_pointers", "offsets", "multiplier", "addend", "table"])
def test_buffers_that_are_no_addresses_of_ours_are_refused(wrong: str, name: str) -> None:
    """Called on the CPU's own kernel, as when a tensor of another device leads torch astray."""
    change, message = WRONG[wrong]
    layer = BlockSparseInt8Linear.of(_dense(8, 6))
    held = _buffers(layer) | {"table": torch.arange(256, dtype=torch.uint8)}
    held[name] = change(held[name])
    order = ("values", "columns", "row_pointers", "offsets", "multiplier", "addend", "table")
    arguments = (*(held[n] for n in order), 0.0, 255.0, torch.uint8, CHANNELS_LAST, CHANNELS_LAST, "native")
    with pytest.raises(RuntimeError, match=f"'{name}' .*{message}"):
        torch.ops.fxprune.block_sparse_int8_linear.default.redispatch(CPU, _levels(2, 8), *arguments)


@needs_native
@pytest.mark.parametrize("shape", [(6, 4), (3, 1, 5), (2, 8, 4), (24,)])
def test_blocks_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    layer = BlockSparseInt8Linear.of(_dense(8, 6))
    held = _buffers(layer) | {"values": torch.zeros(shape, dtype=torch.int8)}
    order = ("values", "columns", "row_pointers", "offsets", "multiplier", "addend", "table")
    arguments = (*(held[n] for n in order), 0.0, 255.0, torch.uint8, CHANNELS_LAST, CHANNELS_LAST, "native")
    with pytest.raises(RuntimeError, match="the native backend multiplies blocks of 1x4, 2x4 and 4x4"):
        torch.ops.fxprune.block_sparse_int8_linear.default.redispatch(CPU, _levels(2, 8), *arguments)


@needs_native
def test_what_torch_sends_elsewhere_is_refused_rather_than_sent_in_circles() -> None:
    quantized = torch.quantize_per_tensor(torch.rand(3, 8), 0.1, 0, torch.quint8)
    with pytest.raises(RuntimeError, match="expected uint8 levels, got QUInt8"):
        pack(quantized)


SHAPES = {"batch": (5, 8, 6, 7), "size": (2, 8, 11, 4)}


class _Images(nn.Module):
    """Quantise images, convolve every channel by itself, multiply patches, and give floats."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.depthwise = _depthwise(8)
        self.linear = BlockSparseInt8Linear.of(_dense(32, 6, None), backend=backend)
        self.linear.input_layout = PACKED

    def forward(self, images: Tensor) -> Tensor:
        rows = quantize(images.permute(0, 2, 3, 1), 0.02, 100, CHANNELS_LAST)
        levels = self.depthwise(rows.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.linear(pack(im2col(levels, [2, 2], [2, 1], [1, 0], [1, 1], 7)))


@pytest.mark.parametrize("backend", ["native", "onednn", "reference"])
def test_exported_programs_take_other_sizes(backend: str) -> None:
    model = _Images(backend)
    dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=3), 3: torch.export.Dim("width", min=3)}
    program = torch.export.export(model, (torch.rand(2, 8, 6, 7),), dynamic_shapes={"images": dims}).module()
    for shape in SHAPES.values():
        images = torch.rand(shape)
        assert torch.equal(program(images), model(images))


def test_threads_may_call_at_once() -> None:
    """Every thread has memory of its own for tiles, and FBGEMM's switch is one thread's at a time."""
    backends = [name for name, backend in BACKENDS.items() if backend.refusal((1, 4), torch.uint8) is None]
    cases = []
    for index in range(8):
        dense, levels = _dense(12 + 9 * index, 6 + 5 * index), _levels(3 + 20 * index, 12 + 9 * index) // 8
        cases.append((BlockSparseInt8Linear.of(dense, backend=backends[index % len(backends)]), levels, dense(levels)))
    engine, barrier, wrong = torch.backends.quantized.engine, threading.Barrier(len(cases)), []

    def work(layer: nn.Module, levels: Tensor, expected: Tensor) -> None:
        barrier.wait()
        try:
            for _ in range(30):
                assert ((layer(levels).int() - expected.int()).abs() <= 1).all()
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=case) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert torch.backends.quantized.engine == engine


@needs_fbgemm
def test_fbgemms_switch_is_open_in_a_forked_child() -> None:
    from fxprune.runtime.int8.vendor import _fbgemm_engine

    layer, levels = BlockSparseInt8Linear.of(_dense(12, 6), backend="fbgemm"), _levels(7, 12)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = layer(levels)
        with _fbgemm_engine():
            codes = in_processes(2, lambda _: sys.exit(not torch.equal(layer(levels), expected)))
    finally:
        torch.set_num_threads(threads)
    assert codes == [0, 0]


def test_loaded_kernels_run_in_a_forked_child() -> None:
    layer, levels = BlockSparseInt8Linear.of(_dense(12, 6)), _levels(7, 12)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork, whoever started them.
    try:
        expected = layer(levels)
        assert in_processes(2, lambda _: sys.exit(not torch.equal(layer(levels), expected))) == [0, 0]
    finally:
        torch.set_num_threads(threads)


def test_weights_of_no_inputs_are_quantised() -> None:
    weight, scales = quantize_weight(torch.zeros(3, 0))
    assert weight.shape == (3, 0)
    assert scales.tolist() == [1, 1, 1]
