"""Which classes leave: targets, constraints, and the order of removal.

Every scope is the same algorithm. Each orbit gives an ordered list of *steps*, each removing enough classes to reach
the next allowed width. All steps are put into one order (by fraction removed for `uniform`, by score for `global`),
and the shortest prefix that meets the target is taken, found by bisection on the cost model.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxprune.budget import Search, order_steps
from fxprune.cost import CostModel
from fxprune.errors import SpecError, TargetError, nearest
from fxprune.labels.orbits import Orbit, Orbits
from fxprune.runtime.masks import MASKS, is_mask
from fxprune.runtime.weight_masks import kind_of, plain_name

__all__ = [
    "Constraints",
    "Target",
    "check_scope",
    "check_target",
    "choose",
    "eligible_orbits",
    "match_layers",
    "read_amount",
    "read_limit",
    "read_patterns",
    "read_ratio",
    "unreachable",
]


@dataclass(frozen=True)
class Target:
    """What to reach: exactly one of `ratio` (fraction removed), `macs`, `parameters` (what is left).

    `macs` and `parameters` are a share ("50%", 0.5) or an absolute count (2e9); `ratio` is a share, or one for each
    layer name or pattern.
    """

    ratio: float | str | Mapping[str, float] | None = None
    macs: float | str | None = None
    parameters: float | str | None = None

    def __post_init__(self) -> None:
        check_target("macs='50%'", ratio=self.ratio, macs=self.macs, parameters=self.parameters)


@dataclass(frozen=True)
class Constraints:
    """What every selection respects.

    `round_to`: kept channels of every orbit are a multiple of it; `min_width`: classes that stay at least;
    `max_ratio`: largest fraction that leaves an orbit; `include`/`exclude`: layers by name, glob or type whose output
    channels may, or may not, leave; `allow_statistical`: also orbits whose removal is only approximate.
    """

    round_to: int = 1
    min_width: int = 1
    max_ratio: float | str = 1.0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allow_statistical: bool = False

    def __post_init__(self) -> None:
        if self.round_to < 1 or self.min_width < 1:
            raise TargetError(f"round_to ({self.round_to}) and min_width ({self.min_width}) must be at least 1")
        read_limit(self.max_ratio, "max_ratio")

    @property
    def largest_ratio(self) -> float:
        """`max_ratio` as a number."""
        return read_limit(self.max_ratio, "max_ratio")

    def widths(self, orbit: Orbit) -> Tensor:
        """Return the widths that an orbit may have, int64, descending from its own."""
        unit = self.round_to // math.gcd(self.round_to, orbit.channels)
        least = max(self.min_width, math.ceil(round(orbit.width * (1 - self.largest_ratio), 9)), 1)
        narrower = torch.arange(orbit.width - 1, min(least, orbit.width) - 1, -1)
        return torch.cat([torch.tensor([orbit.width]), narrower[narrower % unit == 0]])


def read_amount(value: float | str, what: str, whole: float) -> float:
    """Return a target as an absolute number: "50%" and 0.5 are shares of `whole`, anything above 1 is absolute.

    >>> read_amount("50%", "macs", 300.0), read_amount(0.5, "macs", 300.0), read_amount(120, "macs", 300.0)
    (150.0, 150.0, 120.0)
    """
    number = _share(value, what)
    share = str(value).strip().endswith("%") or number <= 1
    amount = number * whole if share else number
    if not 0 < amount <= whole:
        raise TargetError(
            f"{what}={value} is {'more than the model has' if amount > whole else 'not positive'}; the model has "
            f"{whole:,.0f}: give what shall be left, above 0 and at most 100%"
        )
    return amount


def check_target(example: str, **targets: object) -> None:
    """Raise `TargetError` unless exactly one target is given; `example` is what the message suggests."""
    given = [name for name, value in targets.items() if value is not None]
    if len(given) != 1:
        got = ", ".join(given) or "none"
        raise TargetError(f"give exactly one target of {', '.join(targets)}; got {got} (for example {example})")


def read_limit(value: float | str, what: str) -> float:
    """Return the largest fraction that may leave, in (0, 1]. Raises `TargetError` otherwise."""
    limit = _share(value, what)
    if not 0 < limit <= 1:
        raise TargetError(f"{what} is {value}; give a fraction in (0, 1]")
    return limit


def _share(value: float | str, what: str) -> float:
    """Read a number; "50%" is 0.5."""
    text = str(value).strip()
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise TargetError(f"cannot read {what}={value!r}; write a share ('50%', 0.5) or a number (2e9)") from None


def read_patterns(value: str | Iterable[str]) -> tuple[str, ...]:
    """Return the patterns that a user gives, one or several.

    >>> read_patterns("all"), read_patterns(["conv1", "layer1.*"])
    (('all',), ('conv1', 'layer1.*'))
    """
    return (value,) if isinstance(value, str) else tuple(value)


def match_layers(patterns: Iterable[str], module: fx.GraphModule) -> set[str]:
    """Return the modules that any pattern names: by path, by glob over paths, or by type name.

    Raises `SpecError` for a pattern that matches nothing, with the nearest name.
    """
    layers = {n: kind_of(part) for n, part in module.named_modules() if n and n != MASKS and not is_mask(n)}
    names = {plain_name(name) for name, _ in module.named_parameters() if not is_mask(name)}
    parameters = names | {name.rpartition(".")[0] for name in names}
    matched: set[str] = set()
    for pattern in patterns:
        found = {n for n, kind in layers.items() if kind == pattern}
        found |= {n for n in (*layers, *parameters) if any(fnmatch.fnmatchcase(p, pattern) for p in _paths(n))}
        if not found:
            raise SpecError(
                f"no layer matches '{pattern}'; {nearest(pattern, [*layers, *sorted(set(layers.values()))])}"
            )
        matched |= found
    return matched


def _paths(name: str) -> Iterator[str]:
    """Yield a path and those of everything that holds it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def eligible_orbits(module: fx.GraphModule, orbits: Orbits, constraints: Constraints) -> list[Orbit]:
    """Return the orbits that may lose channels: masked, exact unless allowed, included and not excluded."""
    included = match_layers(constraints.include, module) if constraints.include else None
    excluded = match_layers(constraints.exclude, module) if constraints.exclude else set()
    return [
        orbit
        for orbit in orbits
        if orbit.mask is not None
        and (constraints.allow_statistical or orbit.statistical is None)
        and (included is None or included.intersection(_sources(orbit)))
        and not excluded.intersection(_sources(orbit))
    ]


