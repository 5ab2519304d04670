"""Compute models on integers: `lower`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import click
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune import api
from fxprune.callables import import_callable
from fxprune.cli.options import commands, read_by_layer, takes_model, with_options
from fxprune.cli.saving import Saving, saves_result
from fxprune.console import Progress
from fxprune.errors import FxpruneError, InputError, first_line
from fxprune.graph.inputs import Inputs
from fxprune.latency import measure_latency
from fxprune.zoo import ModelSource, build_model

RANDOM = "random"

_LOWERING = (
    click.option(
        "--calibration",
        metavar="FILE.py:CALLABLE",
        help="Takes no argument, returns or yields batches of real inputs; or 'random', for times only.",
    ),
    click.option("--observer", default="histogram", show_default=True, help="histogram, percentile or min-max."),
    click.option(
        "--sparsity",
        multiple=True,
        metavar="[LAYER=]RATIO",
        help="Weights to zero first: 60%; or of single layers, repeated: conv1x1=60%.",
    ),
    click.option(
        "--layers",
        multiple=True,
        metavar="LAYER",
        help="Only these layers: conv1x1, linear, a name, glob or type; repeatable.",
    ),
    click.option("--exclude", multiple=True, metavar="LAYER", help="Not these layers; repeatable."),
    click.option(
        "--im2col",
        multiple=True,
        metavar="PATTERN",
        help="Convolutions with larger kernels, by name, glob or type, to compute on integers too; repeatable.",
    ),
    click.option(
        "--backend",
        multiple=True,
        metavar="[LAYER=]BACKEND",
        help="auto (the default: what is fastest here), native, onednn, fbgemm or reference; or of single layers.",
    ),
    click.option("--block", default="1x4", show_default=True, help="Weights left out together, or dense for none."),
)


@commands.command()
@takes_model
@with_options(_LOWERING)
@click.option("--latency", is_flag=True, help="Measure the time of one run before and after.")
@saves_result
def lower(source: ModelSource, saving: Saving, latency: bool, calibration: str | None, **options: Any) -> None:
    """Compute linear layers, 1×1 and depthwise convolutions on 8-bit integers, and save the model.

    Blocks of zero weights are left out. Without --backend every layer runs in what is fastest here.
    """
    saving.check()
    options = {"backend": ("auto",)} | {name: value for name, value in options.items() if value}
    shares = {"sparsity": read_by_layer(options.pop("sparsity", ()), "--sparsity")}
    shares["backend"] = read_by_layer(options.pop("backend"), "--backend", ("native", "onednn"))
    batches = _Calibration.of(calibration)
    stages = ("build", *_stages(shares["sparsity"] is not None), *(("measure",) if latency else ()), "save")
    with Progress(stages, quiet=saving.as_json) as progress:
        built = build_model(source)
        progress.advance()
        given = batches.batches(built.inputs, source.seed)
        how = options | shares | {"seed": source.seed, "observers": saving.observers(progress)}
        result = api.lower(built.model, built.inputs, calibration=given, **how)
        if latency:
            result = dataclasses.replace(result, latency_ms=measure_latency(built.model, result.module, built.inputs))
            progress.advance()
        result = dataclasses.replace(result, notes=(*result.notes, *batches.notes, *built.notes))
        saving.save(result)
    saving.show(source, result)


def _stages(is_sparse: bool) -> tuple[str, ...]:
    """Return what the progress shows for every pass."""
    first = ("trace and mask weights", "fold batch norms") if is_sparse else ("trace and fold batch norms",)
    return (*first, "remove identities", "make linear layers", "calibrate and quantise", "lower")


@dataclasses.dataclass(frozen=True)
class _Calibration:
    """Where batches come from: a callable of the user's, or noise."""

    name: str

    @staticmethod
    def of(name: str | None) -> _Calibration:
        """Read the option. Raises `InputError` where it is missing: noise is never taken silently."""
        if name is None:
            raise InputError(
                "lowering needs data to find the ranges of values: give --calibration path/to/file.py:callable, which "
                "returns or yields batches of real inputs; --calibration random does to measure times"
            )
        if name != RANDOM:
            import_callable(name, "a source of batches")
        return _Calibration(name)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user must know of the data."""
        if self.name != RANDOM:
            return (f"calibrated on {self.name}",)
        return ("calibrated on random inputs: times are right, outputs are not what they would be on real data",)

    def batches(self, inputs: Inputs, seed: int) -> Iterator[Any]:
        """Yield the batches. Raises `InputError` where the callable fails."""
        if self.name == RANDOM:
            yield _noise(inputs, seed)
            return
        try:
            yield from import_callable(self.name, "a source of batches")()
        except FxpruneError:
            raise
        except Exception as error:
            raise InputError(f"'{self.name}' gives no batches: {first_line(error)}") from error


def _noise(inputs: Inputs, seed: int) -> Inputs:
    """Return inputs of the same shapes with numbers in [0, 1); integers stay as they are."""
    generator = torch.Generator().manual_seed(seed)

    def sample(tensor: Tensor) -> Tensor:
        return torch.rand(tensor.shape, generator=generator).to(tensor) if tensor.is_floating_point() else tensor

    args, kwargs = pytree.tree_map_only(Tensor, sample, (inputs.args, inputs.kwargs))
    return Inputs(args, kwargs)
