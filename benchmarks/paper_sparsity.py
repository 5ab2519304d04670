"""Eq. 1 of paper 000 on timm's FBNetV3: sparsity of the 1×1 convolutions for the MACs of a smaller one, beside Table 1.

F(X) and F₁ₓ₁(X) are counted on the traced graph; the masks are made as `fxprune sparsify --scope uniform` makes them,
and what they leave is counted from the tensors. The paper gives no image sizes: fbnetv3_g runs at 320, of the others
the size is searched whose MACs come nearest to the paper's. The last column takes F(X) from the paper, and only the
share of the 1×1 convolutions from timm. Weights are random, which Eq. 1 does not see.

    python -m benchmarks.paper_sparsity
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from tabulate import tabulate
from torch import nn

import fxprune
from benchmarks.machine import describe_run, publish
from fxprune.sparsity.masks import SparseGraph
from fxprune.sparsity.selection import uniform_sparsity

SIZES = range(224, 257)


@dataclass(frozen=True)
class Published:
    """A network of paper 000: MMACs of Table 3, image side if known, (target MMACs, sparsity in %) of Table 1."""

    name: str
    mmacs: float
    side: int | None
    targets: tuple[tuple[float, float], ...]


PAPER = (
    Published("fbnetv3_g", 2129.7, 320, ((1181.6, 49.69), (762.0, 71.67))),
    Published("fbnetv3_d", 644.4, None, ((557.0, 15.04), (461.6, 31.47))),
    Published("fbnetv3_b", 461.6, None, ((356.6, 26.59),)),
)


def graph_at(model: nn.Module, side: int) -> SparseGraph:
    """Return a model's graph for square images."""
    return SparseGraph(fxprune.trace(model, torch.zeros(1, 3, side, side)))


def nearest_side(model: nn.Module, mmacs: float) -> int:
    """Return the image side whose MACs come nearest to the published ones, of equals a multiple of 8."""
    return min(SIZES, key=lambda side: (abs(graph_at(model, side).whole["macs"] / 1e6 - mmacs), side % 8))


def rows_of(published: Published) -> list[tuple[str, ...]]:
    """Compare one seed network with the paper."""
    model = timm.create_model(published.name).eval()
    side = published.side or nearest_side(model, published.mmacs)
    graph = graph_at(model, side)
    whole = graph.whole["macs"]
    inside = sum(layer.uses * layer.shape.numel() for layer in graph.layers if layer.is_kind("conv1x1"))
    rows: list[tuple[str, ...]] = []
    for target, sparsity in published.targets:
        ours = 100 * uniform_sparsity(whole, target * 1e6, inside)
        result = fxprune.sparsify(
            model, torch.zeros(1, 3, side, side), macs=target * 1e6, scope="uniform", block="1x1", layers=["conv1x1"]
        )
        left = result.report.macs[1] / 1e6
        at_paper = 100 * uniform_sparsity(published.mmacs, target, published.mmacs * inside / whole)
        rows.append(
            (
                published.name,
                str(side),
                f"{whole / 1e6:.1f}",
                f"{published.mmacs:.1f}",
                f"{inside / 1e6:.1f}",
                f"{inside / whole:.1%}",
                f"{target:.1f}",
                f"{left:.1f}",
                f"{ours:.2f}",
                f"{sparsity:.2f}",
                f"{ours - sparsity:+.2f}",
                f"{at_paper:.2f}",
            )
        )
    return rows


def main() -> None:
    """Measure, print, and on request write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table to FILE")
    arguments = parser.parse_args()
    counted = ["F(X), M", "paper", "F1×1(X), M", "share", "target, M", "left, M"]
    header = ["model", "side", *counted, "S, %", "paper", "Δ", "S at paper's F"]
    rows = [row for published in PAPER for row in rows_of(published)]
    table = tabulate(rows, header, "github", disable_numparse=True, colalign=("left", *["right"] * 11))
    publish([describe_run(("torch", "timm", "fxprune")), table], arguments.markdown)


if __name__ == "__main__":
    main()
