"""Arguments and options that several commands share, and how they are read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fxprune.console import Commands
from fxprune.errors import SpecError
from fxprune.labels.attention import POLICIES
from fxprune.zoo import ModelSource

__all__ = [
    "AS_JSON",
    "ATTENTION",
    "SPARSE_LAYERS",
    "commands",
    "read_by_layer",
    "show_notes",
    "takes_model",
    "with_options",
]

_Command = Callable[..., None]


@click.group(cls=Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fxprune")
@click.pass_context
def commands(context: click.Context) -> None:
    """Make trained PyTorch models physically slimmer, and sparser.

    MODEL is torchvision:NAME, timm:NAME, transformers:TYPE, or path/to/file.py:callable, where the callable takes no
    argument and returns a module or a pair (module, example inputs).
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")

_MODEL = (
    click.argument("model"),
    click.option(
        "--weights", metavar="NAME", help="The library's own weights, DEFAULT for its best; random otherwise."
    ),
    click.option(
        "--checkpoint", type=click.Path(path_type=Path), help="A state_dict to load: .safetensors, .pt or .pth."
    ),
    click.option("--seed", default=0, show_default=True, help="Of random weights, inputs and criteria."),
    click.option(
        "--input",
        "--input-size",
        "shapes",
        multiple=True,
        metavar="SHAPE",
        help="Shape of an example input, as 1x3x224x224 or 1x128:int64; repeat it for several inputs.",
    ),
    click.option("--frontend", default="auto", show_default=True, help="auto, symbolic or export."),
)

ATTENTION = click.option(
    "--attention",
    default=POLICIES[0],
    show_default=True,
    metavar="WHAT",
    help="What leaves attention: dimensions, the same of every head, or heads, whole ones.",
)


SPARSE_LAYERS = (
    click.option(
        "--layers",
        multiple=True,
        metavar="LAYER",
        help="Which layers: conv1x1 (the default), conv, linear, all, a name, glob or type; repeatable.",
    ),
    click.option("--exclude", multiple=True, metavar="LAYER", help="Not these layers; repeatable."),
    click.option("--criterion", default="magnitude", show_default=True, help="magnitude or random."),
)


def with_options(options: tuple[Callable[[_Command], _Command], ...]) -> Callable[[_Command], _Command]:
    """Add options to a command, the first of them first in its help."""
    return lambda command: functools.reduce(lambda done, option: option(done), reversed(options), command)


def takes_model(command: _Command) -> _Command:
    """Add the argument and options that say which model, and hand them over as one `ModelSource`."""

    @functools.wraps(command)
    def gathered(
        model: str, weights: str | None, checkpoint: Path | None, shapes: tuple[str, ...], seed: int, **options: Any
    ) -> None:
        command(ModelSource(model, weights, checkpoint, shapes, seed), **options)

    return with_options(_MODEL)(gathered)


def read_by_layer(
    given: tuple[str, ...], option: str, example: tuple[str, str] = ("30%", "50%")
) -> str | dict[str, Any] | None:
    """Read what `option` says for all layers, as `30%`, or for single ones, as `LAYER=30%` any number of times."""
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    pairs = [item.rpartition("=") for item in given]
    if any(not layer for layer, _, _ in pairs):
        first, second = example
        raise SpecError(f"several {option} need a layer each: {option} layer1.*={first} {option} layer2.*={second}")
    return {layer: share for layer, _, share in pairs} or None


def show_notes(notes: tuple[str, ...]) -> None:
    """Print what the user must know."""
    for note in notes:
        click.echo(f"Note: {note}")