def _sources(orbit: Orbit) -> set[str]:
    """Modules and parameters that make an orbit's channels."""
    made = {m.parameter for m in orbit.members if m.role == "output"}
    return {name.rpartition(".")[0] for name in made} | made


def choose(
    module: fx.GraphModule,
    orbits: Orbits,
    scores: Mapping[str, Tensor],
    target: Target,
    constraints: Constraints,
    scope: str,
) -> Tensor:
    """Return the keep-vector, float64 [classes], that meets `target`.

    Raises `TargetError` when the target cannot be reached, with the reachable minimum and what pins the rest.
    """
    check_scope(scope)
    costs = CostModel(module, orbits)
    allowed = eligible_orbits(module, orbits, constraints)
    eligible = [orbit for orbit in allowed if orbit.name in scores]
    if allowed and not eligible:
        raise TargetError(
            f"the criterion has nothing to go by in any of the {len(allowed)} orbits that may be cut (bn-scale needs "
            "batch norms); choose another criterion"
        )
    keep = costs.all_kept()
    if target.ratio is not None:
        return _by_ratio(module, eligible, scores, target.ratio, constraints, scope, keep)
    steps = order_steps(eligible, scores, [constraints.widths(o) for o in eligible], scope)
    what = "macs" if target.macs is not None else "parameters"
    whole = float((costs.macs if what == "macs" else costs.parameters)(keep))
    wanted = target.macs if target.macs is not None else target.parameters
    assert wanted is not None
    amount = read_amount(wanted, what, whole)
    search = Search(steps, eligible, costs.by_width(what, eligible))
    if search.cost_of(len(steps)) > amount * (1 + 1e-12):
        raise TargetError(unreachable(what, wanted, search, whole, orbits, eligible))
    keep[steps.removed_by(search.meet(amount))] = 0
    return keep


