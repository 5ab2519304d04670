"""What a layer does in its network, read off the graph and its shapes rather than off names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, fx
from torch.nn.modules.conv import _ConvNd

from fxprune.sparsity.masks import SparseGraph

__all__ = ["ROLES", "layer_depths", "layer_roles"]

ROLES = ("expansion", "bottleneck", "squeeze-excite", "other")
"""PW, PWL and SE of paper 000, Figure 2d, and everything else."""


def layer_roles(module: fx.GraphModule) -> dict[str, str]:
    """Return what every layer that costs multiply-accumulates does, in the order of their calls.

    * "squeeze-excite": convolutions and linear layers between a global pool and a multiplication onto a feature map.
    * "expansion": other 1×1 convolutions with more output than input channels.
    * "bottleneck": other 1×1 convolutions.
    * "other": convolutions with more taps and depthwise ones, linear layers, products of activations, and the 1×1
      convolutions of a head, after the last pool.

    Args:
        module: a graph of `fxprune.trace` or of a result. A pool is known by its shapes, so that the example inputs
            must give feature maps of more than one position.

    Returns:
        Role by path of the layer, or by name of the node where no layer is called; as `LayerRow.layer` of a report. A
        layer that is called several times goes by its first call.

    >>> import torch, fxprune
    >>> from torch import nn
    >>> graph = fxprune.trace(nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)), torch.zeros(1, 3, 4, 4))
    >>> layer_roles(graph)
    {'0': 'expansion', '1': 'bottleneck'}
    """
    costly = _costly_nodes(module)
    pooled = _pooled_nodes(module)
    gates = [gate for node in module.graph.nodes for gate in _gates(node, pooled)]
    gating = _with_sources(gates, pooled)
    roles: dict[str, str] = {}
    for node in costly:
        roles.setdefault(_layer_name(node), _role(module, node, pooled, gating))
    return roles


def layer_depths(module: fx.GraphModule) -> dict[str, int]:
    """Return how many layers lie on the longest way from an input to each layer, itself included, from 1 upwards.

    Layers are those that cost multiply-accumulates, named as by `layer_roles`.
    """
    costly = set(_costly_nodes(module))
    depth: dict[fx.Node, int] = {}
    for node in module.graph.nodes:
        depth[node] = max((depth[source] for source in node.all_input_nodes), default=0) + (node in costly)
    depths: dict[str, int] = {}
    for node in module.graph.nodes:
        if node in costly:
            depths.setdefault(_layer_name(node), depth[node])
    return depths


def _costly_nodes(module: fx.GraphModule) -> list[fx.Node]:
    macs = SparseGraph(module).macs
    return [node for node in module.graph.nodes if macs.get(node.name)]


def _layer_name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _role(module: fx.GraphModule, node: fx.Node, pooled: set[fx.Node], gating: set[fx.Node]) -> str:
    if node in gating and _is_on_vector(node):
        return "squeeze-excite"
    if not _is_pointwise(module, node) or (node in pooled and _is_on_vector(node)):
        return "other"
    weight = _convolution_weight(module, node)
    assert weight is not None
    channel = 1 - weight.dim()  # before one size for each of the kernel's dimensions
    before, after = (value.shape[channel] for value in (_value(_tensors(node)[0]), _value(node)) if value is not None)
    return "expansion" if after > before else "bottleneck"


def _is_pointwise(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a 1×1 convolution that mixes channels."""
    weight = _convolution_weight(module, node)
    if weight is None or set(weight.shape[2:]) != {1}:
        return False
    into = _value(_tensors(node)[0])
    is_depthwise = into is not None and weight.shape[1] == 1 < into.shape[1 - weight.dim()]
    return not is_depthwise


def _convolution_weight(module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    if node.op == "call_module":
        leaf = module.get_submodule(str(node.target))
        return leaf.weight if isinstance(leaf, _ConvNd) else None
    if not _operator(node).startswith("conv") or len(node.args) < 2 or not isinstance(node.args[1], fx.Node):
        return None
    return _value(node.args[1])


_SHAPED_LIKE_ANOTHER = frozenset(["expand_as", "view_as", "reshape_as", "type_as"])
"""Operators whose second tensor only lends its shape or type."""

_PRODUCTS = frozenset(["mul", "mul_", "imul", "multiply", "multiply_"])


def _operator(node: fx.Node) -> str:
    """Return the plain name of what a node calls: `aten.mul.Tensor`, `operator.mul` and `.mul` are "mul"."""
    if node.op == "call_module":
        return ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.partition(".")[0]


def _value(node: fx.Node) -> Tensor | None:
    """Return the shape of what a node computes; of several tensors that of the first."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def _tensors(node: fx.Node) -> list[fx.Node]:
    """Return the activations that a node computes with: no parameters, and nothing that only lends its shape."""
    found = [source for source in node.all_input_nodes if source.op != "get_attr" and _value(source) is not None]
    return found[:1] if _operator(node) in _SHAPED_LIKE_ANOTHER else found


def _pooled_nodes(module: fx.GraphModule) -> set[fx.Node]:
    """Return the global pools of a graph, and what is computed from them alone."""
    pooled: set[fx.Node] = set()
    for node in module.graph.nodes:
        sources = _tensors(node)
        if sources and _value(node) is not None and (pooled.issuperset(sources) or _is_pool(module, node)):
            pooled.add(node)
    return pooled


def _is_pool(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node without weights makes one vector a sample of a feature map."""
    value = _value(node)
    if value is None or not _is_vector(value) or _has_weights(module, node):
        return False
    maps = (_value(source) for source in _tensors(node))
    return any(m is not None and not _is_vector(m) and m.numel() > value.numel() for m in maps)


def _has_weights(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return any(True for _ in module.get_submodule(str(node.target)).parameters())
    return any(source.op == "get_attr" for source in node.all_input_nodes)


def _is_vector(value: Tensor) -> bool:
    """Whether a value has one dimension at most beside the batch: [N, C], [N, C, 1, 1], [N, 1, C]."""
    return value.dim() > 1 and sum(size > 1 for size in value.shape[1:]) <= 1


def _is_on_vector(node: fx.Node) -> bool:
    """Whether a layer takes one vector a sample and returns one."""
    values = [_value(source) for source in (*_tensors(node)[:1], node)]
    return all(value is not None and _is_vector(value) for value in values)


def _gates(node: fx.Node, pooled: set[fx.Node]) -> Iterator[fx.Node]:
    """Yield what a product multiplies onto a feature map, of what comes from a pool."""
    if _operator(node) not in _PRODUCTS:
        return
    sources = _tensors(node)
    values = [_value(source) for source in sources if source not in pooled]
    if any(value is not None and not _is_vector(value) for value in values):
        yield from (source for source in sources if source in pooled)


def _with_sources(nodes: Iterable[fx.Node], within: set[fx.Node]) -> set[fx.Node]:
    """Return some nodes and all that they are computed from, as far as it lies within a set."""
    found: set[fx.Node] = set()
    left = list(nodes)
    while left:
        node = left.pop()
        if node in within and node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found
