"""Which blocks of which weights become zero: targets, scopes, criteria.

Every scope is the same ranking (`take_least`). A target is an amount to remove: weights, or multiply-accumulates, of
which every weight costs as many as its layer has positions. "uniform" takes the same share of every layer, which for
MACs is Eq. 1 of paper 000, S = (F(X) − F(Y)) / F₁ₓ₁(X); "global" takes the least important blocks of all layers until
the amount is reached, the level that §A.2 searches for.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from fxprune.errors import InputError, SpecError, TargetError, nearest
from fxprune.selection import check_scope, check_target, read_amount, read_limit, read_ratio
from fxprune.sparsity.blocks import Block, Tiling
from fxprune.sparsity.layers import DEFAULT_LAYERS, SparseLayer, choose_layers, mask_of
from fxprune.sparsity.ranking import Ranked, take_least

__all__ = ["CRITERIA", "Sparsifier", "WeightCriterion", "uniform_sparsity"]

WeightCriterion = Callable[[str, Tensor], Tensor]
"""(name of the layer, its weight) → importance of every weight ≥ 0, in the weight's shape."""


def magnitude(layer: SparseLayer, seed: int) -> Tensor:  # noqa: ARG001
    """The weights themselves, of which a block's root mean square counts (Mao et al. 2017)."""
    return layer.weight


def random(layer: SparseLayer, seed: int) -> Tensor:
    """Uniform in (0, 1], from the seed and the layer's name."""
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(layer.name.encode()))
    return 1 - torch.rand(layer.shape, generator=generator)


CRITERIA: dict[str, Callable[[SparseLayer, int], Tensor]] = {"magnitude": magnitude, "random": random}
"""What weights are ranked by, by name: (layer, seed) → values in the weight's shape, those nearest to 0 leave first."""


def uniform_sparsity(whole: float, wanted: float, layers: float) -> float:
    """Return S = (F(X) − F(Y)) / F₁ₓ₁(X), Eq. 1 of paper 000: the sparsity that leaves `wanted` of `whole` MACs.

    Args:
        whole: MACs of the dense model, F(X).
        wanted: MACs to leave, F(Y).
        layers: MACs of the layers to make sparse, F₁ₓ₁(X).

    >>> round(uniform_sparsity(2129.7, 1181.6, 1908.0), 4)
    0.4969
    """
    return (whole - wanted) / layers