def _by_ratio(
    module: fx.GraphModule,
    eligible: Sequence[Orbit],
    scores: Mapping[str, Tensor],
    ratio: float | str | Mapping[str, float],
    constraints: Constraints,
    scope: str,
    keep: Tensor,
) -> Tensor:
    keep = keep.clone()
    if scope == "global" and not isinstance(ratio, Mapping):
        steps = order_steps(eligible, scores, [constraints.widths(o) for o in eligible], scope)
        wanted = read_ratio(ratio) * sum(orbit.width for orbit in eligible)
        within = [end for end in steps.ends if end <= wanted + 0.5]
        keep[steps.classes[: within[-1]]] = 0
        return keep
    ratios = _ratio_of_orbits(module, eligible, ratio)
    for orbit in eligible:
        if orbit.name not in ratios:
            continue
        wanted = orbit.width * (1 - ratios[orbit.name])
        width = min(constraints.widths(orbit).tolist(), key=lambda w: (abs(w - wanted), w))
        keep[orbit.classes[scores[orbit.name].argsort(stable=True)[: orbit.width - width]]] = 0
    return keep


def check_scope(scope: str) -> None:
    """Raise `SpecError` unless there is such a scope."""
    if scope not in ("global", "uniform"):
        raise SpecError(f"unknown scope '{scope}'; known: global, uniform (or give a fraction for each layer pattern)")


def read_ratio(value: float | str, what: str = "ratio") -> float:
    """Return a fraction removed, in [0, 1). Raises `TargetError` otherwise.

    >>> read_ratio("30%"), read_ratio(0.3)
    (0.3, 0.3)
    """
    ratio = _share(value, what)
    if not 0 <= ratio < 1:
        raise TargetError(f"{what}={value} is outside [0, 1); it is the fraction that is removed, as 0.3 or '30%'")
    return ratio


def _ratio_of_orbits(
    module: fx.GraphModule, eligible: Sequence[Orbit], ratio: float | str | Mapping[str, float]
) -> dict[str, float]:
    if not isinstance(ratio, Mapping):
        return {orbit.name: read_ratio(ratio) for orbit in eligible}
    ratios: dict[str, float] = {}
    names = {orbit.name for orbit in eligible}
    for pattern, value in ratio.items():
        named = set(fnmatch.filter(names, pattern))
        layers = set() if named else match_layers([pattern], module)
        for orbit in eligible:
            if orbit.name in named or layers.intersection(_sources(orbit)):
                ratios[orbit.name] = read_ratio(value)
    return ratios


def unreachable(
    what: str, wanted: float | str, search: Search, whole: float, orbits: Orbits, eligible: Sequence[Orbit]
) -> str:
    """Say why a target cannot be reached: the least cost there is, and what holds the rest."""
    least = search.cost_of(len(search.steps))
    held: Counter[str] = Counter()
    for pinned in orbits.pinned:
        if pinned.dimension == 0 and pinned.indices.numel() > 1:
            held[str(pinned.reason)] += pinned.indices.numel()
    names = {orbit.name for orbit in eligible}
    for orbit in orbits:
        if orbit.name not in names:
            why = f"statistical: {orbit.statistical}" if orbit.statistical else "excluded"
            held[why] += orbit.width
    causes = "; ".join(f"{count} channels {reason}" for reason, count in held.most_common(3)) or "nothing else"
    return (
        f"{what}={wanted} cannot be reached: the minimum is {least:,.0f} ({least / whole:.1%} of {whole:,.0f}). "
        f"What holds the rest: {causes}. Raise the target, loosen min_width, max_ratio, round_to or exclude, or pass "
        "allow_statistical where an approximation is acceptable"
    )
