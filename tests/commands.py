"""The command line as tests call it: what it prints when it is done, and the one line that a mistake gets."""

from __future__ import annotations

from click.testing import CliRunner, Result

from fxprune.cli import commands

__all__ = ["call", "done", "mistake"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(commands, [str(argument) for argument in arguments], prog_name="fxprune")


def done(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def mistake(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1, "an error is one line"
    return result.stderr
