"""The hard cases of channel pruning, each a small model on which every law holds."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fxprune.errors import UsageError
from fxprune.graph.inputs import Inputs
from tests.laws import Cut, assert_close, assert_laws


class Net(nn.Module):
    """A model whose forward is `body(self, x)` over the parts given by name."""

    def __init__(self, body: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def image(channels: int = 3, size: int = 6) -> Tensor:
    return torch.randn(2, channels, size, size)


def tokens() -> Tensor:
    return torch.randn(2, 5, 6)


def orbits_of(cut: Cut, parameter: str, dimension: int) -> set[str | None]:
    """The orbits in a parameter's dimension; None stands for pinned positions."""
    return {None if place is None else place[0] for place in cut.channels(parameter, dimension)}


def assert_free(cut: Cut, parameter: str, dimension: int, width: int | None = None) -> None:
    """No position is pinned, and the dimension is one orbit, of `width` classes where given."""
    found = orbits_of(cut, parameter, dimension)
    assert len(found) == 1
    assert None not in found
    if width is not None:
        assert cut.orbits[next(iter(found))].width == width
    assert cut.width(parameter, dimension) < cut.traced.get_parameter(parameter).shape[dimension]


def assert_pinned(cut: Cut, parameter: str, dimension: int, operator: str) -> None:
    assert orbits_of(cut, parameter, dimension) == {None}
    assert cut.pinned_by(parameter, dimension) == {operator}


# Joins and concatenations.


def test_concatenation_then_joiner() -> None:
    net = Net(
        lambda m, x: m.head(torch.cat([m.a(x), m.b(x)], 1) + m.c(x)),
        a=conv(3, 4), b=conv(3, 6), c=conv(3, 10), head=conv(10, 2),
    )  # fmt: skip
    cut = assert_laws(net, image())
    a, b, c = (cut.channels(f"{name}.weight", 0) for name in "abc")
    assert c == a + b
    assert cut.channels("head.weight", 1) == c
    assert [orbit.width for orbit in cut.orbits] == [4, 6]
    assert [set(orbit.layers) for orbit in cut.orbits] == [{"a", "c"}, {"b", "c"}]


def test_joined_concatenations_with_different_split_points() -> None:
    net = Net(
        lambda m, x: m.head(torch.cat([m.a(x), m.b(x)], 1) + torch.cat([m.c(x), m.d(x)], 1)),
        a=conv(3, 4), b=conv(3, 8), c=conv(3, 7), d=conv(3, 5), head=conv(12, 2),
    )  # fmt: skip
    cut = assert_laws(net, image())
    a, b, c, d = (cut.channels(f"{name}.weight", 0) for name in "abcd")
    assert a + b == c + d
    assert sorted(orbit.width for orbit in cut.orbits) == [3, 4, 5]
    assert {frozenset(orbit.layers) for orbit in cut.orbits} == {frozenset("ac"), frozenset("bc"), frozenset("bd")}


def test_concatenation_with_itself() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.head(torch.cat([y, y], 1))

    cut = assert_laws(Net(body, a=conv(3, 5), head=conv(10, 2)), image())
    a = cut.channels("a.weight", 0)
    assert cut.channels("head.weight", 1) == a + a
    (orbit,) = cut.orbits
    member = next(m for m in orbit.members if (m.parameter, m.dimension) == ("head.weight", 1))
    assert member.indices.tolist() == [[i, i + 5] for i in range(5)]


def test_concatenation_with_the_pinned_input() -> None:
    net = Net(lambda m, x: m.head(torch.cat([x, m.a(x)], 1)), a=conv(3, 6), head=conv(9, 2))
    cut = assert_laws(net, image())
    assert cut.channels("head.weight", 1) == [None] * 3 + cut.channels("a.weight", 0)
    assert_free(cut, "a.weight", 0, 6)


def test_dense_connections() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        found = [m.stem(x)]
        for layer in m.layers:
            found.append(layer(torch.cat(found, 1)))
        return m.head(torch.cat(found, 1))

    layers = nn.ModuleList([conv(6 + 4 * i, 4) for i in range(3)])
    cut = assert_laws(Net(body, stem=conv(3, 6), layers=layers, head=conv(18, 2)), image())
    assert len(cut.orbits) == 4
    assert cut.channels("head.weight", 1)[:10] == cut.channels("layers.1.weight", 1)


def test_concatenation_by_negative_dimension_and_stack() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        stacked = torch.stack([m.a(x), m.b(x)], 1)
        attended = (stacked * m.weights.view(1, 2, 1, 1, 1)).sum(1)
        return m.head(torch.cat([attended, m.c(x)], -3))

    parts = {"weights": nn.Parameter(torch.rand(2)), "a": conv(3, 6), "b": conv(3, 6), "c": conv(3, 4)}
    cut = assert_laws(Net(body, **parts, head=conv(10, 2)), image())
    assert cut.channels("a.weight", 0) == cut.channels("b.weight", 0)
    assert_free(cut, "c.weight", 0, 4)


def test_stack_flattened_into_channels() -> None:
    net = Net(
        lambda m, x: m.head(torch.stack([m.a(x), m.b(x)], 2).flatten(1, 2)),
        a=conv(3, 6), b=conv(3, 6), head=conv(12, 2),
    )  # fmt: skip
    cut = assert_laws(net, image())
    assert_free(cut, "a.weight", 0, 6)
    assert cut.channels("head.weight", 1)[::2] == cut.channels("a.weight", 0)


# Divisions.


@pytest.mark.parametrize("divide", ["chunk", "torch.chunk", "split", "sizes", "tensor_split"])
def test_divided_with_literal_sizes(divide: str) -> None:
    ways: dict[str, Callable[[Tensor], Any]] = {
        "chunk": lambda y: y.chunk(2, dim=1),
        "torch.chunk": lambda y: torch.chunk(y, 2, 1),
        "split": lambda y: y.split(6, 1),
        "sizes": lambda y: torch.split(y, [4, 8], dim=1),
        "tensor_split": lambda y: torch.tensor_split(y, 2, dim=1),
    }
    first = 4 if divide == "sizes" else 6

    def body(m: Any, x: Tensor) -> Tensor:
        left, right = ways[divide](m.a(x))
        return m.left(left) + m.right(torch.relu(right))

    net = Net(body, a=conv(3, 12), left=conv(first, 2), right=conv(12 - first, 2))
    cut = assert_laws(net, image(), seed=3)
    assert cut.channels("left.weight", 1) + cut.channels("right.weight", 1) == cut.channels("a.weight", 0)
    assert sorted(orbit.width for orbit in cut.orbits) == sorted([first, 12 - first])


