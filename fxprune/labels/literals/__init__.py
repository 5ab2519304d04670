"""Sizes and positions written into a graph, re-derived after channels left.

A graph holds numbers that were true of the wide model: `view(-1, 9216)`, `x[:, 32:]`, `chunk(2)`, `groups=32`. The
table `LITERALS` maps an operator's name, as Python spells it (`view`, `split`, `getitem`), to a function that rewrites
the arguments of one node. Rules:

1. A number that is computed in the graph and comes out right by itself stays computed.
2. A size of a value becomes the predicted size; a position of a labelled dimension becomes the number of kept
   positions before it.
3. A number that is no size (an attention scale computed from a head's width, the count that a mean divides by) keeps
   the value that it had.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from fxprune.labels.flow import Labelled
from fxprune.labels.literals import numbers, positions, sizes
from fxprune.labels.literals.site import Kept, Rewrite, Site, operator_of

__all__ = [
    "FOLLOWS_INPUT",
    "KEEPS_INPUT",
    "LITERALS",
    "Kept",
    "Rewrite",
    "Site",
    "can_rederive",
    "operator_of",
    "rederive",
]

LITERALS: dict[str, Rewrite] = {
    **dict.fromkeys(["view", "reshape", "expand", "broadcast_to", "_unsafe_view"], sizes.sizes(1)),
    **dict.fromkeys(["new_zeros", "new_ones", "new_empty", "new_full"], sizes.sizes(1)),
    **dict.fromkeys(["zeros", "ones", "empty", "full"], sizes.sizes(0)),
    **dict.fromkeys(["view_as", "reshape_as"], sizes.reshape_to_prediction("other")),
    "as_strided": sizes.as_strided,
    "repeat_interleave": sizes.repeat_interleave,
    "expand_as": sizes.expand_as,
    "unflatten": sizes.unflatten,
    "repeat": sizes.repeat,
    **dict.fromkeys(["split", "split_with_sizes", "chunk", "tensor_split"], sizes.parts(0)),
    **dict.fromkeys(["unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk"], sizes.parts(0)),
    **dict.fromkeys([f"conv{n}d" for n in (1, 2, 3)], sizes.groups(6)),
    **dict.fromkeys([f"conv_transpose{n}d" for n in (1, 2, 3)], sizes.groups(6)),
    "convolution": sizes.groups(8),
    "deform_conv2d": sizes.groups(11),
    **dict.fromkeys(["layer_norm", "rms_norm"], sizes.normalized_shape),
    "group_norm": sizes.num_groups,
    **dict.fromkeys(["getitem", "setitem"], positions.getitem),
    "slice": positions.sliced(1),
    "slice_scatter": positions.sliced(2),
    "narrow": positions.narrow,
    "select": positions.select(1),
    "select_scatter": positions.select(2),
    "index_select": positions.index_select,
    "index": positions.index,
    **dict.fromkeys(["pad", "_pad", "constant_pad_nd"], positions.pad),
    "scaled_dot_product_attention": numbers.attention,
    "mean": numbers.mean,
    "_assert": numbers.assertion,
}
"""Operator → what makes its arguments right for the narrow graph."""

FOLLOWS_INPUT = frozenset(
    [
        *("flatten", "ravel", "squeeze", "unsqueeze", "permute", "transpose", "t", "getattr"),
        *("movedim", "moveaxis", "swapaxes", "swapdims", "flip", "fliplr", "flipud", "roll", "unbind"),
        *("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"),
        *("matmul", "bmm", "mm", "linear", "einsum", "tensordot", "pixel_shuffle", "pixel_unshuffle"),
        *("instance_norm", "normalize", "take_along_dim"),
    ]
)
"""Operators that divide, merge, repeat or move channels by the shape of their input alone."""


KEEPS_INPUT = frozenset(["multi_head_attention_forward"])
"""Functions that compare or scale by the widths that they are given, so that none of them may change."""


def rederive(site: Site) -> None:
    """Make the arguments of one node right for the narrow graph."""
    if site.node.op in ("call_module", "output"):
        numbers.freeze_numbers(site)
        return
    rewrite = LITERALS.get(operator_of(site.node))
    if rewrite is not None:
        _name_the_subject(site.node)
        numbers.freeze_values(site)
        rewrite(site)
    elif any(isinstance(v, Labelled) for v in _leaves(site.result)):
        numbers.freeze_numbers(site)


def _name_the_subject(node: fx.Node) -> None:
    """Move the tensor that a node works on to the front, where a call spells it by name (`chunk(input=x)`)."""
    given = next((name for name in ("input", "self", "tensor", "query") if name in node.kwargs), None)
    if not node.args and given is not None:
        node.args = (node.kwargs[given],)
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != given}


def can_rederive(node: fx.Node) -> bool:
    """Whether a node that divides, merges or expands channels can be made right once some are gone.

    Either it has an entry in `LITERALS`, or it follows the shape of its input and holds no size of its own.
    """
    name = operator_of(node)
    return name in LITERALS or name in FOLLOWS_INPUT


def _leaves(value: Any) -> list[Any]:
    return pytree.tree_leaves(value, is_leaf=lambda v: isinstance(v, Labelled))
