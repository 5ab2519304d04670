"""Sizes and positions written into a graph, re-derived after channels left.

A graph holds numbers that were true of the wide model: `view(-1, 9216)`, `x[:, 32:]`, `chunk(2)`, `groups=32`. The
table `LITERALS` maps an operator's name, as Python spells it (`view`, `split`, `getitem`), to a function that rewrites
the arguments of one node. Rules:

1. A number that is computed in the graph and comes out right by itself stays computed.
2. A size of a value becomes the predicted size; a position of a labelled dimension becomes the number of kept
   positions before it.
3. A number that is no size (an attention scale computed from a head's width) keeps the value that it had.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.errors import VerifyError
from fxprune.graph.inputs import on_meta
from fxprune.graph.shapes import record_shape
from fxprune.labels.flow import Label, Labelled

__all__ = ["LITERALS", "Site", "can_rederive", "operator_of", "rederive"]


class Kept(Protocol):
    """What is kept after the cut, by node and label; `fxprune.narrowing.kept.Kept` is one."""

    def value(self, node: str) -> Any:
        """Return the value of a node before the cut, tensors as `Labelled`."""

    def shapes(self, node: str) -> list[tuple[int, ...]]:
        """Return the predicted shapes of all tensors in a node's value."""

    def of_label(self, label: Label) -> Tensor | None:
        """Return bool [positions], or None where all stay."""


class Site:
    """One node of the narrow graph, with its arguments before and after the cut."""

    def __init__(self, module: fx.GraphModule, node: fx.Node, kept: Kept, env: dict[fx.Node, Any]) -> None:
        self.module = module
        self.node = node
        self.kept = kept
        self.env = env

    def old(self, value: Any) -> Any:
        """Return an argument as it was before the cut: numbers, and `Labelled` for tensors."""
        return fx.node.map_arg(value, lambda n: self.kept.value(n.name))

    def now(self, value: Any) -> Any:
        """Return an argument as it is in the narrow graph: numbers, and meta tensors."""
        return fx.node.map_arg(value, lambda n: self.env[n])

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument by position or name."""
        if len(self.node.args) > position:
            return self.node.args[position]
        return self.node.kwargs.get(name, default)

    def assign(self, position: int, name: str, value: Any) -> None:
        """Set an argument by position or name."""
        if len(self.node.args) > position:
            self.node.update_arg(position, value)
        else:
            self.node.update_kwarg(name, value)

    @property
    def x(self) -> Labelled:
        """The first argument before the cut."""
        value = self.subject
        assert isinstance(value, Labelled)
        return value

    @property
    def subject(self) -> Any:
        """The first argument before the cut, whatever it is."""
        return self.kept.value(self.args[0].name)

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments."""
        return self.node.args

    @property
    def result(self) -> Any:
        """The value of the node before the cut."""
        return self.kept.value(self.node.name)

    @property
    def predicted(self) -> list[tuple[int, ...]]:
        """Shapes of the node's tensors after the cut."""
        return self.kept.shapes(self.node.name)

    def kept_of(self, value: Labelled, dim: int) -> Tensor | None:
        """Return which positions of a dimension stay, None for all."""
        return self.kept.of_label(value.labels[dim])


Rewrite = Callable[[Site], None]


def operator_of(node: fx.Node) -> str:
    """Return an operator's plain name: `view` for a method, a torch function or an ATen overload.

    A function from elsewhere keeps the name of its module, so that no `view` of somebody's passes for torch's.
    """
    if node.op == "call_method":
        return str(node.target)
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    name, home = getattr(target, "__name__", str(target)), getattr(target, "__module__", None) or "torch"
    return name if home.partition(".")[0] in ("torch", "_operator", "builtins") else f"{home}.{name}"


def rederive(site: Site) -> None:
    """Make the arguments of one node right for the narrow graph."""
    rewrite = LITERALS.get(operator_of(site.node))
    if rewrite is not None:
        rewrite(site)
    elif any(isinstance(v, Labelled) for v in _leaves(site.result)):
        _freeze_numbers(site)


def can_rederive(node: fx.Node) -> bool:
    """Whether a node that divides, merges or expands channels can be made right once some are gone.

    Either it has an entry in `LITERALS`, or it follows the shape of its input and holds no size of its own.
    """
    name = operator_of(node)
    return name in LITERALS or name in FOLLOWS_INPUT


