"""Give quantised linear layers to kernels that skip blocks of zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.errors import SpecError
from fxprune.graph.passes import Pass
from fxprune.lowering.choices import Choice, read_form
from fxprune.lowering.layouts import assign_layouts
from fxprune.runtime.int8 import BlockSparseInt8Linear, Int8Linear
from fxprune.selection import match_layers

__all__ = ["BlockSparseInt8Lowering"]


@dataclass(frozen=True)
class BlockSparseInt8Lowering(Pass):
    """Store int8 weights in blocks, name what computes every layer, and lay values out as that reads them.

    Before: `%q = quantize.default(%x, 0.1, 0, 'channels-last')`, `%a = a Int8Linear(8→16, u8)(%q)`,
    `%b = b Int8Linear(16→8, f32)(%a)`
    After: `%q = quantize.default(%x, 0.1, 0, 'packed')`,
    `%a = a BlockSparseInt8Linear(8→16, 60.0% sparse in 1x4, packed→packed, native, u8)(%q)`,
    `%b = b BlockSparseInt8Linear(16→8, 60.0% sparse in 1x4, packed→channels-last, native, f32)(%a)`

    The results are the same, bit for bit, with the backends "native" and "reference".

    1. `backend` is one of `fxprune.runtime.int8.backends`, for all layers, or one for layers by name, glob or type; a
       backend with a form, as "native dense", says how the weight is stored too. The other layers get "native".
    2. `block` is the form of the others: a layer with few zero blocks of that size is stored dense, in 4×4 blocks.
    3. Conversions between layouts are nodes (`pack`, `unpack`), where writers and readers of a value differ.
    """

    name: ClassVar[str] = "block-sparse-int8-lowering"

    backend: str | Mapping[str, str] = "native"
    block: str = "1x4"

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", read_form(self.block))
        for text in self.backend.values() if isinstance(self.backend, Mapping) else (self.backend,):
            Choice.of(text)

    def rewrite(self, module: fx.GraphModule) -> bool:
        """Replace the layers; a graph without quantised layers that are not lowered yet is left alone."""
        layers = _quantised(module)
        if not layers:
            return False
        made: dict[int, BlockSparseInt8Linear] = {}
        for path, choice in self._choices(module, layers).items():
            layer = layers[path]
            if id(layer) not in made:
                made[id(layer)] = choice.fitting(layer.weight, self.block).lower(layer)
            module.set_submodule(path, made[id(layer)])
        assign_layouts(module)
        return True

    def _choices(self, module: fx.GraphModule, layers: Mapping[str, Int8Linear]) -> dict[str, Choice]:
        """Return what computes each layer. Raises `SpecError` for a name that matches no quantised layer."""
        if isinstance(self.backend, str):
            return dict.fromkeys(layers, Choice.of(self.backend))
        found = dict.fromkeys(layers, Choice("native"))
        for pattern, text in self.backend.items():
            named = match_layers([pattern], module) & layers.keys()
            if not named:
                raise SpecError(f"'{pattern}' is no quantised layer; these are: {', '.join(layers)}")
            found |= dict.fromkeys(named, Choice.of(text))
        return found


def _quantised(module: fx.GraphModule) -> dict[str, Int8Linear]:
    """Return path → layer of the quantised layers that a graph calls and that are not lowered."""
    called = (str(node.target) for node in module.graph.nodes if node.op == "call_module")
    found = {path: module.get_submodule(path) for path in called}
    return {path: layer for path, layer in found.items() if isinstance(layer, Int8Linear)}
