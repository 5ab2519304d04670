"""The edit that quantisation makes to a graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from fxprune.graph.shapes import propagate_shapes
from fxprune.quantization.choosing import Choice, ChosenLayer
from fxprune.quantization.facts import keep_float_layers
from fxprune.quantization.permuting import LAST, inverse, permutation, to_last
from fxprune.quantization.values import operand
from fxprune.runtime.int8 import CHANNELS_LAST, Affine, dequantize, quantize
from fxprune.runtime.int8.layer import Int8Layer

__all__ = ["quantize_layers"]


def quantize_layers(module: fx.GraphModule, choice: Choice) -> bool:
    """Make the layers that were chosen compute on uint8, in place; return whether there are any."""
    keep_float_layers(module, choice.floating)
    if not choice.layers:
        return False
    placement = choice.placement
    for node, readers in placement.quantized.items():
        _convert(module.graph, quantize, node, readers, choice.affines[node], placement.channels[node])
    made = {layer.result: (_build(module, layer), layer.kind.channels) for layer in choice.layers}
    for node, readers in placement.dequantized.items():
        int8_layer, channels = made[node]
        width = int8_layer.multiplier.numel()
        _convert(module.graph, dequantize, node, readers, choice.affines[node], channels, width)
    for layer in choice.layers:
        module.set_submodule(str(layer.node.target), made[layer.result][0])
        _absorb(module.graph, layer)
    for node, level in choice.fills.items():
        node.args = (*node.args[:-1], level)
    for node in choice.identities:
        node.replace_all_uses_with(operand(node))
        module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    propagate_shapes(module)
    return True


def _build(module: fx.GraphModule, layer: ChosenLayer) -> Int8Layer:
    return layer.kind.build(module.get_submodule(str(layer.node.target)), layer.numbers).eval()


def _absorb(graph: fx.Graph, layer: ChosenLayer) -> None:
    """Let a layer give what its activation gave, and all between them be gone."""
    layer.result.replace_all_uses_with(layer.node)
    node = layer.result
    while node is not layer.node:
        node, passed = operand(node), node
        graph.erase_node(passed)


def _convert(
    graph: fx.Graph,
    operator: Any,
    node: fx.Node,
    readers: Iterable[fx.Node],
    affine: Affine,
    channels: int,
    *width: int,
) -> None:
    """Give some readers of a value its other form, made before the first of them, of channels that lie last."""
    taking = [reader for reader in graph.nodes if reader in set(readers)]
    there = None if channels == LAST else to_last(node.meta["val"].dim(), channels)
    with graph.inserting_before(taking[0]):
        source = node if there is None else graph.call_method("permute", (node, *there))
        arguments: tuple[Any, ...] = (source, affine.scale, affine.zero_point, CHANNELS_LAST, *width)
        other = graph.create_node("call_function", operator, arguments, name=operator._opname)
        back = other if there is None else graph.call_method("permute", (other, *inverse(there)))
    for reader in taking:
        if there is not None and permutation(reader) == there:  # it would undo the last permute
            reader.replace_all_uses_with(other)
            graph.erase_node(reader)
        else:
            reader.replace_input_with(node, back)
    if not back.users:
        graph.erase_node(back)
