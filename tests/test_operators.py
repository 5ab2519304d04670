"""What every operator does to the channels that flow through it: they leave exactly, or statistically, or are pinned.

Channels of a convolution meet the operator, and every element of its result is weighted by a parameter of its own, so
that a rule that confuses positions is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import torchvision
from torch import Tensor, nn

from tests.laws import Cut, assert_laws

Operator = Callable[[Tensor], Tensor]

aten, vision = torch.ops.aten, torch.ops.torchvision

BOXES = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 2.0, 5.0, 5.0], [0.0, 2.0, 0.0, 6.0, 3.0]])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def fixed(*shape: int) -> Tensor:
    """A constant that differs at every position."""
    return torch.linspace(-1, 1, int(torch.Size(shape).numel()), dtype=torch.float64).sin().view(shape)


def found_in(y: Tensor) -> Tensor:
    """int64 [batch, 1, 5]: places in a flattened map of 6 × 6 that depend on data."""
    return (y.flatten(2).sum(1, keepdim=True)[..., :5] * 7).long() % 36


def everywhere(y: Tensor) -> Tensor:
    """The same places for all channels."""
    return found_in(y).expand(-1, 8, -1)


class Through(nn.Module):
    """Eight channels on a map of 6 × 6 through an operator, and each element of its result weighted.

    The channels are absorbed elsewhere too, so that they could leave if the operator forgot to pin them.
    """

    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.operator = operator
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        with torch.no_grad():
            shape = operator(self.a.double()(torch.randn(2, 3, 6, 6, dtype=torch.float64))).shape
        self.weight, self.direct = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return (self.operator(y) * self.weight).sum() + (y * self.direct).sum()


def pruned(operator: Operator, **options: Any) -> Cut:
    return assert_laws(Through(operator), torch.randn(2, 3, 6, 6), **options)


def places(cut: Cut, parameter: str = "a.weight", dimension: int = 0) -> list[str | None]:
    """The orbit of every position of a parameter's dimension, None where it is pinned."""
    return [None if place is None else place[0] for place in cut.channels(parameter, dimension)]


def assert_exact(cut: Cut, classes: int, parameter: str = "a.weight", dimension: int = 0) -> None:
    found = set(places(cut, parameter, dimension))
    assert len(set(cut.channels(parameter, dimension))) == classes, cut.channels(parameter, dimension)
    assert None not in found
    assert all(cut.orbits[str(name)].statistical is None for name in found)
    assert cut.width(parameter, dimension) < cut.traced.get_parameter(parameter).shape[dimension]


def rms_by_hand(y: Tensor) -> Tensor:
    return y * (y.pow(2).mean(1, keepdim=True) + 1e-6).rsqrt()


