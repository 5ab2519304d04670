"""Run a graph on meta tensors: every ATen operator's shapes, no arithmetic, no memory.

A dispatch mode sees the operators that PyTorch really executes, below whatever Python called them. Real tensors
that meet it (parameters, buffers) are replaced by meta twins, so the model is neither copied nor changed. Meta
rather than fake tensors: the same shape functions at a third of their cost, and one decomposition for all devices.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from fxprune.errors import InputError
from fxprune.graph.inputs import on_meta
from fxprune.graph.undisturbed import without_fast_path

__all__ = ["MetaInterpreter", "MetaMode", "is_mutating", "ordinary"]

_CACHE_LIMIT = 50_000
_shapes: dict[Any, Any] = {}
_mutating: dict[OpOverload, bool] = {}


def is_mutating(func: OpOverload) -> bool:
    """Whether the operator writes into its first argument and returns it (`add_`, `relu_`, `copy_`)."""
    known = _mutating.get(func)
    if known is None:
        name = func._schema.name.split("::")[1]
        known = _mutating[func] = name.endswith("_") and not name.startswith("__")
    return known


def _positions(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return a constant mask of booleans as positions in each dimension, whose number a meta tensor would not tell."""
    if index is None or index.device.type == "meta" or index.dtype != torch.bool or not index.dim():
        return (index,)
    return index.nonzero(as_tuple=True)


