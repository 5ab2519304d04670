"""Law 3: whatever an operator does to channels, the slim model is right; at worst nothing can be pruned.

Each operator meets channels that are prunable elsewhere, so that a rule that forgets to pin cannot hide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.utils import parametrizations

import fxprune
from fxprune.labels import propagation
from fxprune.labels.call import Rule
from fxprune.labels.propagation import RULE_FAILED
from fxprune.labels.rules import find_rule, operator_name
from tests.laws import assert_laws, assert_ruled

Operator = Callable[[Tensor], Any]

MAPS: dict[str, Operator] = {
    "tile": lambda y: y.tile(1, 2, 1, 1),
    "repeat_interleave": lambda y: y.repeat_interleave(2, 1),
    "repeat_interleave_space": lambda y: y.repeat_interleave(2, dim=2),
    "unfold_space": lambda y: F.unfold(y, 3, padding=1),
    "unfold_and_fold": lambda y: F.fold(F.unfold(y, 2, stride=2), (6, 6), 2, stride=2),
    "unfold_channels": lambda y: y.unfold(1, 2, 2),
    "roll": lambda y: y.roll(2, 1),
    "roll_space": lambda y: y.roll((1, 2), (2, 3)),
    "roll_all": lambda y: y.roll(3),
    "rot90": lambda y: y.rot90(1, (2, 3)),
    "rot90_channels": lambda y: y.rot90(1, (1, 2)),
    "diagonal": lambda y: y.diagonal(dim1=2, dim2=3),
    "diagonal_channels": lambda y: y.diagonal(dim1=1, dim2=2),
    "tril": lambda y: y.transpose(1, 2).tril(),
    "movedim": lambda y: y.movedim(1, -1),
    "swapaxes": lambda y: y.swapaxes(1, 3),
    "channel_shuffle": lambda y: F.channel_shuffle(y, 2),
    "gather": lambda y: y.gather(1, torch.zeros(2, 3, 6, 6, dtype=torch.int64)),
    "take_along_dim": lambda y: torch.take_along_dim(y, y.argsort(1), 1),
    "scatter": lambda y: torch.zeros_like(y).scatter(1, torch.zeros(2, 8, 6, 6, dtype=torch.int64), y),
    "gather_by_rank": lambda y: y.gather(2, y.argsort(2)),
    "gather_from_another_rank": lambda y: y.gather(2, y.transpose(2, 3).argsort(3)),
    "scatter_by_rank": lambda y: torch.zeros_like(y).scatter(3, y.argsort(3), y.cos()),
    "scatter_add_channels": lambda y: y.scatter_add(1, torch.ones(2, 8, 6, 6, dtype=torch.int64), y),
    "write_by_mask": lambda y: torch.index_put(y, (y > 0,), y.new_zeros(())),
    "masked_scatter": lambda y: y.masked_scatter(y > 0, y.flip(1)),
    "masked_fill": lambda y: y.masked_fill(y > 0, 1.0),
    "where": lambda y: torch.where(y > 0, y, 0.5),
    "where_inf": lambda y: torch.where(y > 0, y, float("inf")).clamp_max(3),
    "topk": lambda y: y.topk(2, 1)[0],
    "sort": lambda y: y.sort(1)[0],
    "median": lambda y: y.median(1)[0],
    "max": lambda y: y.max(1, keepdim=True)[0],
    "amin": lambda y: y.amin(1),
    "cumsum": lambda y: y.cumsum(1),
    "cumsum_space": lambda y: y.cumsum(2),
    "gram": lambda y: torch.einsum("bchw,bdhw->bcd", y, y),
    "gram_flattened": lambda y: torch.einsum("bchw,bdhw->bcd", y, y).flatten(1),
    "tensordot": lambda y: torch.tensordot(y, y, ([1, 2, 3], [1, 2, 3])),
    "covariance": lambda y: y.flatten(2) @ y.flatten(2).transpose(1, 2),
    "cdist": lambda y: torch.cdist(y.flatten(2), y.flatten(2)),
    "outer": lambda y: torch.outer(y[0, :, 0, 0], y[1, :, 0, 0]),
    "mean_gate": lambda y: y * y.mean(1, keepdim=True),
    "mean_of_mean": lambda y: y - y.mean((1, 2), keepdim=True).mean(-1, keepdim=True),
    "norm_gate": lambda y: y / (y.norm(dim=1, keepdim=True) + 1),
    "global_response": lambda y: y * y.norm(dim=(2, 3), keepdim=True) / y.norm(dim=(2, 3), keepdim=True).mean(1, True),
    "amax_gate": lambda y: y * y.amax(1, keepdim=True).sigmoid(),
    "cosine": lambda y: F.cosine_similarity(y, y.flip(2), dim=1),
    "normalize": lambda y: F.normalize(y, dim=1),
    "normalize_space": lambda y: F.normalize(y, dim=2),
    "instance_norm": lambda y: F.instance_norm(y),
    "batch_norm": lambda y: F.batch_norm(y, None, None, training=True),
    "batch_norm_over_space": lambda y: F.batch_norm(y.transpose(1, 2), None, None, training=True),
    "local_response_norm": lambda y: F.local_response_norm(y, 3),
    "glu": lambda y: F.glu(y, 1),
    "glu_space": lambda y: F.glu(y, 2),
    "maxout": lambda y: y.view(2, 4, 2, 6, 6).max(2)[0],
    "maxout_outer": lambda y: y.view(2, 2, 4, 6, 6).amax(1),
    "lp_pool": lambda y: F.lp_pool2d(y, 2, 2),
    "max_pool_indices": lambda y: F.max_pool2d(y, 2, return_indices=True)[0],
    "max_unpool": lambda y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2),
    "pool_along_channels": lambda y: F.max_pool2d(y.transpose(1, 3), (1, 2)),
    "avg_pool_along_channels": lambda y: F.avg_pool1d(y.mean(2).transpose(1, 2), 2),
    "pool_3d_along_channels": lambda y: F.max_pool3d(y.unsqueeze(1), (2, 1, 1)),
    "interpolate_along_channels": lambda y: F.interpolate(y.transpose(1, 3), scale_factor=2.0),
    "interpolate_to_size": lambda y: F.interpolate(y, size=(9, 9), mode="bilinear"),
    "adaptive_along_channels": lambda y: F.adaptive_avg_pool2d(y.transpose(1, 3), (6, 4)),
    "grid_sample": lambda y: F.grid_sample(y, torch.zeros(2, 4, 4, 2, dtype=y.dtype), align_corners=False),
    "reflect_pad": lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect"),
    "circular_pad": lambda y: F.pad(y, (1, 1, 1, 1), mode="circular"),
    "reflect_pad_channels": lambda y: F.pad(y.mean(2).transpose(1, 2), (1, 1), mode="reflect"),
    "circular_pad_channels": lambda y: F.pad(y.mean(2).transpose(1, 2), (1, 1), mode="circular"),
    "crop_channels": lambda y: F.pad(y, (0, 0, 0, 0, -1, -2)),
    "crop_and_pad_channels": lambda y: F.pad(y, (0, 0, 0, 0, -2, 2)),
    "fft_filter": lambda y: torch.fft.irfft2(torch.fft.rfft2(y) * torch.fft.rfft2(y.flip(2)), s=(6, 6)),
    "fft_over_everything": lambda y: torch.fft.fftn(y).abs(),
    "rfft": lambda y: torch.fft.rfft2(y).abs(),
    "fft_channels": lambda y: torch.fft.fft(y, dim=1).abs(),
    "complex": lambda y: torch.view_as_complex(y.view(2, 4, 2, 6, 6).movedim(2, -1).contiguous()).abs(),
    "std": lambda y: y.std(1),
    "var_space": lambda y: y.var((2, 3)),
    "everything_mean": lambda y: y.mean(),
    "everything_max": lambda y: y.max(),
    "argmax": lambda y: y.argmax(1).to(y.dtype),
    "quantile": lambda y: y.quantile(0.3, dim=1),
    "as_strided_same": lambda y: y.as_strided((2, 8, 6, 6), (288, 36, 6, 1)),
    "as_strided_part": lambda y: y.as_strided((2, 4, 6, 6), (288, 72, 6, 1)),
    "pixel_shuffle_over_channels": lambda y: F.pixel_shuffle(y.permute(0, 2, 3, 1).repeat(1, 2, 1, 1), 2),
    "pixel_unshuffle_over_channels": lambda y: F.pixel_unshuffle(y.transpose(1, 3), 2),
    "pairs_turned": lambda y: torch.stack([-y[:, 1::2], y[:, ::2]], 2).flatten(1, 2),
    "halves_turned": lambda y: torch.cat([-y[:, 4:], y[:, :4]], 1),
    "steps_that_overlap": lambda y: y[:, ::2] * y[:, ::2].flip(1) + y[:, 1::2] * y[:, :4],
    "step_of_seven": lambda y: y[:, :7][:, ::2],
    "step_over_all": lambda y: y[:, ::8],
    "step": lambda y: y[:, ::2],
    "step_backwards": lambda y: y[:, 1:7:3],
    "index_two_dimensions": lambda y: y[:, [0, 1, 2], [3, 4, 5]],
    "index_by_table": lambda y: y[:, torch.tensor([[0, 1], [2, 3]])],
    "boolean_index": lambda y: y[:, torch.tensor([True, False] * 4)],
    "index_channels_and_new": lambda y: y[:, 2:5, None],
    "index_ellipsis_integer": lambda y: y.movedim(1, -1)[..., 3],
    "index_put": lambda y: y.index_put((torch.tensor([0]),), torch.zeros(8, 6, 6, dtype=y.dtype)),
    "index_add": lambda y: y.index_add(1, torch.tensor([0, 3]), y[:, :2]),
    "index_fill": lambda y: y.index_fill(1, torch.tensor([1]), 0.0),
    "slice_scatter": lambda y: y.slice_scatter(y[:, 4:] * 2, 1, 0, 4),
    "select_scatter": lambda y: y.select_scatter(y[:, 0], 1, 2),
    "diff": lambda y: y.diff(dim=1),
    "cross": lambda y: torch.cross(y[:, :3], y[:, 3:6], dim=1),
    "broadcast_against_space": lambda y: y.mean((2, 3))[:, :6].unsqueeze(1) + y[:, :, 0],
    "channels_meet_space": lambda y: y[:, :6, :, 0] * y[:, 0].mean(1).unsqueeze(1),
    "channels_meet_channels_transposed": lambda y: y.mean((2, 3)).unsqueeze(1) * y.mean((2, 3)).unsqueeze(2),
    "batch_meets_channels": lambda y: y.flatten(0, 1),
    "all_flattened": lambda y: y.flatten(),
    "space_into_channels": lambda y: y.view(2, 8 * 36).view(2, 36, 8),
    "regrouped": lambda y: y.reshape(2, 3, 96),
    "channels_into_batch": lambda y: y.reshape(16, 1, 6, 6),
    "view_dtype": lambda y: y.view(torch.int64).view(torch.float64),
    "size_used_as_number": lambda y: y * (y.shape[1] ** -0.5),
    "size_used_in_full": lambda y: y + torch.full((1, y.shape[1], 1, 1), 0.1, dtype=y.dtype),
    "size_used_in_arange": lambda y: y * torch.arange(y.shape[1]).view(1, -1, 1, 1),
    "numel": lambda y: y / y[0].numel(),
    "expand_as": lambda y: y.mean((2, 3), keepdim=True).expand_as(y),
    "reshape_as": lambda y: y.flatten(1).reshape_as(y),
    "view_as": lambda y: y.flatten(1).view_as(y),
    "type_as": lambda y: y.half().type_as(y),
    "broadcast_tensors": lambda y: torch.broadcast_tensors(y, y.mean((2, 3), keepdim=True))[1],
    "broadcast_to": lambda y: y.mean((2, 3), keepdim=True).broadcast_to(2, 8, 6, 6),
    "meshgrid": lambda y: torch.meshgrid(y[0, :, 0, 0], y[0, 0, :, 0], indexing="ij")[0],
    "split_list_unused": lambda y: y.split([2, 2, 4], 1)[1],
    "hsplit": lambda y: torch.hsplit(y, 2)[1],
    "tensor_split_at": lambda y: torch.tensor_split(y, (3, 5), dim=1)[1],
    "dsplit_like": lambda y: torch.chunk(y.transpose(1, 2), 3, dim=2)[2],
    "vstack": lambda y: torch.vstack([y, y]),
    "hstack": lambda y: torch.hstack([y, y]),
    "block_product": lambda y: torch.kron(y[0, :, 0, :1], y[0, :1, 0]),
    "bucketize": lambda y: torch.bucketize(y, torch.tensor([0.0, 1.0], dtype=y.dtype)).to(y.dtype),
    "layer_norm_all": lambda y: F.layer_norm(y, y.shape[1:]),
    "layer_norm_space": lambda y: F.layer_norm(y, (6, 6)),
    "group_norm_1": lambda y: F.group_norm(y, 1),
    "softmax": lambda y: y.softmax(1),
    "softmax_space": lambda y: y.flatten(2).softmax(2),
    "softmax_with_channels": lambda y: y.flatten(1).softmax(1),
    "log_softmax": lambda y: F.log_softmax(y, 1),
    "prod": lambda y: y.prod(1),
    "sum_of_cosines": lambda y: y.cos().sum(1),
    "sum_of_sigmoids": lambda y: y.sigmoid().sum((1, 2)),
    "sum_everything": lambda y: y.exp().sum(),
    "nansum": lambda y: y.nansum(1),
    "trace": lambda y: torch.einsum("bccw->bw", y[:, :6]),
    "bmm_over_channels": lambda y: torch.bmm(y.flatten(2).transpose(1, 2), y.flatten(2).cos()),
    "addbmm": lambda y: torch.addbmm(y[0, :, :, 0], y.flatten(2), y.flatten(2)[:, :6].transpose(1, 2)),
    "attention_over_channels": lambda y: F.scaled_dot_product_attention(y.flatten(2), y.flatten(2), y.flatten(2)),
    "attention_heads_are_channels": lambda y: F.scaled_dot_product_attention(y, y, y),
    "dropout_2d": lambda y: F.dropout2d(y, 0.5, training=False),
    "one_hot": lambda y: F.one_hot(y.argmax(1), 8).to(y.dtype),
    "linear_over_space": lambda y: F.linear(y, torch.ones(3, 6, dtype=y.dtype)),
    "conv_over_channels": lambda y: F.conv1d(y.mean(2).transpose(1, 2), torch.ones(2, 6, 3, dtype=y.dtype)),
    "conv_with_constant_weight": lambda y: F.conv2d(y, torch.ones(8, 1, 3, 3, dtype=y.dtype), groups=8),
    "bilinear": lambda y: F.bilinear(y[..., 0], y[..., 1], torch.ones(2, 6, 6, dtype=y.dtype)),
}


class Probe(nn.Module):
    """Channels of `a` are absorbed by `head`, and meet an operator whose result is absorbed too."""

    def __init__(self, operator: Operator, *, summed: bool) -> None:
        super().__init__()
        self.operator, self.summed = operator, summed
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(3, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        z = self.operator(y)
        # The square keeps zeros, and a normalised map would sum to nothing.
        return self.head(y), self.head(self.b(x)), (z * z).sum() if self.summed else z


@pytest.mark.parametrize("summed", [True, False], ids=["summed", "returned"])
@pytest.mark.parametrize("name", MAPS)
def test_operator_is_never_wrong(name: str, summed: bool) -> None:
    torch.manual_seed(0)
    assert_laws(Probe(MAPS[name], summed=summed), torch.randn(2, 3, 6, 6), removed_at_least=0.0)


class Tied(nn.Module):
    """The same for channels that both feature maps have, since `b` is added to `a`."""

    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.operator = operator
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.mix = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.a(x))
        return self.head(y + self.b(self.operator(self.mix(y))))


SAME_SHAPE = [
    "channel_shuffle", "masked_fill", "where", "cumsum_space", "normalize_space", "instance_norm", "roll_space",
    "unfold_and_fold", "rot90", "max_unpool", "take_along_dim", "index_add", "index_fill", "slice_scatter",
    "select_scatter", "gather_by_rank", "scatter_by_rank", "scatter_add_channels", "write_by_mask", "masked_scatter",
    "mean_gate", "mean_of_mean", "norm_gate", "global_response", "amax_gate", "broadcast_tensors", "broadcast_to",
    "fft_filter", "pairs_turned", "halves_turned",
    "reshape_as", "view_as", "expand_as", "size_used_as_number", "size_used_in_full",
    "size_used_in_arange", "numel", "as_strided_same", "attention_heads_are_channels", "layer_norm_all",
    "layer_norm_space", "softmax", "scatter", "index_put",
]  # fmt: skip


@pytest.mark.parametrize("name", SAME_SHAPE)
def test_operator_between_layers_is_never_wrong(name: str) -> None:
    torch.manual_seed(0)
    assert_laws(Tied(MAPS[name]), torch.randn(2, 3, 6, 6), removed_at_least=0.0)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv2d(8, 8, 1)),
    "old_weight_norm": lambda: nn.utils.weight_norm(nn.Conv2d(8, 8, 1)),
    "same_conv": lambda: nn.Conv2d(8, 8, 3, padding="same"),
    "dilated_conv": lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2),
    "channel_shuffle": lambda: nn.ChannelShuffle(2),
    "prelu": lambda: nn.PReLU(8),
    "one_prelu": lambda: nn.PReLU(),
    "rrelu": lambda: nn.RReLU(),
    "softmax_2d": lambda: nn.Softmax2d(),
    "dropout_2d": lambda: nn.Dropout2d(),
    "local_response_norm": lambda: nn.LocalResponseNorm(3),
    "instance_norm": lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    "batch_norm_without_affine": lambda: nn.BatchNorm2d(8, affine=False),
    "batch_norm_without_statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "upsample": lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.MaxPool2d(2)),
    "zero_pad": lambda: nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3)),
    "reflection_pad": lambda: nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3)),
    "flatten_unflatten": lambda: nn.Sequential(nn.Flatten(1), nn.Unflatten(1, (8, 6, 6))),
    "unfold_fold": lambda: nn.Sequential(nn.Unfold(2, stride=2), nn.Fold((6, 6), 2, stride=2)),
    "identity": lambda: nn.Identity(),
    "lazy": lambda: nn.LazyConv2d(8, 1),
    "hardswish": lambda: nn.Hardswish(),
}


class Layered(nn.Module):
    """A layer between prunable convolutions, its result joined with the input of the first."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 8, 3, padding=1), layer
        self.free, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(torch.relu(self.free(y + self.layer(torch.relu(y)))))


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_never_wrong(name: str) -> None:
    torch.manual_seed(0)
    net = Layered(LAYERS[name]()).eval()
    net(torch.randn(2, 3, 6, 6))
    assert assert_laws(net, torch.randn(2, 3, 6, 6)).width("free.weight", 0) == 4


def test_a_rule_that_fails_pins_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Any) -> None:
        raise IndexError("tuple index out of range")

    def found(operator: OpOverload) -> Rule | None:
        return fails if "max_pool2d" in operator_name(operator) else find_rule(operator)

    monkeypatch.setattr(propagation, "find_rule", found)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)).eval()
    orbits = fxprune.find_orbits(fxprune.trace(model, torch.randn(1, 3, 8, 8)))
    (reason,) = {p.reason.text for p in orbits.pinned if (p.parameter, p.dimension) == ("0.weight", 0)}
    assert reason.startswith(RULE_FAILED)
    assert "IndexError: tuple index out of range" in reason
    assert [m.parameter for orbit in orbits for m in orbit.members if m.role == "output"] == ["2.weight"]
    with pytest.raises(AssertionError, match="please report"):
        assert_ruled(orbits)
