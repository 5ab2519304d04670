"""One helper that asserts every law of design.md §5 that a model can break."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from fxprune.cost import Cost, CostModel
from fxprune.graph.dump import dump
from fxprune.graph.inputs import ExampleInputs, Inputs
from fxprune.graph.passes import Pass, Pipeline
from fxprune.graph.tracing import trace
from fxprune.labels.detection import find_orbits
from fxprune.labels.orbits import Orbits
from fxprune.labels.propagation import RULE_FAILED
from fxprune.runtime.opaque import OpaqueFunction
from passes.channel_surgery import ChannelSurgery
from passes.mask_insertion import MaskInsertion

__all__ = [
    "EXACT",
    "Cut",
    "as_double",
    "assert_close",
    "assert_laws",
    "assert_macs_counted",
    "assert_prediction",
    "channels",
    "in_double",
    "pin_reasons",
    "randomise",
    "relative_errors",
    "run",
    "run_around_choices",
    "zero_masks",
]

EXACT = 1e-9


@dataclass(frozen=True)
class Cut:
    """What a model became: the traced, the masked and the slim graph, the orbits of the masked one, and costs."""

    traced: fx.GraphModule
    masked: fx.GraphModule
    slim: fx.GraphModule
    orbits: Orbits
    before: Cost
    after: Cost

    @property
    def removed(self) -> float:
        """The larger of the fractions of MACs and of parameters that left."""
        macs = 1 - self.after.macs / max(self.before.macs, 1)
        return max(macs, 1 - self.after.parameters / max(self.before.parameters, 1))

    def channels(self, parameter: str, dimension: int) -> list[tuple[str, int] | None]:
        """Return (orbit, class) of every position of a parameter's dimension, None where it is pinned."""
        return channels(self.orbits, parameter, dimension)

    def pinned_by(self, parameter: str, dimension: int) -> set[str]:
        """Return the operators that pin positions of a parameter's dimension."""
        return pin_reasons(self.orbits, parameter, dimension)

    def width(self, parameter: str, dimension: int) -> int:
        """Return the size of a parameter's dimension in the slim graph."""
        return self.slim.get_parameter(parameter).shape[dimension]


def channels(orbits: Orbits, parameter: str, dimension: int) -> list[tuple[str, int] | None]:
    """Return (orbit, class) of every position of a parameter's dimension, None where it is pinned."""
    table = next(t for t in orbits.labelling.flow.slots.tensors if t.name == parameter)
    found: list[tuple[str, int] | None] = [None] * table.shape[dimension]
    for orbit in orbits:
        for member in orbit.members:
            if (member.parameter, member.dimension) != (parameter, dimension):
                continue
            for i, row in enumerate(member.indices.tolist()):
                for position in row:
                    assert found[position] is None, f"{parameter}[{dimension}][{position}] is in two classes"
                    found[position] = (orbit.name, i)
    return found


def pin_reasons(orbits: Orbits, parameter: str, dimension: int) -> set[str]:
    """Return the operators that pin positions of a parameter's dimension."""
    return {p.reason.operator for p in orbits.pinned if (p.parameter, p.dimension) == (parameter, dimension)}


