"""Widths of layers: what they are before and after, and which layers stand in one stage."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError
from fxprune.insights.widths import LayerWidth, StageWidth, layer_widths, stage_table, stage_widths
from fxprune.survey import make_report
from tests.nets import Net

IMAGE = torch.zeros(2, 3, 64, 64)


class UNet(nn.Module):
    """Two resolutions down, and up again by way of what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.middle = nn.Conv2d(16, 32, 3, 2, 1)
        self.up2, self.join2 = nn.ConvTranspose2d(32, 16, 2, 2), nn.Conv2d(32, 16, 3, 1, 1)
        self.up1, self.join1 = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 4, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down1(x).relu()
        low = self.down2(high).relu()
        y = self.middle(low).relu()
        y = self.join2(torch.cat([self.up2(y), low], 1)).relu()
        return self.join1(torch.cat([self.up1(y), high], 1))


def _widths(net: nn.Module, x: Tensor, frontend: str = "auto") -> tuple[LayerWidth, ...]:
    """Return the widths of a network of which nothing was cut."""
    graph = fxprune.trace(net.eval(), x, frontend=frontend)
    return layer_widths(graph, make_report(graph))


def _pruned(net: nn.Module) -> fxprune.Result:
    return fxprune.prune(net.eval(), IMAGE, ratio="50%", scope="uniform")


def _outputs(layer: nn.Module) -> int:
    assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


@pytest.mark.parametrize(
    "model", [torchvision.models.resnet18, torchvision.models.mobilenet_v2, UNet], ids=["resnet18", "mobilenet", "unet"]
)
def test_channels_are_those_of_the_layers_before_and_after(model: Callable[[], nn.Module]) -> None:
    net = model()
    result = fxprune.prune(net.eval(), IMAGE, macs="50%")
    rows = layer_widths(result.traced, result.report)
    assert [row.layer for row in rows] == [
        name for name, layer in net.named_modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    ]
    for row in rows:
        sides = [module.get_submodule(row.layer) for module in (net, result.module)]
        assert row.channels == tuple(_outputs(layer) for layer in sides)
        assert row.kind == type(sides[0]).__name__
    assert any(row.channels[1] < row.channels[0] for row in rows)


def _lengths(rows: tuple[LayerWidth, ...]) -> list[tuple[str, int]]:
    return [(stage, len(list(held))) for stage, held in groupby(rows, lambda row: row.stage)]


def test_stages_of_resnet18_are_its_five_resolutions_and_the_classifier() -> None:
    rows = _widths(torchvision.models.resnet18(), IMAGE)
    sizes = [("32×32", 1), ("16×16", 4), ("8×8", 5), ("4×4", 5), ("2×2", 5), ("vector", 1)]
    assert _lengths(rows) == sizes
    assert [(stage.stage, stage.layers) for stage in stage_widths(rows)] == sizes


def test_stages_of_mobilenet_v2_begin_where_the_stride_is() -> None:
    rows = _widths(torchvision.models.mobilenet_v2(), IMAGE)
    assert _lengths(rows) == [("32×32", 4), ("16×16", 6), ("8×8", 9), ("4×4", 21), ("2×2", 12), ("vector", 1)]
    stage = {row.layer: row.stage for row in rows}
    assert (stage["features.2.conv.0.0"], stage["features.2.conv.1.0"]) == ("32×32", "16×16")


def test_a_resolution_that_comes_back_is_a_new_stage() -> None:
    rows = _widths(UNet(), IMAGE)
    assert _lengths(rows) == [("64×64", 1), ("32×32", 1), ("16×16", 1), ("32×32", 2), ("64×64", 2)]
    assert [stage.layers for stage in stage_widths(rows)] == [1, 1, 1, 2, 2]
    result = _pruned(UNet())
    assert stage_widths(layer_widths(result.traced, result.report))[3] == StageWidth("32×32", 2, (32, 16))


