"""Compare ways to run a model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune.api.lowering import lower
from fxprune.errors import InputError, SpecError, nearest
from fxprune.graph.inputs import ExampleInputs, Inputs
from fxprune.graph.tracing import check_frontend
from fxprune.runtime.int8.layer import Int8Layer
from fxprune.selection import read_patterns, read_ratio
from fxprune.timing.comparison import Comparison
from fxprune.timing.measure import AUTO, Measurement, compare
from fxprune.timing.subject import CHANNELS_LAST, MEMORY_FORMATS, Subject
from fxprune.timing.variants import VARIANTS, Variant, made_elsewhere

__all__ = ["NAMES", "bench", "is_lowered", "lowered_variant"]

_LOWERED = "lowered"

NAMES = (*VARIANTS, _LOWERED)
"""The variants that any model has."""


def bench(
    model: nn.Module,
    example_inputs: ExampleInputs,
    variants: str | Iterable[str] = NAMES,
    *,
    modules: Mapping[str, Callable[..., Any]] | None = None,
    sparsity: float | str | Sequence[float | str] | None = None,
    calibration: Iterable[Any] | None = None,
    im2col: str | Iterable[str] = (),
    runs: int = 30,
    warmup: int = 5,
    threads: int | None = None,
    memory_format: str = AUTO,
    layers: bool = True,
    name: str | None = None,
    frontend: str = "auto",
    progress: Callable[[], None] = lambda: None,
) -> Comparison:
    """Measure how long a model takes when it is run in several ways, in alternation, and how close their outputs are.

    Args:
        model: any floating-point module; a copy in evaluation mode is run, without gradients.
        example_inputs: what the model is called with: a tensor, a tuple of arguments, a dict, or `Inputs`.
        variants: "eager", "compiled" (torch.compile by Inductor, weights frozen), "lowered", "onnxruntime" and
            "openvino" (both in float32). One that cannot run here has its reason in its row.
        modules: modules made elsewhere to compare, or any callables that take what the model takes, by the names of
            their rows; one that is called "lowered" stands for that variant.
        sparsity: of "lowered", in 1×4 blocks; several give a row each.
        calibration: batches for the activations of "lowered"; the example inputs where there are none.
        im2col: convolutions with larger kernels that "lowered" computes on integers too, as in `lower`.
        runs: timed runs of every variant, whose median and quartiles are given.
        warmup: runs of every variant before those.
        threads: of every variant; as torch is set where it is None.
        memory_format: of the inputs of torch's variants: "contiguous", "channels-last", or "auto" for whichever is
            faster. ONNX Runtime and OpenVINO take contiguous inputs.
        layers: whether to time every call in the graphs of "eager", "lowered" and `modules`, in the same rounds.
        name: what the model is called in the result; its type by default.
        frontend: "auto", "symbolic" or "export", of the graph of "eager".
        progress: called when each of the rows is made, and after the runs.

    Raises:
        InputError, SpecError, TargetError, TraceError: a mistake in the call; nothing was measured.
    """
    inputs = Inputs.of(example_inputs)
    batches = None if calibration is None else tuple(calibration)
    lowered = partial(lowered_variant, calibration=batches, im2col=read_patterns(im2col))
    rows = tuple(_rows(read_patterns(variants), dict(modules or {}), sparsity, lowered))
    _check(rows, inputs, memory_format)
    check_frontend(frontend)
    how = Measurement(runs, warmup, memory_format, layers, frontend, is_lowered, progress)
    with tempfile.TemporaryDirectory(prefix="fxprune-", ignore_cleanup_errors=True) as folder:
        own = torch.get_num_threads() if threads is None else threads
        subject = Subject.of(model, inputs, own, Path(folder))
        return compare(name or type(model).__name__, subject, rows, how)


def lowered_variant(
    subject: Subject, *, sparsity: float | None, calibration: Iterable[Any] | None, im2col: tuple[str, ...] = ()
) -> nn.Module:
    """Lower a model as the variant "lowered" runs it.

    Args:
        subject: the model, a copy in evaluation mode, and its example inputs; torch has the threads to measure on.
        sparsity: fraction of its weights that becomes zero in 1×4 blocks; None leaves them as they are.
        calibration: batches; the example inputs where it is None.
        im2col: larger convolutions that are computed on integers too.
    """
    batches = [subject.inputs] if calibration is None else calibration
    how: dict[str, Any] = {"calibration": batches, "sparsity": sparsity or None, "im2col": im2col}
    return lower(subject.model, subject.inputs, **how).module


def is_lowered(module: nn.Module) -> bool:
    """Whether a module is a layer that lowering made."""
    return isinstance(module, Int8Layer)


def _rows(
    names: tuple[str, ...],
    modules: dict[str, Callable[..., Any]],
    sparsity: float | str | Sequence[float | str] | None,
    lower: Callable[..., nn.Module],
) -> Iterator[Variant]:
    """Return the rows in the order in which they are named, other modules behind them."""
    for name in dict.fromkeys(names):
        if name not in NAMES and name not in modules:
            raise SpecError(f"unknown variant '{name}'; {nearest(name, [*NAMES, *modules])}")
    if sparsity is not None and (_LOWERED not in names or _LOWERED in modules):
        made = ", ".join(names)
        raise SpecError(f"a sparsity is of the variant 'lowered', which is not among those to make: {made}")
    for name in dict.fromkeys((*names, *modules)):
        if name in modules:
            yield made_elsewhere(name, partial(_as_given, module=modules[name]))
        elif name == _LOWERED:
            yield from _lowered_rows(sparsity, lower)
        else:
            yield VARIANTS[name]


def _as_given(_: Subject, module: Callable[..., Any]) -> Callable[..., Any]:
    return module


def _lowered_rows(
    sparsity: float | str | Sequence[float | str] | None, lower: Callable[..., nn.Module]
) -> Iterator[Variant]:
    """Return a row for every sparsity, or one for the weights as they are."""
    if sparsity is None:
        yield made_elsewhere(_LOWERED, partial(lower, sparsity=None))
        return
    for share in (sparsity,) if isinstance(sparsity, (float, int, str)) else sparsity:
        ratio = read_ratio(share, "sparsity")
        yield made_elsewhere(f"{_LOWERED} {100 * ratio:g}%", partial(lower, sparsity=ratio))


def _check(rows: tuple[Variant, ...], inputs: Inputs, memory_format: str) -> None:
    """Refuse what cannot be measured, before anything is built."""
    if not rows:
        raise SpecError(f"no variant to measure; give some of: {', '.join(NAMES)}")
    names = [row.name for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SpecError(f"two rows are called '{twice[0]}'; give every sparsity once, and modules names of their own")
    known = (AUTO, *MEMORY_FORMATS)
    if memory_format not in known:
        raise SpecError(f"unknown memory format '{memory_format}'; {nearest(memory_format, known)}")
    if memory_format == CHANNELS_LAST and all(tensor.dim() != 4 for tensor in inputs.tensors()):
        raise InputError("no example input has four dimensions, so that none can lie channels-last")
