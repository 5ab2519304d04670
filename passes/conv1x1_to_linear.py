"""Compute 1×1 convolutions as linear layers."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from fxprune.graph.hooks import is_hooked
from fxprune.graph.passes import Pass
from fxprune.graph.shapes import propagate_shapes
from fxprune.graph.writing import own_memory, writes_into
from fxprune.runtime.im2col import im2col
from fxprune.runtime.weight_masks import class_of, is_plain, mask_weight, place_of, weight_mask
from fxprune.runtime.windows import paddings, pads_evenly
from fxprune.selection import match_layers

__all__ = ["Conv1x1ToLinear"]


@dataclass(frozen=True)
class Conv1x1ToLinear(Pass):
    """Turn 1×1 convolutions into linear layers on channels-last values, with as few changes of layout as that takes.

    Before: `%conv1 = conv1 Conv2d(8→16)(%x)`, `%relu = relu ReLU()(%conv1)`, `%conv2 = conv2 Conv2d(16→8)(%relu)`
    After: `%permute = .permute(%x, 0, 2, 3, 1)`, `%conv1 = conv1 Linear(8→16)(%permute)`,
    `%relu = relu ReLU()(%conv1)`, `%conv2 = conv2 Linear(16→8)(%relu)`, `%permute_1 = .permute(%conv2, 0, 3, 1, 2)`

    Paper 000, §3.1 and §3.3: sparse kernels are linear layers. Strides become slices. Pointwise operators and joins
    stay in the layout of what they read, so that changes of layout between layers cancel. What comes from a global pool
    is a vector [N, C] and needs no permute. Batch and image sizes stay free; masks stay masks. Left as they are:
    grouped convolutions, those of a class of their own, weights that are tied or computed, batch norms (fold them
    first).

    Options: `im2col` are names, globs or types of two-dimensional convolutions with larger kernels, or with padding,
    that become linear layers too: on patches, which a node before them gathers. In float that costs time; a quantised
    layer gains it back.
    """

    name: ClassVar[str] = "conv1x1-to-linear"

    im2col: tuple[str, ...] = ()

    def rewrite(self, module: fx.GraphModule) -> bool:
        """Replace the layers, and the nodes that can keep their layout."""
        unfolded = match_layers(self.im2col, module) if self.im2col else set()
        chosen = _convertible(module, unfolded)
        if not chosen:
            return False
        layouts = _Layouts(module, chosen)
        for node in list(module.graph.nodes):
            layouts.visit(node)
        layouts.clean()
        for path in chosen:
            _replace(module, path)
        _reshape_views(module)
        propagate_shapes(module)
        return True


FIRST, LAST, VECTOR = "channels first", "channels last", "vector"
"""[N, C, …], [N, …, C], and [N, C] for maps of one position."""

_POINTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.LeakyReLU),
    *(nn.ELU, nn.Mish, nn.Softplus, nn.Hardtanh, nn.Dropout, nn.Identity),
)

_POINTWISE: frozenset[Any] = frozenset(
    [
        *(operator.add, operator.iadd, operator.mul, operator.imul, operator.sub, operator.truediv),
        *(torch.add, torch.mul, torch.sub, torch.relu, torch.sigmoid, torch.tanh),
        *(functional.relu, functional.relu6, functional.hardswish, functional.silu, functional.gelu),
        *(functional.sigmoid, functional.hardsigmoid, functional.hardtanh, functional.dropout),
        *("add", "add_", "mul", "mul_", "sub", "relu", "relu_", "sigmoid", "sigmoid_", "tanh"),
    ]
)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _convertible(module: fx.GraphModule, unfolded: Set[str]) -> dict[str, nn.Module]:
    """Return path → convolution of those that are linear layers on every batch that they are called with.

    `unfolded` are those that may be linear layers on patches.
    """
    held = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    refused: set[str] = set()
    for node in module.graph.nodes:
        if node.op == "call_module":
            path, layer = str(node.target), module.get_submodule(str(node.target))
            on_patches = path in unfolded and class_of(layer) is nn.Conv2d
            if class_of(layer) in _CONVOLUTIONS and _is_linear(layer, held, on_patches) and _batched(node, layer):
                found[path] = layer
            else:
                refused.add(path)
    return {path: layer for path, layer in found.items() if path not in refused}


def _is_linear(layer: Any, held: Counter[int], on_patches: bool) -> bool:
    """Whether a convolution is a linear layer: of its input's channels, or of patches."""
    if layer.groups != 1 or is_hooked(layer) or any(held[id(p)] > 1 for p in layer.parameters()):
        return False
    if not _is_pointwise_convolution(layer) and not (on_patches and pads_evenly(layer)):
        return False
    return is_plain(layer, "weight") and not parametrize.is_parametrized(layer, "bias")