def test_chunks_that_are_joined_keep_equal_widths() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        value, gate = m.a(x).chunk(2, 1)
        return m.head(value * gate.sigmoid())

    cut = assert_laws(Net(body, a=conv(3, 12), head=conv(6, 2)), image())
    a = cut.channels("a.weight", 0)
    assert a[:6] == a[6:]
    assert_free(cut, "a.weight", 0, 6)


@pytest.mark.parametrize("groups", [2, 4])
def test_channel_shuffle_with_literal_sizes(groups: int) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).view(-1, groups, 12 // groups, 6, 6).transpose(1, 2).contiguous().view(-1, 12, 6, 6)
        return m.head(m.b(y))

    cut = assert_laws(Net(body, a=conv(3, 12), b=conv(12, 6), head=conv(6, 2)), image())
    assert_free(cut, "b.weight", 1)


def test_channel_shuffle_between_grouped_convolutions() -> None:
    def shuffle(y: Tensor) -> Tensor:
        batch, channels, height, width = y.shape
        return y.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)

    net = Net(
        lambda m, x: m.head(m.b(shuffle(m.a(m.stem(x))))),
        stem=conv(3, 16), a=conv(16, 16, 1, groups=2), b=conv(16, 16, groups=2), head=conv(16, 2),
    )  # fmt: skip
    cut = assert_laws(net, image())
    assert cut.width("a.weight", 0) < 16


def test_shuffle_unit_with_a_passed_through_half() -> None:
    """ShuffleNetV2: one half goes round, then the halves are mixed, twice."""

    def unit(branch: nn.Module, y: Tensor) -> Tensor:
        left, right = y.chunk(2, dim=1)
        y = torch.cat([left, branch(right)], 1)
        return y.view(2, 2, 6, 6, 6).transpose(1, 2).reshape(2, 12, 6, 6)

    net = Net(
        lambda m, x: m.head(unit(m.second, unit(m.first, m.stem(x)))),
        stem=conv(3, 12), first=conv(6, 6), second=conv(6, 6), head=conv(12, 2),
    )  # fmt: skip
    assert_laws(net, image())


SLICES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "slices": lambda y: (y[:, :4], y[:, 4:]),
    "negative": lambda y: (y[:, :-8], y[:, -8:]),
    "ellipsis": lambda y: (y[..., :4, :, :], y[:, 4:12]),
    "narrow": lambda y: (y.narrow(1, 0, 4), torch.narrow(y, 1, 4, 8)),
    "aten": lambda y: (torch.ops.aten.slice.Tensor(y, 1, 0, 4), torch.ops.aten.slice.Tensor(y, 1, 4, 12)),
}


@pytest.mark.parametrize("kind", SLICES)
def test_sliced_by_literals(kind: str) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        left, right = SLICES[kind](m.a(x))
        return m.left(left) + m.right(right)

    cut = assert_laws(Net(body, a=conv(3, 12), left=conv(4, 2), right=conv(8, 2)), image(), seed=1)
    assert cut.channels("left.weight", 1) + cut.channels("right.weight", 1) == cut.channels("a.weight", 0)
    assert sorted(orbit.width for orbit in cut.orbits) == [4, 8]


def test_overlapping_slices() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.left(y[:, :8]) + m.right(y[:, 4:])

    cut = assert_laws(Net(body, a=conv(3, 12), left=conv(8, 2), right=conv(8, 2)), image())
    assert cut.channels("left.weight", 1)[4:] == cut.channels("right.weight", 1)[:4]
    assert sorted(orbit.width for orbit in cut.orbits) == [4, 4, 4]


def test_channel_taken_by_its_index() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.head(y) * y[:, 5].unsqueeze(1) + y.select(1, -2).unsqueeze(1)

    cut = assert_laws(Net(body, a=conv(3, 12), head=conv(12, 2)), image())
    pinned = [i for i, place in enumerate(cut.channels("a.weight", 0)) if place is None]
    assert pinned == [5, 10]
    assert cut.pinned_by("a.weight", 0) == {"aten.select"}


INDEXINGS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "index_select": lambda m, y: y.index_select(1, m.order),
    "torch.index_select": lambda m, y: torch.index_select(y, dim=1, index=m.order),
    "getitem": lambda m, y: y[:, m.order],
    "list": lambda _, y: y[:, [3, 1, 7, 0, 2, 6]],
}


@pytest.mark.parametrize("kind", INDEXINGS)
def test_indexed_by_a_constant(kind: str) -> None:
    net = Net(
        lambda m, x: m.head(INDEXINGS[kind](m, m.a(x))),
        a=conv(3, 8), head=conv(6, 2), order=torch.tensor([3, 1, 7, 0, 2, 6]),
    )  # fmt: skip
    cut = assert_laws(net, image())
    a = cut.channels("a.weight", 0)
    assert cut.channels("head.weight", 1) == [a[i] for i in (3, 1, 7, 0, 2, 6)]


def test_flipped_channels() -> None:
    cut = assert_laws(Net(lambda m, x: m.head(m.a(x).flip(1)), a=conv(3, 8), head=conv(8, 2)), image())
    assert cut.channels("head.weight", 1) == cut.channels("a.weight", 0)[::-1]


def test_pixel_shuffle_and_unshuffle() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        wide = m.b(F.pixel_shuffle(m.a(x), 2))
        return m.head(m.unshuffle(wide))

    cut = assert_laws(Net(body, a=conv(3, 16), b=conv(4, 6), unshuffle=nn.PixelUnshuffle(2), head=conv(24, 2)), image())
    assert_free(cut, "a.weight", 0, 4)
    assert_free(cut, "b.weight", 0, 6)
    assert cut.channels("head.weight", 1) == [place for place in cut.channels("b.weight", 0) for _ in range(4)]