def _excite(net: Any, x: Tensor) -> Tensor:
    y = net.stem(x)
    return net.last(y * net.up(net.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid())


def _windows(net: Any, x: Tensor) -> Tensor:
    y = net.patch(x)  # [2, 8, 4, 4]
    windows = y.unflatten(2, (2, 2)).unflatten(4, (2, 2)).permute(0, 2, 4, 3, 5, 1).flatten(0, 2).flatten(1, 2)
    mixed = net.mix(windows).unflatten(0, (2, 2, 2)).unflatten(3, (2, 2)).permute(0, 1, 3, 2, 4, 5)
    return net.out(mixed.flatten(1, 2).flatten(2, 3))


def _tokens(net: Any, x: Tensor) -> Tensor:
    y = net.patch(x).flatten(2).transpose(1, 2)
    y = torch.cat([y, y.mean(1, keepdim=True)], 1)
    return net.head(net.down(net.up(y).relu())[:, -1])


def _mixer(net: Any, x: Tensor) -> Tensor:
    y = net.patch(x).flatten(2)
    return net.channels((y + net.tokens(y)).transpose(1, 2))


def _shared(net: Any, x: Tensor) -> Tensor:
    high = net.stem(x)
    return net.head(high).mean((2, 3)) + net.head(net.pool(high)).mean((2, 3))


def _recurrent(net: Any, x: Tensor) -> Tensor:
    return net.out(net.cell(net.into(x))[0])


def _functional(net: Any, x: Tensor) -> Tensor:
    y = nn.functional.conv2d(x, net.kernel - net.kernel.mean()).relu()
    return (y.flatten(1) @ net.matrix.t()) @ net.matrix


def _weights() -> Net:
    net = Net(_functional)
    net.kernel, net.matrix = nn.Parameter(torch.rand(6, 3, 1, 1)), nn.Parameter(torch.rand(5, 384))
    return net


SMALL = torch.zeros(2, 3, 8, 8)

CASES: dict[str, tuple[nn.Module, Tensor, list[tuple[str, str]]]] = {
    "squeeze-and-excitation": (
        Net(
            _excite,
            stem=nn.Conv2d(3, 8, 1),
            down=nn.Conv2d(8, 4, 1),
            up=nn.Conv2d(4, 8, 1),
            last=nn.Conv2d(8, 4, 3, 2, 1),
        ),
        SMALL,
        [("stem", "8×8"), ("down", "8×8"), ("up", "8×8"), ("last", "4×4")],
    ),
    "windows": (
        Net(_windows, patch=nn.Conv2d(3, 8, 2, 2), mix=nn.Linear(8, 6), out=nn.Linear(6, 4)),
        SMALL,
        [("patch", "4×4"), ("mix", "4×4"), ("out", "4×4")],
    ),
    "tokens": (
        Net(_tokens, patch=nn.Conv2d(3, 8, 2, 2), up=nn.Linear(8, 16), down=nn.Linear(16, 8), head=nn.Linear(8, 5)),
        SMALL,
        [("patch", "4×4"), ("up", "17 tokens"), ("down", "17 tokens"), ("head", "vector")],
    ),
    "mixed positions are no channels": (
        Net(_mixer, patch=nn.Conv2d(3, 8, 2, 2), tokens=nn.Linear(16, 16), channels=nn.Linear(8, 12)),
        SMALL,
        [("patch", "4×4"), ("channels", "4×4")],
    ),
    "a layer that is called twice": (
        Net(_shared, stem=nn.Conv2d(3, 8, 1), head=nn.Conv2d(8, 4, 1), pool=nn.MaxPool2d(2)),
        SMALL,
        [("stem", "8×8"), ("head", "8×8")],
    ),
    "features of one dimension": (
        nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 8, 3, 2, 1, groups=8), nn.Conv1d(8, 4, 1)),
        torch.zeros(2, 3, 10),
        [("0", "10"), ("1", "5"), ("2", "5")],
    ),
    "features of three dimensions": (
        nn.Sequential(nn.Conv3d(3, 8, 1), nn.AvgPool3d(2), nn.Conv3d(8, 4, 1)),
        torch.zeros(1, 3, 2, 4, 8),
        [("0", "2×4×8"), ("2", "1×2×4")],
    ),
    "vectors": (
        nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)),
        torch.zeros(5, 3),
        [("0", "vector"), ("2", "vector")],
    ),
    "maps of one position": (
        nn.Sequential(nn.Conv2d(3, 8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4)),
        SMALL,
        [("0", "1×1"), ("3", "1×1")],
    ),
    "channels last": (
        nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)),
        torch.zeros(2, 5, 7, 3),
        [("0", "5×7"), ("2", "5×7")],
    ),
    "an image without a batch": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        SMALL[0],
        [("0", "8×8"), ("2", "6×6")],
    ),
    "an embedding": (
        nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4)),
        torch.zeros(2, 7, dtype=torch.int64),
        [("0", "7 tokens"), ("1", "7 tokens")],
    ),
    "what was not traced": (
        Net(_recurrent, into=nn.Linear(3, 8), cell=nn.LSTM(8, 8, batch_first=True), out=nn.Linear(8, 4)),
        torch.zeros(2, 7, 3),
        [("into", "7 tokens"), ("out", "7 tokens")],
    ),
    "functions": (_weights(), SMALL, [("conv2d", "8×8"), ("matmul", "vector"), ("matmul_1", "vector")]),
}


