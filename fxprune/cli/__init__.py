"""The command line: each command builds a model, calls the façade and prints a table, or JSON for machines."""

from __future__ import annotations

from fxprune.cli import bench, learning, looking, lowering, passes, pruning, sensitivity, sparsity
from fxprune.cli.options import commands

__all__ = ["bench", "commands", "learning", "looking", "lowering", "passes", "pruning", "sensitivity", "sparsity"]
