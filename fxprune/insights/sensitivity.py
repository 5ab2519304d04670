"""What a model loses when one layer alone is pruned (paper 000, §4.4 and Figure 2d)."""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.errors import InputError, first_line
from fxprune.graph.inputs import ExampleInputs, Inputs
from fxprune.graph.tracing import trace
from fxprune.graph.undisturbed import undisturbed
from fxprune.insights.roles import ROLES, layer_roles
from fxprune.selection import read_patterns, read_ratio
from fxprune.sparsity.layers import DEFAULT_LAYERS, SparseLayer, find_layers, mask_of
from fxprune.sparsity.masks import mask_layers
from fxprune.sparsity.selection import Sparsifier, WeightCriterion

__all__ = ["LayerSensitivity", "RoleSensitivity", "Sensitivity", "SkippedLayer", "sensitivity"]

Evaluate = Callable[[nn.Module], float]
Progress = Callable[[Sequence[SparseLayer]], Iterable[SparseLayer]]


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer pruned alone: the share of its weights that is zero, what the metric says then, and how much less."""

    layer: str
    role: str
    sparsity: float
    value: float
    drop: float


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that was asked for and stayed dense, and why."""

    layer: str
    role: str
    reason: str


@dataclass(frozen=True)
class RoleSensitivity:
    """How much the metric drops for the layers of one role: least, median and largest drop."""

    role: str
    layers: int
    least: float
    median: float
    largest: float


