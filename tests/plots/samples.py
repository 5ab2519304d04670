"""What is drawn: small widths of layers, and what few gates said."""

from __future__ import annotations

import torch

from fxprune.gating.trail import GateTrail
from fxprune.insights.widths import LayerWidth

WIDTHS = (
    LayerWidth("stem", "Conv2d", "8×8", (16, 4)),
    LayerWidth("left.conv", "Conv2d", "4×4", (200, 199)),
    LayerWidth("right.conv", "Conv2d", "4×4", (32, 32)),
    LayerWidth("head", "Linear", "vector", (1000, 2)),
)

TRAIL = GateTrail(
    (0, 10, 30),
    {
        "orbit_0": torch.tensor([[0.95, 0.96], [0.7, 0.2], [1.0, 0.0]]),
        "orbit_1": torch.tensor([[0.95, 0.95, 0.95], [0.5, 0.4, 0.1], [0.99, 0.01, 0.3]]),
    },
    (0.9, 0.6, 0.25),
    {"orbit_0": ("stem",), "orbit_1": ("left.conv", "right.conv", "head")},
)