# Padding.


def test_zero_padding_of_channels() -> None:
    """CIFAR ResNet's shortcut of option A: subsample, and pad the channels on both sides."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x)
        short = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3))
        return m.head(torch.relu(m.bn(m.a(y)) + short))

    net = Net(body, stem=conv(3, 6), a=conv(6, 12, stride=2), bn=nn.BatchNorm2d(12), head=conv(12, 2))
    cut = assert_laws(net, image())
    assert cut.channels("a.weight", 0)[3:9] == cut.channels("stem.weight", 0)
    assert None not in cut.channels("a.weight", 0)
    (pad,) = (node for node in cut.slim.graph.nodes if "pad" in str(node.target))
    low, high = pad.args[1][4:] if len(pad.args) > 1 else pad.kwargs["pad"][4:]
    assert low + high + cut.width("stem.weight", 0) == cut.width("a.weight", 0)


ZEROS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda y: torch.cat([y, torch.zeros(y.shape[0], 4, 6, 6, dtype=y.dtype)], 1),
    "new_zeros": lambda y: torch.cat([y, y.new_zeros(y.size(0), 4, y.size(2), y.size(3))], 1),
    "zeros_like": lambda y: torch.cat([y, torch.zeros_like(y[:, :4])], 1),
    "mul": lambda y: torch.cat([y, y[:, 2:].mul(0)], 1),
    "module": lambda y: nn.ConstantPad3d((0, 0, 0, 0, 0, 4), 0.0)(y),
}


@pytest.mark.parametrize("kind", ZEROS)
def test_channels_extended_by_zeros(kind: str) -> None:
    net = Net(lambda m, x: m.head(ZEROS[kind](m.stem(x)) + m.a(x)), stem=conv(3, 6), a=conv(3, 10), head=conv(10, 2))
    cut = assert_laws(net, image())
    assert cut.channels("a.weight", 0)[:6] == cut.channels("stem.weight", 0)


def test_padding_by_a_value_and_of_space() -> None:
    net = Net(lambda m, x: m.head(F.pad(m.a(x), (1, 1, 1, 1, 0, 2), value=0.5)), a=conv(3, 8), head=nn.Conv2d(10, 2, 3))
    cut = assert_laws(net, image())
    assert cut.channels("head.weight", 1)[:8] == cut.channels("a.weight", 0)


# Reshapes.


def test_view_with_a_literal_product() -> None:
    net = Net(
        lambda m, x: m.fc2(torch.relu(m.fc1(m.a(x).relu().view(-1, 256 * 6 * 6)))),
        a=conv(3, 256), fc1=nn.Linear(256 * 6 * 6, 8), fc2=nn.Linear(8, 3),
    )  # fmt: skip
    cut = assert_laws(net, image())
    assert cut.channels("fc1.weight", 1) == [place for place in cut.channels("a.weight", 0) for _ in range(36)]
    assert_free(cut, "fc1.weight", 0, 8)


@pytest.mark.parametrize("flatten", ["module", "function", "size", "batch"])
def test_flatten_to_linear_after_pooling(flatten: str) -> None:
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "module": nn.Flatten(),
        "function": lambda y: torch.flatten(y, 1),
        "size": lambda y: y.view(y.size(0), -1),
        "batch": lambda y: y.reshape(2, 10 * 7 * 7),
    }
    net = Net(
        lambda m, x: m.fc(ways[flatten](m.pool(m.a(x)))),
        a=conv(3, 10), pool=nn.AdaptiveAvgPool2d(7), fc=nn.Linear(490, 4),
    )  # fmt: skip
    cut = assert_laws(net, image())
    assert cut.width("fc.weight", 1) == 49 * cut.width("a.weight", 0)


def test_reshape_back_into_channels() -> None:
    net = Net(lambda m, x: m.head(m.fc(x.mean((2, 3))).view(-1, 8, 3, 3)), fc=nn.Linear(3, 72), head=conv(8, 2))
    cut = assert_laws(net, image())
    assert_free(cut, "fc.weight", 0, 8)


def test_unflatten_and_permute() -> None:
    net = Net(
        lambda m, x: m.head(m.fc(m.a(x).permute(0, 2, 3, 1)).movedim(-1, 1).unflatten(1, (3, 4)).flatten(1, 2)),
        a=conv(3, 8), fc=nn.Linear(8, 12), head=conv(12, 2),
    )  # fmt: skip
    cut = assert_laws(net, image())
    assert_free(cut, "a.weight", 0, 8)
    assert cut.width("fc.weight", 0) < 12


def test_expanded_by_literal_sizes() -> None:
    net = Net(
        lambda m, x: m.head(m.a(x) + m.shift.view(1, 8, 1, 1).expand(2, 8, 6, 6)),
        a=conv(3, 8), shift=nn.Parameter(torch.randn(8)), head=conv(8, 2),
    )  # fmt: skip
    cut = assert_laws(net, image())
    assert cut.channels("shift", 0) == cut.channels("a.weight", 0)


def test_gate_expanded_to_the_channels() -> None:
    """A map of one channel is repeated for all that there are: it does not hold them."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.head(y * m.gate(y).sigmoid().expand_as(y) + m.shift.expand(2, 8, 6, 6))

    cut = assert_laws(
        Net(body, a=conv(3, 8), gate=conv(8, 1), shift=nn.Parameter(torch.ones(1, 1, 1, 1)), head=conv(8, 2)), image()
    )
    assert_free(cut, "a.weight", 0, 8)


def test_repeated_channels() -> None:
    cut = assert_laws(Net(lambda m, x: m.head(m.a(x).repeat(1, 2, 1, 1)), a=conv(3, 6), head=conv(12, 2)), image())
    assert cut.channels("head.weight", 1) == cut.channels("a.weight", 0) * 2


# Convolutions.


