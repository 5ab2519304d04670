"""`python -m fxprune`, and the console script."""

from __future__ import annotations

from fxprune.cli import commands

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with 0 when done, 2 for a mistake of the user, 1 for a defect of fxprune."""
    commands(prog_name="fxprune")


if __name__ == "__main__":
    main()
