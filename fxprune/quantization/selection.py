"""Which layers of a graph are to compute on uint8, and why the others are not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import fx

from fxprune.errors import InputError, SpecError, nearest
from fxprune.quantization.layers import Kind, check_finalized, refusal
from fxprune.quantization.ranges import Ranges
from fxprune.quantization.values import Values, operand
from fxprune.selection import match_layers

__all__ = ["Wanted", "select"]


@dataclass(frozen=True)
class Wanted:
    """The layers that a user wants quantised.

    Attributes:
        layers: names, globs or types; all that can be where there are none.
        exclude: which of them not.
        keep_float: path → reason of single layers that stay in float.
        without: kinds of layers that stay in float.
    """

    layers: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    keep_float: Mapping[str, str] = field(default_factory=dict)
    without: Collection[Kind] = ()

    def left_out(self, module: fx.GraphModule, kinds: Mapping[str, Kind]) -> Mapping[str, str]:
        """Return path → reason of the modules that are not wanted; `kinds` are those of layers by path.

        Raises `SpecError` for a pattern or a path that matches nothing.
        """
        paths = [path for path, _ in module.named_modules() if path]
        for path in self.keep_float:
            if path not in paths:
                raise SpecError(f"keep_float names '{path}', which the graph does not have; {nearest(path, paths)}")
        named = match_layers(self.layers, module) if self.layers else set(paths)
        unnamed = dict.fromkeys((path for path in paths if path not in named), "it was not asked for")
        excluded = dict.fromkeys(match_layers(self.exclude, module), "it was excluded")
        kept = {path: f"no {kind.name} was asked for" for path, kind in kinds.items() if kind in self.without}
        return {**kept, **unnamed, **excluded, **self.keep_float}


def select(values: Values, ranges: Ranges | None, wanted: Wanted) -> dict[str, str]:
    """Return path → why it stays in float of every layer of a kind, "" for those that can be quantised.

    Raises:
        InputError: the graph is in training mode, has masked weights, or was not calibrated.
        SpecError: a pattern or a path that matches nothing.
    """
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node in values.kinds:
        calls[str(node.target)].append(node)
    if not calls:
        return {}
    left_out = wanted.left_out(values.module, {path: values.kinds[nodes[0]] for path, nodes in calls.items()})
    reasons = {path: left_out.get(path) or _refusal(values, path, nodes) for path, nodes in calls.items()}
    able = [path for path, reason in reasons.items() if not reason]
    if not able:
        return reasons
    known = _known(values, ranges)
    return reasons | {path: _not_fed(values, calls[path][0], known) for path in able}


def _refusal(values: Values, path: str, nodes: list[fx.Node]) -> str:
    layer = values.module.get_submodule(path)
    check_finalized(path, layer)
    return refusal(layer, values.kinds[nodes[0]], nodes) or ""


def _known(values: Values, ranges: Ranges | None) -> Collection[str]:
    """Return the names of the values that have ranges, some of which are values of this graph."""
    if values.module.training:
        raise InputError("the graph is in training mode; call .eval() on it, calibrate, and quantise then")
    if ranges is None:
        raise InputError(
            "quantisation needs the ranges of the graph's values; find them in data that the model will see: "
            "ranges = fxprune.quantization.calibrate(graph, batches), then Quantization(ranges=ranges)"
        )
    if not ranges.by_name.keys() & {node.name for node in values.nodes}:
        raise InputError(
            "the ranges are of another graph: no value of this one has any; calibrate the graph that all passes "
            "before quantisation have run on"
        )
    return ranges.by_name.keys()


def _not_fed(values: Values, node: fx.Node, known: Collection[str]) -> str:
    """Return what is wrong with the input of a layer, if anything."""
    origin = values.origin(operand(node))
    if values.is_written(origin):
        return f"its input '{origin.name}' is written into in place"
    unseen = [name for name in values.needed(node) if name not in known]
    return f"calibration saw no float32 value of '{unseen[0]}'" if unseen else ""
