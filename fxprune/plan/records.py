"""The parts of a plan."""

from __future__ import annotations

import base64
import binascii
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.quantization.ranges import Ranges
from fxprune.sparsity.blocks import Block, Tiling
from fxprune.sparsity.layers import SparseLayer

__all__ = ["PlannedLowering", "PlannedOrbit", "PlannedWeight"]


@dataclass(frozen=True)
class PlannedOrbit:
    """What one orbit keeps.

    `places` (`conv1.weight[0]`, …) say which dimensions the orbit has, so that a plan is refused by another model.
    `kept` are the classes that stay, ascending, each in 0 … width − 1.
    """

    name: str
    width: int
    kept: tuple[int, ...]
    places: tuple[str, ...]

    @staticmethod
    def of_row(row: Mapping[str, Any]) -> PlannedOrbit:
        """Read what JSON holds. Raises `KeyError`, `TypeError` or `ValueError`."""
        kept = tuple(int(i) for i in row["kept"])
        width = int(row["width"])
        if not kept or len(set(kept)) != len(kept) or min(kept) < 0 or max(kept) >= width:
            raise ValueError(f"'kept' of {row['name']} must be distinct classes in 0 … {width - 1}, and at least one")
        if not row["places"]:
            raise ValueError(f"{row['name']} has no places")
        return PlannedOrbit(str(row["name"]), width, tuple(sorted(kept)), tuple(row["places"]))


@dataclass(frozen=True)
class PlannedWeight:
    """Which weights of one layer stay.

    `shape` is the weight's after channels left, `dims` its output and input dimension. `kept` has one bit a block, in
    the order of `Tiling`, packed eight to a byte, compressed by zlib, in base64.
    """

    layer: str
    shape: tuple[int, ...]
    dims: tuple[int, int]
    block: str
    kept: str

    @staticmethod
    def of(layer: SparseLayer, mask: Tensor) -> PlannedWeight:
        """Describe a layer's mask: in blocks of 1×4 where it consists of those, else in single weights."""
        shape, dims = tuple(mask.shape), (layer.output_dim, layer.input_dim)
        block = Block(1, 4)
        kept = Tiling(shape, *dims, block).whole(mask.cpu())
        if kept is None:
            block = Block(1, 1)
            kept = mask.cpu().flatten()
        packed = zlib.compress(np.packbits(kept.numpy()).tobytes(), 1)
        return PlannedWeight(layer.name, shape, dims, str(block), base64.b64encode(packed).decode("ascii"))

    def mask(self) -> Tensor:
        """Return bool in `shape`. Raises `ValueError` when `kept` is damaged."""
        tiling = Tiling(self.shape, *self.dims, Block.of(self.block))
        try:
            packed = np.frombuffer(zlib.decompress(base64.b64decode(self.kept, validate=True)), np.uint8)
        except (zlib.error, binascii.Error) as error:
            raise ValueError(f"'kept' of {self.layer} is damaged: {error}") from None
        if packed.size != math.ceil(tiling.count / 8):
            raise ValueError(f"'kept' of {self.layer} has {packed.size} bytes, its {tiling.count} blocks need another")
        return tiling.expand(torch.from_numpy(np.unpackbits(packed, count=tiling.count).astype(bool)))

    @staticmethod
    def of_row(row: Mapping[str, Any]) -> PlannedWeight:
        """Read what JSON holds. Raises `KeyError`, `TypeError` or `ValueError`."""
        shape, (output, input_) = tuple(int(size) for size in row["shape"]), row["dims"]
        if min(shape, default=0) < 1 or output == input_ or not {output, input_} <= set(range(len(shape))):
            raise ValueError(f"'shape' and 'dims' of {row['layer']} must be a weight's sizes and two of its dimensions")
        dims = int(output), int(input_)
        planned = PlannedWeight(str(row["layer"]), shape, dims, str(row["block"]), str(row["kept"]))
        planned.mask()
        return planned


@dataclass(frozen=True)
class PlannedLowering:
    """What computes on uint8.

    Attributes:
        ranges: of the values, by the names of their nodes.
        layers: path → what computes the layer, as "native 1x4".
        floating: path → why a layer stays in float.
        im2col: paths of the layers that are convolutions, computed as linear layers on patches.
    """

    ranges: Ranges
    layers: Mapping[str, str]
    floating: Mapping[str, str]
    im2col: tuple[str, ...] = ()

    @staticmethod
    def of_row(row: Mapping[str, Any]) -> PlannedLowering:
        """Read what JSON holds. Raises `KeyError`, `TypeError`, `AttributeError` or `PlanError`."""
        layers, floating = ({str(path): str(text) for path, text in row[key].items()} for key in _NAMED)
        im2col = row.get("im2col", [])
        if not isinstance(im2col, list):
            raise TypeError(f"'im2col' is {im2col!r}, and no list of paths")
        ranges = Ranges.of_rows(str(row["observer"]), row["ranges"])
        return PlannedLowering(ranges, layers, floating, tuple(map(str, im2col)))

    def as_json(self) -> str:
        """Return JSON, a line for every range and layer."""
        named = {key: [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in getattr(self, key).items()] for key in _NAMED}
        parts = [f'"observer": {json.dumps(self.ranges.observer)}']
        parts += [f'"{key}": {{{_lines(lines)}}}' for key, lines in named.items()]
        parts.append(f'"im2col": [{_lines(map(json.dumps, self.im2col))}]')
        parts.append(f'"ranges": [{_lines(json.dumps(row) for row in self.ranges.as_rows())}]')
        return "{\n    " + ",\n    ".join(parts) + "\n  }"


_NAMED = ("layers", "floating")


def _lines(rows: Iterable[str]) -> str:
    text = ",\n      ".join(rows)
    return f"\n      {text}\n    " if text else ""
