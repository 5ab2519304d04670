"""Sizes of values, and counts of groups that follow from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxprune.errors import UsageError
from fxprune.labels.flow import Label
from fxprune.labels.literals.site import Rewrite, Site, operator_of

__all__ = [
    "as_strided",
    "expand_as",
    "groups",
    "normalized_shape",
    "num_groups",
    "parts",
    "repeat",
    "repeat_interleave",
    "reshape_to_prediction",
    "sizes",
    "unflatten",
]


def _resized(site: Site, written: list[Any], first: int | None = None) -> list[Any]:
    """Replace the sizes, of dimensions from `first` on or the last ones, that differ from the predicted ones.

    -1 and what comes out right stay.
    """
    first = len(site.predicted[0]) - len(written) if first is None else first
    dims = slice(first, first + len(written))
    return [
        given if value in (-1, size) else _size(site, given, value, size, label)
        for given, value, size, label in zip(
            written, site.now(written), site.predicted[0][dims], site.result.labels[dims], strict=True
        )
    ]


def _size(site: Site, given: Any, value: int, size: int, label: Label) -> Any:
    """Return a size that was `value`: a computed one of channels merged with a batch still grows with the batch."""
    is_merged = label is not None and site.kept.is_repeated(label)
    return site.scaled(given, size, value) if is_merged and isinstance(given, fx.Node) else size


def sizes(first: int) -> Rewrite:
    """Sizes of the result from argument `first` on, as one list or spread out."""

    def rewrite(site: Site) -> None:
        args = list(site.args)
        for key in ("size", "shape", "sizes"):
            written: Any = site.node.kwargs.get(key)
            if written is not None:
                site.node.update_kwarg(key, _resized(site, list(written)))
                return
        if not args[first:] or isinstance(args[first], torch.dtype):
            return
        if isinstance(args[first], (list, tuple)):
            args[first] = type(args[first])(_resized(site, list(args[first])))
        elif not isinstance(args[first], fx.Node) or isinstance(site.now(args[first]), int):
            args[first:] = _resized(site, args[first:])
        elif tuple(site.now(args[first])) != site.predicted[0]:
            args[first] = [
                site.item(args[first], i) if value == size else size
                for i, (value, size) in enumerate(zip(site.now(args[first]), site.predicted[0], strict=True))
            ]
        site.node.args = tuple(args)

    return rewrite


def reshape_to_prediction(name: str) -> Rewrite:
    """A view by another tensor's shape or by strides becomes a reshape, when that shape is no longer the right one.

    `name` is that of the argument which has the shape.
    """

    def rewrite(site: Site) -> None:
        if _shape_now(site, name) != site.predicted[0]:
            site.node.op, site.node.target = "call_method", "reshape"
            site.node.args, site.node.kwargs = (site.args[0], *_any_batch(site)), {}

    return rewrite


def as_strided(site: Site) -> None:
    """`as_strided(x, size, stride)`: a reshape where channels left; explicit strides are those of a whole tensor.

    Raises `UsageError` for a part of a tensor, whose strides change with channels outside of that part.
    """
    if any(label is not None for label in site.result.labels):
        reshape_to_prediction("size")(site)
    elif not _is_dense(site.now(site.args[0])):
        raise UsageError(
            f"'{site.node.name}' views a part of a tensor by explicit strides, which cannot be re-derived; "
            "write as_strided of a contiguous tensor, or index instead"
        )


def _is_dense(x: Tensor) -> bool:
    """Whether the positions of a tensor fill its memory without gaps."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) == x.numel()


def repeat_interleave(site: Site) -> None:
    """`repeat_interleave(x, repeats, dim, output_size)`: the size is a hint and is left out."""
    if any(label is not None for label in site.result.labels):
        site.node.kwargs = {name: value for name, value in site.node.kwargs.items() if name != "output_size"}


