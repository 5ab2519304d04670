"""Batches as one process sees them: its share, on its device, in an order that the epoch decides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from fxprune.callables import blaming
from fxprune.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Feed", "feed"]


@dataclass(frozen=True)
class Feed:
    """Batches for one process; of plain iterables it takes every `processes`-th."""

    source: Iterable[Any]
    device: torch.device
    generators: tuple[torch.Generator, ...] = ()
    first: int = 0
    processes: int = 1

    @property
    def length(self) -> int | None:
        """How many batches every process gets; None where the source does not know."""
        try:
            return len(self.source) // self.processes  # type: ignore[arg-type]
        except TypeError:
            return None

    def epoch(self, number: int) -> Iterator[Any]:
        """Yield the batches of an epoch; a loader that shuffles draws its order from the seed and the epoch alone.

        Raises `InputError` where the source fails.
        """
        from accelerate.utils import send_to_device

        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(number)
        failing = blaming(f"reading the batches failed in epoch {number}")
        batches = failing(iter)(islice(self.source, self.first, None, self.processes))
        while (batch := failing(next)(batches, _END)) is not _END:
            yield send_to_device(batch, self.device)


_END = object()


def feed(batches: Iterable[Any], accelerator: Accelerator, seed: int, *, even: bool) -> Feed:
    """Share batches out to the processes.

    A DataLoader is sharded as by Accelerate: its batch size is that of each process. With `even`, all get equally
    many batches, so a few samples may come twice; without, every sample comes once. An iterable dataset is run through
    by every process, which takes its share. Raises `InputError` for an iterator, used up after one epoch.
    """
    if isinstance(batches, Iterator):
        raise InputError(
            f"the batches are a {type(batches).__name__}, used up after one epoch; give a DataLoader or a list"
        )
    if not isinstance(batches, DataLoader):
        return Feed(batches, accelerator.device, (), accelerator.process_index, accelerator.num_processes)
    from accelerate.data_loader import prepare_data_loader

    loader = prepare_data_loader(
        batches,
        device=accelerator.device,
        put_on_device=True,
        dispatch_batches=False,
        even_batches=even,
        use_seedable_sampler=True,
        data_seed=seed,
    )
    return Feed(loader, accelerator.device, _generators(batches))


def _generators(loader: DataLoader[Any]) -> tuple[torch.Generator, ...]:
    found = [getattr(owner, "generator", None) for owner in (loader, loader.sampler)]
    return tuple(generator for generator in found if isinstance(generator, torch.Generator))
