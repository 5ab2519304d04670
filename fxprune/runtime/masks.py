"""Channel masks: what a masked graph holds for every orbit, and the operator that applies them.

A mask is a float buffer [width] of zeros and ones in the submodule `channel_masks`; it moves, converts and saves with
the model. While importance is learned a `Gate` stands in its place, under the same name. One `mask_channels` node
stands before every operator that absorbs channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from fxprune.runtime.gates import Gate

__all__ = ["MASKS", "ChannelMasks", "gates_of", "has_masks", "is_mask", "mask_channels", "mask_values", "reads_mask"]

MASKS = "channel_masks"
"""Name of the submodule that holds the masks of a graph."""


class ChannelMasks(nn.Module):
    """Holds one buffer or gate per orbit, named after it, and the index tables of the places where orbits mix."""


def is_mask(target: str) -> bool:
    """Whether an attribute path names a mask, something of a gate, or an index table.

    >>> is_mask("channel_masks.orbit_0"), is_mask("layer1.masks.0")
    (True, False)
    """
    return target.startswith(f"{MASKS}.")


def reads_mask(node: fx.Node) -> bool:
    """Whether a node's value is a mask, sampled or not, or an index table."""
    return node.op in ("get_attr", "call_module") and is_mask(str(node.target))


def gates_of(module: nn.Module) -> dict[str, Gate]:
    """Return the gates of a graph by the names of the masks that they stand for."""
    return {name: part for name, part in module.named_modules() if isinstance(part, Gate)}


def mask_values(module: nn.Module, name: str) -> Tensor:
    """Return the zeros and ones [width] of a mask; of a gate those of evaluation."""
    owner, _, attribute = name.rpartition(".")
    found = getattr(module.get_submodule(owner), attribute)
    return found.mask() if isinstance(found, Gate) else found


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
