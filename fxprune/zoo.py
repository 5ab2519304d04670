"""Models by name (`torchvision:resnet50`, `timm:NAME`, `path/to/file.py:callable` …), with inputs and weights."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from fxprune.callables import import_callable
from fxprune.checkpoint import load_checkpoint
from fxprune.errors import InputError, nearest
from fxprune.graph.inputs import Inputs

__all__ = ["BuiltModel", "ModelSource", "build_model", "read_shape"]


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: `torchvision:NAME`, `timm:NAME`, `transformers:TYPE` with that type's default configuration, or
            `path/to/file.py:callable`. The callable takes no argument and returns a module, or a pair (module, example
            inputs).
        weights: name of the library's own weights ("DEFAULT"), which it downloads; None for random ones.
        checkpoint: a state_dict to load: `.safetensors`, or `.pt` and `.pth` as `torch.save` writes them.
        shapes: example inputs as `1x3x224x224` or, for other types than float32, `1x128:int64`; the model's own
            where none is given.
        seed: of random weights and random inputs.
    """

    name: str
    weights: str | None = None
    checkpoint: Path | None = None
    shapes: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class BuiltModel:
    """A model in evaluation mode, its example inputs, and what a user must know about the two."""

    model: nn.Module
    inputs: Inputs
    notes: tuple[str, ...] = ()


def build_model(source: ModelSource) -> BuiltModel:
    """Build a model by name and load its weights.

    Raises `InputError` for a name, file, weights, checkpoint or shape that does not exist or does not fit.
    """
    prefix, _, name = source.name.rpartition(":")
    build = _LIBRARIES.get(prefix, _from_file if prefix.endswith(".py") else None)
    if build is None:
        raise InputError(f"cannot tell where model '{source.name}' comes from; {_guess(source.name)}")
    torch.manual_seed(source.seed)
    model, inputs, notes = build(name, source)
    if source.shapes:
        inputs = _inputs_of(source.shapes, inputs)
    if inputs is None:
        raise InputError(f"the inputs of '{source.name}' are not known; give --input, for example --input 1x3x224x224")
    if source.checkpoint is not None:
        load_checkpoint(model, source.checkpoint)
    return BuiltModel(model.eval(), inputs, (*_notes(source, prefix), *notes))


def _inputs_of(shapes: tuple[str, ...], own: Inputs | None) -> Inputs:
    """Return inputs of given shapes: one argument each, or one list of all where the model takes a list of images."""
    tensors = [read_shape(shape) for shape in shapes]
    takes_list = own is not None and len(own.args) == 1 and isinstance(own.args[0], list)
    return Inputs((tensors,) if takes_list else tuple(tensors))


def _guess(name: str) -> str:
    plain = name.rpartition(":")[2]
    close = difflib.get_close_matches(plain, torchvision.models.list_models(), n=1, cutoff=0.7)
    hint = f"did you mean 'torchvision:{close[0]}'? " if close else ""
    return f"{hint}write torchvision:NAME, timm:NAME, transformers:TYPE or path/to/file.py:callable"


def _notes(source: ModelSource, prefix: str) -> tuple[str, ...]:
    if source.checkpoint is not None:
        return (f"weights from {source.checkpoint.name}",)
    if source.weights is not None:
        return (f"weights '{source.weights}' of {prefix}",)
    if prefix in _LIBRARIES:
        remedy = "give --weights DEFAULT or --checkpoint FILE for trained ones"
        return (f"the weights are random (seed {source.seed}); {remedy}",)
    return ("weights as the callable made them",)


class _Built(NamedTuple):
    """A model as its library makes it; its inputs are None where they are not known."""

    model: nn.Module
    inputs: Inputs | None
    notes: tuple[str, ...] = ()


def _from_torchvision(name: str, source: ModelSource) -> _Built:
    models = torchvision.models
    known = [n for n in models.list_models() if not n.startswith("quantized_")]
    if name.startswith("quantized_"):
        plain = name.removeprefix("quantized_")
        raise InputError(
            f"'{name}' is quantised; prune the floating-point model 'torchvision:{plain}' and quantise then"
        )
    if name not in known:
        raise InputError(f"torchvision has no model '{name}'; {nearest(name, known)}")
    builder = models.get_model_builder(name)
    family = builder.__module__.split(".")[2]
    options: dict[str, Any] = {"weights": _torchvision_weights(name, source.weights)}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    if name in _SLOW_RANDOM_WEIGHTS and source.weights is None:
        options["init_weights"] = False
    with _downloading(name):
        model = builder(**options)
    if family == "detection":
        return _Built(model, Inputs(([torch.rand(3, _DETECTED, _DETECTED)],)), (_DATA_DEPENDENT,))
    shapes = _FAMILY_INPUTS.get(family, _one_image)(_image_size(name, model))
    return _Built(model, Inputs(tuple(torch.rand(shape) for shape in shapes)))


_DETECTED = 320
"""Side of a detector's example image, which the detector itself resizes."""

_DATA_DEPENDENT = "a detector's boxes, and what they cost, depend on the image's values"