def _is_pointwise_convolution(layer: Any) -> bool:
    """Whether every output position depends on one input position."""
    return set(layer.kernel_size) == {1} and not any(paddings(layer))


def _batched(node: fx.Node, layer: Any) -> bool:
    value = node.meta.get("val")
    return len(node.args) == 1 and isinstance(value, Tensor) and value.dim() == len(layer.kernel_size) + 2


class _Layouts:
    """In which layout every value is computed, and the one node that gives it in each other layout."""

    def __init__(self, module: fx.GraphModule, chosen: dict[str, nn.Module]) -> None:
        self.module = module
        self.graph = module.graph
        self.chosen = chosen
        self.native: dict[fx.Node, str] = {}
        self.known: dict[tuple[fx.Node, str], fx.Node] = {}
        self.pooled: set[fx.Node] = set()

    def visit(self, node: fx.Node) -> None:
        """Give a node, all before it being done, the layout that suits it."""
        sources = node.all_input_nodes
        if _is_global_pool(self.module, node) or (
            sources and self.pooled.issuperset(sources) and _is_pointwise(self.module, node)
        ):
            self.pooled.add(node)
        if node.op == "call_module" and str(node.target) in self.chosen:
            self._convert(node)
            return
        layout = self._layout_of(node)
        if layout != FIRST:
            self.native[node] = layout
        for source in list(node.all_input_nodes):
            if self.native.get(source, FIRST) != layout and source in self.native:
                node.replace_input_with(source, self.given(source, layout))

    def _convert(self, node: fx.Node) -> None:
        """Let a convolution read, and be, a channels-last value or a vector."""
        source = node.all_input_nodes[0]
        layer: Any = self.chosen[str(node.target)]
        is_pointwise = _is_pointwise_convolution(layer)
        is_vector = source in self.pooled or self.native.get(source) == VECTOR
        layout = VECTOR if is_vector and is_pointwise else LAST
        read = self.given(source, layout)
        with self.graph.inserting_before(node):
            if not is_pointwise:
                sizes = (layer.kernel_size, layer.stride, paddings(layer), layer.dilation)
                arguments: tuple[Any, ...] = (read, *(list(size) for size in sizes), 0)
                read = self.graph.create_node("call_function", im2col, arguments, name="im2col")
            elif layout == LAST and set(layer.stride) != {1}:
                steps = (slice(None), *(slice(None, None, stride) for stride in layer.stride))
                read = self.graph.call_function(operator.getitem, (read, steps))
        node.replace_input_with(source, read)
        self.native[node] = layout

    def _layout_of(self, node: fx.Node) -> str:
        """Return the layout that an operator can compute in without changing that of what it writes into."""
        operands = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]
        if not operands or not _is_pointwise(self.module, node) or len(operands) < len(node.all_input_nodes):
            return FIRST
        layouts = [self.native.get(source, FIRST) for source in operands]
        ranks = {source.meta["val"].dim() for source in operands}
        if FIRST in layouts or len(ranks) > 1 or (VECTOR in layouts and layouts[0] == VECTOR and LAST in layouts):
            return FIRST
        return LAST if LAST in layouts else VECTOR

    def given(self, node: fx.Node, layout: str) -> fx.Node:
        """Return the node that gives a value in a layout, made behind it where there is none."""
        native = self.native.get(node, FIRST)
        if native == layout:
            return node
        if (node, layout) not in self.known:
            rank = node.meta["val"].dim()
            with self.graph.inserting_after(node):
                method, arguments = _change(native, layout, rank)
                self.known[node, layout] = self.graph.call_method(method, (node, *arguments))
        return self.known[node, layout]

    def clean(self) -> None:
        """Forget shapes that are no longer those of the values."""
        for node in self.native:
            node.meta.pop("val", None)