def assert_laws(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    seed: int = 0,
    fraction: float = 0.5,
    removed_at_least: float = 0.1,
    approximate: bool = False,
    frontend: str = "auto",
    attention: str = "dimensions",
) -> Cut:
    """Prune random channels of `model` and assert every law; return what was made.

    Args:
        model: converted to float64, put into evaluation mode and given random batch-norm statistics in place.
        example_inputs: as `fxprune.trace` takes them.
        seed: of statistics and masks.
        fraction: of each orbit's classes that leaves; at least one always stays.
        removed_at_least: fraction of MACs or of parameters that must have left, so that no test prunes nothing.
        approximate: also cut statistical orbits, and assert everything but exactness.
        frontend: of the tracer.
        attention: what leaves attention.
    """
    generator = torch.Generator().manual_seed(seed)
    randomise(model.double().eval(), generator)
    inputs = as_double(Inputs.of(example_inputs))
    state, outputs = copy.deepcopy(model.state_dict()), run(model, inputs)

    traced = trace(model, inputs, frontend=frontend)
    assert_close(run(traced, inputs), outputs, "tracing")
    masked = _run_pass(MaskInsertion(attention), traced, inputs).graph_module
    assert not Pipeline((MaskInsertion(attention),))(masked).modified, "mask insertion is not idempotent"
    assert_close(run(masked, inputs), outputs, "masks of ones", 1e-12)

    orbits = find_orbits(masked)
    _assert_masked(orbits)
    keep = zero_masks(masked, orbits, generator, fraction, approximate)
    slim = _run_pass(ChannelSurgery(), masked, inputs).graph_module
    _assert_idempotent(slim)
    if not approximate:
        assert_close(run(slim, inputs), run(masked, inputs), "exactness")
        _assert_exact_in_training(slim, masked, inputs)
    _assert_names(slim, traced)
    before, after = assert_prediction(masked, slim, orbits, keep)
    assert_macs_counted(masked, inputs, before, "whole")
    assert_macs_counted(slim, inputs, after, "slim")
    _assert_shapes(slim, inputs)
    _assert_trains(slim, inputs)
    assert_close(run(copy.deepcopy(slim), inputs), run(slim, inputs), "deepcopy", 0)

    assert_equal_state(model.state_dict(), state)
    assert_close(run(model, inputs), outputs, "the original model", 0)
    cut = Cut(traced, masked, slim, orbits, before, after)
    assert cut.removed >= removed_at_least, f"only {cut.removed:.1%} was removed; nothing is tested\n{dump(masked)}"
    return cut


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Give tensors that initialisation made constant random values, so that no channel is the identity or dead.

    These are the statistics and affine parameters of normalisation layers, layer scales, biases and tokens. Values of
    positive ones stay positive, as variances must; a single number is a temperature unless it is zero.
    """
    for parameter in model.parameters():
        _fill(parameter, generator)
    for buffer in model.buffers():
        if buffer.dim() == 1:
            _fill(buffer, generator)


def _fill(tensor: Tensor, generator: torch.Generator) -> None:
    if not tensor.is_floating_point() or not tensor.numel():
        return
    first = float(tensor.detach().flatten()[0])
    if bool((tensor != first).any()) or (tensor.numel() == 1 and first):
        return
    values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    tensor.data.copy_(values + (0.5 if first > 0 else -0.5))


def as_double(inputs: Inputs) -> Inputs:
    """Return inputs whose floating-point tensors are float64."""
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t, (inputs.args, inputs.kwargs)
    )
    return Inputs(args, kwargs)


def run(module: nn.Module, inputs: Inputs) -> Any:
    """Call a model or a graph of it on fresh copies of the inputs, without gradients and in float64 throughout."""
    args, kwargs = _arguments(module, inputs)
    with torch.no_grad(), in_double():
        return module(*args, **kwargs)


def in_double() -> TorchFunctionMode:
    """Return a mode in which casts to float32 that a model writes into its code are to float64."""
    return _InDouble()


class _InDouble(TorchFunctionMode):
    """Casts to float32 that a model writes into its code are to float64, so that rounding hides nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args, kwargs = pytree.tree_map_only(torch.dtype, _doubled, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


def _doubled(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else dtype


def run_around_choices(masked: fx.GraphModule, slim: fx.GraphModule, inputs: Inputs) -> tuple[Any, Any]:
    """Return what the slim and the masked graph hand to functions that choose by data, and their outputs.

    Such functions (the best boxes of a detector) may tell numbers apart that agree to rounding. So the slim graph is
    given what they chose in the masked one.
    """
    chosen: dict[str, Any] = {}
    runs = [_ChoicesNoted(module, chosen) for module in (masked, slim)]
    with torch.no_grad(), in_double():
        outputs = [noting.run(*_placeholder_values(noting.module, inputs)) for noting in runs]
    (expected, wanted), (found, given) = zip(outputs, (noting.handed for noting in runs), strict=True)
    return [found, given], [expected, wanted]


class _ChoicesNoted(fx.Interpreter):
    """Notes what opaque functions are called with, and uses what was `chosen` where it is known."""

    def __init__(self, module: fx.GraphModule, chosen: dict[str, Any]) -> None:
        super().__init__(module)
        self.chosen = chosen
        self.handed: list[Any] = []

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not isinstance(self.fetch_attr(target), OpaqueFunction):
            return super().call_module(target, args, kwargs)
        args, kwargs = _mutable(args), _mutable(kwargs)
        self.handed.append(pytree.tree_map_only(Tensor, torch.clone, (args, kwargs)))
        if target not in self.chosen:
            self.chosen[target] = super().call_module(target, args, kwargs)
        return self.chosen[target]


def _mutable(value: Any) -> Any:
    """Return ordinary containers, as generated code makes them; torch.fx keeps immutable ones."""
    if isinstance(value, dict):
        return {k: _mutable(v) for k, v in value.items()}
    return (
        type(value)(map(_mutable, value))
        if type(value) is tuple
        else ([_mutable(v) for v in value] if isinstance(value, list) else value)
    )


def _arguments(module: nn.Module, inputs: Inputs) -> tuple[Any, Any]:
    """Return fresh arguments, as in-place operators may write into them; those without tensors are in the graph."""
    kwargs = inputs.kwargs
    if isinstance(module, fx.GraphModule):
        kwargs = {k: v for k, v in kwargs.items() if any(isinstance(t, Tensor) for t in pytree.tree_leaves(v))}
    return pytree.tree_map_only(Tensor, torch.clone, (inputs.args, kwargs))


def assert_close(found: Any, expected: Any, what: str, relative: float = EXACT) -> None:
    """Compare nested outputs, every tensor relative to its largest magnitude; 0 asks for equal bits."""
    for i, error in enumerate(relative_errors(found, expected, what)):
        assert error <= relative, f"{what}: output {i} is off by {error:.1e} relative"


def relative_errors(found: Any, expected: Any, what: str) -> list[float]:
    """Return the error of every nested output relative to its largest magnitude; structure and shapes must agree."""
    left, left_spec = pytree.tree_flatten(_plain(found))
    right, right_spec = pytree.tree_flatten(_plain(expected))
    assert left_spec == right_spec, f"{what}: the outputs have another structure"
    return [_error(a, b, f"{what}: output {i}") for i, (a, b) in enumerate(zip(left, right, strict=True))]


def _error(a: Any, b: Any, what: str) -> float:
    if not isinstance(b, Tensor):
        assert a == b, f"{what} is {a}, expected {b}"
        return 0.0
    assert a.shape == b.shape, f"{what} has shape {tuple(a.shape)}, expected {tuple(b.shape)}"
    assert b.isfinite().all(), f"{what} is not finite, so that nothing is compared"
    if not a.numel():
        return 0.0
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def _plain(output: Any) -> Any:
    """Return an ordered dict as the plain one that a traced graph returns."""
    return dict(output) if isinstance(output, OrderedDict) else output


def assert_equal_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare two state_dicts bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), f"'{name}' of the original model was changed"


def _run_pass(step: Pass, module: fx.GraphModule, inputs: Inputs) -> PassResult:
    """Run one pass through a pipeline; its input must stay untouched and `modified` must be true to the dump."""
    before, state, outputs = dump(module), copy.deepcopy(module.state_dict()), run(module, inputs)
    result = Pipeline((step,))(module)
    assert dump(module) == before, f"{step.name} edited its input graph"
    assert_equal_state(module.state_dict(), state)
    assert_close(run(module, inputs), outputs, f"the input of {step.name}", 0)
    assert bool(result.modified) == (dump(result.graph_module) != before), (
        f"{step.name} says modified={result.modified}"
    )
    result.graph_module.graph.lint()
    return result


def assert_ruled(orbits: Orbits) -> None:
    """Every rule did its work: one that fails pins its channels, which no user shall meet."""
    failed = {str(reason) for _, reason in orbits.labelling.flow.pins if reason.text.startswith(RULE_FAILED)}
    assert not failed, failed


def _assert_masked(orbits: Orbits) -> None:
    for orbit in orbits:
        assert orbit.mask is not None or not orbit.absorbers or orbit.width == 1, (
            f"{orbit} is absorbed, but has no mask"
        )
        assert not orbit.absorbers or orbit.producers, f"{orbit} comes from nowhere"


def zero_masks(
    masked: fx.GraphModule,
    orbits: Orbits,
    generator: torch.Generator,
    fraction: float = 0.5,
    approximate: bool = False,
) -> Tensor:
    """Write random zeros into the masks; return the keep-vector float64 [classes] that they stand for."""
    assert_ruled(orbits)
    keep = torch.ones(orbits.labelling.partition.count, dtype=torch.float64)
    for orbit in orbits:
        if orbit.mask is None or (orbit.statistical and not approximate):
            continue
        removed = min(round(orbit.width * fraction), orbit.width - 1)
        mask = torch.ones(orbit.width, dtype=torch.float64)
        mask[torch.randperm(orbit.width, generator=generator)[:removed]] = 0
        masked.get_buffer(orbit.mask).copy_(mask)
        keep[orbit.classes] = mask
    return keep


def _assert_idempotent(slim: fx.GraphModule) -> None:
    again = Pipeline((ChannelSurgery(),))(slim)
    assert not again.modified, "surgery on a slim graph says that it changed it"
    assert dump(again.graph_module) == dump(slim)


def _assert_exact_in_training(slim: fx.GraphModule, masked: fx.GraphModule, inputs: Inputs) -> None:
    """Batch statistics are per channel, so training mode is exact too, unless the model draws random numbers."""

    def in_training(module: fx.GraphModule, seed: int) -> Any:
        torch.manual_seed(seed)
        return run(copy.deepcopy(module).train(), inputs)

    expected = in_training(masked, 0)
    if _agree(expected, in_training(masked, 1)):
        assert_close(in_training(slim, 0), expected, "exactness in training mode")


def _agree(a: Any, b: Any) -> bool:
    leaves = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in leaves)


