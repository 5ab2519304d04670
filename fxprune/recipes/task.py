"""What a recipe trains on and for: data, loss and measures, by name or from files of the user's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, random_split

from fxprune.callables import blaming, import_callable
from fxprune.errors import InputError
from fxprune.selection import read_limit
from fxprune.training.batches import Feed
from fxprune.training.objectives import (
    Loss,
    Measure,
    classification,
    cross_entropy,
    mean_absolute_error,
    mean_squared_error,
    reconstruction,
)

if TYPE_CHECKING:
    from fxprune.recipes.schema import Data, Recipe

__all__ = ["LOSSES", "MEASURES", "Task", "open_task"]


LOSSES: Mapping[str, Loss] = {
    "cross-entropy": cross_entropy,
    "mse": mean_squared_error,
    "l1": mean_absolute_error,
}

MEASURES: Mapping[str, Measure] = {"classification": classification, "reconstruction": reconstruction}


@dataclass(frozen=True)
class Task:
    """Batches to train on, the loss to minimise on them, and what to measure on which other ones."""

    batches: Iterable[Any]
    loss: Loss
    validation: Iterable[Any] | None
    measure: Measure | None

    def first(self, count: int) -> Task:
        """Return the same with the first batches alone. Raises `InputError` where they cannot be read."""
        validation = None if self.validation is None else _first(self.validation, count, "validation")
        return replace(self, batches=_first(self.batches, count, "training"), validation=validation)


def _first(batches: Iterable[Any], count: int, what: str) -> list[Any]:
    with blaming(f"reading the first batch of the {what} data failed"):
        found = list(islice(batches, count))
    if not found:
        raise InputError(f"the {what} data have no batch; give one or more")
    return found


def open_task(recipe: Recipe) -> Task:
    """Import what a recipe names and load its data; whatever of that fails, now or later, is an `InputError`."""
    data, measure = recipe.data, None
    loss = _function(LOSSES, recipe.task.loss, "loss")
    if recipe.task.measure is not None:
        measure = _function(MEASURES, recipe.task.measure, "measure")
    train, validation = _load(data.train, recipe.seed), None
    if data.validation is not None:
        validation = _load(data.validation, recipe.seed)
    _check(data, train, validation)
    with blaming("making batches of the data failed"):
        if data.held_out is not None:
            train, validation = _split(train, data, recipe.seed)
        train, validation = _batches(train, data, shuffled=True), _batches(validation, data, shuffled=False)
    _check_length(recipe, train)
    return Task(train, loss, validation, measure)


def _function(known: Mapping[str, Any], name: str, what: str) -> Any:
    """Return a function by name; when it fails, on any batch, that is the user's to mend."""
    return blaming(f"the {what} '{name}' failed")(known.get(name) or import_callable(name, f"a {what} of your own"))


def _load(name: str, seed: int) -> Any:
    """Call a function of the user's; random numbers that it draws depend on the seed alone."""
    from accelerate.utils import set_seed

    load = import_callable(name, "a source of data")
    set_seed(seed)
    with blaming(f"calling '{name}' without arguments failed"):
        found = load()
    if isinstance(found, Iterator) or not isinstance(found, Dataset | Iterable):
        raise InputError(
            f"'{name}' returned {type(found).__name__}; return a Dataset, a DataLoader or a list of batches"
        )
    return found


def _check(data: Data, train: Any, validation: Any) -> None:
    """Raise `InputError` for keys that are about datasets, where batches are given."""
    if data.held_out is not None and (not isinstance(train, Dataset) or isinstance(train, IterableDataset)):
        raise InputError(
            f"held_out is a part of a Dataset with a length, and '{data.train}' returned {type(train).__name__}; "
            "return one, or name validation data"
        )
    given = sorted({"batch_size", "workers"} & data.model_fields_set)
    if given and not isinstance(train, Dataset) and not isinstance(validation, Dataset):
        raise InputError(
            f"{given[0]} is for a Dataset, and '{data.train}' returned {type(train).__name__}, whose batches are taken "
            "as they are; leave the key out"
        )


def _check_length(recipe: Recipe, batches: Any) -> None:
    """Raise `InputError` for batches without a length, where a training does not say how many it takes."""
    jobs = {"learn": recipe.learn, "finetune": recipe.finetune}
    missing = [name for name, job in jobs.items() if job is not None and job.training(0).steps_per_epoch is None]
    if missing and Feed(batches, torch.device("cpu")).length is None:
        keys = " and ".join(f"{name}.steps_per_epoch" for name in missing)
        raise InputError(f"the batches of '{recipe.data.train}' have no length; set {keys}")


def _split(dataset: Any, data: Data, seed: int) -> list[Any]:
    assert data.held_out is not None
    size = round(len(dataset) * read_limit(data.held_out, "held_out"))
    if not 0 < size < len(dataset):
        raise InputError(
            f"held_out is {data.held_out}, and of {len(dataset)} samples that is {size}; leave some on both sides"
        )
    return random_split(dataset, [len(dataset) - size, size], torch.Generator().manual_seed(seed))


def _batches(found: Any, data: Data, *, shuffled: bool) -> Any:
    """Return a loader of a dataset, and anything else as it is."""
    if not isinstance(found, Dataset):
        return found
    # Workers that lived on would keep random states that no checkpoint knows.
    shuffled = shuffled and not isinstance(found, IterableDataset)
    return DataLoader(found, data.batch_size, shuffle=shuffled, num_workers=data.workers)