@dataclass(frozen=True)
class Sensitivity:
    """The metric of a model whose layers were pruned one at a time, in the order of their calls.

    `metric` names it; higher is better. `baseline` is its value before any layer is pruned, `sparsity` and `block` are
    what was asked for.
    """

    metric: str
    baseline: float
    sparsity: float
    block: str
    layers: tuple[LayerSensitivity, ...]
    skipped: tuple[SkippedLayer, ...] = ()

    @property
    def roles(self) -> tuple[RoleSensitivity, ...]:
        """The roles that occur, summed up."""
        drops = {role: [layer.drop for layer in self.layers if layer.role == role] for role in ROLES}
        return tuple(
            RoleSensitivity(role, len(held), min(held), statistics.median(held), max(held))
            for role, held in drops.items()
            if held
        )

    def table(self, style: str = "simple") -> str:
        """Return layers, roles and what was skipped as text; `style` is any table format of tabulate."""
        cells = [(x.layer, x.role, f"{x.sparsity:.1%}", f"{x.value:z.4f}", f"{x.drop:z.4f}") for x in self.layers]
        header = ["layer", "role", "sparsity", self.metric, "drop"]
        layers = tabulate(cells, header, style, disable_numparse=True, colalign=("left", "left", *("right",) * 3))
        skipped = [f"Skipped '{skip.layer}' ({skip.role}): {skip.reason}" for skip in self.skipped]
        return "\n\n".join([layers, self.by_role(style), *skipped])

    def by_role(self, style: str = "simple") -> str:
        """Return the drops by role as text, and what they are measured from."""
        drops = [
            (x.role, str(x.layers), *(f"{drop:z.4f}" for drop in (x.least, x.median, x.largest))) for x in self.roles
        ]
        header = ["role", "layers", "least drop", "median", "largest"]
        roles = tabulate(drops, header, style, disable_numparse=True, colalign=("left", *("right",) * 4))
        asked = f"one layer at a time, {self.sparsity:.1%} in blocks of {self.block}"
        return f"{roles}\n\n{self.metric}: {self.baseline:z.4f} before pruning; {asked}"

    def json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(asdict(self) | {"roles": [asdict(role) for role in self.roles]}, indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> Sensitivity:
        """Read a sensitivity, the inverse of `json`."""
        facts = {name: value for name, value in json.loads(text).items() if name != "roles"}
        facts["layers"] = tuple(LayerSensitivity(**row) for row in facts["layers"])
        facts["skipped"] = tuple(SkippedLayer(**row) for row in facts["skipped"])
        return Sensitivity(**facts)


def sensitivity(
    model: nn.Module,
    example_inputs: ExampleInputs,
    evaluate: Evaluate | None = None,
    *,
    sparsity: float | str = 0.95,
    block: str | tuple[int, int] = "1x1",
    layers: str | Iterable[str] = DEFAULT_LAYERS,
    exclude: str | Iterable[str] = (),
    criterion: str | WeightCriterion = "magnitude",
    seed: int = 0,
    frontend: str = "auto",
    progress: Progress = iter,
) -> Sensitivity:
    """Prune each layer alone, all others dense, and measure what the model loses.

    Args:
        model: any floating-point module; neither it nor anything it holds is changed, whatever `evaluate` does.
        example_inputs: what the model is called with: a tensor, a tuple of arguments, a dict, or `Inputs`.
        evaluate: takes a module that is called as the model is, and returns a number, higher is better (accuracy on a
            validation set). It may train the module: every layer starts from the model's weights again. Without it, the
            value is minus the relative L2 error of the outputs on the example inputs; give trained weights and real
            inputs then, for random ones tell little.
        sparsity: fraction of each layer's weights that becomes zero, at least.
        block: output × input channels that become zero together. A layer with no room for one block is skipped.
        layers: which layers: "conv1x1", "conv", "linear" or "all", names, globs or types.
        exclude: which of them not.
        criterion: "magnitude", "random", or a function (layer, weight) → importance of every weight.
        seed: of the random criterion.
        frontend: "auto", "symbolic" or "export".
        progress: wraps the sequence of layers while it is walked, as `tqdm.tqdm` does.

    Raises:
        InputError: `evaluate` failed or returned no finite number; the message names the layer.
        InputError, TraceError, TargetError, SpecError: a mistake in the call.
    """
    options = Sparsifier(
        read_ratio(sparsity, "sparsity"),
        block=block,
        scope="uniform",
        layers=read_patterns(layers),
        exclude=read_patterns(exclude),
        criterion=criterion,
        seed=seed,
    )
    probe = _Probe(trace(model, example_inputs, frontend=frontend), options)
    metric = _name(evaluate)
    if evaluate is None:
        evaluate = _minus_error(probe.copy, Inputs.of(example_inputs))
    baseline = probe.baseline(evaluate)
    rows = [probe.measured(layer, evaluate, baseline) for layer in progress(probe.layers)]
    return Sensitivity(
        metric, baseline, read_ratio(sparsity, "sparsity"), str(options.block), tuple(rows), probe.skipped
    )


class _Probe:
    """A copy of a graph, of which one layer at a time is masked; the graph itself shares its tensors with the model."""

    def __init__(self, dense: fx.GraphModule, options: Sparsifier) -> None:
        known = find_layers(dense, {})
        chosen = {layer.name for layer in options.choose(dense, known)}
        small = options.too_small(dense, known)
        self.options = options
        self.dense = dense
        self.roles = layer_roles(dense)
        reason = f"it has fewer channels than a block of {options.block}"
        self.skipped = tuple(SkippedLayer(x.name, self._role(x), reason) for x in small)
        self.copy = copy.deepcopy(dense)
        self.layers = [layer for layer in find_layers(self.copy, {}) if layer.name in chosen]

    def _role(self, layer: SparseLayer) -> str:
        return self.roles.get(layer.name, ROLES[-1])

    def baseline(self, evaluate: Evaluate) -> float:
        """Evaluate with no layer masked."""
        with undisturbed(self.copy):
            value = _measure(evaluate, self.copy, "the dense model")
        self.restore()
        return value

    def measured(self, layer: SparseLayer, evaluate: Evaluate, baseline: float) -> LayerSensitivity:
        """Mask one layer, evaluate, and take everything back."""
        # "all" of this one layer: its name might read as a kind, or as a glob.
        alone = replace(self.options, layers=("all",), exclude=())
        with self._masked(layer, alone.masks(self.copy, [layer], {})[layer.name]):
            mask = mask_of(layer)
            assert mask is not None
            reached = 1 - int(mask.count_nonzero()) / mask.numel()
            value = _measure(evaluate, self.copy, f"'{layer.name}' pruned to {reached:.1%}")
        self.restore()
        return LayerSensitivity(layer.name, self._role(layer), reached, value, baseline - value)

    @contextmanager
    def _masked(self, layer: SparseLayer, mask: Tensor) -> Iterator[None]:
        kinds = [(owner, type(owner)) for _, owner, _ in layer.owners]
        with undisturbed(self.copy):
            mask_layers([layer], {layer.name: mask})
            yield
        for owner, kind in kinds:
            owner.__class__ = kind  # torch parametrises a module by giving it another class

    @torch.no_grad()
    def restore(self) -> None:
        """Give every tensor of the copy the value that it has in the model: an evaluation may train."""
        original = {**dict(self.dense.named_parameters()), **dict(self.dense.named_buffers())}
        for name, tensor in (*self.copy.named_parameters(), *self.copy.named_buffers()):
            tensor.copy_(original[name])
            tensor.grad = None


def _measure(evaluate: Evaluate, module: nn.Module, what: str) -> float:
    try:
        found: object = evaluate(module)
        value = float(found.detach() if isinstance(found, Tensor) else found)  # type: ignore[arg-type]
    except Exception as error:
        raise InputError(f"evaluating {what} failed: {first_line(error)}") from error
    if not math.isfinite(value):
        raise InputError(f"evaluating {what} gave {value}; return a finite number, higher is better")
    return value


def _name(evaluate: Evaluate | None) -> str:
    if evaluate is None:
        return "minus output error"
    return str(getattr(evaluate, "__name__", type(evaluate).__name__))


def _minus_error(dense: nn.Module, inputs: Inputs) -> Evaluate:
    """Return what measures −‖y − y₀‖ / ‖y₀‖, where y₀ are the outputs of the dense model."""
    expected = _outputs(dense, inputs)
    whole = _norm(expected)
    if not math.isfinite(whole) or not whole:
        raise InputError(f"the outputs on the example inputs have norm {whole}; give others, or an `evaluate`")

    def minus_error(module: nn.Module) -> float:
        found = _outputs(module, inputs)
        if [y.shape for y in found] != [y.shape for y in expected]:
            raise InputError("the shapes of its outputs depend on the weights; give an `evaluate`")
        return 0.0 - _norm([a - b for a, b in zip(found, expected, strict=True)]) / whole

    return minus_error


@torch.no_grad()
def _outputs(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    with undisturbed(module):
        returned = pytree.tree_leaves(module(*inputs.args, **inputs.kwargs))
    return [y.double() for y in returned if isinstance(y, Tensor) and y.is_floating_point()]


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(y.square().sum()) for y in tensors))
