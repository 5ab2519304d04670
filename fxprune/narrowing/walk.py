"""Run the narrow graph node by node, re-deriving literals and checking every shape against the prediction."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxprune.errors import FxpruneError, VerifyError
from fxprune.graph.dump import dump_around
from fxprune.graph.execution import MetaInterpreter, MetaMode
from fxprune.graph.leaves import narrowed_attributes
from fxprune.graph.shapes import record_shape, shapes_of
from fxprune.graph.undisturbed import undisturbed
from fxprune.labels.literals import Site, rederive
from fxprune.narrowing.kept import Kept

__all__ = ["narrow_nodes"]


def narrow_nodes(module: fx.GraphModule, kept: Kept) -> None:
    """Make every node of a graph with cut tensors right, and write its new shapes into `node.meta`.

    Raises `VerifyError` when a value's shape differs from what the labels predict.
    """
    walk = _Walk(module, kept)
    try:
        walk.run_from_meta()
    except FxpruneError:
        raise
    except Exception as error:
        name = walk.current.name if walk.current is not None else ""
        raise VerifyError(
            f"surgery made a graph that does not run at '{name}': {error}; please report this with the graph around "
            f"it:\n{dump_around(module, name)}"
        ) from error


class _Walk(MetaInterpreter):
    def __init__(self, module: fx.GraphModule, kept: Kept) -> None:
        super().__init__(module, MetaMode(), self._check)
        self.garbage_collect_values = False
        self.kept = kept
        self.narrow = module

    def run_node(self, n: fx.Node) -> Any:
        """Re-derive the arguments or attributes of one node, then run it."""
        if n.op in ("call_module", "call_function", "call_method", "output"):
            rederive(Site(self.narrow, n, self.kept, self.env))
        if n.op == "call_module":
            leaf = self.narrow.get_submodule(str(n.target))
            self._assign_attributes(n, leaf)
            with undisturbed(leaf):
                return super().run_node(n)
        return super().run_node(n)

    def _assign_attributes(self, node: fx.Node, leaf: nn.Module) -> None:
        inputs = [shape for source in node.all_input_nodes for shape in shapes_of(self.env[source])]
        outputs = self.kept.shapes(node.name)
        if inputs and outputs:
            for name, value in narrowed_attributes(leaf, inputs[0], outputs[0]).items():
                setattr(leaf, name, value)

    def _check(self, node: fx.Node, value: Any) -> None:
        record_shape(node, value)
        found = [tuple(shape) for shape in shapes_of(value)]
        if node.op == "get_attr" or node.name not in self.kept.labelling.values:
            return
        predicted = self.kept.shapes(node.name)
        if found != predicted:
            raise VerifyError(
                f"surgery made '{node.name}' {found} where {predicted} was predicted; please report this with the "
                f"graph around it:\n{dump_around(self.narrow, node.name)}"
            )