def layer_norm_by_hand(y: Tensor) -> Tensor:
    centred = y - y.mean(1, keepdim=True)
    return centred / (centred.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()


def global_response_norm(y: Tensor) -> Tensor:
    energy = y.norm(p=2, dim=(2, 3), keepdim=True)
    share = energy / (energy.mean(dim=1, keepdim=True) + 1e-6)
    return y + torch.addcmul(fixed(8).view(1, -1, 1, 1), fixed(8).view(1, -1, 1, 1), y * share)


def rotary_by_halves(y: Tensor) -> Tensor:
    first, second = y.chunk(2, dim=1)
    return y * fixed(8, 1, 1).cos() + torch.cat((-second, first), 1) * fixed(8, 1, 1).sin()


def rotary_by_pairs(y: Tensor) -> Tensor:
    y = y.permute(0, 2, 3, 1)
    turned = torch.stack([-y[..., 1::2], y[..., ::2]], -1).reshape(y.shape)
    return y * fixed(8).cos() + turned * fixed(8).sin()


def written_in_place(y: Tensor) -> Tensor:
    aten.slice.Tensor(y, 1, 0, 4).copy_(y[:, 4:] * 2)
    return y * 2


def assigned(y: Tensor) -> Tensor:
    y = y * 2
    y[:, :4] = y[:, 4:] * 2
    y[:, 2:6, 1] = 0.5
    y[..., 3] = y.shape[1]
    return y


EXACT: dict[str, tuple[Operator, int]] = {
    # A mean keeps its divisor.
    "mean": (lambda y: y.mean(1), 8),
    "mean_keepdim": (lambda y: y.mean(-3, keepdim=True), 8),
    "mean_of_several": (lambda y: torch.mean(y, (1, 2)), 8),
    "mean_by_keywords": (lambda y: torch.mean(input=y, dim=[1, -1], keepdim=True), 8),
    "mean_as_numpy_spells_it": (lambda y: y.mean(axis=1, keepdims=True), 8),
    "mean_of_all": (lambda y: y.mean(), 8),
    "mean_in_another_type": (lambda y: y.float().mean(1, dtype=torch.float64), 8),
    "mean_of_aten": (lambda y: aten.mean.dim(y, [1], True), 8),
    "mean_of_two_orbits": (lambda y: torch.cat([y, y[:, :4]], 1).mean((1, 2)), 8),
    "rms_by_hand": (rms_by_hand, 8),
    "layer_norm_by_hand": (layer_norm_by_hand, 8),
    # A zero adds nothing to a norm.
    **{f"norm_{p}": (lambda y, p=p: torch.linalg.vector_norm(y, ord=p, dim=1), 8) for p in (0, 0.5, 1, 2, 3)},
    "norm_inf": (lambda y: torch.linalg.vector_norm(y, ord=float("inf"), dim=(1, 3)), 8),
    "norm_of_all": (lambda y: y.norm(), 8),
    "norm_of_method": (lambda y: y.norm(p=1, dim=1, keepdim=True), 8),
    "pairwise_norm": (lambda y: aten.norm.ScalarOpt_dim(y, None, [1]), 8),
    **{f"normalize_{p}": (lambda y, p=p: F.normalize(y, p=p, dim=1), 8) for p in (1.0, 2.0, float("inf"))},
    "nansum": (lambda y: y.nansum(1), 8),
    # Statistics of each channel alone.
    "instance_norm": (lambda y: F.instance_norm(y), 8),
    "batch_norm": (lambda y: F.batch_norm(y, None, None, training=True), 8),
    "var_of_space": (lambda y: y.var((2, 3)), 8),
    "amax_of_space": (lambda y: y.amax((2, 3)), 8),
    "median_of_space": (lambda y: y.median(2)[0], 8),
    "kthvalue_of_space": (lambda y: y.kthvalue(2, 3)[0], 8),
    "mode_of_space": (lambda y: y.mode(3)[0], 8),
    "softmax_of_space": (lambda y: y.flatten(2).softmax(2), 8),
    "topk_of_space": (lambda y: y.flatten(2).topk(3, 2)[0], 8),
    "sort_of_batch": (lambda y: y.sort(0)[0], 8),
    "argsort_of_space": (lambda y: y.argsort(2) * 0.5, 8),
    "cummax_of_space": (lambda y: y.cummax(3)[0], 8),
    # Pointwise operators that PyTorch does not tag.
    "floor_divide": (lambda y: y.detach() // 0.25, 8),
    "bucketize": (lambda y: torch.bucketize(y, torch.tensor([-0.5, 0.0, 0.5], dtype=y.dtype)) * 0.5, 8),
    "polar": (lambda y: torch.view_as_real(torch.polar(y.abs(), y)), 8),
    "complex": (lambda y: torch.complex(y, y.cos()).abs(), 8),
    "clamp_by_tensors": (lambda y: torch.clamp(y, fixed(8, 1, 1) - 1, fixed(8, 1, 1)), 8),
    "addcmul": (lambda y: torch.addcmul(y, fixed(8, 1, 1), y), 8),
    "addcdiv": (lambda y: torch.addcdiv(y, y, fixed(8, 1, 1) + 2), 8),
    "lerp": (lambda y: torch.lerp(y, y.cos(), fixed(8, 1, 1)), 8),
    "where": (lambda y: torch.where(y > 0, y, fixed(8, 1, 1)), 8),
    "masked_fill": (lambda y: y.masked_fill(y > 0, 1.0), 8),
    "glu": (lambda y: F.glu(y, 1), 4),
    # Windows.
    "unfold": (lambda y: F.unfold(y, 3, padding=1, stride=2), 8),
    "fold": (lambda y: F.fold(y.flatten(2), (7, 7), 2), 2),
    "fold_of_unfold": (lambda y: F.fold(F.unfold(y, 2, stride=2), (6, 6), 2, stride=2), 8),
    "windows": (lambda y: y.unfold(2, 4, 2).unfold(3, 3, 3).permute(0, 2, 3, 1, 4, 5).reshape(4, 2, 8, 12), 8),
    # Divisions and moves.
    "channel_shuffle": (lambda y: F.channel_shuffle(y, 2), 4),
    "step": (lambda y: y[:, ::2], 4),
    "step_from_an_offset": (lambda y: y[:, 1::4] + y[:, 3:8:4], 2),
    "step_of_aten": (lambda y: aten.slice.Tensor(y, 1, 0, 8, 2), 4),
    "rotary_by_halves": (rotary_by_halves, 4),
    "rotary_by_pairs": (rotary_by_pairs, 4),
    "unsafe_chunk": (lambda y: torch.mul(*y.unsafe_chunk(2, 1)), 4),
    "unsafe_split": (lambda y: torch.mul(*torch.unsafe_split_with_sizes(y, [4, 4], 1)), 4),
    "repeat_interleave": (lambda y: y.repeat_interleave(3, 1), 8),
    "tile": (lambda y: y.tile(1, 2, 1, 1), 8),
    "broadcast_to": (lambda y: y.mean((2, 3), keepdim=True).broadcast_to(2, 8, 6, 6), 8),
    "hstack": (lambda y: torch.hstack([y, y]), 8),
    "diagonal": (lambda y: y.diagonal(1, dim1=3, dim2=2), 8),
    "tril": (lambda y: y.tril(), 8),
    "triu": (lambda y: y.triu(1), 8),
    "rot90": (lambda y: y.rot90(1, (2, 3)), 8),
    # Reading and writing at positions of other dimensions.
    "gather": (lambda y: y.flatten(2).gather(2, everywhere(y)), 8),
    "take_along_dim": (lambda y: torch.take_along_dim(y.flatten(2), found_in(y), 2), 8),
    "scatter": (lambda y: y.flatten(2).scatter(2, everywhere(y), y.flatten(2)[:, :, :5] * 2), 8),
    "scatter_a_value": (lambda y: y.flatten(2).scatter(2, everywhere(y), 0.5), 8),
    "scatter_add": (lambda y: y.flatten(2).scatter_add(2, everywhere(y), y.flatten(2)[:, :, :5]), 8),
    "scatter_reduce": (
        lambda y: y.flatten(2).scatter_reduce(2, everywhere(y), y.flatten(2)[:, :, :5], "amax"),
        8,
    ),
    "index_add": (lambda y: y.index_add(2, torch.tensor([0, 3]), y[:, :, :2]), 8),
    "index_copy": (lambda y: y.index_copy(3, torch.tensor([5, 2]), y[..., :2]), 8),
    "index_fill": (lambda y: y.index_fill(2, torch.tensor([1, 4]), 0.5), 8),
    "index_put": (lambda y: y.movedim(1, -1).index_put((torch.tensor([1]), torch.tensor([2])), fixed(6, 8)), 8),
    "index_put_a_value": (lambda y: y.movedim(1, -1).index_put((torch.tensor([0]),), fixed(1)), 8),
    "index_put_of_channels": (lambda y: fixed(3, 2, 8).index_put((torch.tensor([1]),), y[:, :, 0, 0]), 8),
    "slice_scatter": (lambda y: y.slice_scatter(y[:, 4:] * 2, 1, 0, 4), 4),
    "slice_scatter_by_keywords": (lambda y: y.slice_scatter(y[:, :4].cos(), dim=1, start=4), 4),
    "slice_scatter_of_space": (lambda y: y.slice_scatter(y[:, :, 4:], 2, 1, 5, 2), 8),
    "select_scatter_of_space": (lambda y: y.select_scatter(y[:, :, 0].cos(), 2, 3), 8),
    "copy_into_a_slice": (written_in_place, 4),
    "assigned_to_slices": (assigned, 4),
    "embedding_of_levels": (
        lambda y: F.embedding(torch.bucketize(y, torch.tensor([-0.5, 0.5], dtype=y.dtype)), fixed(3, 5)),
        8,
    ),
    # Sampling.
    "grid_sample": (lambda y: F.grid_sample(y, fixed(2, 4, 5, 2), align_corners=False), 8),
    "grid_sample_3d": (
        lambda y: F.grid_sample(y.unflatten(3, (2, 3)), fixed(2, 2, 4, 5, 3), align_corners=True),
        8,
    ),
    "roi_align": (lambda y: vision.roi_align(y, BOXES.to(y.dtype), 1.0, 2, 3, 2, False), 8),
    "roi_pool": (lambda y: vision.roi_pool(y, BOXES.to(y.dtype), 1.0, 2, 2)[0], 8),
    "ps_roi_align": (lambda y: vision.ps_roi_align(y, BOXES.to(y.dtype), 1.0, 2, 2, 2)[0], 2),
    "ps_roi_pool": (lambda y: vision.ps_roi_pool(y, BOXES.to(y.dtype), 1.0, 2, 1)[0], 4),
    "max_unpool": (lambda y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2), 8),
    "resized_with_antialiasing": (lambda y: F.interpolate(y, size=(4, 9), mode="bicubic", antialias=True), 8),
    # Fourier transforms.
    "rfft": (lambda y: torch.fft.rfft2(y).abs(), 8),
    "fft": (lambda y: torch.view_as_real(torch.fft.fft(y, dim=2)), 8),
    "inverse_fft": (lambda y: torch.fft.irfft2(torch.fft.rfft2(y), s=(6, 6)), 8),
    "pairs_as_complex": (lambda y: torch.view_as_real(torch.view_as_complex(y.unflatten(3, (3, 2))).exp()), 8),
    # Numbers computed from sizes are no sizes.
    "size_as_a_value": (lambda y: y + torch.full((1, y.shape[1], 1, 1), y.shape[1], dtype=y.dtype), 8),
    "size_as_a_fraction": (lambda y: y + y.new_full((1, y.size(1), 1, 1), y.size(1) ** -0.5), 8),
    "size_as_padding": (lambda y: F.pad(y, (1, 1), value=y.shape[1]), 8),
    "size_as_a_scale": (
        lambda y: F.scaled_dot_product_attention(*[y.flatten(2).mT] * 3, scale=1 / y.shape[1]),
        8,
    ),
    # Products.
    "einsum_with_ellipsis": (lambda y: torch.einsum("bc...,dc->bd...", y, fixed(5, 8)), 8),
    "einsum_over_the_batch": (lambda y: torch.einsum("nc,nd->cd", y[:, :, 0, 0], fixed(2, 5)), 8),
    "tensordot": (lambda y: torch.tensordot(y, fixed(8, 6, 5), ([1, 3], [0, 1])), 8),
    "kernel_of_one_tap": (lambda y: F.conv2d(y.transpose(1, 3), fixed(5, 6, 3, 1), padding=(1, 0)), 8),
    "transposed_kernel_of_one_tap": (lambda y: F.conv_transpose1d(y[:, :, 0].mT, fixed(6, 5, 1)), 8),
    "addmm": (lambda y: torch.addmm(fixed(5), y.mean((2, 3)), fixed(8, 5)), 8),
    "addbmm": (lambda y: torch.addbmm(fixed(6, 5), y[:, :, 0].transpose(1, 2), fixed(2, 8, 5)), 8),
    "addbmm_out": (lambda y: torch.addbmm(fixed(8, 5), y[:, :, 0], fixed(2, 6, 5)), 8),
    "addmv": (lambda y: torch.addmv(fixed(2), y[:, :, 0, 0], fixed(8)), 8),
    "addr": (lambda y: torch.addr(fixed(8, 6), y[0, :, 0, 0], fixed(6)), 8),
    "outer": (lambda y: torch.outer(y[0, :, 0, 0], fixed(5)), 8),
    "global_response_norm": (global_response_norm, 8),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str) -> None:
    operator, classes = EXACT[name]
    assert_exact(pruned(operator), classes)


STATISTICAL: dict[str, Operator] = {
    "amax": lambda y: y.amax(1),
    "amin": lambda y: y.amin((1, 2), keepdim=True),
    "aminmax": lambda y: torch.aminmax(y, dim=1)[0],
    "max_of_all": lambda y: y.max(),
    "min_of_all": lambda y: y.min(),
    "median_of_all": lambda y: y.median(),
    "logsumexp": lambda y: y.logsumexp(1),
    "var": lambda y: y.var(1),
    "std": lambda y: y.std((1, 2)),
    "var_mean": lambda y: torch.var_mean(y, 1)[1],
    "mean_inside_a_pool": lambda y: F.adaptive_avg_pool2d(y.transpose(1, 3), 1),
    "rms_norm": lambda y: F.rms_norm(y.movedim(1, -1), (8,), fixed(8)),
    "layer_norm": lambda y: F.layer_norm(y.movedim(1, -1), (8,), fixed(8), fixed(8)),
    "batch_norm_of_the_batch": lambda y: F.batch_norm(y.transpose(0, 1), None, None, training=True),
}


@pytest.mark.parametrize("name", STATISTICAL)
def test_statistical(name: str) -> None:
    exact = pruned(STATISTICAL[name], removed_at_least=0.0)
    (orbit,) = {str(place) for place in places(exact)}
    assert exact.orbits[orbit].statistical is not None
    assert exact.width("a.weight", 0) == 8
    approximate = pruned(STATISTICAL[name], approximate=True)
    assert approximate.width("a.weight", 0) == 4


PINNED: dict[str, tuple[Operator, str, str]] = {
    "norm_of_negative_order": (lambda y: y.norm(p=-1, dim=1), "aten.linalg_vector_norm", "zero is not a removal"),
    "prod": (lambda y: y.prod(1), "aten.prod", "zero is not a removal"),
    "argmax": (lambda y: y.argmax(1) * 0.5, "aten.argmax", "zero is not a removal"),
    "max": (lambda y: y.max(1)[0], "aten.max", "positions are given as numbers"),
    "median": (lambda y: y.median(1)[0], "aten.median", "positions are given as numbers"),
    "kthvalue": (lambda y: y.kthvalue(2, 1)[0], "aten.kthvalue", "positions are given as numbers"),
    "mode": (lambda y: y.mode(1)[0], "aten.mode", "positions are given as numbers"),
    "softmax": (lambda y: y.softmax(1), "aten._softmax", "depends on the others"),
    "cumsum": (lambda y: y.cumsum(1), "aten.cumsum", "depends on the others"),
    "cummax": (lambda y: y.cummax(1)[0], "aten.cummax", "depends on the others"),
    "sort": (lambda y: y.sort(1)[0], "aten.sort", "depends on the others"),
    "topk": (lambda y: y.topk(3, 1)[0], "aten.topk", "depends on the others"),
    "windows": (lambda y: y.unfold(1, 2, 2), "aten.unfold", "windows slide"),
    "unfold_over_channels": (lambda y: F.unfold(y.transpose(1, 3), 3), "aten.im2col", "windows slide"),
    "fold_over_channels": (
        lambda y: F.fold(y.flatten(2).transpose(1, 2), (3, 5), 2),
        "aten.col2im",
        "added up along this dimension",
    ),
    "step_that_stops_early": (lambda y: y[:, 1:7:3], "aten.slice", "step"),
    "step_that_starts_late": (lambda y: y[:, 2::2], "aten.slice", "step"),
    "rot90": (lambda y: y.rot90(1, (1, 2)), "aten.rot90", "rotated"),
    "roll": (lambda y: y.roll(2, 1), "aten.roll", "rolled"),
    "tril": (lambda y: y.transpose(1, 2).tril(), "aten.tril", "zeroed by its position"),
    "diagonal": (lambda y: y.diagonal(0, 1, 2), "aten.diagonal", "a diagonal is taken"),
    "gather": (lambda y: y.gather(1, torch.zeros(2, 3, 6, 6, dtype=torch.int64)), "aten.gather", "at positions"),
    "gather_by_a_table_of_channels": (
        lambda y: y.gather(2, torch.zeros(2, 8, 3, 6, dtype=torch.int64)),
        "aten.gather",
        "joined with a dimension that cannot be pruned",
    ),
    "gather_of_the_first": (
        lambda y: y.gather(2, torch.zeros(2, 5, 3, 6, dtype=torch.int64)),
        "aten.gather",
        "at its first positions",
    ),
    "scatter": (
        lambda y: y.scatter(1, torch.zeros(2, 1, 6, 6, dtype=torch.int64), y[:, :1] * 2),
        "aten.scatter",
        "written at positions",
    ),
    "index_add": (lambda y: y.index_add(1, torch.tensor([0, 3]), fixed(2, 2, 6, 6)), "aten.index_add", "at positions"),
    "index_fill": (lambda y: y.index_fill(1, torch.tensor([1]), 0.5), "aten.index_fill", "written at positions"),
    "index_put": (
        lambda y: y.transpose(0, 1).index_put((torch.tensor([0, 3]),), fixed(2, 6, 6)),
        "aten.index_put",
        "written at positions",
    ),
    "read_at_positions_of_channels": (
        lambda y: fixed(36)[(y.flatten(2).topk(3, 2)[1],)],
        "aten.index",
        "positions that are read",
    ),
    "selected_by_positions_of_channels": (
        lambda y: fixed(5, 2).index_select(0, y.flatten(2).argmax(2)[0] % 5),
        "aten.index_select",
        "positions that are read",
    ),
    "written_at_positions_of_channels": (
        lambda y: fixed(36, 2).index_put((y.flatten(2).argmax(2)[0],), fixed(1)),
        "aten.index_put",
        "positions that are written",
    ),
    "added_at_positions_of_channels": (
        lambda y: fixed(36, 2).index_add(0, y.flatten(2).argmax(2)[0], fixed(8, 2)),
        "aten.index_add",
        "positions that are written",
    ),
    "filled_at_positions_of_channels": (
        lambda y: fixed(36, 2).index_fill(0, y.flatten(2).argmax(2)[0], 0.5),
        "aten.index_fill",
        "positions that are written",
    ),
    "slice_scatter_with_a_step": (
        lambda y: y.slice_scatter(fixed(2, 4, 6, 6), 1, 0, 8, 2),
        "aten.slice_scatter",
        "cannot be re-derived",
    ),
    "masked_scatter": (lambda y: y.masked_scatter(y > 0, fixed(2, 8, 6, 6)), "aten.masked_scatter", "mask is set"),
    "fft": (lambda y: torch.fft.fft(y, dim=1).abs(), "aten._fft_r2c", "Fourier transform"),
    "parts_of_complex_numbers": (
        lambda y: torch.view_as_complex(y[:, :2].movedim(1, -1).contiguous()).abs() * y.sum(1),
        "aten.view_as_complex",
        "real and imaginary",
    ),
    "grid_over_channels": (
        lambda y: F.grid_sample(y.transpose(1, 3), fixed(2, 4, 5, 2), align_corners=False),
        "aten.grid_sampler_2d",
        "places of this dimension",
    ),
    "channels_as_places": (
        lambda y: F.grid_sample(fixed(2, 3, 5, 5), y[:, :2].movedim(1, -1), align_corners=False).sum() * y.sum(1),
        "aten.grid_sampler_2d",
        "places to sample at",
    ),
    "affine_grid": (
        lambda y: F.affine_grid(y.mean(2)[:, :6, 0].view(2, 2, 3), (2, 3, 4, 4), align_corners=False),
        "aten.affine_grid_generator",
        "affine map",
    ),
    "kernel_over_channels": (
        lambda y: F.conv2d(y.transpose(1, 3), fixed(5, 6, 1, 3)),
        "aten.convolution",
        "slides along this dimension",
    ),
    "kernel_with_a_stride": (
        lambda y: F.conv2d(y.transpose(1, 3), fixed(5, 6, 1, 1), stride=2),
        "aten.convolution",
        "slides along this dimension",
    ),
    "kernel_with_padding": (
        lambda y: F.conv2d(y.transpose(1, 3), fixed(5, 6, 1, 1), padding=(0, 1)),
        "aten.convolution",
        "slides along this dimension",
    ),
    "bilinear": (
        lambda y: F.bilinear(y[:, :, 0, 0], y[:, :, 1, 1], fixed(3, 8, 8)),
        "aten._trilinear",
        "two other tensors",
    ),
    "cdist": (lambda y: torch.cdist(y.flatten(2), y.flatten(2)), "aten._cdist_forward", "distances"),
    "regions_over_channels": (
        lambda y: vision.roi_align(y.transpose(1, 3), BOXES.to(y.dtype), 1.0, 2, 2, 2, False),
        "torchvision.roi_align",
        "boxes lie",
    ),
    "local_response_norm": (lambda y: F.local_response_norm(y, 3), "aten.constant_pad_nd", "cannot be re-derived"),
}


@pytest.mark.parametrize("name", PINNED)
def test_pinned(name: str) -> None:
    operator, cause, text = PINNED[name]
    cut = pruned(operator, removed_at_least=0.0)
    found = [p for p in cut.orbits.pinned if (p.parameter, p.dimension) == ("a.weight", 0)]
    assert any(p.reason.operator == cause and text in p.reason.text for p in found), [str(p.reason) for p in found]


class Net(nn.Module):
    """A convolution, a body with parameters of its own, and a convolution that absorbs the result."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], into: int, **parts: Any) -> None:
        super().__init__()
        self.body = body
        self.a, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(into, 2, 1)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, self.a(x)))


def random(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


class StandardisedConv(nn.Conv2d):
    """As timm writes it: the weight is batch-normalised over its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2, channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = random(width), random(width)

    def forward(self, x: Tensor) -> Tensor:
        energy = x.norm(p=2, dim=(1, 2), keepdim=True)
        share = energy / (energy.mean(dim=-1, keepdim=True) + 1e-6)
        return x + torch.addcmul(self.bias.view(1, 1, 1, -1), self.weight.view(1, 1, 1, -1), x * share)


def test_standardised_convolution() -> None:
    net = Net(lambda m, y: m.ws(y), 6, ws=StandardisedConv(8, 6, 3, padding=1))
    cut = assert_laws(net, torch.randn(2, 3, 6, 6))
    assert_exact(cut, 6, "ws.weight", 0)
    (into,) = {str(name) for name in places(cut, "ws.weight", 1)}
    assert cut.orbits[into].statistical is not None


def test_statistics_keep_two_values() -> None:
    net = Net(lambda m, y: m.ws(y), 6, ws=StandardisedConv(8, 6, 1))
    cut = assert_laws(net, torch.randn(2, 3, 6, 6), approximate=True, fraction=1.0)
    assert cut.width("ws.weight", 1) == 2
    assert "aten.native_batch_norm" in cut.pinned_by("ws.weight", 1)


def test_global_response_norm() -> None:
    net = Net(lambda m, y: m.grn(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 8, grn=GlobalResponseNorm(8))
    cut = assert_laws(net, torch.randn(2, 3, 6, 6))
    assert_exact(cut, 8)
    assert cut.channels("grn.weight", 0) == cut.channels("a.weight", 0)


def test_mean_is_divided_by_the_count_of_the_wide_model() -> None:
    cut = pruned(lambda y: y.mean((1, 2)))
    (mean,) = (node for node in cut.slim.graph.nodes if node.target == "mean")
    (scaled,) = mean.users
    assert scaled.args == (mean, cut.width("a.weight", 0) / 8)


def test_mean_is_cut_again() -> None:
    once = pruned(lambda y: y.mean(1))
    twice = assert_laws(once.slim, torch.randn(2, 3, 6, 6), seed=1)
    assert (once.width("a.weight", 0), twice.width("a.weight", 0)) == (4, 2)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_deformable_convolution(groups: int, bias: bool) -> None:
    def body(m: Any, y: Tensor) -> Tensor:
        return vision.deform_conv2d(
            y, m.weight, m.offset(y), m.mask(y).sigmoid(), m.bias, 1, 1, 1, 1, 1, 1, groups, 1, True
        )

    parts = {"offset": nn.Conv2d(8, 18, 1), "mask": nn.Conv2d(8, 9, 1), "weight": random(16, 8 // groups, 3, 3)}
    net = Net(body, 16, **parts, bias=random(16) if bias else torch.zeros(16, dtype=torch.float64))
    cut = assert_laws(net, torch.randn(2, 3, 6, 6))
    assert cut.width("a.weight", 0) == 4
    assert cut.width("weight", 0) < 16
    assert set(places(cut, "offset.weight", 0)) == set(places(cut, "mask.weight", 0)) == {None}


def test_deformable_convolution_module() -> None:
    layer = torchvision.ops.DeformConv2d(8, 16, 3, padding=1, groups=8, bias=False)
    net = Net(lambda m, y: m.layer(y, m.offset(y)), 16, offset=nn.Conv2d(8, 18, 1), layer=layer)
    cut = assert_laws(net, torch.randn(2, 3, 6, 6))
    assert cut.channels("layer.weight", 0)[::2] == cut.channels("a.weight", 0)


def test_deformable_convolution_with_groups_of_offsets_pins_its_input() -> None:
    def body(m: Any, y: Tensor) -> Tensor:
        ones = torch.ones(2, 2, 6, 6, dtype=torch.float64)
        return vision.deform_conv2d(y, m.weight, m.offset(y), ones, m.bias, 1, 1, 0, 0, 1, 1, 1, 2, True)

    net = Net(body, 6, offset=nn.Conv2d(8, 4, 1), weight=random(6, 8, 1, 1), bias=random(6))
    cut = assert_laws(net, torch.randn(2, 3, 6, 6))
    assert cut.pinned_by("a.weight", 0) == {"torchvision.deform_conv2d"}
    assert_exact(cut, 6, "weight", 0)


def test_filter_in_frequency() -> None:
    """GFNet: a product with a learned complex weight."""

    def body(m: Any, y: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(y.permute(0, 2, 3, 1), dim=(1, 2), norm="ortho")
        spectrum = spectrum * torch.view_as_complex(m.filter)
        return torch.fft.irfft2(spectrum, s=(6, 6), dim=(1, 2), norm="ortho").permute(0, 3, 1, 2)

    cut = assert_laws(Net(body, 8, filter=random(6, 4, 8, 2)), torch.randn(2, 3, 6, 6))
    assert_exact(cut, 8)
    assert cut.channels("filter", 2) == cut.channels("a.weight", 0)


@pytest.mark.parametrize("dim", [0, 3])
def test_weight_norm(dim: int) -> None:
    """The dimension that keeps its scale leaves exactly, the others share a norm."""

    def body(m: Any, y: Tensor) -> Tensor:
        weight = torch._weight_norm(m.direction, m.scale, dim)
        return F.conv2d(y, weight if dim == 0 else weight.permute(3, 0, 1, 2))

    shape = (6, 8, 1, 1) if dim == 0 else (8, 1, 1, 6)
    scale = (6, 1, 1, 1) if dim == 0 else (1, 1, 1, 6)
    cut = assert_laws(Net(body, 6, direction=random(*shape), scale=random(*scale)), torch.randn(2, 3, 6, 6))
    assert_exact(cut, 6, "direction", dim)
    assert cut.channels("scale", dim) == cut.channels("direction", dim)
    (into,) = {str(name) for name in places(cut, "direction", 1 - min(dim, 1))}
    assert cut.orbits[into].statistical is not None


@pytest.mark.parametrize("kind", ["embedding by halves", "embedding by pairs"])
def test_rotary_attention(kind: str) -> None:
    """Queries and keys lose pairs of the dimensions of a head, the same in every head."""

    def turned(y: Tensor) -> Tensor:
        if kind == "embedding by halves":
            first, second = y.chunk(2, -1)
            return torch.cat((-second, first), -1)
        return torch.stack([-y[..., 1::2], y[..., ::2]], -1).reshape(y.shape)

    def body(m: Any, y: Tensor) -> Tensor:
        q, k, v = m.qkv(y.flatten(2).transpose(1, 2)).reshape(2, 36, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = (part * m.cos + turned(part) * m.sin for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 36, 16)
        return mixed.transpose(1, 2).unflatten(2, (6, 6))

    parts = {"cos": random(36, 8), "sin": random(36, 8)}
    cut = assert_laws(Net(body, 16, qkv=nn.Linear(8, 48), **parts), torch.randn(2, 3, 6, 6))
    assert cut.width("cos", 1) == cut.width("sin", 1) == 4
    assert_exact(cut, 4, "cos", 1)
    assert_exact(cut, 4, "head.weight", 1)


def test_cosine_attention() -> None:
    """Swin V2: queries and keys are normalised along the dimensions of a head, a zero adds nothing to the norm."""

    def body(m: Any, y: Tensor) -> Tensor:
        tokens = y.flatten(2).transpose(1, 2)
        q, k, v = (layer(tokens).view(2, 36, 2, 4).transpose(1, 2) for layer in (m.q, m.k, m.v))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * m.scale
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 36, 8).transpose(1, 2).unflatten(2, (6, 6))

    layers = {name: nn.Linear(8, 8) for name in "qkv"}
    cut = assert_laws(Net(body, 8, **layers, scale=random(2, 1, 1)), torch.randn(2, 3, 6, 6))
    assert_exact(cut, 4, "q.weight", 0)
    assert_exact(cut, 4, "v.weight", 0)


def test_relative_positions_from_a_table() -> None:
    """A table looked up by two constant indices; its rows are no channels."""

    def body(m: Any, y: Tensor) -> Tensor:
        row, column = torch.arange(6)[:, None], torch.arange(6)[None]
        return y + m.table[row, column - row].permute(2, 0, 1)

    cut = assert_laws(Net(body, 8, table=random(6, 6, 8)), torch.randn(2, 3, 6, 6))
    assert cut.channels("table", 2) == cut.channels("a.weight", 0)
    assert_exact(cut, 8)


def test_mean_inside_a_layer_is_statistical() -> None:
    """Surgery rewrites nodes, not what happens inside of a leaf."""

    class Centred(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(1, keepdim=True))

    cut = assert_laws(Net(lambda m, y: m.layer(y), 6, layer=Centred(8, 6, 1)), torch.randn(2, 3, 6, 6))
    (place,) = {str(name) for name in places(cut)}
    assert place == "None" or cut.orbits[place].statistical is not None
    assert cut.width("a.weight", 0) == 8
    assert_exact(cut, 6, "layer.weight", 0)
