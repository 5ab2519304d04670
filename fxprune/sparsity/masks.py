"""A graph whose weights can be masked: its layers, what each costs, and what its masks leave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, fx

from fxprune.cost import CostModel
from fxprune.labels.detection import find_orbits
from fxprune.runtime.weight_masks import mask_weight, plain_name
from fxprune.sparsity.layers import SparseLayer, find_layers, mask_of
from fxprune.sparsity.selection import Sparsifier

__all__ = ["KeptWeights", "SparseGraph", "kept_weights", "mask_layers", "zeros_by_parameter"]


class SparseGraph:
    """A graph, its convolutions and linear layers, and their masks."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module

    @cached_property
    def macs(self) -> dict[str, int]:
        """Dense multiply-accumulates of every node that has any."""
        costs = CostModel(self.module, find_orbits(self.module))
        return costs.macs_by_node(costs.all_kept())

    @cached_property
    def layers(self) -> list[SparseLayer]:
        """Its convolutions and linear layers."""
        return find_layers(self.module, self.macs)

    @cached_property
    def whole(self) -> dict[str, int]:
        """What the dense graph costs: "macs" and "parameters"."""
        return {"macs": sum(self.macs.values()), "parameters": sum(p.numel() for p in self.module.parameters())}

    def sparsify(self, sparsifier: Sparsifier, fraction: float = 1.0) -> bool:
        """Choose and write masks; return whether any weight became zero that was not.

        Args:
            sparsifier: what to reach.
            fraction: of the amount to remove; less than 1 on the way of a schedule.
        """
        return mask_layers(self.layers, sparsifier.masks(self.module, self.layers, self.whole, fraction))


def mask_layers(layers: Iterable[SparseLayer], masks: Mapping[str, Tensor]) -> bool:
    """Mask weights by layer name, bool in their shapes; return whether that changed anything."""
    changed = False
    for layer in layers:
        if layer.name in masks:
            before, mask = mask_of(layer), masks[layer.name].to(layer.original.device)
            changed |= not bool(mask.all()) if before is None else bool((before & ~mask).any())
            mask_weight([(owner, attribute) for _, owner, attribute in layer.owners], mask)
    return changed


@dataclass(frozen=True)
class KeptWeights:
    """How many weights of a layer its mask keeps, of how many."""

    count: int
    total: int

    @property
    def zeros(self) -> int:
        """How many are masked."""
        return self.total - self.count

    @property
    def sparsity(self) -> float:
        """Share of the weights that are masked."""
        return self.zeros / self.total

    def of(self, macs: int) -> int:
        """Return how many multiply-accumulates the kept weights do, where all together do `macs`."""
        return macs // self.total * self.count


def zeros_by_parameter(module: fx.GraphModule, kept: Iterable[tuple[SparseLayer, KeptWeights]]) -> dict[str, int]:
    """Return how many weights are masked by plain name of the parameter, tied ones by each of theirs."""
    zeros = {id(layer.original): weights.zeros for layer, weights in kept}
    named = module.named_parameters(remove_duplicate=False)
    return {plain_name(name): zeros[id(parameter)] for name, parameter in named if id(parameter) in zeros}


def kept_weights(module: fx.GraphModule) -> list[tuple[SparseLayer, KeptWeights]]:
    """Return every masked layer, and what its mask keeps."""
    layers = [(layer, mask_of(layer)) for layer in find_layers(module, {})]
    return [(layer, KeptWeights(int(m.count_nonzero()), m.numel())) for layer, m in layers if m is not None]