def test_depthwise_with_multiplier() -> None:
    net = Net(lambda m, x: m.head(m.depthwise(m.a(x))), a=conv(3, 6), depthwise=conv(6, 12, groups=6), head=conv(12, 2))
    cut = assert_laws(net, image())
    assert cut.channels("head.weight", 1) == [place for place in cut.channels("a.weight", 0) for _ in range(2)]
    depthwise = cut.slim.get_submodule("depthwise")
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels // 2 == cut.width("a.weight", 0)


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_grouped_between_ungrouped(groups: int) -> None:
    net = Net(
        lambda m, x: m.head(m.bn(m.grouped(m.a(x)))),
        a=conv(3, 12), grouped=conv(12, 18, groups=groups), bn=nn.BatchNorm2d(18), head=conv(18, 2),
    )  # fmt: skip
    cut = assert_laws(net, image())
    assert cut.width("a.weight", 0) < 12
    assert cut.width("head.weight", 1) < 18


def test_group_with_one_output_channel() -> None:
    net = Net(lambda m, x: m.head(m.grouped(m.a(x))), a=conv(3, 12), grouped=conv(12, 4, groups=4), head=conv(4, 2))
    cut = assert_laws(net, image())
    assert_free(cut, "a.weight", 0, 4)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_transposed_convolution(groups: int) -> None:
    up = nn.ConvTranspose2d(8, 16, 4, 2, 1, groups=groups)
    cut = assert_laws(Net(lambda m, x: m.head(m.up(m.a(x))), a=conv(3, 8), up=up, head=conv(16, 2)), image())
    assert_free(cut, "a.weight", 0)
    assert cut.width("head.weight", 1) < 16


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_functional_convolutions(groups: int) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = F.conv2d(m.a(x), m.weight, m.bias, padding=1, groups=groups)
        return m.head(F.conv_transpose2d(y, m.up, stride=2, groups=groups))

    net = Net(
        body, a=conv(3, 8), weight=nn.Parameter(torch.randn(16, 8 // groups, 3, 3)), bias=nn.Parameter(torch.randn(16)),
        up=nn.Parameter(torch.randn(16, 16 // groups, 2, 2)), head=conv(16, 2),
    )  # fmt: skip
    cut = assert_laws(net, image())
    assert cut.width("a.weight", 0) < 8
    assert cut.width("head.weight", 1) < 16


@pytest.mark.parametrize("dimensions", [1, 3])
def test_convolutions_in_other_dimensions(dimensions: int) -> None:
    kind, norm, pool = {
        1: (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d),
        3: (nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d),
    }[dimensions]
    net = nn.Sequential(
        kind(2, 8, 3, padding=1), norm(8), nn.ReLU(inplace=True), pool(2), kind(8, 8, 3, padding=1, groups=8),
        kind(8, 6, 1), nn.Flatten(), nn.Linear(6 * 2**dimensions, 3),
    )  # fmt: skip
    cut = assert_laws(net, torch.randn(2, 2, *[4] * dimensions))
    assert_free(cut, "0.weight", 0, 8)
    assert_free(cut, "5.weight", 0, 6)


class CosineConv(nn.Conv2d):
    """A leaf that transforms its channels before it absorbs them: a mask before it is no removal."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.cos())


def test_leaf_that_transforms_channels_before_it_absorbs_them() -> None:
    cut = assert_laws(nn.Sequential(conv(3, 8), CosineConv(8, 8, 1), conv(8, 2)), image())
    assert orbits_of(cut, "0.weight", 0) == {None}
    assert_free(cut, "1.weight", 0, 8)


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_padding_modes(mode: str) -> None:
    net = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6, padding_mode=mode), nn.ReLU(), conv(6, 2, padding_mode=mode))
    cut = assert_laws(net, image())
    assert_free(cut, "0.weight", 0, 8)
    assert_free(cut, "2.weight", 0, 6)


def test_circular_padding_copies_its_input_and_pins_it() -> None:
    net = nn.Sequential(conv(3, 8), conv(8, 6, padding_mode="circular"), conv(6, 2))
    cut = assert_laws(net, image())
    assert orbits_of(cut, "0.weight", 0) == {None}
    assert_free(cut, "1.weight", 0, 6)


def test_convolution_with_one_output_channel() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.head(y * m.gate(y).sigmoid())

    cut = assert_laws(Net(body, a=conv(3, 8), gate=conv(8, 1), head=conv(8, 2)), image())
    assert_free(cut, "a.weight", 0, 8)
    assert orbits_of(cut, "gate.weight", 0) == {None}
    assert cut.channels("gate.weight", 1) == cut.channels("a.weight", 0)


def test_convolution_along_channels_pins_them() -> None:
    """ECA: a 1-D convolution slides over the channels."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        gate = m.eca(y.mean((2, 3)).unsqueeze(1)).sigmoid()
        return m.head(m.b(y * gate.view(2, 8, 1, 1)))

    net = Net(body, a=conv(3, 8), eca=nn.Conv1d(1, 1, 3, padding=1), b=conv(8, 8), head=conv(8, 2))
    cut = assert_laws(net, image())
    assert_pinned(cut, "a.weight", 0, "aten.convolution")
    assert_free(cut, "b.weight", 0, 8)


def test_channels_last() -> None:
    net = Net(lambda m, x: m.fc(m.pool(m.b(m.a(x))).flatten(1)), a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 2))
    net.pool = nn.AdaptiveAvgPool2d(1)
    cut = assert_laws(net.to(memory_format=torch.channels_last), image().to(memory_format=torch.channels_last))
    assert_free(cut, "b.weight", 0, 6)


# Parameters.


class StandardisedConv(nn.Conv2d):
    """Its weight is standardised over the inputs at every call."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardisedModule(nn.Module):
    """The same without being one of torch's layers, so that the tracer looks inside."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True)
        return F.conv2d(x, (self.weight - mean) * torch.rsqrt(variance + 1e-5), padding=1)


@pytest.mark.parametrize("kind", ["layer", "module"])
def test_weight_standardisation(kind: str) -> None:
    ws = StandardisedConv(8, 8, 3, padding=1) if kind == "layer" else StandardisedModule(8, 8)
    net = Net(lambda m, x: m.head(m.ws(m.b(m.a(x)))), a=conv(3, 8), b=conv(8, 8), ws=ws, head=conv(8, 2))
    cut = assert_laws(net, image())
    assert_free(cut, "ws.weight", 0, 8)
    (into,) = orbits_of(cut, "ws.weight", 1)
    assert into is None or cut.orbits[into].statistical is not None
    assert cut.width("ws.weight", 1) == 8


def test_bare_parameter_scale() -> None:
    net = Net(
        lambda m, x: m.head(m.a(x) * m.gamma + m.beta.view(1, -1, 1, 1)),
        a=conv(3, 8), gamma=nn.Parameter(torch.randn(8, 1, 1)), beta=nn.Parameter(torch.randn(8)), head=conv(8, 2),
    )  # fmt: skip
    cut = assert_laws(net, image())
    assert cut.channels("gamma", 0) == cut.channels("a.weight", 0) == cut.channels("beta", 0)


def test_scalar_parameter() -> None:
    net = Net(
        lambda m, x: m.head(m.a(x) * m.alpha + m.beta * x.mean()),
        a=conv(3, 8), alpha=nn.Parameter(torch.tensor(0.3)), beta=nn.Parameter(torch.randn(1)), head=conv(8, 2),
    )  # fmt: skip
    assert_free(assert_laws(net, image()), "a.weight", 0, 8)


def test_buffers_are_cut_as_parameters_are() -> None:
    net = Net(
        lambda m, x: m.head((m.a(x) - m.mean) / m.deviation), a=conv(3, 8), head=conv(8, 2),
        mean=torch.randn(1, 8, 1, 1), deviation=torch.rand(8, 1, 1) + 1,
    )  # fmt: skip
    cut = assert_laws(net, image())
    assert cut.slim.get_buffer("mean").shape[1] == cut.slim.get_buffer("deviation").shape[0] < 8


def test_prelu_per_channel() -> None:
    cut = assert_laws(nn.Sequential(conv(3, 8), nn.PReLU(8), conv(8, 6), nn.PReLU(), conv(6, 2)), image())
    assert cut.channels("1.weight", 0) == cut.channels("0.weight", 0)
    assert cut.slim.get_submodule("1").num_parameters == cut.width("0.weight", 0)


def test_module_called_twice() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x)
        y = torch.relu(m.shared(y)) + y
        y = torch.relu(m.shared(y)) + y
        return m.head(y)

    cut = assert_laws(Net(body, stem=conv(3, 8), shared=conv(8, 8), head=conv(8, 2)), image())
    assert cut.channels("shared.weight", 0) == cut.channels("shared.weight", 1) == cut.channels("stem.weight", 0)
    (orbit,) = cut.orbits
    assert orbit.width == 8


def test_module_called_on_different_sources() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.cat([m.shared(m.a(x)), m.shared(m.b(x))], 1))

    cut = assert_laws(Net(body, a=conv(3, 8), b=conv(3, 8), shared=conv(8, 6), head=conv(12, 2)), image())
    assert cut.channels("a.weight", 0) == cut.channels("b.weight", 0) == cut.channels("shared.weight", 1)
    assert cut.channels("head.weight", 1) == cut.channels("shared.weight", 0) * 2


def test_module_under_two_names() -> None:
    shared = conv(8, 8)
    net = Net(
        lambda m, x: m.head(m.second(m.first(m.stem(x)))), stem=conv(3, 8), first=shared, second=shared, head=conv(8, 2)
    )
    cut = assert_laws(net, image())
    assert cut.channels("first.weight", 0) == cut.channels("first.weight", 1) == cut.channels("stem.weight", 0)


def test_tied_weights_stay_tied() -> None:
    net = Net(lambda m, x: m.head(m.b(m.a(m.stem(x)))), stem=conv(3, 8), a=conv(8, 8), b=conv(8, 8), head=conv(8, 2))
    net.b.weight = net.a.weight
    cut = assert_laws(net, image())
    slim_a, slim_b = cut.slim.get_submodule("a"), cut.slim.get_submodule("b")
    assert slim_a.weight is slim_b.weight
    assert slim_a.bias is not slim_b.bias
    assert_free(cut, "a.weight", 0, 8)


def test_tied_transposed_decoder() -> None:
    net = Net(
        lambda m, x: F.linear(m.middle(m.encoder(x).relu()).relu(), m.encoder.weight.t(), m.bias),
        encoder=nn.Linear(6, 16), middle=nn.Linear(16, 16), bias=nn.Parameter(torch.randn(6)),
    )  # fmt: skip
    cut = assert_laws(net, tokens())
    assert cut.channels("middle.weight", 0) == cut.channels("middle.weight", 1) == cut.channels("encoder.weight", 0)


def test_tied_embedding() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.fc = nn.Linear(8, 16)
            self.back = nn.Linear(16, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, words: Tensor) -> Tensor:
            return self.head(self.back(torch.relu(self.fc(self.embedding(words)))))

    cut = assert_laws(Language(), torch.randint(0, 11, (2, 5)))
    assert cut.slim.get_submodule("head").weight is cut.slim.get_submodule("embedding").weight
    assert_free(cut, "embedding.weight", 1, 8)


def test_frozen_parameters_and_detached_branches() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.head(y + m.b(x).detach())

    net = Net(body, a=conv(3, 8), b=conv(3, 8), head=conv(8, 2))
    net.a.weight.requires_grad_(False)
    cut = assert_laws(net, image())
    assert cut.channels("a.weight", 0) == cut.channels("b.weight", 0)


# Gates.


@pytest.mark.parametrize("written", ["convolutions", "linears"])
def test_squeeze_and_excitation(written: str) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.a(x))
        pooled = F.adaptive_avg_pool2d(y, 1)
        if written == "linears":
            gate = m.expand(torch.relu(m.squeeze(pooled.flatten(1)))).sigmoid().view(2, 8, 1, 1)
        else:
            gate = torch.sigmoid(m.expand(torch.relu(m.squeeze(pooled))))
        return m.head(y * gate)

    layer = nn.Linear if written == "linears" else lambda i, o: nn.Conv2d(i, o, 1)
    net = Net(body, a=conv(3, 8), bn=nn.BatchNorm2d(8), squeeze=layer(8, 4), expand=layer(4, 8), head=conv(8, 2))
    cut = assert_laws(net, image())
    assert cut.channels("squeeze.weight", 1) == cut.channels("expand.weight", 0) == cut.channels("a.weight", 0)
    assert_free(cut, "squeeze.weight", 0, 4)