def _change(given: str, wanted: str, rank: int) -> tuple[str, tuple[Any, ...]]:
    """Return the method that changes a value of `rank` dimensions from one layout to another, and its arguments."""
    ones = (1,) * (rank - 2)
    changes: dict[tuple[str, str], tuple[str, tuple[Any, ...]]] = {
        (FIRST, LAST): ("permute", (0, *range(2, rank), 1)),
        (LAST, FIRST): ("permute", (0, rank - 1, *range(1, rank - 1))),
        (FIRST, VECTOR): ("flatten", (1,)),
        (VECTOR, FIRST): ("unflatten", (1, (-1, *ones))),
        (VECTOR, LAST): ("unflatten", (1, (*ones, -1))),
    }
    return changes[given, wanted]


def _is_pointwise(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        leaf = module.get_submodule(str(node.target))
        return isinstance(leaf, _POINTWISE_MODULES) and not is_hooked(leaf)
    return node.op in ("call_function", "call_method") and node.target in _POINTWISE


def _is_global_pool(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node makes one position of each map, whatever the size of the map."""
    if node.op == "call_module":
        leaf = module.get_submodule(str(node.target))
        pools = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
        return isinstance(leaf, pools) and set(_sizes(leaf.output_size)) == {1}
    called: tuple[Callable[..., Any], ...] = (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d)
    if node.target in called and len(node.args) > 1:
        return set(_sizes(node.args[1])) == {1}
    value = node.meta.get("val")
    if node.target not in ("mean", torch.mean) or not isinstance(value, Tensor):
        return False
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    keeps = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
    if not keeps or not all(isinstance(d, int) for d in _sizes(dims)):
        return False
    return {d % value.dim() for d in _sizes(dims)} == set(range(2, value.dim()))


def _sizes(value: Any) -> Iterator[Any]:
    """Yield one number or several."""
    yield from value if isinstance(value, (tuple, list)) else (value,)


_COPYING = {"view": "reshape", "view_as": "reshape_as"}


def _reshape_views(module: fx.GraphModule) -> None:
    """Let views copy where values lie otherwise than they did; not those through which something is written."""
    named = dict(module.named_modules())
    views = [node for node in module.graph.nodes if node.op == "call_method" and node.target in _COPYING]
    writers = list(module.graph.nodes) if views else []
    written = {part for node in writers for into in writes_into(node, named) for part in own_memory(into, named)}
    for node in views:
        is_of_sizes = not any(isinstance(value, torch.dtype) for value in node.args)
        if is_of_sizes and node not in written:
            node.target = _COPYING[node.target]


def _as_matrix(weight: Tensor) -> Tensor:
    """Return a convolution's weight as [out, taps · in], channels beside each other."""
    return weight.movedim(1, -1).flatten(1).contiguous()


def _replace(module: fx.GraphModule, path: str) -> None:
    """Put a linear layer with the convolution's weight in its place."""
    layer: Any = module.get_submodule(path)
    mask = weight_mask(layer, "weight")
    original = getattr(*place_of(layer, "weight"))
    matrix = _as_matrix(original.detach())
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(matrix, requires_grad=original.requires_grad)
    linear.bias = layer.bias
    if mask is not None:
        mask_weight([(linear, "weight")], _as_matrix(mask.mask))
    module.set_submodule(path, linear.train(layer.training))
