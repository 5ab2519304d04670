"""What leaves attention: head dimensions, the same of every head, or whole heads.

Attention divides a width into (heads, dimensions) and merges the two afterwards, and only one of them can lose
channels. Which of them is which no operator says, but products do: attention multiplies activations with activations,
one product *for every head*. A probe gives every axis of every division slots of its own and lets them flow; then

* the axis of heads is the outermost that counts such products: that reaches a batch dimension, or, where heads share
  their keys, rows or columns of a product that contracts another axis of the same division;
* the axis of dimensions is the innermost other one that reaches a matrix dimension.

A division of which no axis counts products (channel shuffle, groups) has nothing to do with attention. Attention of
one head divides nothing: its dimensions leave under either policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from fxprune.errors import SpecError, UsageError
from fxprune.labels.flow import Choice, Label
from fxprune.labels.places import distinct
from fxprune.labels.propagation import Labelling, propagate_labels

__all__ = ["POLICIES", "attention_of", "check_attention", "keep_attention", "label_channels"]

POLICIES = ("dimensions", "heads")
"""What may leave attention; the first is the default."""

_KEY = "fxprune.attention"


def check_attention(policy: str) -> None:
    """Raise `SpecError` for a policy that does not exist."""
    if policy not in POLICIES:
        raise SpecError(f"unknown attention policy '{policy}'; known policies: {', '.join(POLICIES)}")


def attention_of(module: fx.GraphModule, wanted: str | None = None) -> str:
    """Return the policy of a graph: the one that it is masked for, else the `wanted` one, else the default.

    Raises `SpecError` for a policy that does not exist, `UsageError` for another than the graph is masked for.
    """
    if wanted is not None:
        check_attention(wanted)
    kept: str | None = module.meta.get(_KEY)
    if kept is None:
        return wanted or POLICIES[0]
    if wanted not in (None, kept):
        raise UsageError(f"the graph is masked for attention={kept}, not {wanted}; start from a graph without masks")
    return kept


def keep_attention(module: fx.GraphModule, policy: str | None) -> None:
    """Keep the policy with a graph and its copies, as long as it has masks; None forgets it."""
    module.meta.pop(_KEY, None)
    if policy is not None:
        module.meta[_KEY] = policy


def label_channels(module: fx.GraphModule, policy: str) -> Labelling:
    """Let labels flow through a graph so that attention loses what `policy` says.

    One propagation is enough where its own choices agree with the policy, as they mostly do for head dimensions.
    """
    first = propagate_labels(module)
    if not _disagrees(first, policy):
        return first
    axes = dict(_decided(propagate_labels(module, axes=None), policy))
    chosen = first.flow.choices
    if all(choice not in chosen or chosen[choice][axis] is not None for choice, axis in axes.items()):
        return first
    return propagate_labels(module, axes)


@dataclass(frozen=True)
class _Product:
    """Classes in the dimensions of a matrix product: [batch, rows, contracted] × [batch, contracted, columns]."""

    batch: frozenset[int]
    rows: frozenset[int]
    contracted: frozenset[int]
    columns: frozenset[int]

    @cached_property
    def matrix(self) -> frozenset[int]:
        """Classes in any dimension but those of the batch."""
        return self.rows | self.contracted | self.columns


def _products(labelling: Labelling) -> list[_Product]:
    def classes(*labels: Label) -> frozenset[int]:
        return frozenset(_classes(labelling, labels))

    return [
        _Product(classes(*a[:-2], *b[:-2]), classes(a[-2]), classes(a[-1], b[-2]), classes(b[-1]))
        for a, b in labelling.flow.products
    ]


def _classes(labelling: Labelling, labels: Iterable[Label]) -> set[int]:
    return set().union(*(distinct(labelling.partition.of_slot[label]) for label in labels if label is not None))


def _disagrees(labelling: Labelling, policy: str) -> bool:
    """Whether a label that was kept by choice is where the policy wants none: inside products, or what counts them."""
    products = _products(labelling)
    unwanted = set().union(*(p.matrix if policy == "heads" else p.batch | p.rows for p in products))
    kept = (_classes(labelling, labels) for labels in labelling.flow.choices.values())
    return bool(unwanted) and any(not unwanted.isdisjoint(classes) for classes in kept)


def _decided(probe: Labelling, policy: str) -> Iterator[tuple[Choice, int]]:
    """Yield the axis that keeps its label, of every choice that belongs to attention."""
    products = _products(probe)
    choices = {c: [_classes(probe, [label]) for label in labels] for c, labels in probe.flow.choices.items()}
    counting = set().union(*(p.batch for p in products), *(_shared(axes, products) for axes in choices.values()))
    inside = set().union(*(p.matrix for p in products))
    for choice, axes in choices.items():
        heads = [i for i, axis in enumerate(axes) if axis & counting][:1]
        dimensions = [i for i, axis in enumerate(axes) if heads and i not in heads and axis & inside][-1:]
        for axis in heads if policy == "heads" else dimensions:
            yield choice, axis


def _shared(axes: list[set[int]], products: list[_Product]) -> set[int]:
    """Return the classes that are rows or columns of a product that contracts another axis of the same division."""
    found: set[int] = set()
    for product in products:
        contracted = [not product.contracted.isdisjoint(axis) for axis in axes]
        if any(contracted):
            rest = set().union(
                *(axis for axis, is_contracted in zip(axes, contracted, strict=True) if not is_contracted)
            )
            found |= rest & (product.rows | product.columns)
    return found
