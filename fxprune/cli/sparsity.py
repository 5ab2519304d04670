"""Make weights sparse: `sparsify`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from fxprune import api
from fxprune.cli.options import SPARSE_LAYERS, commands, read_by_layer, takes_model, with_options
from fxprune.cli.saving import Saving, saves_result
from fxprune.console import Progress
from fxprune.errors import ArtifactError, SpecError, TargetError
from fxprune.insights.profile import sparsity_profile
from fxprune.plots import check_plot, plot_macs_by_role, plot_sparsity
from fxprune.sparsity.layers import DEFAULT_LAYERS
from fxprune.zoo import ModelSource, build_model

_SPARSITY = (
    click.option(
        "--sparsity",
        multiple=True,
        metavar="[LAYER=]RATIO",
        help="Weights to zero: 80%; or of single layers, repeated: conv1x1=80%.",
    ),
    click.option("--macs", metavar="AMOUNT", help="Multiply-accumulates to leave: 50% or 2e9."),
    click.option("--macs-of", metavar="MODEL", help="As many multiply-accumulates as this model has."),
    click.option("--parameters", metavar="AMOUNT", help="Parameters to leave: 50% or 1e6."),
    click.option("--block", default="1x4", show_default=True, help="Weights zeroed together, output × input channels."),
    click.option("--scope", default="uniform", show_default=True, help="uniform or global."),
    *SPARSE_LAYERS,
    click.option("--max-sparsity", metavar="RATIO", help="Largest fraction of any layer; all of it by default."),
)


@commands.command()
@takes_model
@with_options(_SPARSITY)
@click.option("--plots", type=click.Path(path_type=Path), help="A folder for plots; needs the extra 'plots'.")
@saves_result
def sparsify(source: ModelSource, saving: Saving, plots: Path | None, **options: Any) -> None:
    """Zero the least important weights, single or in blocks, and save the sparse model."""
    saving.check()
    if plots is not None:
        _check_plots(plots)
    options = _options(**options)
    stages = ("build", "trace and mask weights", "save", *(("plot",) if plots else ()))
    with Progress(stages, quiet=saving.as_json) as progress:
        built = build_model(source)
        if "macs_of" in options:
            options["macs"] = build_model(
                dataclasses.replace(source, name=options.pop("macs_of"), weights=None, checkpoint=None)
            ).model
        progress.advance()
        observers = saving.observers(progress)
        result = api.sparsify(built.model, built.inputs, seed=source.seed, observers=observers, **options)
        result = dataclasses.replace(result, notes=(*result.notes, *built.notes))
        saving.save(result)
        progress.advance()
        if plots is not None:
            _write_plots(result, plots)
    saving.show(source, result)
    if plots is not None and not saving.as_json:
        click.echo(f"Plotted {plots}: {', '.join(_PLOTS)}")


def _options(sparsity: tuple[str, ...], layers: tuple[str, ...], **options: Any) -> dict[str, Any]:
    """Return the options of a command as the façade takes them. Raises `SpecError` and `TargetError`."""
    shares = read_by_layer(sparsity, "--sparsity")
    if isinstance(shares, dict) and layers:
        raise SpecError("--sparsity says which layers: give --layers, or --sparsity LAYER=80%, not both")
    if options["macs"] is not None and options["macs_of"] is not None:
        raise TargetError("give exactly one target: --macs, or --macs-of, not both")
    given = {name: value for name, value in options.items() if value is not None}
    return given | {"sparsity": shares, "layers": layers or DEFAULT_LAYERS}


_PLOTS = {"macs.png": plot_macs_by_role, "sparsity.png": plot_sparsity}


def _check_plots(folder: Path) -> None:
    check_plot(folder / next(iter(_PLOTS)))
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"'{folder}' is a file; give a folder for the plots")


def _write_plots(result: api.Result, folder: Path) -> None:
    profile = sparsity_profile(result.traced, result.report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot make the folder '{folder}': {error.strerror}") from error
    for name, plot in _PLOTS.items():
        plot(profile, folder / name)
