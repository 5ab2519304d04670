"""How a graph was made, kept with the graph."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

__all__ = ["TraceFacts", "set_trace_facts", "trace_facts"]

_KEY = "fxprune.trace"


@dataclass(frozen=True)
class TraceFacts:
    """The front end that ran, why others did not (`notes`), and the leaves that were not traced into.

    `opaque` maps the path of each opaque submodule to the reason.
    """

    frontend: str
    opaque: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def trace_facts(module: fx.GraphModule) -> TraceFacts:
    """Return how `module` was traced; of a GraphModule from elsewhere nothing is known."""
    return module.meta.get(_KEY) or TraceFacts(frontend="given")


def set_trace_facts(module: fx.GraphModule, facts: TraceFacts) -> None:
    """Keep `facts` with `module`; copies of it keep them too."""
    module.meta[_KEY] = facts