def _run_on_noise(leaf: nn.Module, args: Any, kwargs: Any, error: Exception) -> tuple[Any, int]:
    """Run a copy of a leaf on noise outside of all modes; return its meta value and its MACs, or raise `error`."""
    # Not every version of torch counts the fused kernels of attention.
    with _disable_current_modes(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        try:
            value = copy.deepcopy(leaf)(*_noise(args), **_noise(kwargs))
        except Exception:
            raise error from None
    return on_meta(pytree.tree_map_only(Tensor, _not_empty, value)), counter.get_total_flops() // 2


def _noise(value: Any) -> Any:
    """Return `value` with numbers in [0, 1) for its floating meta tensors, and zeros for others.

    Tensors of equal shape get equal numbers, so that a leaf whose inputs keep their shapes gives equal shapes.
    """

    def sample(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        return torch.rand(tensor.shape, dtype=tensor.dtype, generator=torch.Generator().manual_seed(0))

    return pytree.tree_map_only(Tensor, sample, value)


def _not_empty(tensor: Tensor) -> Tensor:
    """Return a tensor with two positions where one has none: what is found in noise says nothing of other data."""
    return tensor if tensor.numel() else tensor.new_empty([size or 2 for size in tensor.shape])


class MetaMode(TorchDispatchMode):
    """Execute ATen operators on meta tensors and report each to `observe`."""

    def __init__(self) -> None:
        super().__init__()
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spare every operator the wrapper that keeps torch.compile out: nothing compiles this mode."""
        return False

    def observe(self, operator: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Hook: called after every operator with its meta arguments and result."""

    def unseen(self, leaf: nn.Module, macs: int) -> None:
        """Hook: a leaf ran outside of the mode and was measured to cost `macs` multiply-accumulates."""

    def twin(self, tensor: Tensor) -> Tensor:
        """Return the meta tensor that stands for a real one; always the same for the same tensor."""
        if tensor.is_meta:
            return tensor
        found = self._twins.get(id(tensor))
        if found is None:
            # The real tensor is kept as well, so that its id is not given to another one.
            found = self._twins[id(tensor)] = (tensor, on_meta(tensor))
        return found[1]

    def _replace(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.twin(value)
        if isinstance(value, (list, tuple)):
            return type(value)(self._replace(v) for v in value)
        return value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim" or _is_integer_constant(func, args):
            return func(*args, **kwargs)
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [position for i in args[1] for position in _positions(i)])
        args = tuple(self._replace(a) for a in args)
        if kwargs:
            kwargs = {k: self._replace(v) for k, v in kwargs.items()}
            if kwargs.get("device") is not None:
                kwargs["device"] = torch.device("meta")
        result = _execute(func, args, kwargs)
        self.observe(func, args, kwargs, result)
        return result


def _is_integer_constant(func: OpOverload, args: tuple[Any, ...]) -> bool:
    """Whether the operator reads real integer tensors only: index tables are computed for real."""
    if args and isinstance(args[0], Tensor) and (args[0].is_meta or args[0].is_floating_point()):
        return False
    tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]
    if not tensors or is_mutating(func):
        return False
    return not any(t.is_meta or t.is_floating_point() for t in tensors)


def _execute(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the operator, or repeat a shape that an equal call gave before."""
    if is_mutating(func) and torch.Tag.inplace_view not in func.tags:
        return args[0]
    try:
        key = (func, _call_spec(args), _call_spec(tuple(kwargs.items())))
        known = _shapes.get(key)
    except TypeError:  # an unhashable argument
        return func(*args, **kwargs)
    if known is not None:
        return _rebuild(known)
    result = func(*args, **kwargs)
    if is_mutating(func):
        return result
    spec = _result_spec(result)
    if spec is not None:
        if len(_shapes) >= _CACHE_LIMIT:
            _shapes.clear()
        _shapes[key] = spec
    return result


def _call_spec(value: Any) -> Any:
    """Return a hashable description of an argument; two calls of equal description give equal shapes."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.storage_offset())
    if isinstance(value, (list, tuple)):
        return tuple(_call_spec(v) for v in value)
    return (type(value), value)


def _result_spec(result: Any) -> Any:
    if isinstance(result, Tensor):
        if result.device.type != "meta":
            return None
        return (tuple(result.shape), result.stride(), result.dtype)
    if isinstance(result, (tuple, list)):
        parts = [_result_spec(r) for r in result]
        return None if any(p is None for p in parts) else (type(result), parts)
    return None


def _rebuild(spec: Any) -> Any:
    if len(spec) == 2:
        return spec[0](_rebuild(part) for part in spec[1])
    size, stride, dtype = spec
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def ordinary(value: Any) -> Any:
    """Return nested arguments of a node in ordinary containers, as generated code has them, not immutable ones."""
    if isinstance(value, list):
        return [ordinary(v) for v in value]
    if isinstance(value, dict):
        return {k: ordinary(v) for k, v in value.items()}
    return tuple(ordinary(v) for v in value) if type(value) is tuple else value


class MetaInterpreter(fx.Interpreter):
    """Interpret a GraphModule, or a `graph` over any module, under a `MetaMode`.

    It starts from the shapes in the placeholders' `meta["val"]`. `visit(node, value)` is called after every node; the
    run leaves graph, parameters and generators as they were.
    """

    def __init__(
        self,
        module: nn.Module,
        mode: MetaMode,
        visit: Callable[[fx.Node, Any], None],
        graph: fx.Graph | None = None,
    ) -> None:
        super().__init__(module, garbage_collect_values=graph is None, graph=graph)
        self.mode = mode
        self.visit = visit
        self.current: fx.Node | None = None

    def run_from_meta(self) -> Any:
        """Run the whole graph and return its meta output."""
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        unknown = [n.name for n in inputs if "val" not in n.meta]
        if unknown:
            raise InputError(
                f"the graph does not know the shapes of its inputs {', '.join(unknown)}; make it with "
                "fxprune.trace(model, example_inputs)"
            )
        with self.on_meta_tensors():
            return self.run(*on_meta([n.meta["val"] for n in inputs]), enable_io_processing=False)

    @contextmanager
    def on_meta_tensors(self) -> Iterator[None]:
        """Run what happens inside under the mode, without gradients and without fused kernels that hide operators."""
        with without_fast_path(), torch.no_grad(), self.mode:
            yield

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and report its value."""
        self.current = n
        value = super().run_node(n)
        self.visit(n, value)
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a function with ordinary lists, as generated code does; torch.fx keeps immutable ones."""
        args, kwargs = ordinary(args), ordinary(kwargs)
        if target is operator.getitem and isinstance(args[1], tuple):
            # On a meta tensor a list would become a meta index, whose positions are not known.
            args = (args[0], tuple(torch.tensor(i) if isinstance(i, list) else i for i in args[1]))
        return super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a leaf; one that needs real values or real parameters gets noise, and its operators are not seen."""
        args, kwargs = ordinary(args), ordinary(kwargs)
        try:
            return super().call_module(target, args, kwargs)
        except Exception as error:
            leaf = self.fetch_attr(target)
            value, macs = _run_on_noise(leaf, args, kwargs, error)
            self.mode.unseen(leaf, macs)
            return value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return the meta twin of a floating tensor; integer tables stay real, and other attributes as they are."""
        value = super().get_attr(target, args, kwargs)
        return self.mode.twin(value) if isinstance(value, Tensor) and value.is_floating_point() else value
