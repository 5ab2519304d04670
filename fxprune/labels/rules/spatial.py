"""Operators that act on trailing spatial dimensions of every channel alone: pooling, interpolation, reflection."""

from __future__ import annotations

import re

from torch import Tensor

from fxprune.labels.call import Call, Rule
from fxprune.labels.flow import Labels

__all__ = ["RULES", "spatial"]


def spatial(call: Call) -> Labels | list[Labels]:
    """Batch and channel labels pass; a label on a dimension that the operator slides along is pinned."""
    x = call.tensors[0]
    labels = call.labels(x)
    count = _spatial_dims(str(call.operator))
    for label in labels[-count:]:
        call.flow.pin(label, "pooled or resized along this dimension")
    out = labels[:-count] + (None,) * count
    return out if isinstance(call.result, Tensor) else [out for _ in call.result]


def _spatial_dims(name: str) -> int:
    """Return how many trailing dimensions an operator works on, as its name says: `avg_pool2d` on 2."""
    found = re.search(r"([123])d", name)
    if found is None:
        raise ValueError(f"operator {name} does not name its spatial dimensions")
    return int(found.group(1))


RULES: dict[str, Rule] = dict.fromkeys(
    [
        *(f"aten.{kind}_pool{n}d" for kind in ("avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)),
        *(f"aten.{kind}_pool{n}d" for kind in ("_adaptive_avg", "fractional_max") for n in (2, 3)),
        *(f"aten.max_pool{n}d_with_indices" for n in (1, 2, 3)),
        *(f"aten.{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
        *(f"aten.upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "trilinear3d")),
        *(f"aten.upsample_{kind}" for kind in ("bilinear2d", "bicubic2d")),
        *(f"aten._upsample_{kind}" for kind in ("nearest_exact1d", "nearest_exact2d", "nearest_exact3d")),
        *(f"aten._upsample_{kind}" for kind in ("bilinear2d_aa", "bicubic2d_aa", "lanczos2d_aa")),
    ],
    spatial,
)