@dataclass(frozen=True)
class Sparsifier:
    """What to reach and how: exactly one of `sparsity`, `macs`, `parameters`.

    Attributes:
        sparsity: fraction of the chosen layers' weights that becomes zero, at least ("80%", 0.8); or one for each layer
            name, glob or type.
        macs, parameters: what the model keeps at most, a share of the dense model ("50%", 0.5) or a count.
        block: tile that becomes zero as a whole, output × input channels: "1x4" or (1, 4).
        scope: "uniform" or "global".
        layers, exclude: which layers, see `choose_layers`.
        criterion: a name of `CRITERIA`, or a function.
        max_sparsity: largest fraction that leaves any layer.
        seed: of "random".
    """

    sparsity: float | str | Mapping[str, float] | None = None
    macs: float | str | None = None
    parameters: float | str | None = None
    block: str | tuple[int, int] = "1x4"
    scope: str = "uniform"
    layers: tuple[str, ...] = DEFAULT_LAYERS
    exclude: tuple[str, ...] = ()
    criterion: str | WeightCriterion = "magnitude"
    max_sparsity: float | str = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, Mapping) and self.layers != DEFAULT_LAYERS:
            raise SpecError("sparsity names its layers itself: leave out layers, or give one sparsity for all of them")
        object.__setattr__(self, "block", str(Block.of(self.block)))  # so that a pair of sizes has a spelling too
        check_scope(self.scope)
        if not callable(self.criterion) and self.criterion not in CRITERIA:
            raise SpecError(f"unknown criterion '{self.criterion}'; {nearest(self.criterion, CRITERIA)}")
        read_limit(self.max_sparsity, "max_sparsity")

    @property
    def largest(self) -> float:
        """`max_sparsity` as a number."""
        return read_limit(self.max_sparsity, "max_sparsity")

    @property
    def named(self) -> tuple[str, ...]:
        """Return which layers are asked for."""
        return tuple(self.sparsity) if isinstance(self.sparsity, Mapping) else self.layers

    def check_target(self) -> None:
        """Raise `TargetError` unless there is exactly one target."""
        check_target("sparsity='80%'", sparsity=self.sparsity, macs=self.macs, parameters=self.parameters)

    def choose(self, module: fx.GraphModule, known: Sequence[SparseLayer]) -> tuple[SparseLayer, ...]:
        """Return the layers to make sparse: those asked for, but of those too small for a block.

        Raises `SpecError` for a name that matches nothing, `TargetError` when no layer has room for a block.
        """
        named = choose_layers(module, known, self.named, self.exclude)
        chosen = tuple(layer for layer in named if self.tiling(layer).fits)
        if not chosen:
            why = f"none of {', '.join(x.name for x in named[:3])} … has {self.block} channels" if named else "excluded"
            raise TargetError(f"no layer can be made sparse: {why}; choose others, or a smaller block")
        return chosen

    def too_small(self, module: fx.GraphModule, known: Sequence[SparseLayer]) -> list[SparseLayer]:
        """Return the layers that are asked for, but have no room for one block."""
        named = choose_layers(module, known, self.named, self.exclude)
        return [layer for layer in named if not self.tiling(layer).fits]

    def masks(
        self, module: fx.GraphModule, known: Sequence[SparseLayer], whole: Mapping[str, int], fraction: float = 1.0
    ) -> dict[str, Tensor]:
        """Return layer name → bool mask in the shape of its weight, False where it becomes zero.

        Args:
            module: the graph.
            known: all its layers.
            whole: what the dense graph costs: "macs" and "parameters".
            fraction: of the amount to remove; less than 1 on the way of a schedule.

        Raises `TargetError` when the target cannot be reached, `InputError` for weights that are not finite.
        """
        self.check_target()
        chosen = _Chosen(self, module, known, self.choose(module, known), whole)
        taken = chosen.take(fraction)
        masks = {}
        for layer, blocks in zip(chosen.layers, taken, strict=True):
            mask, before = self.tiling(layer).expand(~blocks), mask_of(layer)
            masks[layer.name] = mask if before is None else mask & before.cpu()
        return masks

    def tiling(self, layer: SparseLayer) -> Tiling:
        """Return a layer's weight in blocks."""
        return Tiling(tuple(layer.shape), layer.output_dim, layer.input_dim, Block.of(self.block))

    def importance(self, layer: SparseLayer) -> Tensor:
        """Return the importance of every weight, in the weight's shape; what is masked has none."""
        if layer.original.is_meta:
            raise InputError(f"'{layer.name}' is on the meta device and has no values to rank; load its weights first")
        if callable(self.criterion):
            found = _judged(self.criterion, layer.name, layer.weight)
        else:
            found = CRITERIA[self.criterion](layer, self.seed)
        if not bool(torch.isfinite(found.sum(dtype=torch.promote_types(found.dtype, torch.float32)))):
            raise InputError(f"'{layer.name}' has weights that are not finite; restore a sound checkpoint")
        mask = mask_of(layer)
        return found if mask is None else found.to(mask.device) * mask


def _judged(criterion: WeightCriterion, name: str, weight: Tensor) -> Tensor:
    found = criterion(name, weight.clone())  # the weight is the model's own until the last pass is done
    if not isinstance(found, Tensor) or found.shape != weight.shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        shape = tuple(weight.shape)
        raise SpecError(f"the criterion returned {got} for '{name}'; return a tensor of the weight's shape {shape}")
    if bool((found < 0).any()):
        raise SpecError(f"the criterion is negative for '{name}'; return importance, 0 for the least")
    return found.detach()


