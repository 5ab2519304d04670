"""Values of nodes while their graph is being recorded, for control flow that asks.

A symbolic tracer records what Python does with proxies. When Python asks for more than a proxy (`if`, `len`, `for`,
`range`, `int`), the nodes recorded so far are run on meta tensors, and the answer is what holds for the sizes of the
example inputs. What depends on the inputs' data has no answer.
"""

from __future__ import annotations

import dis
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute

from fxprune.errors import DataDependentError, first_line
from fxprune.graph.execution import MetaInterpreter, MetaMode

__all__ = ["ValueProxy", "Values"]


class _Mode(MetaMode):
    """Notes whether a leaf had to run on noise, so that what it gives may depend on data."""

    def __init__(self) -> None:
        super().__init__()
        self.ran_on_noise = False

    def unseen(self, leaf: nn.Module, macs: int) -> None:  # noqa: ARG002
        self.ran_on_noise = True


_KNOWN_OF_ANY_DATA = frozenset(["dtype", "device", "is_floating_point", "is_cuda"])
"""What a tensor tells about itself that does not depend on data even where its sizes do."""


class Values(MetaInterpreter):
    """Runs the nodes of a growing graph, each once and in order.

    `running` is true meanwhile: the tracer must not record what happens inside. `steered` tells whether any value has
    decided what was recorded.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, leaves: Mapping[str, nn.Module]) -> None:
        self.notes = _Mode()
        super().__init__(root, self.notes, lambda *_: None, graph=graph)
        self.leaves = leaves
        self.running = False
        self.steered = False
        self.uncertain: set[fx.Node] = set()
        self.failed: dict[fx.Node, str] = {}
        self._last: fx.Node = graph._root

    def fetch_attr(self, target: str) -> Any:
        """Return what a node names: a leaf that the tracer made, or an attribute of the model."""
        return self.leaves[target] if target in self.leaves else super().fetch_attr(target)

    def of(self, node: fx.Node) -> Any:
        """Return the meta value of a node.

        Raises `DataDependentError` when it cannot be known without the inputs' data.
        """
        self._catch_up(node)
        if node in self.failed:
            raise DataDependentError(self.failed[node])
        return self.env[node]

    def certain(self, node: fx.Node) -> Any:
        """Return a value that holds for all data, however the sizes inside were found."""
        value = self.of(node)
        if node in self.uncertain or isinstance(value, Tensor):
            raise DataDependentError(f"{_BY_DATA} '{node.name}'")
        self.steered = True
        return value

    def all_known(self) -> bool:
        """Whether every node that was recorded has a value."""
        *_, last = self.graph.nodes
        self._catch_up(last.prev)
        return not self.failed

    def _catch_up(self, node: fx.Node) -> None:
        """Run what was recorded up to `node`; the order matters for operators that write in place."""
        if node in self.env or node in self.failed:
            return
        self.running = True
        try:
            with self.on_meta_tensors():
                while node not in self.env and node not in self.failed:
                    self._last = self._last.next
                    self._run(self._last)
        finally:
            self.running = False

    def _run(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.env[node] = node.meta["val"]
            return
        lost = [i for i in node.all_input_nodes if i in self.failed]
        if lost:
            self.failed[node] = self.failed[lost[0]]
            return
        self.notes.ran_on_noise = False
        try:
            self.env[node] = self.run_node(node)
        except Exception as error:
            self.failed[node] = _reason(node, error)
            return
        inherits = any(i in self.uncertain for i in node.all_input_nodes) and not _tells_no_data(node)
        if inherits or self.notes.ran_on_noise:
            self.uncertain.add(node)


_BY_DATA = "control flow depends on the data in"


def _reason(node: fx.Node, error: Exception) -> str:
    """Say why a node has no value: operators whose sizes depend on data are not implemented for meta tensors."""
    if isinstance(error, NotImplementedError) or "meta tensor" in str(error):
        return f"{_BY_DATA} '{node.name}'"
    return f"'{node.name}' does not run on the example inputs: {first_line(error)}"


def _tells_no_data(node: fx.Node) -> bool:
    name = node.args[1] if node.target is getattr else node.target
    return name in _KNOWN_OF_ANY_DATA


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    """Return the method of an augmented assignment, of which torch.fx would make a value of its own.

    Views of a tensor and other names for it see what `x += y` writes.
    """

    def record(self: ValueProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return record


class ValueProxy(fx.Proxy):
    """A proxy whose value can be asked for."""

    tracer: Any
    """A tracer with `values: Values`."""

    __getitem__: Any

    def __getattr__(self, k: str) -> Any:
        rank = self._rank() if k == "ndim" else None
        return ValueAttribute(self, k) if rank is None else rank

    def _rank(self) -> int | None:
        """The number of dimensions, which is a fact about the graph; None for what is no tensor."""
        try:
            value = self.tracer.values.of(self.node)
        except DataDependentError:
            return None
        return value.dim() if isinstance(value, Tensor) else None

    def __bool__(self) -> bool:
        return bool(self.tracer.values.certain(self.node))

    def __index__(self) -> int:
        return operator.index(self.tracer.values.certain(self.node))

    def __int__(self) -> int:
        return int(self.tracer.values.certain(self.node))

    def __float__(self) -> float:
        return float(self.tracer.values.certain(self.node))

    def __len__(self) -> int:
        return self._length(self.tracer.values.of(self.node))

    def __contains__(self, item: Any) -> bool:
        value = self.tracer.values.of(self.node)
        if isinstance(value, Tensor):
            raise DataDependentError(f"{_BY_DATA} '{self.node.name}'")
        return item in value

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    __iadd__, __isub__, __imul__, __itruediv__ = map(_in_place, ("iadd", "isub", "imul", "itruediv"))
    __ifloordiv__, __imod__, __ipow__, __imatmul__ = map(_in_place, ("ifloordiv", "imod", "ipow", "imatmul"))
    __iand__, __ior__, __ixor__ = map(_in_place, ("iand", "ior", "ixor"))
    __ilshift__, __irshift__ = map(_in_place, ("ilshift", "irshift"))

    def __iter__(self) -> Iterator[Any]:
        frame = sys._getframe(1)
        code, at = frame.f_code.co_code, frame.f_lasti
        if dis.opname[code[at]] == "UNPACK_SEQUENCE" and self.node.op != "call_module":
            return (self[i] for i in range(code[at + 1]))
        value = self.tracer.values.of(self.node)
        if isinstance(value, dict):
            return iter(value)
        # A part that is None is no value of the graph but a fact about it.
        parts = [None] * self._length(value) if isinstance(value, Tensor) else value
        return iter([None if p is None and not isinstance(value, Tensor) else self[i] for i, p in enumerate(parts)])

    def _length(self, value: Any) -> int:
        """The number of parts of a container, or of positions of a tensor whose sizes are certain."""
        if isinstance(value, Tensor) and self.node in self.tracer.values.uncertain:
            raise DataDependentError(f"control flow depends on how many positions '{self.node.name}' has")
        return len(value)

    def keys(self) -> Any:
        """Return the keys of a dictionary; they are constants of the graph."""
        return self.tracer.values.of(self.node).keys()


class ValueAttribute(Attribute, ValueProxy):
    """An attribute of a value, recorded when it is used as more than the name of a method."""

    root: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Record the call of a method; the number of dimensions and the items of a dictionary are known."""
        if self.attr in ("dim", "ndimension") and (rank := self.root._rank()) is not None:
            return rank
        if self.attr in ("values", "items") and isinstance(self.tracer.values.of(self.root.node), dict):
            items = {key: self.root[key] for key in self.root.keys()}  # noqa: SIM118
            return getattr(items, self.attr)()
        return super().__call__(*args, **kwargs)
