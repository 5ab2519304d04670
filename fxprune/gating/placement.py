"""Where the predictor of an orbit looks: behind the convolution with the largest kernel (paper 001, §3)."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxprune.graph.shapes import shapes_of
from fxprune.labels.flow import Labelled, Labels
from fxprune.labels.orbits import Orbit, Orbits
from fxprune.labels.places import distinct

__all__ = ["View", "Views"]

_FUNCTIONS = ("convolution", *(f"conv{kind}{dims}d" for kind in ("", "_transpose") for dims in (1, 2, 3)))
"""Names of functions and of ATen operators."""

_MOST_SPATIAL = 3
"""Dimensions of space that a predictor's kernel has at most; more are taken for batch."""


@dataclass(frozen=True)
class View:
    """A feature map with the channels of an orbit.

    Attributes:
        node: whose value it is.
        dim: the dimension of channels.
        index: int64 [channels], where the orbit is in that dimension, class by class; None where it is all of it.
        channels: how many positions that are.
        spatial: dimensions of space: those of a convolution's kernel, else all but the channels and the batch, which is
            the first of the rest.
    """

    node: fx.Node
    dim: int
    index: Tensor | None
    channels: int
    spatial: int


class Views:
    """All feature maps of a graph by the orbits whose channels they have, in the order of the graph."""

    def __init__(self, module: fx.GraphModule, orbits: Orbits) -> None:
        self.module, self.orbits = module, orbits
        self.found: dict[int, list[tuple[fx.Node, int]]] = defaultdict(list)
        self.place = {node: i for i, node in enumerate(module.graph.nodes)}
        of_slot = orbits.labelling.partition.of_slot
        seen: dict[int, set[int]] = {}
        for node in module.graph.nodes:
            for dim, label in enumerate(self._labels(node)):
                if label is None:
                    continue
                if id(label) not in seen:
                    seen[id(label)] = distinct(orbits.of_class[of_slot[label]])
                for number in seen[id(label)]:
                    self.found[number].append((node, dim))

    def _labels(self, node: fx.Node) -> Labels:
        """Return the labels of a value that depends on the input; parameters themselves show nothing."""
        value = self.orbits.labelling.values.get(node.name)
        if node.op not in ("call_module", "call_function", "call_method") or not isinstance(value, Labelled):
            return ()
        return value.labels

    def best(self, orbit: Orbit, before: fx.Node) -> View | None:
        """Return where to look at an orbit, None where no value shows it in time.

        1. Behind the convolution with the largest kernel of those whose value has the orbit's channels, depthwise ones
           included; the first of equals.
        2. Without a convolution: at the first value that has them, that of a linear layer as a rule.

        Only values that are there `before` the node that reads the mask count.
        """
        number = int(self.orbits.of_class[orbit.classes[0]])
        early = [(node, dim) for node, dim in self.found[number] if self.place[node] < self.place[before]]
        if not early:
            return None
        kernels = [_kernel(self.module, node) for node, _ in early]
        place = max(range(len(early)), key=lambda i: math.prod(kernels[i]) if kernels[i] else 0)
        return self._view(number, *early[place], len(kernels[place]))

    def _view(self, number: int, node: fx.Node, dim: int, kernel: int) -> View:
        value = self.orbits.labelling.values[node.name]
        classes = self.orbits.labelling.partition.of_slot[value.labels[dim]]
        places = (self.orbits.of_class[classes] == number).nonzero().squeeze(1)
        index = places[classes[places].argsort(stable=True)]
        whole = torch.equal(index, torch.arange(classes.numel()))
        spatial = kernel or min(max(len(value.shape) - 2, 0), _MOST_SPATIAL)
        return View(node, dim, None if whole else index, index.numel(), spatial)


def _kernel(module: fx.GraphModule, node: fx.Node) -> tuple[int, ...]:
    """Return the sizes of a convolution's kernel; nothing for other nodes."""
    if node.op == "call_module":
        leaf = module.get_submodule(str(node.target))
        return tuple(leaf.kernel_size) if isinstance(leaf, nn.modules.conv._ConvNd) else ()
    if node.op != "call_function" or getattr(node.target, "__name__", "").partition(".")[0] not in _FUNCTIONS:
        return ()
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    shapes = shapes_of(weight.meta.get("val")) if isinstance(weight, fx.Node) else []
    return tuple(shapes[0][2:]) if shapes else ()
