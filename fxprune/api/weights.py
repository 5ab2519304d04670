"""Make weights sparse."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from fxprune.api.results import Result, Source, rewrite
from fxprune.graph.inputs import ExampleInputs, Inputs
from fxprune.graph.passes import Observer
from fxprune.graph.tracing import trace
from fxprune.report import some_of
from fxprune.selection import read_patterns
from fxprune.sparsity.layers import DEFAULT_LAYERS, KINDS, is_kind, other_weights
from fxprune.sparsity.masks import SparseGraph
from fxprune.sparsity.selection import Sparsifier, WeightCriterion
from passes import WeightSparsification

__all__ = ["make_step", "sparsify"]


def sparsify(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    sparsity: float | str | Mapping[str, float] | None = None,
    macs: float | str | nn.Module | None = None,
    parameters: float | str | None = None,
    block: str | tuple[int, int] = "1x4",
    scope: str = "uniform",
    layers: str | Iterable[str] = DEFAULT_LAYERS,
    exclude: str | Iterable[str] = (),
    criterion: str | WeightCriterion = "magnitude",
    max_sparsity: float | str = 1.0,
    seed: int = 0,
    frontend: str = "auto",
    observers: Iterable[Observer] = (),
) -> Result:
    """Zero the least important weights of a trained model, single or in blocks that a kernel can skip.

    The result holds its zeros as masks (`torch.nn.utils.parametrize`), which training keeps; `fxprune.finalize` bakes
    them into the weights. A model that was pruned or made sparse before may be given.

    Args:
        model: any floating-point module; it is not changed.
        example_inputs: what the model is called with: a tensor, a tuple of arguments, a dict, or `Inputs`.
        sparsity: fraction of the chosen layers' weights that becomes zero, at least ("80%", 0.8); or one for each layer
            name, glob, type or kind, as {"conv1x1": 0.8, "classifier.*": 0.5}.
        macs: multiply-accumulates to keep at most: a share of the dense model's ("50%", 0.5), a count (2e9), or another
            model, whose MACs on the same inputs are the target (paper 000, §3.1).
        parameters: parameters to keep at most, a share or a count. Exactly one of the three targets is given.
        block: output × input channels that become zero together; "1x1" for single weights. Channels that are no
            multiple of it leave a smaller block at the end; a layer with no room for one block stays dense, and the
            report says so.
        scope: "uniform" takes the same share of every layer (Eq. 1 of paper 000), "global" the least important blocks
            of all (§A.2), and so may empty layers. At equal sparsity "global" keeps more accuracy, at equal MACs
            "uniform" does, since "global" spares the early layers, whose weights cost most.
        layers: which layers: "conv1x1", "conv", "linear" or "all", names, globs or types, one or several. A weight that
            such a layer does not read as it is, but a function or another module, stays dense, and the report says so.
        exclude: which of them not.
        criterion: "magnitude" (root mean square of a block), "random", or a function (layer, weight) → importance of
            every weight. Of equally important blocks the first of the first layer becomes zero first.
        max_sparsity: largest fraction of any layer.
        seed: of the random criterion.
        frontend: "auto", "symbolic" or "export".
        observers: called after every pass.

    Raises:
        InputError, TraceError, TargetError, SpecError: a mistake in the call; the model is unchanged.
        VerifyError: a defect of fxprune.
    """
    inputs = Inputs.of(example_inputs)
    step = make_step(
        inputs,
        frontend,
        sparsity=sparsity,
        macs=macs,
        parameters=parameters,
        block=block,
        scope=scope,
        layers=layers,
        exclude=exclude,
        criterion=criterion,
        max_sparsity=max_sparsity,
        seed=seed,
    )
    result = rewrite(Source(model, inputs, frontend, step.record(), seed), (step,), None, observers)
    return replace(result, notes=tuple(_dense(result, step)))


def _dense(result: Result, step: Sparsifier) -> Iterator[str]:
    """Say what was asked for and stays dense."""
    graph = SparseGraph(result.traced)
    small = [layer.name for layer in step.too_small(graph.module, graph.layers)]
    others = other_weights(graph.module, graph.layers, graph.macs)
    asked = [word for word in step.named if word in KINDS]
    unread = [name for name, shape in others.items() if any(is_kind(shape, word) for word in asked)]
    for what, names in (
        (f"layers with fewer channels than a block of {step.block}", small),
        ("weights that no convolution or linear layer reads as they are", unread),
    ):
        if names:
            yield f"{what} stay dense: {some_of(names)}"


def make_step(
    inputs: Inputs,
    frontend: str,
    *,
    macs: float | str | nn.Module | None = None,
    layers: str | Iterable[str] = DEFAULT_LAYERS,
    exclude: str | Iterable[str] = (),
    **options: Any,
) -> WeightSparsification:
    """Return the pass that `sparsify` runs: a model given as target is counted on `inputs`."""
    if isinstance(macs, nn.Module):
        macs = SparseGraph(trace(macs, inputs, frontend=frontend)).whole["macs"]
    return WeightSparsification(macs=macs, layers=read_patterns(layers), exclude=read_patterns(exclude), **options)
