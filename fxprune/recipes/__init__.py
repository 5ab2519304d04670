"""Recipes: a file says which model, data and options learn channels, cut and fine-tune.

Reading one needs the extra `train`; this package can be imported without.
"""

from __future__ import annotations

from fxprune.recipes.reading import RecipeFile, changed_keys, read_recipe
from fxprune.recipes.task import Task, open_task

__all__ = ["RecipeFile", "Task", "changed_keys", "open_task", "read_recipe"]
