"""Find which layers bear being sparse: `sensitivity`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from fxprune.callables import import_callable
from fxprune.cli.options import AS_JSON, SPARSE_LAYERS, commands, show_notes, takes_model, with_options
from fxprune.console import Progress
from fxprune.errors import ArtifactError
from fxprune.insights.sensitivity import Sensitivity, sensitivity
from fxprune.plots import check_plot, plot_sensitivity
from fxprune.sparsity.layers import DEFAULT_LAYERS, SparseLayer
from fxprune.zoo import ModelSource, build_model


@commands.command("sensitivity")
@takes_model
@click.option("--sparsity", default="95%", show_default=True, help="Of the one layer that is pruned.")
@click.option("--block", default="1x1", show_default=True, help="Weights zeroed together, output × input channels.")
@with_options(SPARSE_LAYERS)
@click.option("--metric", metavar="FILE.py:CALLABLE", help="Takes the module, returns a number; higher is better.")
@click.option("--plot", type=click.Path(path_type=Path), help="A file for a plot: .png, .svg or .pdf.")
@click.option("--out", type=click.Path(path_type=Path), help="A file for the result as JSON.")
@AS_JSON
def show_sensitivity(source: ModelSource, plot: Path | None, out: Path | None, as_json: bool, **options: Any) -> None:
    """Prune each layer alone, and show what the model loses.

    Without --metric that is how far its outputs on the example inputs move, which says little of random weights.
    """
    if plot is not None:
        check_plot(plot)
    for path in filter(None, (plot, out)):
        _check_file(path)
    found, notes = _measure(source, as_json, **options)
    if out is not None:
        _write(out, found.json())
    if plot is not None:
        plot_sensitivity(found, plot)
    if as_json:
        click.echo(found.json(), nl=False)
        return
    click.echo(found.table())
    show_notes(notes)


def _measure(
    source: ModelSource, quiet: bool, metric: str | None, layers: tuple[str, ...], **options: Any
) -> tuple[Sensitivity, tuple[str, ...]]:
    """Return the sensitivity of a model by name, and what is known of its weights."""
    evaluate = None if metric is None else import_callable(metric, "a metric")
    with Progress(("build",), quiet=quiet):
        built = build_model(source)
    with ExitStack() as bars:

        def with_bar(chosen: Sequence[SparseLayer]) -> Iterator[SparseLayer]:
            progress = bars.enter_context(Progress(tuple(layer.name for layer in chosen), quiet=quiet))
            for layer in chosen:
                yield layer
                progress.advance()

        how = options | {"layers": layers or DEFAULT_LAYERS, "seed": source.seed, "progress": with_bar}
        return sensitivity(built.model, built.inputs, evaluate, **how), built.notes


def _check_file(path: Path) -> None:
    """Raise `ArtifactError` where a file cannot be; before the work, so that none is lost."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        why = "it is a folder" if path.is_dir() else f"there is no folder '{path.parent}'"
        raise ArtifactError(f"cannot write '{path}': {why}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"cannot write '{path}': {error.strerror}") from error