def _leaves(value: Any) -> list[Any]:
    return pytree.tree_leaves(value, is_leaf=lambda v: isinstance(v, Labelled))


def _freeze_numbers(site: Site) -> None:
    """3. Keep the numbers that a tensor operator read."""

    def freeze(n: fx.Node) -> Any:
        before, after = site.kept.value(n.name), site.env[n]
        is_number = isinstance(before, (int, float)) and not isinstance(before, bool)
        return before if is_number and before != after else n

    site.node.args = fx.node.map_arg(site.node.args, freeze)
    site.node.kwargs = fx.node.map_arg(site.node.kwargs, freeze)


def _resized(site: Site, sizes: list[Any], predicted: tuple[int, ...]) -> list[Any]:
    """Replace the sizes that differ from the predicted ones; -1 and what comes out right stay."""
    front = len(predicted) - len(sizes)
    now = site.now(sizes)
    return [
        written if value in (-1, size) else size
        for written, value, size in zip(sizes, now, predicted[front:], strict=True)
    ]


def _sizes(first: int) -> Rewrite:
    """Sizes of the result from argument `first` on, as one list or spread out."""

    def rewrite(site: Site) -> None:
        args = list(site.args)
        for key in ("size", "shape", "sizes"):
            written: Any = site.node.kwargs.get(key)
            if written is not None:
                site.node.update_kwarg(key, _resized(site, list(written), site.predicted[0]))
                return
        if not args[first:] or isinstance(args[first], torch.dtype):
            return
        if isinstance(args[first], (list, tuple)):
            args[first] = type(args[first])(_resized(site, list(args[first]), site.predicted[0]))
        elif not isinstance(args[first], fx.Node) or isinstance(site.now(args[first]), int):
            args[first:] = _resized(site, args[first:], site.predicted[0])
        elif tuple(site.now(args[first])) != site.predicted[0]:
            args[first] = list(site.predicted[0])
        site.node.args = tuple(args)

    return rewrite


def _reshape_to_prediction(site: Site) -> None:
    """A view by another tensor's shape or by strides becomes a reshape, when that shape is no longer the right one."""
    if _shape_now(site) != site.predicted[0]:
        site.node.op, site.node.target = "call_method", "reshape"
        site.node.args, site.node.kwargs = (site.args[0], *_any_batch(site)), {}


def _any_batch(site: Site) -> list[int]:
    """Return the predicted sizes, the first left open where it is not of channels: a slim model takes other batches."""
    sizes = list(site.predicted[0])
    return [-1, *sizes[1:]] if site.result.labels[0] is None else sizes


def _shape_now(site: Site) -> tuple[int, ...] | None:
    other = site.args[1]
    return tuple(site.env[other].shape) if isinstance(other, fx.Node) else None


def _expand_as(site: Site) -> None:
    """`expand_as(other)`: by explicit sizes, when those of the other tensor are no longer the right ones."""
    if _shape_now(site) != site.predicted[0]:
        before, after = site.env[site.args[0]].shape, site.predicted[0]
        new = len(after) - len(before)
        sizes = [-1 if d >= new and before[d - new] == size else size for d, size in enumerate(after)]
        site.node.op, site.node.target = "call_method", "expand"
        site.node.args, site.node.kwargs = (site.args[0], *sizes), {}


def _repeat(site: Site) -> None:
    """`repeat(times)`: a dimension of size 1 is repeated as often as its copies are kept."""
    spread = not isinstance(site.args[1], (list, tuple))
    times = list(site.args[1:] if spread else site.args[1])
    before = (1,) * (len(times) - len(site.x.shape)) + site.x.shape
    for i, size in enumerate(site.predicted[0]):
        if before[i] == 1 and site.now(times[i]) != size:
            times[i] = size
    site.node.args = (site.args[0], *times) if spread else (site.args[0], times)


def _unflatten(site: Site) -> None:
    dim = site.now(site.argument(1, "dim")) % len(site.x.shape)
    sizes = list(site.argument(2, "sizes"))
    predicted = site.predicted[0][dim : dim + len(sizes)]
    site.assign(2, "sizes", _resized(site, sizes, predicted))