def test_dead_branch() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        m.dead(y)
        m.dead_tail(torch.relu(m.dead_head(y)))
        return m.head(y)

    net = Net(
        body, a=conv(3, 8), dead=conv(8, 6), dead_head=conv(8, 4), dead_tail=conv(4, 4), head=conv(8, 2),
        never_called=conv(3, 4),
    )  # fmt: skip
    cut = assert_laws(net, image())
    assert_free(cut, "a.weight", 0, 8)
    assert cut.channels("dead.weight", 1) == cut.channels("a.weight", 0)


def test_intermediate_feature_as_output_is_pinned() -> None:
    def body(m: Any, x: Tensor) -> Any:
        features = torch.relu(m.a(x))
        return features, m.head(m.b(features))

    cut = assert_laws(Net(body, a=conv(3, 8), b=conv(8, 8), head=conv(8, 2)), image())
    assert orbits_of(cut, "a.weight", 0) == {None}
    reasons = {p.reason for p in cut.orbits.pinned if (p.parameter, p.dimension) == ("a.weight", 0)}
    assert {(r.node, r.text) for r in reasons} == {("output", "returned by the model")}
    assert_free(cut, "b.weight", 0, 8)


def test_summed_over_channels() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.head(m.b(x) * y.sum(1, keepdim=True))

    cut = assert_laws(Net(body, a=conv(3, 8), b=conv(3, 8), head=conv(8, 2)), image())
    assert_free(cut, "a.weight", 0, 8)
    orbit = next(orbit for orbit in cut.orbits if orbit.layers == ("a",))
    assert orbit.absorbers == ("sum_1",)


