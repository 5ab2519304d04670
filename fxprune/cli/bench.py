"""Compare ways to run a model: `bench`."""

from __future__ import annotations

from typing import Any

import click

from fxprune import api
from fxprune.api.bench import NAMES
from fxprune.cli.options import AS_JSON, commands, show_notes, takes_model
from fxprune.console import Progress
from fxprune.zoo import ModelSource, build_model


@commands.command("bench")
@takes_model
@click.option(
    "--variants", default=",".join(NAMES), show_default=True, metavar="NAMES", help="What to compare, with commas."
)
@click.option("--sparsity", multiple=True, metavar="RATIO", help="Of the variant lowered: 60%; repeatable.")
@click.option(
    "--im2col",
    multiple=True,
    metavar="PATTERN",
    help="Larger convolutions that lowered computes on integers; repeatable.",
)
@click.option("--runs", default=30, show_default=True, help="Timed runs of every variant.")
@click.option("--warmup", default=5, show_default=True, help="Runs of every variant before those.")
@click.option("--threads", type=int, help="Of every variant; as torch is set by default.")
@click.option(
    "--memory-format", default="auto", show_default=True, help="Of images: contiguous, channels-last, or the faster."
)
@click.option("--layers", is_flag=True, help="Print the time of every call in a graph, not only by kind.")
@AS_JSON
def show_bench(
    source: ModelSource, variants: str, sparsity: tuple[str, ...], layers: bool, as_json: bool, **options: Any
) -> None:
    """Measure the model run in several ways, in alternation: eager, compiled, lowered, in other runtimes.

    Every variant's outputs are compared with eager's. What cannot run here has its reason in its row.
    """
    names = tuple(name.strip() for name in variants.split(",") if name.strip())
    made = [name for name in names if name != "lowered"] + [f"lower {share}" for share in sparsity or ("",)]
    with Progress(("build", *made, "measure"), quiet=as_json) as progress:
        built = build_model(source)
        progress.advance()
        how = options | {"sparsity": sparsity or None, "name": source.name, "progress": progress.advance}
        found = api.bench(built.model, built.inputs, names, **how)
    if as_json:
        click.echo(found.json(), nl=False)
        return
    click.echo(found.table())
    if layers:
        click.echo(f"\n{found.layer_table()}")
    show_notes(built.notes)
