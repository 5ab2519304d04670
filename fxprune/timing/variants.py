"""The ways to run a model, one entry each: what makes it ready, and which memory formats are worth trying."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fxprune.errors import FxpruneError
from fxprune.timing import engines
from fxprune.timing.subject import CHANNELS_LAST, CONTIGUOUS, Subject

__all__ = ["VARIANTS", "Call", "Variant", "made_elsewhere"]


@dataclass(frozen=True)
class Call:
    """A variant made ready.

    Attributes:
        run: runs it once on the example inputs and returns its outputs.
        module: what runs, where that is a module of torch.
        remark: what a reader must know about how it was made.
    """

    run: Callable[[], Any]
    module: nn.Module | None = None
    remark: str = ""


@dataclass(frozen=True)
class Variant:
    """A way to run a model.

    Attributes:
        name: what its row is called.
        make: takes the subject and one of `MEMORY_FORMATS`, and makes it ready.
        memory_formats: those worth trying on images; the faster is kept. None: it lays values out by itself.
        computes_alike: its outputs are the model's, to rounding of float32.
    """

    name: str
    make: Callable[[Subject, str], Call]
    memory_formats: tuple[str, ...] | None
    computes_alike: bool = True


def _eager(subject: Subject, memory_format: str) -> Call:
    return _called(subject.model_as(memory_format), subject, memory_format)


def _compiled(subject: Subject, memory_format: str) -> Call:
    """Compile with frozen weights, which lets Inductor pack them for its kernels: what it needs for inference."""
    from torch._dynamo.utils import counters  # imports half of the compiler
    from torch._inductor import config as inductor

    # What was compiled of this class of models before, without frozen weights, would be taken for this one.
    torch.compiler.reset()
    module = subject.model_as(memory_format)
    call = _called(torch.compile(module), subject, memory_format)
    before = counters["stats"]["unique_graphs"]
    with torch.no_grad(), inductor.patch(freezing=True):
        call.run()
    graphs = counters["stats"]["unique_graphs"] - before
    if not graphs:
        raise FxpruneError("torch.compile compiled nothing of the model; is TORCH_COMPILE_DISABLE set?")
    return Call(call.run, None, f"weights frozen, {graphs} graph{'s' * (graphs != 1)}")


def _called(module: Callable[..., Any], subject: Subject, memory_format: str) -> Call:
    inputs = subject.inputs_as(memory_format)
    run = partial(module, *inputs.args, **inputs.kwargs)
    return Call(run, module if isinstance(module, nn.Module) else None)


def made_elsewhere(name: str, make: Callable[[Subject], Callable[..., Any]]) -> Variant:
    """Return the variant that calls what `make` returns as the model is called; it is made once, as late as it can.

    Its weights stay as they lie; only the inputs are tried in both memory formats.
    """
    made: list[Callable[..., Any]] = []

    def build(subject: Subject, memory_format: str) -> Call:
        if not made:
            made.append(make(subject))
        return _called(made[0], subject, memory_format)

    return Variant(name, build, (CONTIGUOUS, CHANNELS_LAST), computes_alike=False)


def _engine(make: Callable[[Subject], tuple[Callable[[], Any], str]]) -> Callable[[Subject, str], Call]:
    def build(subject: Subject, _: str) -> Call:
        run, remark = make(subject)
        return Call(run, None, remark)

    return build


VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("eager", _eager, (CONTIGUOUS, CHANNELS_LAST)),
        # Inductor lays convolutions out channels-last by itself; compiling twice would find the same.
        Variant("compiled", _compiled, (CHANNELS_LAST,)),
        Variant("onnxruntime", _engine(engines.onnxruntime), None),
        Variant("openvino", _engine(engines.openvino), None),
    )
}
"""Ways to run any model; what fxprune makes of it comes by `made_elsewhere`."""
