"""What every kind of operator does with uint8 values: one table, whose last row is the default.

Layers that compute on uint8 are rows of a table of their own, `KINDS` in `layers`.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd

from fxprune.graph.hooks import is_hooked
from fxprune.graph.writing import writes_into
from fxprune.quantization.layers import find_kind, runs_as
from fxprune.runtime.im2col import im2col

__all__ = ["ASKS", "COMPUTES", "FLOAT", "GIVES_ON", "MOVES", "PADS", "SELECTS", "Rule", "rule_of", "written_by"]


@dataclass(frozen=True)
class Rule:
    """What an operator does with the first of its arguments.

    Attributes:
        takes: the form that it takes: "uint8", "float", or "any".
        keeps_form: it gives what it takes.
        keeps_values: it gives every value that it takes, and no other but zero, so that their range stays.
        is_identity: it gives what it takes, and does nothing else.
        pads: it gives more values than it takes, zeros among them: its last argument is their level, 0 in float.
    """

    takes: str
    keeps_form: bool = False
    keeps_values: bool = False
    is_identity: bool = False
    pads: bool = False


COMPUTES = Rule("uint8")
"""Takes uint8, and gives uint8 or float32 as its readers like."""

MOVES = Rule("any", keeps_form=True, keeps_values=True)
"""Puts values elsewhere."""

GIVES_ON = Rule("any", keeps_form=True, keeps_values=True, is_identity=True)
"""Does nothing in evaluation."""

PADS = Rule("any", keeps_form=True, keeps_values=True, pads=True)
"""Puts values elsewhere, many of them several times, and zeros between them."""

SELECTS = Rule("any", keeps_form=True)
"""Gives some of the values."""

ASKS = Rule("any")
"""Asks for the shape only."""

FLOAT = Rule("float")
"""Takes float32 and gives float32."""


_MODULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys([nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d], GIVES_ON),
    **dict.fromkeys([nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle], MOVES),
}
"""Max pools are not here: torch's take levels whose channels lie last from images of up to 127 positions only."""

_METHODS: dict[str, Rule] = {
    **dict.fromkeys(["permute", "transpose", "swapaxes", "movedim", "moveaxis", "t", "adjoint"], MOVES),
    **dict.fromkeys(["reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze"], MOVES),
    **dict.fromkeys(["contiguous", "clone", "expand", "roll", "chunk", "split", "unbind", "tensor_split"], MOVES),
    **dict.fromkeys(["narrow", "select"], SELECTS),
    **dict.fromkeys(["size", "dim", "numel", "stride"], ASKS),
}
"""Those of the first four rows are functions of torch too."""

_FUNCTIONS: dict[Any, Rule] = {
    **{getattr(torch, name): rule for name, rule in _METHODS.items() if hasattr(torch, name)},
    **dict.fromkeys([functional.pixel_shuffle, functional.pixel_unshuffle], MOVES),
    functional.dropout: GIVES_ON,
    im2col: PADS,
    operator.getitem: SELECTS,
}


def rule_of(module: fx.GraphModule, node: fx.Node) -> Rule:
    """Return what a node does with its first argument, where that is a value of the graph."""
    if not node.args or not isinstance(node.args[0], fx.Node) or _is_special(module, node):
        return FLOAT
    if node.op == "call_module":
        return _rule_of_leaf(module.get_submodule(str(node.target)))
    if node.op == "call_method":
        return _METHODS.get(str(node.target), FLOAT)
    if node.target is getattr:
        return ASKS if node.args[1] in ("shape", "ndim", "device") else FLOAT
    return _FUNCTIONS.get(node.target, FLOAT) if node.op == "call_function" else FLOAT


def _rule_of_leaf(leaf: nn.Module) -> Rule:
    if is_hooked(leaf):
        return FLOAT
    kind = find_kind(leaf)
    if kind is not None and runs_as(leaf) is kind.base:
        return COMPUTES
    return _MODULES.get(runs_as(leaf), FLOAT)


def _is_special(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a dropout drops, or patches are filled up with levels already."""
    if node.op == "call_module":
        leaf = module.get_submodule(str(node.target))
        return isinstance(leaf, _DropoutNd) and leaf.training
    if node.target is functional.dropout:
        return _option(node, "training") is not False
    return node.target is im2col and bool(node.kwargs or node.args[-1])


def _option(node: fx.Node, name: str) -> Any:
    """Return what a call gives for a parameter of its function; None where it gives nothing, or that is not known."""
    called: Any = node.target
    try:
        return inspect.signature(called).bind(*node.args, **node.kwargs).arguments.get(name)
    except (TypeError, ValueError):  # a function of C, which has no signature
        return node.kwargs.get(name)


def written_by(module: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Return the inputs of a node that it writes into; a module that does says so."""
    if node.op != "call_module":
        return list(writes_into(node, {}))
    return node.all_input_nodes[:1] if getattr(module.get_submodule(str(node.target)), "inplace", False) else []
