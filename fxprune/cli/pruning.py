"""Make models slimmer: `prune`."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from fxprune import api
from fxprune.cli.options import ATTENTION, commands, read_by_layer, takes_model, with_options
from fxprune.cli.saving import Saving, saves_result
from fxprune.console import Progress
from fxprune.latency import measure_latency
from fxprune.zoo import ModelSource, build_model

_SELECTION = (
    click.option("--macs", metavar="AMOUNT", help="Multiply-accumulates to leave: 50% or 2e9."),
    click.option("--parameters", metavar="AMOUNT", help="Parameters to leave: 50% or 1e6."),
    click.option(
        "--ratio",
        multiple=True,
        metavar="[LAYER=]RATIO",
        help="Channels to remove: 30%; or of single layers, repeated: layer1.*=30%.",
    ),
    click.option("--criterion", default="l2", show_default=True, help="l1, l2, fpgm, bn-scale or random."),
    click.option("--scope", default="global", show_default=True, help="global or uniform."),
    click.option("--round-to", default=1, show_default=True, help="Kept channels are a multiple of this."),
    click.option("--min-width", default=1, show_default=True, help="Channels that stay in every orbit at least."),
    click.option("--max-ratio", default=1.0, show_default=True, help="Largest fraction that leaves any orbit."),
    click.option(
        "--include", multiple=True, metavar="LAYER", help="Only these layers: name, glob or type; repeatable."
    ),
    click.option("--exclude", multiple=True, metavar="LAYER", help="Not these layers: name, glob or type; repeatable."),
    click.option("--allow-statistical", is_flag=True, help="Also cut through layer norms, approximately."),
    ATTENTION,
)


@commands.command()
@takes_model
@with_options(_SELECTION)
@click.option("--latency", is_flag=True, help="Measure the time of one run before and after.")
@saves_result
def prune(source: ModelSource, saving: Saving, latency: bool, ratio: tuple[str, ...], **options: Any) -> None:
    """Remove the least important channels and save the slim model."""
    saving.check()
    stages = ("build", "trace and mask", "select channels", "cut channels", *(("measure",) if latency else ()), "save")
    with Progress(stages, quiet=saving.as_json) as progress:
        built = build_model(source)
        progress.advance()
        shares = read_by_layer(ratio, "--ratio")
        observers = saving.observers(progress)
        result = api.prune(built.model, built.inputs, ratio=shares, seed=source.seed, observers=observers, **options)
        if latency:
            times = measure_latency(built.model, result.module, built.inputs)
            result = dataclasses.replace(result, latency_ms=times)
            progress.advance()
        result = dataclasses.replace(result, notes=(*result.notes, *built.notes))
        saving.save(result)
    saving.show(source, result)
