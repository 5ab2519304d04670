"""The tables of a recipe and what each key means; needs pydantic, of the extra `train`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, cast

from pydantic import Field, create_model, field_validator, model_validator

from fxprune.errors import UsageError
from fxprune.recipes.tables import File, Function, Name, Strings, Table, a_list, named, with_parameters
from fxprune.recipes.task import LOSSES, MEASURES
from fxprune.selection import read_limit
from fxprune.training.options import Training
from fxprune.zoo import ModelSource, read_shape

__all__ = ["Data", "Finetune", "Job", "Learn", "Model", "Objectives", "Output", "Recipe", "Source", "recipe_of"]


class Source(Table):
    """Where a model comes from: as MODEL, --weights and --checkpoint of every command."""

    name: Name
    weights: str | None = None
    checkpoint: File | None = None

    def source(self, shapes: tuple[str, ...], seed: int) -> ModelSource:
        """Return what builds the model."""
        checkpoint = None if self.checkpoint is None else Path(self.checkpoint)
        return ModelSource(self.name, self.weights, checkpoint, shapes, seed)


class Model(Source):
    """The model to make slimmer, and the shapes of its example inputs."""

    input: Strings = ()
    frontend: str = "auto"

    @field_validator("input")
    @classmethod
    def _is_shapes(cls, shapes: tuple[str, ...]) -> tuple[str, ...]:
        for shape in shapes:
            _checked(read_shape, shape)
        return shapes


class Data(Table):
    """Functions of the user's that take no argument and return a Dataset, a DataLoader or a list of batches.

    Of a Dataset `batch_size` and `workers` make a loader; the share `held_out` of it is kept for validation.
    """

    train: Function
    validation: Function | None = None
    held_out: float | str | None = None
    batch_size: int = Field(64, ge=1)
    workers: int = Field(0, ge=0)

    @field_validator("held_out")
    @classmethod
    def _is_share(cls, share: float | str) -> float | str:
        _checked(read_limit, share, "held_out")
        return share

    @model_validator(mode="after")
    def _has_one_validation(self) -> Self:
        if self.held_out is not None and self.validation is not None:
            raise ValueError("has validation and held_out; give one of the two")
        return self


class Objectives(Table):
    """What training minimises, and what is measured on the validation data: by name, or functions of the user's."""

    loss: Annotated[str, named(LOSSES)]
    measure: Annotated[str, named(MEASURES)] | None = None


class Job(Table):
    """Options of `Training`, and beside them those of the function that trains."""

    elsewhere: ClassVar = {"seed": "it stands at the top of the recipe, for all that is drawn"}

    @model_validator(mode="after")
    def _can_train(self) -> Self:
        _checked(self.training, Training.seed)
        return self

    def training(self, seed: int) -> Training:
        """Return the options of the training."""
        return Training(**self.arguments(Training), seed=seed)


class Learn(Job):
    """How channels are learned: all epochs are run."""

    elsewhere: ClassVar = Job.elsewhere | dict.fromkeys(
        ("keep_best", "tolerance", "smoothing"), "where channels are learned, the last weights of all epochs are kept"
    )


class Finetune(Job):
    """How the slim model trains: on the outputs of teachers too, the smallest first, where any are named.

    `recalibrate` estimates the statistics of batch norms anew before.
    """

    teachers: Annotated[tuple[Source, ...], a_list] = ()
    recalibrate: bool = False

    @model_validator(mode="after")
    def _has_teachers(self) -> Self:
        others = (*Finetune.model_fields, *Training.__dataclass_fields__)
        alone = sorted(name for name in self.model_fields_set if name not in others)
        if alone and not self.teachers:
            raise ValueError(f"{alone[0]} is about teachers; name some: teachers = [{{name = …}}]")
        return self


class Output(Table):
    """What is written beside the weights and the plan."""

    pt2: bool = False
    onnx: bool = False
    plots: bool = False


class Recipe(Table):
    """All that a run depends on; `base` is where relative paths start, by default the folder of the recipe."""

    base: File | None = None
    seed: int = Training.seed
    model: Model
    data: Data
    task: Objectives
    learn: Job
    finetune: Finetune | None = None
    output: Output = Output()

    @field_validator("seed")
    @classmethod
    def _is_seed(cls, seed: int) -> int:
        _checked(Training, epochs=1, seed=seed)
        return seed

    @model_validator(mode="after")
    def _measures_something(self) -> Self:
        if self.task.measure is not None and self.data.validation is None and self.data.held_out is None:
            raise ValueError("task.measure has nothing to measure on; give data.validation or data.held_out")
        return self


_OF_OTHERS = ("seed", "validation", "measure", "folder", "frontend", "observers", "hooks", "progress", "teachers")
"""Parameters that a run fills from other tables, or that no file can hold."""


@functools.cache
def recipe_of(learn: Callable[..., Any], finetune: Callable[..., Any]) -> type[Recipe]:
    """Return the schema whose tables [learn] and [finetune] have the options of two functions."""
    learning = with_parameters(with_parameters(Learn, Training, (*_OF_OTHERS, *Learn.elsewhere)), learn, _OF_OTHERS)
    finetuning = with_parameters(with_parameters(Finetune, Training, _OF_OTHERS), finetune, _OF_OTHERS)
    fields: dict[str, Any] = {"learn": (learning, ...), "finetune": (finetuning | None, None)}
    return cast(type[Recipe], create_model("Recipe", __base__=Recipe, **fields))


def _checked(check: Callable[..., object], *args: Any, **options: Any) -> None:
    """Run a check of fxprune's own where pydantic expects another exception; None is false in a recipe."""
    try:
        check(*args, **options)
    except UsageError as error:
        raise ValueError(str(error).replace(", or None", ", or false")) from error
