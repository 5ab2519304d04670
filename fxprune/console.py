"""What every command shares: exit codes, one-line errors and progress."""

from __future__ import annotations

import functools
import platform
import sys
import threading
import traceback
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import click
import torch
from tqdm import tqdm

from fxprune.errors import UsageError

__all__ = ["Commands", "Progress"]


class Commands(click.Group):
    """Commands whose exit code tells whose turn it is: 0 done, 2 the user's mistake, 1 a defect of fxprune."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run the command that `args` name; in standalone mode exit the process with the code."""
        run = functools.partial(super().main, *args, standalone_mode=False, **extra)
        if not standalone_mode:
            return run()
        sys.exit(_exit_code(run))


def _exit_code(run: Callable[[], Any]) -> int:
    try:
        return run() or 0
    except (UsageError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        context = getattr(error, "ctx", None)
        hint = f" (see '{context.command_path} --help')" if context is not None else ""
        click.echo(f"Error: {' '.join(message.split()).rstrip('.')}{hint}", err=True)
        return 2
    except click.Abort:
        click.echo("Interrupted", err=True)
        return 130
    except Exception:
        click.echo(traceback.format_exc(), err=True)
        click.echo(_defect(), err=True)
        return 1


def _defect() -> str:
    versions = f"fxprune {version('fxprune')}, torch {torch.__version__}, torchvision {version('torchvision')}"
    return (
        "Error: this is a defect of fxprune, not a mistake of yours. Please report it with the traceback above, the "
        f"command that you ran, and these versions: {versions}, Python {platform.python_version()}"
    )


class Progress:
    """A bar on stderr: one tick for every finished stage, and a clock that runs within one.

    It shows after two seconds, and only on a terminal.
    """

    def __init__(self, stages: tuple[str, ...], *, quiet: bool) -> None:
        self.stages = iter((*stages, "done"))
        layout = "{desc}: {bar:24} {n_fmt}/{total_fmt}, {elapsed}"
        silent = quiet or not sys.stderr.isatty()
        self.bar = tqdm(total=len(stages), disable=silent, leave=False, delay=2, bar_format=layout, file=sys.stderr)
        self.bar.set_description_str(next(self.stages), refresh=False)
        self.finished = threading.Event()
        self.clock = None if silent else threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        if self.clock is not None:
            self.clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finished.set()
        if self.clock is not None:
            self.clock.join()
        self.bar.close()

    def _tick(self) -> None:
        wait = self.bar.delay
        while not self.finished.wait(wait):
            self.show()
            wait = 0.5

    def show(self) -> None:
        """Draw the bar now."""
        self.bar.delay = 0  # tqdm takes a bar away only if its delay is over
        self.bar.refresh()

    def advance(self, *_: object) -> None:
        """Finish a stage; also an observer of passes."""
        self.bar.set_description_str(next(self.stages, "done"), refresh=False)
        self.bar.update()
