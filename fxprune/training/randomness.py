"""The state of every random number generator that training draws from."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["random_state", "restore_random_state", "undisturbed_randomness"]


def random_state(device: torch.device, generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's generators, of the device's, and of `generators`."""
    legacy = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**legacy, "state": {**legacy["state"], "key": legacy["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "device": None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(),
        "generators": [generator.get_state() for generator in generators],
    }


def restore_random_state(
    state: dict[str, Any], device: torch.device, generators: Sequence[torch.Generator] = ()
) -> None:
    """Put the generators back to where `random_state` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    if state["device"] is not None:
        torch.get_device_module(device).set_rng_state(state["device"])
    for generator, saved in zip(generators, state["generators"], strict=True):
        generator.set_state(saved)


@contextmanager
def undisturbed_randomness(device: torch.device) -> Iterator[None]:
    """Leave all generators as they were, whatever is drawn inside."""
    state = random_state(device)
    try:
        yield
    finally:
        restore_random_state(state, device)
