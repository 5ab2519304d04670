"""Remove channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fxprune.api.results import Result, Source, rewrite
from fxprune.graph.inputs import ExampleInputs, Inputs
from fxprune.graph.passes import Observer
from fxprune.importance import Criterion, Evidence
from fxprune.selection import read_patterns
from passes import ChannelSelection, ChannelSurgery, MaskInsertion

__all__ = ["prune"]


def prune(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    ratio: float | str | Mapping[str, float] | None = None,
    macs: float | str | None = None,
    parameters: float | str | None = None,
    criterion: str | Criterion = "l2",
    scope: str = "global",
    round_to: int = 1,
    min_width: int = 1,
    max_ratio: float | str = 1.0,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    allow_statistical: bool = False,
    attention: str = "dimensions",
    seed: int = 0,
    batches: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    frontend: str = "auto",
    observers: Iterable[Observer] = (),
) -> Result:
    """Remove the least important channels of a trained model for good.

    Args:
        model: any floating-point module; it is not changed.
        example_inputs: what the model is called with: a tensor, a tuple of arguments, a dict, or `Inputs`.
        ratio: fraction of channels to remove ("30%", 0.3), or one for each orbit, layer name, glob or type.
        macs: multiply-accumulates to leave: a share ("50%", 0.5) or a count (2e9).
        parameters: parameters to leave, likewise. Exactly one of the three targets is given.
        criterion: "l1", "l2", "fpgm", "bn-scale", "taylor", "random", or a function `Subject` → scores [width].
        scope: "global" ranks all channels together, "uniform" removes the same fraction of every orbit.
        round_to: kept channels of every orbit are a multiple of it.
        min_width: classes that stay in every orbit at least.
        max_ratio: largest fraction that leaves any orbit.
        include: layers whose output channels may leave, by name, glob or type; all by default.
        exclude: layers whose output channels must stay.
        allow_statistical: also cut channels that share statistics (layer norm), where the result is approximate.
        attention: what may leave attention: "dimensions", the same of every head, or "heads", whole heads.
        seed: of the random criterion.
        batches: data for criteria that need it; with `loss`, a function (module, batch) → scalar tensor.
        loss: see `batches`.
        frontend: "auto", "symbolic" or "export".
        observers: called after every pass.

    Raises:
        InputError, TraceError, TargetError, SpecError: a mistake in the call; the model is unchanged.
        VerifyError: a defect of fxprune.
    """
    selection = ChannelSelection(
        ratio=ratio,
        macs=macs,
        parameters=parameters,
        criterion=criterion,
        scope=scope,
        round_to=round_to,
        min_width=min_width,
        max_ratio=max_ratio,
        include=read_patterns(include),
        exclude=read_patterns(exclude),
        allow_statistical=allow_statistical,
        seed=seed,
        evidence=None if batches is None or loss is None else Evidence(batches, loss),
    )
    masks = MaskInsertion(attention)
    steps = (masks, selection, ChannelSurgery())
    source = Source(model, Inputs.of(example_inputs), frontend, ",".join(step.record() for step in steps), seed)
    return rewrite(source, steps, selection, observers)