def test_softmax_over_channels_is_pinned() -> None:
    net = Net(lambda m, x: m.head(m.b(m.a(x).softmax(1))), a=conv(3, 8), b=conv(8, 8), head=conv(8, 2))
    cut = assert_laws(net, image())
    assert_pinned(cut, "a.weight", 0, "aten._softmax")
    assert_free(cut, "b.weight", 0, 8)


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda y: y.max(1, keepdim=True)[0],
    "amax": lambda y: y.amax(1, keepdim=True),
    "logsumexp": lambda y: y.logsumexp(1, keepdim=True),
    "cumsum": lambda y: y.cumsum(1)[:, -1:],
    "prod": lambda y: y.prod(1, keepdim=True),
    "mean": lambda y: y.mean(1, keepdim=True),
    "norm": lambda y: y.norm(dim=1, keepdim=True),
    "normalize": lambda y: F.normalize(y, dim=1).sum(1, keepdim=True),
    "argmax": lambda y: y.argmax(1, keepdim=True).to(y.dtype),
    "rolled": lambda y: y.roll(1, 1)[:, :1],
    "stepped": lambda y: y[:, ::2].sum(1, keepdim=True),
    "lrn": lambda y: F.local_response_norm(y, 3).sum(1, keepdim=True),
    "unbound": lambda y: y.unbind(1)[2].unsqueeze(1),
    "instance_norm": lambda y: F.instance_norm(y).sum(1, keepdim=True),
    "sin_then_sum": lambda y: y.cos().sum(1, keepdim=True),
    "einsum": lambda y: torch.einsum("bchw,bchw->bhw", y, y.cos()).unsqueeze(1),
}


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_reductions_over_channels_are_never_wrong(kind: str) -> None:
    """Whether absorbed, statistical or pinned: the laws hold and the rest stays prunable."""
    net = Net(
        lambda m, x: m.head(m.b(x) * REDUCTIONS[kind](m.a(x)).sigmoid()), a=conv(3, 8), b=conv(3, 8), head=conv(8, 2)
    )
    assert_free(assert_laws(net, image()), "b.weight", 0, 8)


# Normalisations.


def test_group_norm_keeps_groups_whole() -> None:
    net = nn.Sequential(conv(3, 12), nn.GroupNorm(4, 12), nn.ReLU(), conv(12, 2))
    cut = assert_laws(net, image())
    assert_free(cut, "0.weight", 0, 4)
    norm = cut.slim.get_submodule("1")
    assert (norm.num_groups, norm.num_channels) == (cut.width("0.weight", 0) // 3, cut.width("0.weight", 0))


def test_group_norm_function() -> None:
    net = Net(
        lambda m, x: m.head(F.group_norm(m.a(x), 4, m.scale, m.shift)), a=conv(3, 12), head=conv(12, 2),
        scale=nn.Parameter(torch.randn(12)), shift=nn.Parameter(torch.randn(12)),
    )  # fmt: skip
    assert_free(assert_laws(net, image()), "a.weight", 0, 4)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm", "functional", "group_norm"])
def test_shared_statistics_are_cut_only_when_allowed(kind: str) -> None:
    norms: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "layer_norm": lambda m, y: m.layer_norm(y),
        "rms_norm": lambda m, y: m.rms_norm(y),
        "functional": lambda m, y: F.layer_norm(y, (16,), m.gamma, m.beta),
        "group_norm": lambda m, y: m.group_norm(y.transpose(1, 2)).transpose(1, 2),
    }
    parts: dict[str, dict[str, Any]] = {
        "layer_norm": {"layer_norm": nn.LayerNorm(16)},
        "rms_norm": {"rms_norm": nn.RMSNorm(16)},
        "functional": {"gamma": nn.Parameter(torch.rand(16)), "beta": nn.Parameter(torch.rand(16))},
        "group_norm": {"group_norm": nn.GroupNorm(1, 16)},
    }
    net = Net(
        lambda m, x: m.head(torch.relu(m.b(norms[kind](m, m.a(x))))),
        a=nn.Linear(6, 16), **parts[kind], b=nn.Linear(16, 16), head=nn.Linear(16, 2),
    )  # fmt: skip
    exact = assert_laws(net, tokens())
    (name,) = orbits_of(exact, "a.weight", 0)
    assert name is not None
    assert exact.orbits[name].statistical is not None
    assert exact.width("a.weight", 0) == 16
    assert_free(exact, "b.weight", 0, 16)
    assert_free(assert_laws(net, tokens(), approximate=True), "a.weight", 0, 16)