def _parts(default_dim: int) -> Rewrite:
    """`split` and `chunk`: parts of unequal width are split by explicit sizes."""

    def rewrite(site: Site) -> None:
        dim = site.now(site.argument(2, "dim", default_dim)) % len(site.x.shape)
        if site.kept_of(site.x, dim) is None:
            return
        sizes = [shape[dim] for shape in site.predicted]
        site.node.op, site.node.target = "call_function", torch.split
        site.node.args, site.node.kwargs = (site.node.args[0], sizes), {"dim": dim}

    return rewrite


def _before(kept: Tensor, position: int) -> int:
    """2. The number of kept positions before `position`."""
    return int(kept[:position].sum())


def _getitem(site: Site) -> None:
    """`x[index]`: slices and integers of labelled dimensions; items of tuples stay."""
    if not isinstance(site.subject, Labelled):
        return
    index = site.args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    consumed = sum(1 for item in items if item is not None and item is not Ellipsis)
    dim = 0
    out: list[Any] = []
    for item in items:
        if item is Ellipsis:
            dim += len(site.x.shape) - consumed
            out.append(item)
        elif item is None:
            out.append(item)
        else:
            out.append(_item(site, item, dim))
            dim += 1
    site.node.update_arg(1, tuple(out) if isinstance(index, tuple) else out[0])


def _item(site: Site, item: Any, dim: int) -> Any:
    kept = site.kept_of(site.x, dim)
    if kept is None:
        return item
    old = site.old(item)
    if isinstance(item, slice):
        start, stop, _ = old.indices(len(kept))
        wanted = (_before(kept, start), _before(kept, stop))
        now = site.now(item).indices(int(kept.sum()))[:2]
        return item if tuple(now) == wanted else slice(*wanted)
    if isinstance(old, int):
        return _before(kept, old % len(kept))
    return _positions(site, item, kept)


def _positions(site: Site, item: Any, kept: Tensor) -> Any:
    """Return a constant index table with the positions that stay, renumbered."""
    index = site.now(item)
    index = torch.tensor(index) if isinstance(index, (list, tuple)) else index
    if not isinstance(index, Tensor) or index.device.type == "meta":
        raise VerifyError(f"'{site.node.name}' indexes pruned channels by data; its channels should have been pinned")
    where = index.nonzero().squeeze(1).cpu() if index.dtype == torch.bool else index.cpu() % len(kept)
    renumbered = kept.cumsum(0)[where[kept[where]]] - 1
    name = f"positions_of_{site.node.name}"
    site.module.register_buffer(name, renumbered.to(index.device))
    with site.node.graph.inserting_before(site.node):
        table = site.node.graph.get_attr(name)
    site.env[table] = site.module.get_buffer(name)
    record_shape(table, on_meta(site.env[table]))
    return table


def _slice(site: Site) -> None:
    """`aten.slice(x, dim, start, end)`."""
    dim = site.now(site.argument(1, "dim", 0)) % len(site.x.shape)
    kept = site.kept_of(site.x, dim)
    if kept is None:
        return
    old = slice(site.old(site.argument(2, "start")), site.old(site.argument(3, "end")))
    start, stop, _ = old.indices(len(kept))
    site.node.args = (site.node.args[0], dim, _before(kept, start), _before(kept, stop))
    site.node.kwargs = {}


def _narrow(site: Site) -> None:
    """`narrow(x, dim, start, length)`."""
    dim = site.now(site.argument(1, "dim")) % len(site.x.shape)
    kept = site.kept_of(site.x, dim)
    if kept is None:
        return
    start, length = site.old(site.argument(2, "start")), site.old(site.argument(3, "length"))
    first = _before(kept, start % len(kept))
    site.assign(2, "start", first)
    site.assign(3, "length", _before(kept, start % len(kept) + length) - first)


def _select(site: Site) -> None:
    """`select(x, dim, index)`."""
    dim = site.now(site.argument(1, "dim")) % len(site.x.shape)
    kept = site.kept_of(site.x, dim)
    if kept is not None:
        site.assign(2, "index", _before(kept, site.old(site.argument(2, "index")) % len(kept)))


def _index_select(site: Site) -> None:
    """`index_select(x, dim, index)` with a constant index."""
    dim = site.now(site.argument(1, "dim")) % len(site.x.shape)
    kept = site.kept_of(site.x, dim)
    if kept is not None:
        site.assign(2, "index", _positions(site, site.argument(2, "index"), kept))


