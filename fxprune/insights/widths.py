"""How wide every layer was and is, resolution by resolution (paper 001, Figure 6)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from tabulate import tabulate
from torch import Tensor, fx

from fxprune.errors import InputError
from fxprune.graph.shapes import shapes_of
from fxprune.insights.roles import layer_roles
from fxprune.report import LayerRow, Report

__all__ = ["LayerWidth", "StageWidth", "layer_widths", "stage_table", "stage_widths"]


@dataclass(frozen=True)
class LayerWidth:
    """One layer: what it is, the stage that it stands in, and the channels that it makes before and after."""

    layer: str
    kind: str
    stage: str
    channels: tuple[int, int]


@dataclass(frozen=True)
class StageWidth:
    """All layers of a stage: how many, and the channels that they make, before and after."""

    stage: str
    layers: int
    channels: tuple[int, int]

    @property
    def kept(self) -> float:
        """Share of the channels that is left."""
        return self.channels[1] / max(self.channels[0], 1)


def layer_widths(traced: fx.GraphModule, report: Report) -> tuple[LayerWidth, ...]:
    """Return how many channels every layer makes before and after pruning, in the order of their first calls.

    Layers are the convolutions, the linear layers and whatever else a report lists that makes channels with a matrix of
    weights: embeddings, products with a parameter. A depthwise layer counts, though its channels are those of the layer
    before it; a layer that mixes positions (the tokens of a mixer) makes no channels and does not.

    Layers that follow each other are one stage while they make as many positions; a resolution that comes back is a new
    stage. So convolutions on 14×14 positions and linear layers on 196 tokens or on four windows of 49 go together. A
    stage bears the sizes of its first layer: "16000", "112×112", "8×56×56", "197 tokens", and "vector" where a sample
    is one. Squeeze-and-excitation layers stand in the stage that they were called in.

    Args:
        traced: the graph before pruning, `Result.traced`.
        report: what became of it, `Result.report`.

    Raises:
        InputError: the report is that of another graph.

    >>> import torch, fxprune
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 2))
    >>> result = fxprune.prune(net, torch.zeros(1, 3, 8, 8), ratio="50%", scope="uniform")
    >>> for row in layer_widths(result.traced, result.report):
    ...     print(row)
    LayerWidth(layer='0', kind='Conv2d', stage='4×4', channels=(8, 4))
    LayerWidth(layer='2', kind='Conv2d', stage='4×4', channels=(4, 2))
    LayerWidth(layer='4', kind='Linear', stage='vector', channels=(2, 2))
    """
    roles = layer_roles(traced)
    batch = _batch(traced)
    rows: list[LayerWidth] = []
    positions, stage = None, ""
    for row, shape, dims in _makers(traced, report):
        count = shape.numel() // row.channels[0]
        if count != positions and not (rows and roles.get(row.layer) == "squeeze-excite"):
            positions, stage = count, _stage(shape, dims, batch)
        rows.append(LayerWidth(row.layer, row.kind, stage, row.channels))
    return tuple(rows)


def _makers(traced: fx.GraphModule, report: Report) -> Iterator[tuple[LayerRow, torch.Size, int]]:
    """Yield the rows of layers that make channels, the shape of what they compute, and over how many dimensions."""
    calls: dict[str, fx.Node] = {}
    for node in traced.graph.nodes:
        calls.setdefault(str(node.target) if node.op == "call_module" else node.name, node)
    constant = _constants(traced, {row.layer for row in report.layers})
    seen: set[str] = set()
    for row in report.layers:
        if row.layer not in calls:
            raise InputError(f"the graph has no layer '{row.layer}'; give the graph and the report of one result")
        shape, dims = _shape(calls[row.layer]), _weight_dims(traced, calls[row.layer], constant)
        if row.layer not in seen and 2 <= dims <= len(shape) + 1 and 0 < row.channels[0] == shape[1 - dims]:
            yield row, shape, dims - 2
        seen.add(row.layer)


def _constants(traced: fx.GraphModule, layers: set[str]) -> set[fx.Node]:
    """Return the nodes that are weights, or computed from weights alone by what is no layer."""
    constant: set[fx.Node] = set()
    for node in traced.graph.nodes:
        derived = node.all_input_nodes and constant.issuperset(node.all_input_nodes) and node.name not in layers
        if node.op == "get_attr" or derived:
            constant.add(node)
    return constant


def _weight_dims(traced: fx.GraphModule, node: fx.Node, constant: set[fx.Node]) -> int:
    """Return how many dimensions the weight of a layer has: 2 for a matrix, 4 for a kernel on images; 0 for none."""
    if node.op != "call_module":
        return max((len(_shape(source)) for source in node.all_input_nodes if source in constant), default=0)
    weight = getattr(traced.get_submodule(str(node.target)), "weight", None)
    return weight.dim() if isinstance(weight, Tensor) else 0


def _shape(node: fx.Node) -> torch.Size:
    return next(iter(shapes_of(node.meta.get("val"))), torch.Size())


def _batch(traced: fx.GraphModule) -> int:
    """Return how many samples the example inputs have."""
    shapes = [_shape(node) for node in traced.graph.nodes if node.op == "placeholder"]
    return next((max(shape[0], 1) for shape in shapes if shape), 1)


def _stage(shape: torch.Size, dims: int, batch: int) -> str:
    """Name the resolution of features [N, C, ...] of a kernel with `dims` dimensions, or [N, ..., C] of a matrix."""
    sizes = shape[-dims:] if dims else shape[1:-1]
    if dims or (len(sizes) > 1 and shape[0] == batch):
        return "×".join(str(size) for size in sizes)
    positions = shape[:-1].numel()
    tokens = positions // batch if positions % batch == 0 else positions
    return "vector" if tokens == 1 else f"{tokens} tokens"


def stage_widths(rows: Sequence[LayerWidth]) -> tuple[StageWidth, ...]:
    """Sum up the layers that follow each other in one stage."""
    return tuple(_summed(stage, tuple(held)) for stage, held in groupby(rows, lambda row: row.stage))


def _summed(stage: str, rows: Sequence[LayerWidth]) -> StageWidth:
    before, after = (sum(row.channels[side] for row in rows) for side in (0, 1))
    return StageWidth(stage, len(rows), (before, after))


def stage_table(stages: Sequence[StageWidth], style: str = "simple") -> str:
    """Return stages and the share of channels that each keeps as text; `style` is any table format of tabulate.

    >>> rows = [LayerWidth("0", "Conv2d", "4×4", (8, 4)), LayerWidth("2", "Conv2d", "4×4", (4, 2))]
    >>> print(stage_table(stage_widths(rows)))
    stage      layers    channels before    channels after    left
    -------  --------  -----------------  ----------------  ------
    4×4             2                 12                 6   50.0%
    """
    cells = [(x.stage, str(x.layers), *(f"{count:,}" for count in x.channels), f"{x.kept:.1%}") for x in stages]
    header = ["stage", "layers", "channels before", "channels after", "left"]
    return tabulate(cells, header, style, disable_numparse=True, colalign=("left", *("right",) * 4))
