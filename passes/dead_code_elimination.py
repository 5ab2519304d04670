"""Remove what no output depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from fxprune.graph.hooks import is_hooked
from fxprune.graph.passes import Pass
from fxprune.graph.writing import own_memory, writes_into
from fxprune.runtime.weight_masks import class_of

__all__ = ["DeadCodeElimination"]


@dataclass(frozen=True)
class DeadCodeElimination(Pass):
    """Remove nodes that no output depends on, and the submodules and tensors that no node needs any more.

    Before: `%a = conv(%x)`, `%b = unused(%x)`, `output %a`
    After: `%a = conv(%x)`, `output %a`

    A node that writes in place into a value, or a view of it, that something else reads, or into an input, stays.

    Option: `identities` also removes calls of `torch.nn.Identity`, each of which costs a lowered model time.
    """

    name: ClassVar[str] = "dead-code-elimination"

    identities: bool = False

    def rewrite(self, module: fx.GraphModule) -> bool:
        """Erase dead nodes and dangling submodules."""
        before, read = len(module.graph.nodes), _attributes(module)
        if self.identities:
            _pass_on(module)
        # Leaf modules are pure but for statistics of batch norms, which nothing reads in a dead branch.
        changed = module.graph.eliminate_dead_code(_living(module).__contains__)
        _forget(module, read - _attributes(module))
        module.delete_all_unused_submodules()
        return changed or len(module.graph.nodes) != before


def _attributes(module: fx.GraphModule) -> set[str]:
    """Return the paths of the tensors that nodes read."""
    return {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}


def _forget(module: fx.GraphModule, paths: set[str]) -> None:
    """Take away tensors that no node reads any more, but for those of modules that are called."""
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    for path in paths:
        owner, _, name = path.rpartition(".")
        if not any(f"{owner}.".startswith(f"{other}.") for other in called):
            part = module.get_submodule(owner)
            for held in (part._parameters, part._buffers):
                held.pop(name, None)


def _living(module: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes that the output depends on: what it reads, and what writes into the memory of that."""
    named = dict(module.named_modules())
    living: set[fx.Node] = set()
    given = [node for node in module.graph.nodes if node.op in ("placeholder", "get_attr")]
    pending = [node for node in module.graph.nodes if node.op in ("placeholder", "output")]
    while pending:
        _revive(pending, living)
        seen = living.union(given)
        dead = [node for node in module.graph.nodes if node not in living]
        pending = [n for n in dead if any(seen & own_memory(into, named) for into in writes_into(n, named))]
    return living


def _revive(pending: list[fx.Node], living: set[fx.Node]) -> None:
    """Add nodes, and all that they read, to those that are living."""
    while pending:
        node = pending.pop()
        if node not in living:
            living.add(node)
            pending += node.all_input_nodes


def _pass_on(module: fx.GraphModule) -> None:
    """Let those who read an identity read what it gives on."""
    for node in module.graph.nodes:
        leaf = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if leaf is None or class_of(leaf) is not nn.Identity or is_hooked(leaf):
            continue
        if len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs:
            node.replace_all_uses_with(node.args[0])