def _assert_names(slim: fx.GraphModule, traced: fx.GraphModule) -> None:
    """Parameters keep the names that they have in the model, and ties stay ties."""

    def names(module: nn.Module) -> list[str]:
        return sorted(name for name, _ in module.named_parameters(remove_duplicate=False))

    assert names(slim) == names(traced)
    assert len(list(slim.parameters())) == len(list(traced.parameters())), "surgery untied or tied parameters"
    for name, parameter in traced.named_parameters(remove_duplicate=False):
        narrow = slim.get_parameter(name)
        assert narrow.requires_grad == parameter.requires_grad
        assert narrow.dtype == parameter.dtype
        assert all(a <= b for a, b in zip(narrow.shape, parameter.shape, strict=True))
        assert narrow.numel(), f"'{name}' became empty"


def _macs(module: nn.Module, inputs: Inputs) -> int:
    # Fused kernels of attention are unknown to the counter, that of nn.MultiheadAttention in all versions of torch.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run(module, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def assert_prediction(masked: fx.GraphModule, slim: fx.GraphModule, orbits: Orbits, keep: Tensor) -> tuple[Cost, Cost]:
    """Law 2: what the labels of the masked graph predict is what is there; return the costs before and after."""
    model = CostModel(masked, orbits)
    before, after = model.cost(), model.cost(keep)
    again = CostModel(slim, find_orbits(slim)).cost()
    assert after.macs == again.macs, "predicted MACs differ from those of the slim graph, analysed anew"
    assert sum(model.macs_by_node(keep).values()) == after.macs
    assert before.parameters == _parameters(masked)
    assert after.parameters == _parameters(slim), "predicted parameters differ from those of the slim graph"
    assert after.parameters == again.parameters
    assert (after.kfpp, before.kfpp) == (after.macs / model.pixels / 1000, before.macs / model.pixels / 1000)
    return before, after


