"""Which layers became sparse, and where the multiply-accumulates went (paper 000, Figures 2b and 2c)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tabulate import tabulate
from torch import fx

from fxprune.insights.roles import ROLES, layer_depths, layer_roles
from fxprune.report import LayerRow, Report
from fxprune.survey import make_report

__all__ = ["LayerProfile", "RoleProfile", "SparsityProfile", "sparsity_profile"]


@dataclass(frozen=True)
class LayerProfile:
    """One layer: its role, its depth (layers on the longest way from an input), its sparsity, its MACs.

    `sparsity` is the share of its weights that is masked after pruning, `macs` are those before and after.
    """

    layer: str
    role: str
    depth: int
    sparsity: float
    macs: tuple[int, int]


@dataclass(frozen=True)
class RoleProfile:
    """All layers of a role: how many, and their multiply-accumulates before and after."""

    role: str
    layers: int
    macs: tuple[int, int]


@dataclass(frozen=True)
class SparsityProfile:
    """The layers of a model that cost multiply-accumulates, in the order of their calls."""

    layers: tuple[LayerProfile, ...]

    @property
    def roles(self) -> tuple[RoleProfile, ...]:
        """The roles that occur, summed up."""
        held = {role: [layer.macs for layer in self.layers if layer.role == role] for role in ROLES}
        sums = {role: (sum(a for a, _ in macs), sum(b for _, b in macs)) for role, macs in held.items()}
        return tuple(RoleProfile(role, len(held[role]), sums[role]) for role in ROLES if held[role])

    def table(self, style: str = "simple") -> str:
        """Return the layers and the roles as text; `style` is any table format of tabulate."""
        cells = [(x.layer, x.role, str(x.depth), f"{x.sparsity:.1%}", *_both(x.macs)) for x in self.layers]
        header = ["layer", "role", "depth", "sparsity", "MACs before", "MACs after"]
        layers = tabulate(cells, header, style, disable_numparse=True, colalign=_aligned(2, 4))
        return f"{layers}\n\n{self.by_role(style)}"

    def by_role(self, style: str = "simple") -> str:
        """Return the roles as text, each with its share of all multiply-accumulates."""
        whole = [max(sum(role.macs[side] for role in self.roles), 1) for side in (0, 1)]
        cells = [
            (x.role, str(x.layers), *_both(x.macs), *(f"{m / w:.1%}" for m, w in zip(x.macs, whole, strict=True)))
            for x in self.roles
        ]
        header = ["role", "layers", "MACs before", "MACs after", "share before", "share after"]
        return tabulate(cells, header, style, disable_numparse=True, colalign=_aligned(1, 5))

    def json(self) -> str:
        """Return layers and roles as JSON."""
        return json.dumps(asdict(self) | {"roles": [asdict(role) for role in self.roles]}, indent=2) + "\n"


def _both(macs: tuple[int, int]) -> tuple[str, str]:
    return f"{macs[0]:,}", f"{macs[1]:,}"


def _aligned(texts: int, numbers: int) -> Sequence[str]:
    return ("left",) * texts + ("right",) * numbers


def sparsity_profile(module: fx.GraphModule, report: Report | None = None) -> SparsityProfile:
    """Return how sparse every layer of a graph became, and what it costs, by role.

    Args:
        module: the graph before pruning, `Result.traced`.
        report: what became of it, `Result.report`; by default the graph as it is, before and after.

    >>> import torch, fxprune
    >>> from torch import nn
    >>> net, x = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)), torch.zeros(1, 4, 2, 2)
    >>> result = fxprune.sparsify(net, x, sparsity="50%", scope="uniform")
    >>> print(sparsity_profile(result.traced, result.report).by_role())
    role          layers    MACs before    MACs after    share before    share after
    ----------  --------  -------------  ------------  --------------  -------------
    expansion          1            128            64           50.0%          50.0%
    bottleneck         1            128            64           50.0%          50.0%
    """
    calls: dict[str, list[LayerRow]] = defaultdict(list)
    for row in (make_report(module) if report is None else report).layers:
        calls[row.layer].append(row)
    depths = layer_depths(module)
    return SparsityProfile(
        tuple(_profile(name, role, depths[name], calls[name]) for name, role in layer_roles(module).items())
    )


def _profile(layer: str, role: str, depth: int, calls: Sequence[LayerRow]) -> LayerProfile:
    macs = sum(row.macs[0] for row in calls), sum(row.macs[1] for row in calls)
    return LayerProfile(layer, role, depth, max((row.sparsity[1] for row in calls), default=0.0), macs)
