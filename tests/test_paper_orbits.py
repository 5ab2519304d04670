"""Orbits against the literal Algorithm 1 of paper 001 (§4.1), on networks that it supports.

Phase one: paths from a convolution to a convolution with none inside; drop the last node of each; colour all nodes on
the paths from one source alike; merge colours that meet in a node. Phase two: inside each extended orbit,
concatenations are sinks, and the same again; an extended orbit in which a joiner follows a concatenation is discarded.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import networkx as nx
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import torchvision
from torch import Tensor, fx, nn

from fxprune.graph.tracing import trace
from fxprune.labels.detection import find_orbits
from fxprune.labels.orbits import Orbits

Partition = set[frozenset[str]]
"""Sets of layers whose output channels are pruned jointly."""

JOINERS = (operator.add, operator.iadd, operator.mul, torch.add, torch.mul, "add", "add_", "mul", "mul_")


class Algorithm1:
    """The two phases over a traced graph, in the words of the paper."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.dag = nx.DiGraph((source, node) for node in module.graph.nodes for source in node.all_input_nodes)

    def is_convolution(self, node: fx.Node) -> bool:
        """Regular convolutions (not depthwise) and dense layers: sources and sinks."""
        layer = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, nn.Conv2d):
            assert layer.groups in (1, layer.in_channels), "the paper knows no grouped convolution"
            return layer.groups == 1
        return isinstance(layer, nn.Linear)

    def is_concatenation(self, node: fx.Node) -> bool:
        return node.target is torch.cat

    def is_joiner(self, node: fx.Node) -> bool:
        return node.target in JOINERS and len(node.all_input_nodes) > 1

    def search(self, nodes: set[fx.Node], is_sink: Callable[[fx.Node], bool]) -> list[set[fx.Node]]:
        """Algorithm 1 on the subgraph of `nodes`: return the nodes of each colour in the end."""
        inside = self.dag.subgraph(nodes)
        colours: dict[fx.Node, set[int]] = {}
        sources = [n for n in inside if self.is_convolution(n)]
        for colour, x in enumerate(sources):
            for node in self._on_paths(inside, x, is_sink):
                colours.setdefault(node, set()).add(colour)
        while several := next((c for c in colours.values() if len(c) > 1), None):
            first, rest = min(several), several - {min(several)}
            for node, held in colours.items():
                if held & rest:
                    colours[node] = (held - rest) | {first}
        return [{n for n, held in colours.items() if held == {c}} for c in {min(held) for held in colours.values()}]

    def _on_paths(self, inside: nx.DiGraph, x: fx.Node, is_sink: Callable[[fx.Node], bool]) -> set[fx.Node]:
        """Nodes on all paths from x to the next sink, the sink itself removed."""
        reached, ends, stack = {x}, set(), [x]
        while stack:
            node = stack.pop()
            for after in inside.successors(node):
                if is_sink(after):
                    ends.add(node)
                elif after not in reached:
                    reached.add(after)
                    stack.append(after)
        on_the_way = nx.DiGraph(inside.subgraph(reached))
        return set().union(*(nx.ancestors(on_the_way, end) | {end} for end in ends)) if ends else set()

    def extended_orbits(self) -> list[set[fx.Node]]:
        return self.search(set(self.dag), self.is_convolution)

    def final_orbits(self) -> list[set[fx.Node]]:
        found = []
        for orbit in self.extended_orbits():
            if not self.is_discarded(orbit):
                found += self.search(
                    orbit | self._sinks(orbit), lambda n: self.is_convolution(n) or self.is_concatenation(n)
                )
        return found

    def _sinks(self, orbit: set[fx.Node]) -> set[fx.Node]:
        """Phase one removed the convolutions that end its paths; phase two needs them as ends again."""
        return {after for node in orbit for after in self.dag.successors(node) if self.is_convolution(after)}

    def is_discarded(self, orbit: set[fx.Node]) -> bool:
        """Whether a joiner follows a concatenation inside the extended orbit."""
        inside = self.dag.subgraph(orbit)
        return any(
            self.is_joiner(after)
            for node in orbit
            if self.is_concatenation(node)
            for after in nx.descendants(inside, node)
        )

    def is_returned(self, orbit: set[fx.Node]) -> bool:
        return any(after.op == "output" for node in orbit for after in self.dag.successors(node))

    def partition(self) -> Partition:
        """Source layers of every final orbit that does not end in the output."""
        orbits = (orbit for orbit in self.final_orbits() if not self.is_returned(orbit))
        return {frozenset(str(n.target) for n in orbit if self.is_convolution(n)) for orbit in orbits}


def sources(module: fx.GraphModule, orbits: Orbits) -> Partition:
    """The same from labels; depthwise convolutions are no sources in the paper."""
    algorithm = Algorithm1(module)
    layers = {str(n.target) for n in module.graph.nodes if algorithm.is_convolution(n)}
    return {frozenset(set(orbit.layers) & layers) for orbit in orbits}


NETWORKS: dict[str, tuple[Callable[..., nn.Module], int, int]] = {
    "resnet18": (torchvision.models.resnet18, 64, 12),
    "vgg11_bn": (torchvision.models.vgg11_bn, 32, 10),
    "alexnet": (torchvision.models.alexnet, 64, 7),
    "squeezenet1_1": (torchvision.models.squeezenet1_1, 64, 25),
    "densenet121": (torchvision.models.densenet121, 32, 120),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, 32, 25),
}
"""Constructor, input size, number of final orbits."""


@pytest.mark.parametrize("name", NETWORKS)
def test_same_orbits_as_the_paper(name: str) -> None:
    build, size, count = NETWORKS[name]
    module = trace(build().eval(), torch.randn(1, 3, size, size))
    expected = Algorithm1(module).partition()
    assert sources(module, find_orbits(module)) == expected
    assert len(expected) == count


def test_same_orbits_as_the_paper_on_googlenet() -> None:
    model = torchvision.models.googlenet(aux_logits=False, init_weights=False).eval()
    module = trace(model, torch.randn(1, 3, 64, 64))
    expected = Algorithm1(module).partition()
    assert sources(module, find_orbits(module)) == expected
    assert len(expected) == 57


class Figure3(nn.Module):
    """An extended orbit that breaks into two final ones: C1 and C2 are summed, C3 is concatenated to the sum."""

    def __init__(self, *, joined: bool) -> None:
        super().__init__()
        self.joined = joined
        self.c1, self.c2, self.c3 = (nn.Conv2d(3, 4, 3, padding=1) for _ in range(3))
        self.c4, self.c5 = nn.Conv2d(8, 2, 1), nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([F.relu(self.c1(x) + self.c2(x)), self.c3(x)], 1)
        return self.c4(y + self.c5(x) if self.joined else y)


def test_figure_3() -> None:
    module = trace(Figure3(joined=False), torch.randn(1, 3, 8, 8))
    algorithm = Algorithm1(module)
    assert len(algorithm.extended_orbits()) == 1
    assert algorithm.partition() == {frozenset({"c1", "c2"}), frozenset({"c3"})}
    assert sources(module, find_orbits(module)) == algorithm.partition()


def test_concatenation_then_joiner_which_the_paper_discards() -> None:
    module = trace(Figure3(joined=True), torch.randn(1, 3, 8, 8))
    assert Algorithm1(module).partition() == set()
    assert sources(module, find_orbits(module)) == {frozenset({"c1", "c2", "c5"}), frozenset({"c3", "c5"})}
