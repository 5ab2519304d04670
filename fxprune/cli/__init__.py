"""The command line: each command builds a model, calls the façade and prints a table, or JSON for machines."""

from __future__ import annotations

from fxprune.cli import looking, passes, pruning, sensitivity, sparsity
from fxprune.cli.options import commands

__all__ = ["commands", "looking", "passes", "pruning", "sensitivity", "sparsity"]