@pytest.mark.parametrize(("net", "x", "expected"), CASES.values(), ids=CASES)
def test_layers_stand_in_stages(net: nn.Module, x: Tensor, expected: list[tuple[str, str]]) -> None:
    assert [(row.layer, row.stage) for row in _widths(net, x)] == expected


def test_products_of_activations_make_no_channels() -> None:
    net = nn.MultiheadAttention(8, 2, batch_first=True)
    graph = fxprune.trace(Net(lambda net, x: net.attend(x, x, x)[0], attend=net), torch.zeros(2, 5, 8))
    report = make_report(graph)
    assert len(report.layers) > 2
    assert [row.channels[0] for row in layer_widths(graph, report)] == [24, 8], "the projections in and out"


def test_an_exported_graph_has_the_same_widths() -> None:
    symbolic, exported = (_widths(UNet(), IMAGE, frontend=frontend) for frontend in ("symbolic", "export"))
    assert [(row.stage, row.channels) for row in exported] == [(row.stage, row.channels) for row in symbolic]


def test_a_report_read_from_a_file_gives_the_same() -> None:
    result = _pruned(UNet())
    again = fxprune.Report.from_json(result.report.json())
    assert layer_widths(result.traced, again) == layer_widths(result.traced, result.report)


def test_the_report_of_another_graph_is_refused() -> None:
    graph, other = fxprune.trace(UNet(), IMAGE), fxprune.trace(nn.Linear(3, 4), torch.zeros(2, 3))
    with pytest.raises(InputError, match="the graph has no layer 'down1'; give the graph and the report of one result"):
        layer_widths(other, make_report(graph))


def test_stages_sum_up_their_layers() -> None:
    result = _pruned(torchvision.models.mobilenet_v2())
    rows = layer_widths(result.traced, result.report)
    stages = stage_widths(rows)
    for side in (0, 1):
        assert sum(stage.channels[side] for stage in stages) == sum(row.channels[side] for row in rows)
    assert stages[-1].kept == 1
    assert all(0 < stage.kept < 1 for stage in stages[:-1])


def test_no_layers_are_no_stages() -> None:
    assert stage_widths(()) == ()
    assert StageWidth("4×4", 0, (0, 0)).kept == 0


def test_stages_are_a_table_in_any_style() -> None:
    table = stage_table([StageWidth("112×112", 3, (1200, 300)), StageWidth("vector", 1, (1000, 1000))], "github")
    assert table.splitlines()[2:] == [
        "| 112×112 |        3 |             1,200 |              300 |  25.0% |",
        "| vector  |        1 |             1,000 |            1,000 | 100.0% |",
    ]
