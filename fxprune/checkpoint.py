"""Weights from a file into a model: tensors only, and all of them or none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fxprune.errors import InputError

__all__ = ["load_checkpoint"]


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a state_dict from a file into `model`; nothing is unpickled but tensors.

    Raises `InputError` naming the first key or shape that does not fit; the model is then unchanged.
    """
    state = _state_dict(path)
    own = model.state_dict()
    if not own.keys() & state.keys() and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}  # as DataParallel saves
    optional = {key for key in own if key.endswith("num_batches_tracked")}
    missing = [key for key in own if key not in state and key not in optional]
    unexpected = [key for key in state if key not in own]
    for keys, fact in ((missing, "lacks"), (unexpected, "has an unexpected")):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise InputError(f"checkpoint '{path}' does not fit the model: it {fact} '{keys[0]}'{more}")
    for key, value in state.items():
        if value.shape != own[key].shape:
            shapes = f"{tuple(value.shape)}, the model {tuple(own[key].shape)}"
            raise InputError(f"checkpoint '{path}' does not fit the model: '{key}' has shape {shapes}")
    model.load_state_dict(state, strict=False)


def _state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"there is no checkpoint file '{path}'")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise InputError(f"checkpoint '{path}' is truncated or no safetensors file: {error}") from None
    except Exception as error:
        first = str(error).splitlines()[0]
        raise InputError(
            f"checkpoint '{path}' cannot be read as tensors only ({first}); save model.state_dict()"
        ) from None
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise InputError(f"checkpoint '{path}' holds no state_dict; save model.state_dict() or {{'state_dict': …}}")
    return dict(loaded)
