"""Channel masks: what a masked graph holds for every orbit, and the operator that applies them.

A mask is a float buffer [width] of zeros and ones in the submodule `channel_masks`; it moves, converts and saves with
the model. One `mask_channels` node stands before every operator that absorbs channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

__all__ = ["MASKS", "ChannelMasks", "has_masks", "is_mask", "mask_channels"]

MASKS = "channel_masks"
"""Name of the submodule that holds the masks of a graph."""


class ChannelMasks(nn.Module):
    """Holds one buffer per orbit, named after it, and the index tables of the places where orbits mix."""


def is_mask(target: str) -> bool:
    """Whether an attribute path names a mask or its index table.

    >>> is_mask("channel_masks.orbit_0"), is_mask("layer1.masks.0")
    (True, False)
    """
    return target.startswith(f"{MASKS}.")


def has_masks(module: fx.GraphModule) -> bool:
    """Whether a graph is masked."""
    return any(node.target is mask_channels for node in module.graph.nodes)


def mask_channels(x: Tensor, masks: Sequence[Tensor], dim: int, index: Tensor | None = None) -> Tensor:
    """Multiply the channels of `x` by masks.

    Args:
        x: any floating tensor.
        masks: float [width] vectors, joined end to end.
        dim: the dimension of channels.
        index: int64 [x.shape[dim]], position of each channel in the joined masks; one past their end is never
            masked. None: the one mask fits as it is.

    >>> mask_channels(torch.ones(1, 3), [torch.tensor([1.0, 0.0])], 1, torch.tensor([0, 1, 2]))
    tensor([[1., 0., 1.]])
    """
    mask = masks[0]
    if index is not None:
        mask = torch.cat([*masks, mask.new_ones(1)]).index_select(0, index)
    shape = [1] * x.dim()
    shape[dim] = mask.numel()
    return x * mask.to(x.dtype).view(shape)
