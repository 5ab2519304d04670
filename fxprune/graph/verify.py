"""Check what every pass must leave behind."""

from __future__ import annotations

import warnings

import torch
from torch import fx

from fxprune.errors import VerifyError
from fxprune.graph.shapes import shapes_of

__all__ = ["output_shapes", "verify"]


def output_shapes(module: fx.GraphModule) -> list[torch.Size]:
    """Return the shapes of everything that the graph returns, as its nodes record them."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    return [shape for node in output.all_input_nodes for shape in shapes_of(node.meta.get("val"))]


def verify(module: fx.GraphModule, culprit: str, outputs: list[torch.Size]) -> None:
    """Raise `VerifyError` unless the graph holds together.

    1. Lint: every value is defined before it is used, every name is unique, every target exists.
    2. No dangling state: every parameter and buffer belongs to a node of the graph.
    3. What the model returns has the shapes `outputs` that it had before, where they were known.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.graph.lint()
    except Exception as error:
        raise VerifyError(f"pass '{culprit}' broke the graph: {error}") from error
    targets = {str(n.target) for n in module.graph.nodes if n.op in ("call_module", "get_attr")}
    for name, _ in (*module.named_parameters(), *module.named_buffers()):
        parts = name.split(".")
        if not any(".".join(parts[:end]) in targets for end in range(1, len(parts) + 1)):
            raise VerifyError(f"pass '{culprit}' left '{name}' behind, which no node of the graph uses")
    found = output_shapes(module)
    if outputs and found != outputs:
        raise VerifyError(f"pass '{culprit}' changed the shapes of the outputs from {outputs} to {found}")