_SLOW_RANDOM_WEIGHTS = frozenset({"googlenet", "inception_v3"})
"""Models whose own initialisation takes most of a minute."""


def _torchvision_weights(name: str, wanted: str | None) -> Any:
    if wanted is None:
        return None
    known = torchvision.models.get_model_weights(name)
    if wanted == "DEFAULT":
        return known["DEFAULT"]
    if wanted not in known.__members__:
        raise InputError(f"'{name}' has no weights '{wanted}'; {nearest(wanted, ['DEFAULT', *known.__members__])}")
    return known[wanted]


def _image_size(name: str, model: nn.Module) -> int:
    """Return the side of the images that a torchvision model takes: its own, else what its weights were tested on."""
    own = getattr(model, "image_size", None)
    if isinstance(own, int):
        return own
    transforms = getattr(torchvision.models.get_model_weights(name)["DEFAULT"].transforms, "keywords", {})
    size = transforms.get("crop_size", transforms.get("resize_size", 224))
    return int(size[0] if isinstance(size, (tuple, list)) else size)


_Shapes = tuple[tuple[int, ...], ...]


def _one_image(size: int) -> _Shapes:
    return ((1, 3, size, size),)


_FAMILY_INPUTS: Mapping[str, Callable[[int], _Shapes]] = {
    "video": lambda size: ((1, 3, 16, size, size),),
    "optical_flow": lambda _: ((1, 3, 128, 128), (1, 3, 128, 128)),
}


def _library(package: str, name: str) -> Any:
    """Import a library of models that fxprune does not depend on."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(f"'{package}:{name}' needs the package {package}: pip install {package}") from None


def _from_timm(name: str, source: ModelSource) -> _Built:
    timm = _library("timm", name)
    if source.weights not in (None, "DEFAULT"):
        remedy = f"write the tag behind the name, 'timm:{name}.TAG', with --weights DEFAULT"
        raise InputError(f"timm knows no weights '{source.weights}'; {remedy}")
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise InputError(f"timm has no model '{name}'; {nearest(architecture, timm.list_models())}")
    with _downloading(name):
        model = timm.create_model(name, pretrained=source.weights is not None)
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
    return _Built(model, Inputs((torch.rand(1, *size),)))


_TRANSFORMERS_TASKS = ("ObjectDetection", "SemanticSegmentation", "ImageClassification")
"""Heads that a vision model of transformers may have, the one with most layers first."""


def _from_transformers(name: str, source: ModelSource) -> _Built:
    transformers = _library("transformers", name)
    if source.weights is not None:
        raise InputError(f"'{source.name}' is a bare architecture; give --checkpoint FILE for trained weights")
    known = list(transformers.CONFIG_MAPPING)
    if name not in known:
        raise InputError(f"transformers has no model type '{name}'; {nearest(name, known)}")
    config = transformers.AutoConfig.for_model(name)
    heads = [getattr(transformers, f"AutoModelFor{task}") for task in _TRANSFORMERS_TASKS]
    head = next((h for h in heads if type(config) in h._model_mapping), None)
    if head is None:
        tasks = ", ".join(_TRANSFORMERS_TASKS)
        raise InputError(
            f"transformers has no vision model of type '{name}' (for {tasks}); write path/to/file.py:callable"
        )
    with _downloading(name):
        model = head.from_config(config)
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return _Built(model, Inputs(kwargs={"pixel_values": torch.rand(1, config.num_channels, height, width)}))


@contextmanager
def _downloading(name: str) -> Iterator[None]:
    """Say in one line which model's weights did not come, whatever the library raises."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"'{name}' could not be built or its weights downloaded: {lines[0]}") from error


def _from_file(_: str, source: ModelSource) -> _Built:
    if source.weights is not None:
        raise InputError(f"--weights is for torchvision and timm; give '{source.name}' a --checkpoint FILE")
    build = import_callable(source.name)
    try:
        made = build()
    except Exception as error:
        raise InputError(
            f"calling '{source.name}' without arguments failed: {type(error).__name__}: {error}"
        ) from error
    if isinstance(made, nn.Module):
        return _Built(made, None)
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        return _Built(made[0], Inputs.of(made[1]))
    raise InputError(
        f"'{source.name}' returned {type(made).__name__}; return a torch.nn.Module or a pair (module, example inputs)"
    )


_LIBRARIES: Mapping[str, Callable[[str, ModelSource], _Built]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "transformers": _from_transformers,
}


_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")


def read_shape(text: str) -> Tensor:
    """Return a random tensor of a shape as users write it; integers and booleans are zeros.

    >>> read_shape("1x3x8x8").shape, read_shape("2x16:int64").dtype
    (torch.Size([1, 3, 8, 8]), torch.int64)
    """
    size, _, name = text.partition(":")
    name = name or "float32"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size) or name not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise InputError(f"cannot read the input shape '{text}'; write 1x3x224x224, or 1x128:int64; types: {known}")
    dtype: torch.dtype = getattr(torch, name)
    shape = [int(part) for part in size.split("x")]
    return torch.rand(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
