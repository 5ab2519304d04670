"""Run a graph once and let labels flow through every ATen operator that PyTorch executes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fxprune.graph.execution import MetaInterpreter, MetaMode, is_mutating
from fxprune.graph.facts import trace_facts
from fxprune.graph.leaves import follows_input
from fxprune.graph.shapes import record_shape, run_analysis
from fxprune.labels.call import Call, is_labelled, nothing
from fxprune.labels.flow import Choice, Flow, Labelled, Labels
from fxprune.labels.leaves import LeafRule, find_leaf_rule
from fxprune.labels.literals import KEEPS_INPUT, can_rederive, operator_of
from fxprune.labels.partition import Partition, partition
from fxprune.labels.rules import FAMILIES, find_rule, operator_name
from fxprune.labels.zeros import joins, keeps_zeros
from fxprune.runtime.masks import is_mask, mask_channels, reads_mask
from fxprune.runtime.modes import by_mode
from fxprune.runtime.opaque import OpaqueFunction
from fxprune.runtime.weight_masks import is_weight_mask, plain_name

__all__ = ["RULE_FAILED", "Labelling", "propagate_labels"]

RULE_FAILED = "the rule for this operator failed"
"""How the reason of a pin begins that a defect of fxprune is behind."""

_NO_AXES: Mapping[Choice, int] = {}


@dataclass(frozen=True)
class Labelling:
    """What one propagation found out about a graph.

    Attributes:
        flow: the facts that the rules stated.
        partition: the classes of slots that follow from them.
        values: node name → its value, every tensor replaced by a `Labelled`.
        vectors: every distinct label vector that any operator made.
        unruled: operator → number of calls, of those that have no rule and pinned something.
    """

    flow: Flow
    partition: Partition
    values: dict[str, Any]
    vectors: tuple[Tensor, ...]
    unruled: dict[str, int]


def propagate_labels(module: fx.GraphModule, axes: Mapping[Choice, int] | None = _NO_AXES) -> Labelling:
    """Let labels flow through `module`, whose placeholders carry shapes in `meta["val"]`; all nodes do afterwards.

    Args:
        module: the graph.
        axes: which of divided or merged dimensions keeps its label, where not the one that the rules would choose;
            None for a probe, see `Flow`.

    Raises `InputError` when the graph does not run on those shapes.
    """
    mode = _LabelMode(module, Flow(axes))
    run_analysis(module, _LabelInterpreter(module, mode))
    return Labelling(mode.flow, partition(mode.flow), mode.values, tuple(mode.vectors.values()), mode.unruled)


class _LabelMode(MetaMode):
    """Applies the rule of every operator that has labelled arguments."""

    def __init__(self, module: fx.GraphModule, flow: Flow) -> None:
        super().__init__()
        self.flow = flow
        self.values: dict[str, Any] = {}
        self.unruled: dict[str, int] = {}
        self.vectors: dict[int, Tensor] = {}
        self.may_reshape = True
        self.spelling = ""
        self.opaque = False
        self.leaf_rule: LeafRule | None = None
        self.ran_unseen = False
        self.inputs: list[Tensor] = []
        self._sources: dict[int, tuple[Tensor, str]] = {}
        self._labels: dict[int, tuple[Tensor, Labels]] = {}
        self._constants: dict[int, Tensor] = {}
        self._varying: dict[int, Tensor] = {}
        for name, tensor, is_parameter in _named_tensors(module):
            slots = self.flow.slots.add(name, tensor.shape, is_parameter=is_parameter)
            self._write(self.twin(tensor), slots.labels())

    def _write(self, tensor: Tensor, labels: Labels) -> None:
        """Give labels to a tensor; the only position of a dimension must stay."""
        if not is_labelled(labels):
            self._labels.pop(id(tensor), None)
            return
        checked = list(labels)
        for d, label in enumerate(labels):
            if label is None:
                continue
            if tensor.shape[d] <= 1:
                self.flow.pin(label, "the only position of its dimension")
                checked[d] = None
            elif id(label) not in self.vectors:
                self.vectors[id(label)] = label
        self._labels[id(tensor)] = (tensor, tuple(checked))

    def read(self, tensor: Tensor) -> Labels:
        """Return the labels of a tensor."""
        known = self._labels.get(id(tensor))
        return nothing(tensor) if known is None else known[1]

    def twin(self, tensor: Tensor) -> Tensor:
        made = super().twin(tensor)
        if made is not tensor and not tensor.is_floating_point():
            self._constants[id(made)] = tensor
        return made

    def source(self, tensor: Tensor) -> str | None:
        """Return the input node of the current node whose zeros are zeros of this tensor, None if there is none."""
        known = self._sources.get(id(tensor))
        return None if known is None else known[1]

    def observe(self, operator: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        inputs = _tensors(args, kwargs)
        self.flow.step += 1
        self._follow_zeros(operator, args, inputs, result)
        if any(self.varies(t) for t in inputs):
            self._vary(result)
        if not any(id(t) in self._labels for t in inputs) and not _states_facts(operator):
            return
        self.flow.operator = operator_name(operator)
        self._assign(result, self._apply(operator, Call(self, operator, args, kwargs, result)))

    def _follow_zeros(self, operator: OpOverload, args: tuple[Any, ...], inputs: list[Tensor], result: Any) -> None:
        """Note that zeros of the node's input are zeros of the result, where the operator keeps them.

        What writes anything else in place ends it for the whole node, since views of the tensor change with it.
        """
        if not keeps_zeros(operator, args):
            if is_mutating(operator):
                self._sources.clear()
            return
        sources = [self.source(t) for t in inputs]
        known = {source for source in sources if source is not None}
        if len(known) == 1 and (None not in sources or not joins(operator)):
            (source,) = known
            self._sources.update((id(t), (t, source)) for t in _tensors(result))

    def varies(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on an input of the graph."""
        return id(tensor) in self._varying

    def _vary(self, value: Any) -> None:
        """Note that the tensors of a value depend on an input; they are held, so that no other gets their id."""
        self._varying.update((id(t), t) for t in _tensors(value))

    def constant(self, tensor: Tensor) -> Tensor | None:
        """Return the real values of an integer table, None for a tensor that depends on data."""
        return self._constants.get(id(tensor), tensor if tensor.device.type != "meta" else None)

    def _apply(self, operator: OpOverload, call: Call) -> Any:
        rule = find_rule(operator)
        if self.opaque:
            call.pin_all("inside a module that was not traced")
            if self.flow.operator not in FAMILIES["contraction"]:
                return None
        if rule is None:
            self.unruled[self.flow.operator] = self.unruled.get(self.flow.operator, 0) + 1
            call.pin_all("no rule for this operator")
            return None
        try:
            return rule(call)
        except Exception as error:
            call.pin_all(f"{RULE_FAILED}, please report it: {type(error).__name__}: {error}")
            return None

    def _assign(self, result: Any, labels: Any) -> None:
        results = [result] if isinstance(result, Tensor) else list(result or ())
        given = [labels] if isinstance(result, Tensor) else list(labels or ())
        for i, tensor in enumerate(results):
            if isinstance(tensor, Tensor):
                found = given[i] if i < len(given) and given[i] is not None else nothing(tensor)
                self._write(tensor, found)

    def enter(self, module: fx.GraphModule, node: fx.Node, inputs: dict[str, Any]) -> None:
        """Prepare for the operators of one node, whose input nodes have the values `inputs`."""
        self.flow.node = node.name
        self.inputs = _tensors(inputs)
        self._sources = {id(value): (value, name) for name, value in inputs.items() if isinstance(value, Tensor)}
        leaf = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        self.may_reshape = can_rederive(node) if leaf is None else follows_input(leaf)
        self.spelling = operator_of(node) if leaf is None else ""
        self.leaf_rule = None if leaf is None else find_leaf_rule(leaf)
        if self.spelling in KEEPS_INPUT:
            self.flow.operator = self.spelling
            for label in (label for tensor in self.inputs for label in self.read(tensor)):
                self.flow.pin(label, "its width is an argument of the function")
        self.ran_unseen = False
        self.opaque = leaf is not None and not self.leaf_rule and str(node.target) in trace_facts(module).opaque
        if self.opaque and leaf is not None:
            self.unseen(leaf, 0)

    def unseen(self, leaf: nn.Module, macs: int) -> None:
        """Count what a leaf was measured to cost; pin all that it holds and takes, unless it has a rule of its own."""
        self.flow.operator = leaf.extra_repr() if isinstance(leaf, OpaqueFunction) else type(leaf).__name__
        self.flow.recount_macs(macs)
        self.ran_unseen = True
        if self.leaf_rule is not None:
            return
        for tensor in (*leaf.parameters(), *leaf.buffers(), *self.inputs):
            for label in self.read(self.twin(tensor)):
                self.flow.pin(label, "meets a module that was not traced")

    def leave(self, node: fx.Node, value: Any) -> None:
        """Record the labels of a node's value; what the graph returns must stay whole."""
        if node.op == "output" or node.target is by_mode:
            self.flow.operator = "output"
            for tensor in _tensors(value, self.inputs):
                for label in self.read(tensor):
                    self.flow.pin(label, "returned by the model")
        if self.leaf_rule is not None and self.ran_unseen:
            self._write(value, self.leaf_rule(self.flow, [(t, self.read(t)) for t in self.inputs], value))
        # Operators of a leaf may have been out of sight.
        if node.op == "placeholder" or (node.op == "call_module" and any(self.varies(t) for t in self.inputs)):
            self._vary(value)
        record_shape(node, value)
        self.values[node.name] = self._labelled(value)

    def _labelled(self, value: Any) -> Any:
        """Return a node's value with every tensor replaced by its size and labels."""
        if isinstance(value, Tensor):
            return Labelled(tuple(value.shape), self.read(value))
        return pytree.tree_map_only(Tensor, self._labelled, value)