def assert_macs_counted(module: fx.GraphModule, inputs: Inputs, cost: Cost, which: str) -> None:
    """Law 2: the multiply-accumulates of a graph are those that PyTorch's own counter sees in a run."""
    counted = _macs(module, inputs)
    assert cost.macs == counted, f"{cost.macs:,} MACs of the {which} graph, but the FLOP counter sees {counted:,}"


class _ShapeCheck(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n.op != "output":
            assert "val" in n.meta, f"'{n.name}' has no recorded shape"
            _assert_recorded(n, found, n.meta["val"])
        return found


def _assert_recorded(node: fx.Node, found: Any, recorded: Any) -> None:
    left, right = pytree.tree_leaves(found), pytree.tree_leaves(recorded)
    assert len(left) == len(right), f"'{node.name}': {recorded} was recorded"
    for a, b in zip(left, right, strict=True):
        if isinstance(a, Tensor):
            assert a.shape == b.shape, f"'{node.name}' has shape {tuple(a.shape)}, {tuple(b.shape)} was recorded"
            assert a.dtype == b.dtype, f"'{node.name}' has dtype {a.dtype}, {b.dtype} was recorded"


def _assert_shapes(slim: fx.GraphModule, inputs: Inputs) -> None:
    """Law 2: every node's recorded shape is that of a real run."""
    args = _placeholder_values(slim, inputs)
    with torch.no_grad():
        _ShapeCheck(copy.deepcopy(slim), garbage_collect_values=False).run(*args)


def _placeholder_values(module: fx.GraphModule, inputs: Inputs) -> list[Any]:
    names = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]
    bound = Inputs(*_arguments(module, inputs)).bind(module.forward)
    return [bound[name] for name in names]


def _assert_trains(slim: fx.GraphModule, inputs: Inputs) -> None:
    """A backward pass and an optimiser step work, and train() and eval() reach every part."""
    module = copy.deepcopy(slim).train()
    assert all(m.training for m in module.modules())
    trainable = [p for p in module.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trainable]
    optimiser = torch.optim.SGD(trainable, lr=0.1)
    args, kwargs = _arguments(module, inputs)
    _loss(module(*args, **kwargs)).backward()
    optimiser.step()
    gradients = [p.grad for p in trainable if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainable, strict=True)), "an SGD step changed nothing"
    module.eval()
    assert not any(m.training for m in module.modules())
    run(module, inputs)


def _loss(outputs: Any) -> Tensor:
    losses: list[Tensor] = [t.square().mean() for t in pytree.tree_leaves(outputs) if _is_differentiable(t)]
    return torch.stack(losses).sum()


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
