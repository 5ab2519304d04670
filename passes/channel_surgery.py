"""Cut the channels that the masks zero out of parameters, modules and literals, and take the masks away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.graph.passes import Pass
from fxprune.labels.attention import keep_attention
from fxprune.labels.detection import find_orbits
from fxprune.narrowing.kept import Kept, kept_classes
from fxprune.narrowing.tensors import cut_tensors
from fxprune.narrowing.walk import narrow_nodes
from fxprune.runtime.masks import MASKS, has_masks, mask_channels, reads_mask

__all__ = ["ChannelSurgery"]


@dataclass(frozen=True)
class ChannelSurgery(Pass):
    """Make the zeros of the masks real: the result equals the masked graph, physically slimmer.

    Before (channel_masks.orbit_0 keeps 2 of 4): `%conv1 = Conv2d(3→4)(%x)`,
    `%mask = mask_channels(%conv1, [%orbit_0], 1)`, `%conv2 = Conv2d(4→8)(%mask)`
    After: `%conv1 = Conv2d(3→2)(%x)`, `%conv2 = Conv2d(2→8)(%conv1)`

    1. Every parameter and buffer keeps the positions of the classes that stay.
    2. Attributes of leaf modules (groups, num_features …) and literal sizes are re-derived.
    3. Every value's shape is checked against the labels' prediction.

    Of gates it cuts what they zero in evaluation.
    """

    name: ClassVar[str] = "channel-surgery"

    def rewrite(self, module: fx.GraphModule) -> bool:
        """Cut; a graph without masks is left alone."""
        if not has_masks(module):
            return False
        orbits = find_orbits(module)
        kept = Kept(orbits, kept_classes(module, orbits))
        cut_tensors(module, orbits, kept)
        _remove_masks(module)
        narrow_nodes(module, kept)
        return True


def _remove_masks(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.target is mask_channels:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    for node in list(module.graph.nodes):
        if reads_mask(node):
            module.graph.erase_node(node)
    delattr(module, MASKS)
    keep_attention(module, None)