class _LabelInterpreter(MetaInterpreter):
    def __init__(self, module: fx.GraphModule, mode: _LabelMode) -> None:
        super().__init__(module, mode, mode.leave)
        self.labels = mode
        self.traced = module

    def run_node(self, n: fx.Node) -> Any:
        if reads_mask(n):
            return None
        if n.target is mask_channels:
            value = self.env[n.args[0]]  # type: ignore[index]
            self.visit(n, value)
            return value
        inputs = {i.name: self.env[i] for i in n.all_input_nodes}
        self.labels.enter(self.traced, n, inputs)
        return super().run_node(n)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield every floating parameter, floating buffer and weight mask once, under its first name.

    A parametrised weight goes by its plain name. Channel masks and gates are none of the model's.
    """
    for name, parameter in module.named_parameters():
        if not is_mask(name):
            yield plain_name(name), parameter, True
    for name, buffer in module.named_buffers():
        if (buffer.is_floating_point() or is_weight_mask(name)) and not is_mask(name):
            yield name, buffer, False


def _tensors(*values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(_tensors(*value))
        elif isinstance(value, dict):
            found.extend(_tensors(*value.values()))
    return found


@functools.cache
def _states_facts(operator: OpOverload) -> bool:
    """Whether an operator has something to say even without labels: it makes slots, or costs MACs."""
    name = operator_name(operator)
    return name in FAMILIES["creation"] or name in FAMILIES["contraction"] or name in ("aten.expand", "aten.repeat")