# Attention.


class Attention(nn.Module):
    """Attention written by hand over [batch, tokens, width]."""

    def __init__(self, kind: str, heads: int = 2, width: int = 8) -> None:
        super().__init__()
        self.kind, self.heads = kind, heads
        self.query, self.key, self.value = (nn.Linear(6, width) for _ in range(3))
        self.out = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (self._heads(layer(x), batch, length) for layer in (self.query, self.key, self.value))
        y = getattr(self, self.kind)(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))

    def _heads(self, y: Tensor, batch: int, length: int) -> Tensor:
        return y.view(batch, length, self.heads, y.shape[-1] // self.heads).transpose(1, 2)

    def by_hand(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        return (q @ k.transpose(-2, -1) * scale).softmax(-1) @ v

    def by_division(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(-2, -1)) / (q.size(-1) ** 0.5)
        return torch.matmul(scores.softmax(-1), v)

    def by_einsum(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhid,bhjd->bhij", q * q.shape[-1] ** -0.5, k)
        return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def fused_causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("kind", ["by_hand", "by_division", "by_einsum", "fused", "fused_causal"])
def test_attention_by_hand(kind: str) -> None:
    cut = assert_laws(Attention(kind), tokens())
    query = cut.channels("query.weight", 0)
    assert query == cut.channels("key.weight", 0)
    assert_free(cut, "query.weight", 0, 4)
    assert_free(cut, "value.weight", 0, 4)
    assert query[:4] == query[4:], "the same channel leaves every head"
    assert cut.channels("out.weight", 1) == cut.channels("value.weight", 0)


def test_attention_with_literal_sizes_and_one_projection() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q * 4**-0.5) @ k.transpose(2, 3)
        return m.out((y.softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 8))

    cut = assert_laws(Net(body, qkv=nn.Linear(6, 24), out=nn.Linear(8, 3)), tokens())
    assert cut.width("out.weight", 1) < 8


def test_multi_head_attention_module() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.fc1, self.fc2 = nn.Linear(6, 12), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return x + self.fc2(F.gelu(self.fc1(x)))

    assert_free(assert_laws(Block(), tokens()), "fc1.weight", 0, 12)


# In-place operators, inputs and outputs.


def test_in_place_operators() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x), inplace=True) * 2
        y += m.b(x)
        y.mul_(m.gamma).clamp_(-1, 1)
        z = F.hardtanh_(m.c(y))
        z.add_(y, alpha=0.5)
        return m.head(F.leaky_relu_(z))

    net = Net(body, a=conv(3, 8), b=conv(3, 8), c=conv(8, 8), head=conv(8, 2), gamma=nn.Parameter(torch.randn(8, 1, 1)))
    cut = assert_laws(net, image())
    assert cut.channels("c.weight", 0) == cut.channels("c.weight", 1) == cut.channels("b.weight", 0)
    assert_free(cut, "a.weight", 0, 8)


def test_in_place_write_into_a_slice() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y[:, :4].mul_(2.0)
        y[:, 4:].add_(m.b(x))
        return m.head(y)

    cut = assert_laws(Net(body, a=conv(3, 8), b=conv(3, 4), head=conv(8, 2)), image(), removed_at_least=0.0)
    assert cut.width("head.weight", 1) <= 8


def test_several_and_nested_inputs_and_outputs() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(3, 8), conv(2, 8), conv(1, 8)
            self.left, self.right = conv(8, 2), conv(8, 3)

        def forward(self, x: Tensor, pair: tuple[Tensor, dict[str, Tensor]]) -> dict[str, Any]:
            first, rest = pair
            y = self.a(x) + self.b(first)
            z = self.c(rest["extra"])
            return {"left": self.left(y), "more": [self.right(z), (x, y.mean())]}

    cut = assert_laws(Several(), (image(), (image(2), {"extra": image(1)})))
    assert_free(cut, "c.weight", 0, 8)


@pytest.mark.parametrize("form", ["dict", "Inputs"])
def test_keyword_inputs(form: str) -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.embed, self.head = conv(3, 8), nn.Linear(4, 8), conv(8, 2)

        def forward(self, x: Tensor, *, condition: Tensor | None = None, scale: float = 1.0) -> Tensor:
            y = self.a(x) * scale
            if condition is not None:
                y = y + self.embed(condition)[:, :, None, None]
            return self.head(y)

    keywords = {"condition": torch.randn(2, 4), "scale": 0.5}
    inputs = {"x": image(), **keywords} if form == "dict" else Inputs((image(),), keywords)
    cut = assert_laws(Conditioned(), inputs)
    assert cut.channels("embed.weight", 0) == cut.channels("a.weight", 0)


def test_recurrent_layer_is_opaque_to_pruning_but_not_to_the_rest() -> None:
    net = Net(
        lambda m, x: m.head(m.fc(m.rnn(x)[0])), rnn=nn.LSTM(6, 8, batch_first=True), fc=nn.Linear(8, 16),
        head=nn.Linear(16, 2),
    )  # fmt: skip
    cut = assert_laws(net, tokens())
    assert_free(cut, "fc.weight", 0, 16)