@dataclass(frozen=True)
class _Chosen:
    """The layers that a sparsifier chose in a graph, and how much leaves them."""

    options: Sparsifier
    module: fx.GraphModule
    known: Sequence[SparseLayer]
    layers: tuple[SparseLayer, ...]
    whole: Mapping[str, int]

    @cached_property
    def ranked(self) -> list[Ranked]:
        """The blocks of every layer."""
        return [self._rank(layer) for layer in self.layers]

    def take(self, fraction: float) -> list[Tensor]:
        """Return for every layer the blocks that leave, bool [blocks]."""
        if isinstance(self.options.sparsity, Mapping):
            shares = self._by_name(self.options.sparsity)
        else:
            amount = self._amount()
            if self.options.scope == "global":
                return take_least(self.ranked, fraction * amount)
            # The amount is F(X) − F(Y).
            shares = [uniform_sparsity(amount, 0, sum(r.total for r in self.ranked))] * len(self.layers)
        return [take_least([r], fraction * s * r.total)[0] for r, s in zip(self.ranked, shares, strict=True)]

    def _rank(self, layer: SparseLayer) -> Ranked:
        options, tiling, cost = self.options, self.options.tiling(layer), self._cost(layer)
        sizes, total = tiling.sizes(), float(layer.shape.numel() * cost)
        costs = sizes.double() * cost if isinstance(sizes, Tensor) else float(sizes * cost)
        return Ranked(lambda: tiling.norms(options.importance(layer)).cpu(), costs, total, options.largest * total)

    def _cost(self, layer: SparseLayer) -> int:
        """Return what one weight of a layer costs, in the words of the target."""
        return layer.uses if self.options.macs is not None else 1

    def _by_name(self, sparsity: Mapping[str, float]) -> list[float]:
        found: dict[str, float] = {}
        for pattern, value in sparsity.items():
            for layer in choose_layers(self.module, self.known, [pattern]):
                found[layer.name] = read_ratio(value, "sparsity")
        shares = [found[layer.name] for layer in self.layers]
        if max(shares) > self.options.largest:
            raise TargetError(
                f"a sparsity of {max(shares):.1%} cannot be reached when layers lose at most "
                f"{self.options.largest:.0%} of their weights; raise max_sparsity"
            )
        return shares

    def _amount(self) -> float:
        """Return how many weights or multiply-accumulates to remove. Raises `TargetError` when there are not enough."""
        options, room = self.options, sum(r.limit for r in self.ranked)
        if options.sparsity is not None:
            assert not isinstance(options.sparsity, Mapping)
            amount = read_ratio(options.sparsity, "sparsity") * sum(r.total for r in self.ranked)
            asked, least = f"sparsity={options.sparsity}", ""
        else:
            what = "macs" if options.macs is not None else "parameters"
            wanted: float | str = getattr(options, what)
            inside, whole = {layer.name for layer in self.layers}, self.whole[what]
            there = whole - sum(_zeros(layer) * self._cost(layer) for layer in self.known if layer.name not in inside)
            amount = max(there - read_amount(wanted, what, whole), 0.0)
            asked, least = f"{what}={wanted}", f"; the minimum is {there - room:,.0f} ({(there - room) / whole:.1%})"
        if amount > room * (1 + 1e-9):
            raise TargetError(
                f"{asked} cannot be reached when {len(self.layers)} layers ({', '.join(options.named)}) lose at most "
                f"{options.largest:.0%} of their weights{least}. Raise the target or max_sparsity"
                + ("" if "all" in options.named else ", or choose more layers, as layers='all'")
            )
        return amount


def _zeros(layer: SparseLayer) -> int:
    mask = mask_of(layer)
    return 0 if mask is None else int(mask.numel() - mask.count_nonzero())
