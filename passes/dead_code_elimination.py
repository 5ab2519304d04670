"""Remove what no output depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.graph.passes import Pass

__all__ = ["DeadCodeElimination"]


@dataclass(frozen=True)
class DeadCodeElimination(Pass):
    """Remove nodes without users and the submodules that no node calls any more.

    Before: `%a = conv(%x)`, `%b = unused(%x)`, `output %a`
    After: `%a = conv(%x)`, `output %a`
    """

    name: ClassVar[str] = "dead-code-elimination"

    def rewrite(self, module: fx.GraphModule) -> bool:
        """Erase dead nodes and dangling submodules."""
        before = len(module.graph.nodes)
        # Leaf modules are pure but for statistics of batch norms, which nothing reads in a dead branch.
        changed = module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        module.delete_all_unused_submodules()
        return changed or len(module.graph.nodes) != before