class Branching(nn.Module):
    """Chooses by its input's data, which no tracer can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 1e9 else self.inner(-x)


def test_opaque_submodule_is_pinned() -> None:
    net = Net(
        lambda m, x: m.head(m.b(m.opaque(m.a(x)))), a=conv(3, 8), opaque=Branching(), b=conv(8, 8), head=conv(8, 2)
    )
    cut = assert_laws(net, image())
    assert orbits_of(cut, "a.weight", 0) == orbits_of(cut, "opaque.inner.weight", 0) == {None}
    assert_free(cut, "b.weight", 0, 8)


def test_export_front_end() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        left, right = m.bn(m.a(x)).chunk(2, 1)
        y = torch.cat([m.left(left), right], 1)
        return m.fc(torch.flatten(F.adaptive_avg_pool2d(y, 2), 1))

    net = Net(body, a=conv(3, 12), bn=nn.BatchNorm2d(12), left=conv(6, 4), fc=nn.Linear(40, 3))
    cut = assert_laws(net.eval(), image(), frontend="export")
    assert cut.width("left.weight", 1) < 6


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.9, 1.0])
def test_every_fraction(fraction: float) -> None:
    widths = [3, 8, 7, 6, 2]
    net = nn.Sequential(*(layer for i, o in pairwise(widths) for layer in (conv(i, o), nn.BatchNorm2d(o), nn.ReLU())))
    cut = assert_laws(net, image(), fraction=fraction, removed_at_least=fraction / 4)
    if fraction == 1.0:
        assert [cut.width(f"{i}.weight", 0) for i in (0, 3, 6)] == [1, 1, 1]


# Numbers of a graph that depend on channels and on a batch.


def _choose(x: Tensor, divisor: int) -> Tensor:
    return x / divisor if x.sum() < 1e9 else x


BATCHED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "divided_by_numel": lambda m, x: m.head(x - x.sum() / x.numel()),
    "divided_by_a_product": lambda m, x: m.head(x - x.sum() / (x.shape[0] * x.shape[1] * x.shape[2])),
    "shape_as_a_tensor": lambda m, x: m.head(x / torch.tensor(x.shape[1:]).prod()),
    "merged_with_the_batch": lambda m, x: m.head(
        F.avg_pool2d(x.view(x.shape[0] * 8, 1, 6, 6), 3, 1, 1).view(x.shape[0], 8, 6, 6)
    ),
    "zeros_over_the_batch": lambda m, x: m.head(
        (m.c(x.softmax(1)).flatten(0, 1) + torch.zeros(x.shape[0] * 8, 6, 6).to(x)).view(-1, 8, 6, 6)
    ),
    "shape_of_another": lambda m, x: m.head(m.c(x.softmax(1)) + torch.zeros(x.softmax(1).shape).to(x)),
    "expanded_like_another": lambda m, x: m.head(m.c(y := x.softmax(1)).mean((0, 2, 3), keepdim=True).expand_as(y)),
    "augmented": lambda m, x: m.head(_written_through_a_view(m.c(x))),
    "asserted": lambda m, x: (torch._assert(x.shape[1] == 8, "eight"), m.head(x))[1],
    "given_to_an_opaque_function": lambda m, x: m.head(x) * _choose(x[:, :1], x.shape[1]),
    "viewed_by_strides": lambda m, x: m.head(x.contiguous().as_strided((x.shape[0], 8, 6, 6), (288, 36, 1, 6))),
    "indexed_by_a_mask_of_two_dimensions": lambda m, x: m.head(x) + x[:, m.mask].sum(1)[:, None, None],
    "interleaved": lambda m, x: m.head(x[:, :4].repeat_interleave(2, dim=1, output_size=8)),
    "repeated_by_name": lambda m, x: m.head(x[:, :4].repeat(repeats=(1, 2, 1, 1))),
    "viewed_as_by_name": lambda m, x: m.head(x.flatten(2).view_as(other=x)),
}


def _written_through_a_view(x: Tensor) -> Tensor:
    part = x[:, :4]
    part += x[:, 4:] * 2
    return x


@pytest.mark.parametrize("kind", BATCHED)
def test_numbers_are_right_for_other_batches(kind: str) -> None:
    mask = torch.zeros(8, 6, dtype=torch.bool)
    mask[[1, 4], [2, 3]] = True
    net = Net(lambda m, x: BATCHED[kind](m, m.a(x)), a=conv(3, 8), c=conv(8, 8, 1), head=conv(8, 2), mask=mask)
    cut = assert_laws(net, image(), removed_at_least=0)
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        assert_close([cut.traced(x), cut.slim(x)], [net(x), cut.masked(x)], "another batch")


def test_a_returned_size_is_that_before_the_cut() -> None:
    net = Net(lambda m, x: (m.head(y := m.a(x)), y.shape[1], y.shape[0]), a=conv(3, 8), head=conv(8, 2))
    cut = assert_laws(net, image())
    assert cut.slim(torch.randn(5, 3, 6, 6, dtype=torch.float64))[1:] == (8, 5)


def test_function_of_attention_keeps_its_width() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        t, of = m.l(x).transpose(0, 1), m.of
        out, _ = F.multi_head_attention_forward(
            t, t, t, 6, 2, of.in_proj_weight, of.in_proj_bias, None, None, False, 0.0, of.out_proj.weight,
            of.out_proj.bias, need_weights=False,
        )  # fmt: skip
        return m.o(F.relu(m.h(out)))

    parts = {"l": nn.Linear(6, 6), "of": nn.MultiheadAttention(6, 2), "h": nn.Linear(6, 8), "o": nn.Linear(8, 2)}
    cut = assert_laws(Net(body, **parts), tokens())
    assert_pinned(cut, "l.weight", 0, "multi_head_attention_forward")


def test_batch_norm_over_tokens_is_statistical() -> None:
    net = Net(lambda m, x: m.o(m.n(m.l(x))), l=nn.Linear(6, 8), n=nn.BatchNorm1d(5), o=nn.Linear(8, 2))
    cut = assert_laws(net, tokens(), removed_at_least=0)
    assert all(orbit.statistical for orbit in cut.orbits)


def test_strides_of_a_part_are_refused() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.head(y) * y[:, :4].as_strided((2, 36), (288, 1)).sum()

    with pytest.raises(UsageError, match="views a part of a tensor by explicit strides"):
        assert_laws(Net(body, a=conv(3, 8), head=conv(8, 2)), image())