def _index(site: Site) -> None:
    """`aten.index(x, [None, index])` with a constant index."""
    indices = list(site.args[1])
    for dim, item in enumerate(indices):
        kept = site.kept_of(site.x, dim) if item is not None else None
        if kept is not None:
            indices[dim] = _positions(site, item, kept)
    site.node.update_arg(1, indices)


def _pad(site: Site) -> None:
    """`pad(x, amounts)`: padded positions of a labelled dimension that stay."""
    amounts = list(site.old(site.argument(1, "pad")))
    result = site.result
    for back in range(len(amounts) // 2):
        dim = len(result.shape) - 1 - back
        kept = site.kept_of(result, dim)
        if kept is not None:
            low, high = amounts[2 * back : 2 * back + 2]
            amounts[2 * back] = _before(kept, low)
            amounts[2 * back + 1] = int(kept.sum()) - _before(kept, len(kept) - high)
    site.assign(1, "pad", amounts)


def _groups(position: int) -> Rewrite:
    """Functional convolution: the groups that its narrow weight and input imply."""

    def rewrite(site: Site) -> None:
        if site.now(site.argument(position, "groups", 1)) == 1:
            return
        weight = site.now(site.argument(1, "weight"))
        transposed = "transpose" in operator_of(site.node) or site.argument(6, "transposed") is True
        channel = -(weight.dim() - 1)
        width = site.predicted[0][channel] if transposed else site.now(site.node.args[0]).shape[channel]
        site.assign(position, "groups", width // weight.shape[1])

    return rewrite


def _normalized_shape(site: Site) -> None:
    """`layer_norm(x, normalized_shape)`."""
    shape = site.argument(1, "normalized_shape")
    now = tuple(site.now(shape))
    predicted = site.predicted[0][-len(now) :]
    if now != predicted:
        site.assign(1, "normalized_shape", list(predicted))


def _num_groups(site: Site) -> None:
    """`group_norm(x, num_groups)`: groups leave whole."""
    groups = site.now(site.argument(1, "num_groups"))
    if groups > 1:
        width = site.x.shape[1] // groups
        site.assign(1, "num_groups", site.now(site.node.args[0]).shape[1] // width)


def _attention(site: Site) -> None:
    """`scaled_dot_product_attention`: the default scale is that of the width before the cut."""
    width = site.x.shape[-1]
    if site.node.kwargs.get("scale") is None and site.now(site.node.args[0]).shape[-1] != width:
        site.node.update_kwarg("scale", width**-0.5)


LITERALS: dict[str, Rewrite] = {
    **dict.fromkeys(["view", "reshape", "expand", "_unsafe_view", "new_zeros", "new_ones", "new_empty"], _sizes(1)),
    **dict.fromkeys(["new_full"], _sizes(1)),
    **dict.fromkeys(["zeros", "ones", "empty", "full"], _sizes(0)),
    **dict.fromkeys(["view_as", "reshape_as", "as_strided"], _reshape_to_prediction),
    "expand_as": _expand_as,
    "unflatten": _unflatten,
    "repeat": _repeat,
    **dict.fromkeys(["split", "chunk", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"], _parts(0)),
    "getitem": _getitem,
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "index_select": _index_select,
    "index": _index,
    "pad": _pad,
    "_pad": _pad,
    "constant_pad_nd": _pad,
    **dict.fromkeys([f"conv{n}d" for n in (1, 2, 3)], _groups(6)),
    **dict.fromkeys([f"conv_transpose{n}d" for n in (1, 2, 3)], _groups(6)),
    "convolution": _groups(8),
    "layer_norm": _normalized_shape,
    "group_norm": _num_groups,
    "scaled_dot_product_attention": _attention,
}

FOLLOWS_INPUT = frozenset(
    [
        *("flatten", "ravel", "squeeze", "unsqueeze", "permute", "transpose", "t", "getattr"),
        *("movedim", "moveaxis", "swapaxes", "swapdims", "flip", "fliplr", "flipud", "roll", "unbind"),
        *("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"),
        *("matmul", "bmm", "mm", "linear", "einsum", "pixel_shuffle", "pixel_unshuffle", "instance_norm"),
    ]
)
"""Operators that divide, merge or move channels by the shape of their input alone."""
