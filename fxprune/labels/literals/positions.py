"""2. Positions of labelled dimensions become the number of kept positions before them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxprune.errors import VerifyError
from fxprune.labels.flow import Labelled
from fxprune.labels.literals.site import Rewrite, Site

__all__ = ["getitem", "index", "index_select", "narrow", "pad", "select", "sliced"]


def _before(kept: Tensor, position: int) -> int:
    """Return the number of kept positions before `position`."""
    return int(kept[:position].sum())


def getitem(site: Site) -> None:
    """`x[index]` and `x[index] = value`: slices and integers of labelled dimensions; items of tuples stay."""
    if not isinstance(site.subject, Labelled):
        return
    items = site.args[1]
    rewritten = [item if dim is None else _item(site, item, dim) for item, dim in _indexed(site)]
    site.node.update_arg(1, tuple(rewritten) if isinstance(items, tuple) else rewritten[0])


def _indexed(site: Site) -> Iterator[tuple[Any, int | None]]:
    """Yield every item of an index with the dimension that it indexes, None for `...` and `None`."""
    items = site.args[1] if isinstance(site.args[1], tuple) else (site.args[1],)
    consumed = sum(1 for item in items if item is not None and item is not Ellipsis)
    dim = 0
    for item in items:
        if item is Ellipsis:
            dim += len(site.x.shape) - consumed
        if item is None or item is Ellipsis:
            yield item, None
        else:
            yield item, dim
            dim += 1


def _item(site: Site, item: Any, dim: int) -> Any:
    kept = site.kept_of(site.x, dim)
    if kept is None:
        return item
    old = site.old(item)
    if isinstance(item, slice):
        wanted = _narrow_slice(old, kept)
        now = site.now(item).indices(int(kept.sum()))
        return item if now == wanted.indices(int(kept.sum())) else wanted
    if isinstance(old, int):
        return _before(kept, old % len(kept))
    return _positions(site, item, kept)


def _narrow_slice(old: slice, kept: Tensor) -> slice:
    """Return the slice that takes the kept ones of what `old` took.

    With a step the kept positions are whole blocks of that many, and `old` takes the same position of each.
    """
    start, stop, step = old.indices(len(kept))
    return slice(start, None, step) if step > 1 else slice(_before(kept, start), _before(kept, stop))


def _positions(site: Site, item: Any, kept: Tensor) -> Any:
    """Return a constant index table with the positions that stay, renumbered."""
    table = site.now(item)
    table = torch.tensor(table) if isinstance(table, (list, tuple)) else table
    if not isinstance(table, Tensor) or table.device.type == "meta":
        raise VerifyError(f"'{site.node.name}' indexes pruned channels by data; its channels should have been pinned")
    where = table.nonzero().squeeze(1).cpu() if table.dtype == torch.bool else table.cpu() % len(kept)
    renumbered = kept.cumsum(0)[where[kept[where]]] - 1
    name = f"positions_of_{site.node.name}"
    site.module.register_buffer(name, renumbered.to(table.device))
    with site.node.graph.inserting_before(site.node):
        read = site.node.graph.get_attr(name)
    return site.put_before(read, site.module.get_buffer(name))


def sliced(first: int) -> Rewrite:
    """`aten.slice(x, dim, start, end, step)`, or with those arguments from `first` on (`slice_scatter`)."""

    def rewrite(site: Site) -> None:
        dim = site.now(site.argument(first, "dim", 0)) % len(site.x.shape)
        kept = site.kept_of(site.x, dim)
        if kept is None:
            return
        bounds = [site.old(site.argument(first + i, name)) for i, name in enumerate(("start", "end", "step"), 1)]
        wanted = _narrow_slice(slice(*bounds), kept).indices(int(kept.sum()))
        front = [site.argument(i, name) for i, name in enumerate(("input", "src")[:first])]
        site.node.args, site.node.kwargs = (*front, dim, *wanted), {}

    return rewrite


def narrow(site: Site) -> None:
    """`narrow(x, dim, start, length)`."""
    dim = site.now(site.argument(1, "dim")) % len(site.x.shape)
    kept = site.kept_of(site.x, dim)
    if kept is None:
        return
    start, length = site.old(site.argument(2, "start")), site.old(site.argument(3, "length"))
    first = _before(kept, start % len(kept))
    site.assign(2, "start", first)
    site.assign(3, "length", _before(kept, start % len(kept) + length) - first)


def select(first: int) -> Rewrite:
    """`select(x, dim, index)`, or with those arguments from `first` on (`select_scatter`)."""

    def rewrite(site: Site) -> None:
        dim = site.now(site.argument(first, "dim")) % len(site.x.shape)
        kept = site.kept_of(site.x, dim)
        if kept is not None:
            position = site.old(site.argument(first + 1, "index")) % len(kept)
            site.assign(first + 1, "index", _before(kept, position))

    return rewrite


def index_select(site: Site) -> None:
    """`index_select(x, dim, index)` with a constant index."""
    dim = site.now(site.argument(1, "dim")) % len(site.x.shape)
    kept = site.kept_of(site.x, dim)
    if kept is not None:
        site.assign(2, "index", _positions(site, site.argument(2, "index"), kept))


def index(site: Site) -> None:
    """`aten.index(x, [None, index])` with a constant index."""
    indices = list(site.args[1])
    for dim, item in enumerate(indices):
        kept = site.kept_of(site.x, dim) if item is not None else None
        if kept is not None:
            indices[dim] = _positions(site, item, kept)
    site.node.update_arg(1, indices)


def pad(site: Site) -> None:
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
