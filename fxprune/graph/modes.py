"""Merge the training graph and the evaluation graph of one model into one that obeys train() and eval().

And tell which modules act by their mode at all.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn

from fxprune.graph.writing import own_memory, writes_into
from fxprune.runtime.modes import by_mode

__all__ = ["merge_modes", "modules_with_state", "reads_training", "reads_training_only"]


def merge_modes(graph: fx.Graph, other: fx.Graph, named: Mapping[str, Any], *, training: bool) -> fx.Graph | None:
    """Return one graph that acts as `graph` in the mode `training` and as `other` in the other mode.

    `named` is what the graphs name: modules, parameters and buffers.

    1. Nodes that both graphs have are shared; a literal that is `True` in one and `False` in the other reads the
       module's own `training` flag instead.
    2. What only the training graph computes (auxiliary heads) stays in the graph, and where the outputs differ,
       `by_mode(training, a, b)` chooses.

    None when the evaluation graph computes anything that the training graph does not, since the two then share no
    order, when a graph holds literal tensors, which cannot be told apart by name, and when what only the training graph
    computes writes into a value that the evaluation graph has too (running averages, noise that is added in place).
    """
    if any(str(n.target).startswith("_tensor_constant") for g in (graph, other) for n in g.nodes):
        return None
    train_graph, eval_graph = (graph, other) if training else (other, graph)
    return _Merge(train_graph, eval_graph, named).run()


class _Merge:
    def __init__(self, train_graph: fx.Graph, eval_graph: fx.Graph, named: Mapping[str, Any]) -> None:
        self.named = named
        self.merged = fx.Graph(tracer_cls=train_graph._tracer_cls)
        self.eval_nodes = list(eval_graph.nodes)
        self.train_nodes = list(train_graph.nodes)
        self.from_train: dict[fx.Node, fx.Node] = {}
        self.from_eval: dict[fx.Node, fx.Node] = {}
        self.flag: fx.Node | None = None

    def run(self) -> fx.Graph | None:
        position = 0
        for node in self.train_nodes[:-1]:
            partner = self.eval_nodes[position]
            if not self._same(node, partner):
                if any(self._is_seen_by_both(n) for n in writes_into(node, self.named)):
                    return None
                self._copy(node, node.args, node.kwargs)
                continue
            args, kwargs = self._join(node.args, partner.args), self._join(node.kwargs, partner.kwargs)
            self.from_eval[partner] = self._copy(node, args, kwargs)
            position += 1
        if position != len(self.eval_nodes) - 1:
            return None
        self._output()
        return self.merged

    def _is_seen_by_both(self, node: fx.Node) -> bool:
        """Whether the value of a training node may share memory with one that the evaluation graph has too."""
        shared = set(self.from_eval.values())
        sources = own_memory(node, self.named)
        return any(source.op in ("placeholder", "get_attr") or self.from_train[source] in shared for source in sources)

    def _same(self, node: fx.Node, partner: fx.Node) -> bool:
        """Whether the two do the same to the same values, literals that follow the mode aside."""
        if (node.op, node.target) != (partner.op, partner.target) or partner.op == "output":
            return False
        return self._equal(node.args, partner.args) and self._equal(node.kwargs, partner.kwargs)

    def _equal(self, a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node) or isinstance(b, fx.Node):
            return isinstance(a, fx.Node) and isinstance(b, fx.Node) and self.from_train.get(a) is self.from_eval.get(b)
        if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
            return len(a) == len(b) and all(self._equal(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(self._equal(a[k], b[k]) for k in a)
        return bool(type(a) is type(b) and (a == b or (a is True and b is False)))

    def _join(self, a: Any, b: Any) -> Any:
        """Return the arguments of the training node, reading the flag where the two modes differ."""
        if isinstance(a, (tuple, list)):
            return type(a)(self._join(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict):
            return {k: self._join(a[k], b[k]) for k in a}
        return self._training() if a is True and b is False else a

    def _training(self) -> fx.Node:
        if self.flag is None:
            self.flag = self.merged.create_node("get_attr", "training")
        return self.flag

    def _copy(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        def mapped(n: fx.Node) -> fx.Node:
            return self.from_train.get(n, n)

        copied = self.merged.create_node(
            node.op, node.target, fx.node.map_arg(args, mapped), fx.node.map_arg(kwargs, mapped), node.name, node.type
        )
        copied.meta = dict(node.meta)
        self.from_train[node] = copied
        return copied

    def _output(self) -> None:
        train_out, eval_out = self.train_nodes[-1].args[0], self.eval_nodes[-1].args[0]
        result = fx.node.map_arg(train_out, lambda n: self.from_train[n])
        if not self._equal(train_out, eval_out):
            chosen = fx.node.map_arg(eval_out, lambda n: self.from_eval[n])
            result = self.merged.create_node("call_function", by_mode, (self._training(), result, chosen))
        self.merged.create_node("output", "output", (result,))


def modules_with_state(m: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts of a module that hold parameters or buffers of their own."""
    return (s for s in m.modules() if s._parameters or s._buffers)


def reads_training(m: nn.Module) -> bool:
    """Whether a method of a module's class, torch.nn's own aside, reads `self.training`."""
    kind: Any = type(m)
    return _class_reads_training(kind)


@functools.cache
def _class_reads_training(kind: Any) -> bool:
    for base in kind.__mro__:
        if base.__module__.startswith("torch."):
            continue
        for attribute in vars(base).values():
            code = getattr(inspect.unwrap(attribute) if callable(attribute) else None, "__code__", None)
            if code is not None and "training" in code.co_names:
                return True
    return False


def reads_training_only(m: nn.Module) -> bool:
    """Whether `m` is stateless and acts by `self.training` (DropPath): left a leaf, so train() and eval() reach it."""
    return reads_training(m) and not any(True for _ in modules_with_state(m))
