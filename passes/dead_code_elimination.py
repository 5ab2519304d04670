"""Remove what no output depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from fxprune.graph.passes import Pass
from fxprune.runtime.weight_masks import class_of

__all__ = ["DeadCodeElimination"]


@dataclass(frozen=True)
class DeadCodeElimination(Pass):
    """Remove nodes without users and the submodules that no node calls any more.

    Before: `%a = conv(%x)`, `%b = unused(%x)`, `output %a`
    After: `%a = conv(%x)`, `output %a`

    Option: `identities` also removes calls of `torch.nn.Identity`, each of which costs a lowered model time.
    """

    name: ClassVar[str] = "dead-code-elimination"

    identities: bool = False

    def rewrite(self, module: fx.GraphModule) -> bool:
        """Erase dead nodes and dangling submodules."""
        before = len(module.graph.nodes)
        if self.identities:
            _pass_on(module)
        # Leaf modules are pure but for statistics of batch norms, which nothing reads in a dead branch.
        changed = module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        module.delete_all_unused_submodules()
        return changed or len(module.graph.nodes) != before


def _pass_on(module: fx.GraphModule) -> None:
    """Let those who read an identity read what it gives on."""
    for node in module.graph.nodes:
        if node.op != "call_module" or class_of(module.get_submodule(str(node.target))) is not nn.Identity:
            continue
        if len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs:
            node.replace_all_uses_with(node.args[0])
