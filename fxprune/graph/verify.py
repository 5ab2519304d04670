"""Check what every pass must leave behind."""

from __future__ import annotations

import warnings

from torch import fx

from fxprune.errors import VerifyError
from fxprune.graph.dump import dump

__all__ = ["verify"]


def verify(module: fx.GraphModule, culprit: str) -> None:
    """Raise `VerifyError` unless the graph holds together.

    1. Lint: every value is defined before it is used, every name is unique, every target exists.
    2. No dangling state: every parameter and buffer belongs to a node of the graph.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.graph.lint()
    except Exception as error:
        raise VerifyError(f"pass '{culprit}' broke the graph: {error}\n{dump(module)}") from error
    targets = {str(n.target) for n in module.graph.nodes if n.op in ("call_module", "get_attr")}
    for name, _ in (*module.named_parameters(), *module.named_buffers()):
        parts = name.split(".")
        if not any(".".join(parts[:end]) in targets for end in range(1, len(parts) + 1)):
            raise VerifyError(f"pass '{culprit}' left '{name}' behind, which no node of the graph uses")
