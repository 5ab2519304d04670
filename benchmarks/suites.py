"""Which models the public zoos hold, and how each is built for a measurement."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from fxprune import Inputs
from fxprune.zoo import BuiltModel, ModelSource, build_model

__all__ = ["SUITES", "build", "inputs_for_laws", "is_data_dependent"]

SMALL_SIDES = (64, 96, 128)
"""Sides of images on which large models are checked, where they take them."""

CHEAP = 5e9
"""MACs of a run in float64 that needs no smaller image."""


def torchvision_names(results: Path) -> list[str]:  # noqa: ARG001
    """Every constructor of torchvision."""
    return list(torchvision.models.list_models())


def timm_names(results: Path) -> list[str]:
    """The smallest variant of every family of timm; found once, then read from `timm-families.json`."""
    file = results / "timm-families.json"
    if not file.is_file():
        file.write_text(json.dumps(dict(smallest_of_families()), indent=2) + "\n")
    return list(json.loads(file.read_text()).values())


def smallest_of_families() -> Iterator[tuple[str, str]]:
    """Yield (family, variant with the fewest parameters); variants that timm keeps for its own tests do not count."""
    import timm

    for family in sorted(timm.list_modules()):
        variants = [name for name in timm.list_models(module=family) if not name.startswith("test_")]
        if variants:
            yield family, min(variants, key=parameters_of)


def parameters_of(name: str) -> int:
    """Count the parameters of a timm model without memory for them."""
    import timm

    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())


def transformers_names(results: Path) -> list[str]:  # noqa: ARG001
    """Vision models of transformers with their default configurations."""
    return ["vit", "swin", "convnext", "segformer", "detr"]


SUITES: Mapping[str, Callable[[Path], list[str]]] = {
    "torchvision": torchvision_names,
    "timm": timm_names,
    "transformers": transformers_names,
}
"""Suite → function from the folder of results to the names of its models."""


def build(suite: str, name: str) -> BuiltModel:
    """Return a model with random weights in evaluation mode, and inputs of its own size."""
    return build_model(ModelSource(f"{suite}:{name}"))


def is_data_dependent(suite: str, name: str) -> bool:
    """Whether what the model computes, and so its MACs, depend on the values of the image: whether it is a detector."""
    return suite == "torchvision" and name in torchvision.models.list_models(module=torchvision.models.detection)


def inputs_for_laws(suite: str, name: str, macs: float) -> tuple[nn.Module, Inputs]:
    """Return the model anew and inputs on which it is checked: its own where they are cheap, else small images."""
    if is_data_dependent(suite, name):
        return small_detector(name)
    built = build(suite, name)
    own = built.inputs
    if macs <= CHEAP or own.kwargs or len(own.args) > 1 or own.args[0].dim() != 4:
        return built.model, own
    images = (Inputs((torch.rand(2, own.args[0].shape[1], side, side),)) for side in SMALL_SIDES)
    return built.model, next((inputs for inputs in images if accepts(built.model, inputs)), own)


def accepts(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a model runs on inputs."""
    try:
        with torch.no_grad():
            model(*inputs.args, **inputs.kwargs)
    except Exception:
        return False
    return True


def small_detector(name: str) -> tuple[nn.Module, Inputs]:
    """Return a detector that keeps its image small and every box, so that there is something to compare."""
    options: dict[str, Any] = {} if name.startswith("ssd") else {"min_size": 128, "max_size": 160}
    threshold = "box_score_thresh" if "rcnn" in name else "score_thresh"
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, **{threshold: 0.0}, **options)
    return model.eval(), Inputs(([torch.rand(3, 128, 128)],))
