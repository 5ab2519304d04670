"""Shapes, dtypes and memory formats of every node, by one run on meta tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.errors import FxpruneError, InputError
from fxprune.graph.execution import MetaInterpreter, MetaMode
from fxprune.graph.undisturbed import undisturbed

__all__ = ["copy_shapes", "input_pixels", "propagate_shapes", "record_shape", "run_analysis", "shapes_of"]


def propagate_shapes(module: fx.GraphModule) -> None:
    """Write `meta["val"]`, the value with meta tensors for its tensors, into every node.

    Raises `InputError` when the graph cannot run on its inputs, naming the node.
    """
    run_analysis(module, MetaInterpreter(module, MetaMode(), record_shape))


def run_analysis(module: fx.GraphModule, interpreter: MetaInterpreter) -> None:
    """Run an interpreter over a module that stays as it is; raise `InputError` naming the node that cannot run."""
    try:
        with undisturbed(module):
            interpreter.run_from_meta()
    except FxpruneError:
        raise
    except Exception as error:
        raise _explained(module, interpreter.current, error) from error


def record_shape(node: fx.Node, value: Any) -> None:
    """Write a node's meta value where readers of torch.fx graphs look for it."""
    node.meta["val"] = value


def copy_shapes(source: fx.GraphModule, target: fx.GraphModule) -> None:
    """Give every node of `target` the shapes of the node of that name in `source`."""
    values = {node.name: node.meta["val"] for node in source.graph.nodes if "val" in node.meta}
    for node in target.graph.nodes:
        if node.name in values:
            node.meta["val"] = values[node.name]


def _explained(module: fx.GraphModule, node: fx.Node | None, error: BaseException) -> InputError:
    """Say which node cannot run on the example inputs, and the usual remedy."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if module.training and "Expected more than 1 value per channel" in reason:
        return InputError(
            "the model is in training mode and the example batch has one sample, which batch normalisation cannot "
            "take; call model.eval() first, or give a batch of two or more"
        )
    where = f"at '{node.format_node() or node.name}'" if node is not None else "at its start"
    return InputError(f"the model does not run on the example inputs: {where}: {reason}")


def shapes_of(value: Any) -> list[torch.Size]:
    """Return the shapes of all tensors in a nested value, in order."""
    if isinstance(value, Tensor):
        return [value.shape]
    return [leaf.shape for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def input_pixels(module: fx.GraphModule) -> int:
    """Return batch × spatial positions of the first input, or its batch size where it has no space.

    Images come as one tensor [N, C, ...], or as a list of [C, H, W].
    """
    for node in module.graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        shapes = shapes_of(value)
        if not shapes:
            continue
        if isinstance(value, (list, tuple)) and all(len(shape) == 3 for shape in shapes):
            return sum(shape[1:].numel() for shape in shapes)
        first = shapes[0]
        return first[:1].numel() * first[2:].numel()
    return 1