def _any_batch(site: Site) -> list[int]:
    """Return the predicted sizes, the first left open where it is not of channels: a slim model takes other batches."""
    predicted = list(site.predicted[0])
    return [-1, *predicted[1:]] if site.result.labels[0] is None else predicted


def _shape_now(site: Site, name: str) -> tuple[int, ...]:
    """Return the shape that an argument has or is in the narrow graph."""
    given = site.now(site.argument(1, name))
    return tuple(given.shape if isinstance(given, Tensor) else given)


def expand_as(site: Site) -> None:
    """`expand_as(other)`: by explicit sizes, when those of the other tensor are no longer the right ones."""
    if _shape_now(site, "other") != site.predicted[0]:
        before, after = site.env[site.args[0]].shape, site.predicted[0]
        new = len(after) - len(before)
        shape = site.computed(getattr, site.argument(1, "other"), "shape")
        open_sizes = [site.item(shape, d) if size == site.now(shape)[d] else size for d, size in enumerate(after)]
        wanted = [-1 if d >= new and before[d - new] == after[d] else size for d, size in enumerate(open_sizes)]
        site.node.op, site.node.target = "call_method", "expand"
        site.node.args, site.node.kwargs = (site.args[0], *wanted), {}


def repeat(site: Site) -> None:
    """`repeat(times)`: a dimension of size 1 is repeated as often as its copies are kept."""
    given = site.argument(1, "repeats")
    spread = not isinstance(given, (list, tuple))
    times = list(site.args[1:] if spread else given)
    before = (1,) * (len(times) - len(site.x.shape)) + site.x.shape
    for i, size in enumerate(site.predicted[0]):
        if before[i] == 1 and site.now(times[i]) != size:
            times[i] = size
    site.node.args, site.node.kwargs = (site.args[0], *times) if spread else (site.args[0], times), {}


def unflatten(site: Site) -> None:
    """`unflatten(x, dim, sizes)`."""
    dim = site.now(site.argument(1, "dim")) % len(site.x.shape)
    written = list(site.argument(2, "sizes"))
    site.assign(2, "sizes", _resized(site, written, dim))


def parts(default_dim: int) -> Rewrite:
    """`split` and `chunk`: parts of unequal width are split by explicit sizes."""

    def rewrite(site: Site) -> None:
        dim = site.now(site.argument(2, "dim", default_dim)) % len(site.x.shape)
        if site.kept_of(site.x, dim) is None:
            return
        widths = [shape[dim] for shape in site.predicted]
        site.node.op, site.node.target = "call_function", torch.split
        site.node.args, site.node.kwargs = (site.node.args[0], widths), {"dim": dim}

    return rewrite


def groups(position: int) -> Rewrite:
    """Functional convolution: the groups that its narrow weight and input imply."""

    def rewrite(site: Site) -> None:
        count = site.now(site.argument(position, "groups", 1))
        if count == 1:
            return
        weight = site.now(site.argument(1, "weight"))
        transposed = "transpose" in operator_of(site.node) or site.argument(6, "transposed") is True
        channel = -(weight.dim() - 1)
        width = site.predicted[0][channel] if transposed else site.now(site.node.args[0]).shape[channel]
        if count != width // weight.shape[1]:
            site.assign(position, "groups", width // weight.shape[1])

    return rewrite


def normalized_shape(site: Site) -> None:
    """`layer_norm(x, normalized_shape)`, `rms_norm(x, normalized_shape)`."""
    now = tuple(site.now(site.argument(1, "normalized_shape")))
    predicted = site.predicted[0][-len(now) :]
    if now != predicted:
        site.assign(1, "normalized_shape", list(predicted))


def num_groups(site: Site) -> None:
    """`group_norm(x, num_groups)`: groups leave whole."""
    count = site.now(site.argument(1, "num_groups"))
    if count > 1:
        width = site.x.shape[1] // count
        site.assign(1, "num_groups", site.now(site.node.args[0]).shape[1] // width)
