"""What commands that make a model write and print."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from fxprune import api, artifacts
from fxprune.cli.options import AS_JSON, show_notes, with_options
from fxprune.console import Progress
from fxprune.graph.passes import Observer, PassEvent, changes
from fxprune.zoo import ModelSource

__all__ = ["Saving", "saves_result"]


@dataclasses.dataclass(frozen=True)
class Saving:
    """A new folder for a model, the formats to write besides, and how to tell of it."""

    out: Path
    pt2: bool
    onnx: bool
    print_changes: bool
    as_json: bool

    def check(self) -> None:
        """Raise `ArtifactError` unless the folder can be written; before the work, so that none is lost."""
        artifacts.check_free(self.out.absolute())

    def observers(self, progress: Progress) -> tuple[Observer, ...]:
        """Return what is called after every pass."""

        def show_changes(event: PassEvent) -> None:
            tqdm.write(changes(event), file=sys.stderr if self.as_json else sys.stdout)

        return (show_changes, progress.advance) if self.print_changes else (progress.advance,)

    def save(self, result: api.Result) -> None:
        """Write the folder."""
        api.save(result, self.out, pt2=self.pt2, onnx=self.onnx)

    def show(self, source: ModelSource, result: api.Result) -> None:
        """Print what a model became and where it is."""
        if self.as_json:
            facts = {"model": source.name, "out": str(self.out), "spec": result.plan.spec, "seed": result.plan.seed}
            click.echo(json.dumps(facts | {"report": dataclasses.asdict(result.report)}, indent=2))
            return
        click.echo(result.report.totals())
        show_notes(result.report.notes)
        click.echo(f"Saved {self.out}: {', '.join(sorted(path.name for path in self.out.iterdir()))}")


_OUTPUT = (
    click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder for the model."),
    click.option("--pt2", is_flag=True, help="Also write model.pt2 (torch.export)."),
    click.option("--onnx", is_flag=True, help="Also write model.onnx; needs the extra 'export'."),
    click.option("--print-changes", is_flag=True, help="Print what each pass changed."),
    AS_JSON,
)


def saves_result(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say what to write and print, and hand them over as one `Saving`."""

    @functools.wraps(command)
    def gathered(
        *args: Any, out: Path, pt2: bool, onnx: bool, print_changes: bool, as_json: bool, **options: Any
    ) -> None:
        command(*args, saving=Saving(out, pt2, onnx, print_changes, as_json), **options)

    return with_options(_OUTPUT)(gathered)
