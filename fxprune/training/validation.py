"""The means of measures over validation data, taken without a trace in the run that is going on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import InputError, SpecError
from fxprune.training.batches import Feed
from fxprune.training.objectives import Measure
from fxprune.training.processes import gathered, share_buffers
from fxprune.training.randomness import undisturbed_randomness

__all__ = ["Validation", "modes_kept"]


@dataclass(frozen=True)
class Validation:
    """Measures a module on validation data.

    Every sample of all processes weighs the same: values per sample are summed, a scalar counts for as many samples as
    its batch's first tensor has. (Iterable datasets on several processes are the exception: Accelerate completes
    their last batch with samples of the first.)
    """

    module: nn.Module
    feed: Feed
    measure: Measure

    def means(self) -> dict[str, float]:
        """Return every measure's mean; modes and random numbers stay as they are. All processes must call it.

        Raises `InputError` when there is no batch.
        """
        share_buffers(self.module)
        totals: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        for part in gathered(self._sums(self.feed.epoch(0))):
            for name, (total, count) in part.items():
                totals[name] += total
                counts[name] += count
        if not totals:
            raise InputError("the validation data give no batch; give at least one, or no validation")
        return {name: total / max(counts[name], 1) for name, total in totals.items()}

    def check(self) -> None:
        """Measure one batch, so that a wrong measure fails before the first epoch and not after it.

        Raises `SpecError` when the measure is no mapping to tensors with "loss".
        """
        self._sums(islice(self.feed.epoch(0), 1))

    def _sums(self, batches: Iterable[Any]) -> dict[str, tuple[float, int]]:
        """Return for every measure its sum over this process's samples, and how many they are."""
        sums: dict[str, tuple[float, int]] = {}
        with modes_kept(self.module), undisturbed_randomness(self.feed.device), torch.no_grad():
            self.module.eval()
            for batch in batches:
                for name, value in self._measured(batch).items():
                    total, count = sums.get(name, (0.0, 0))
                    value = value.detach().cpu().double()
                    more = value.numel() if value.ndim else _samples(batch)
                    sums[name] = (total + (value.sum() if value.ndim else value * more).item(), count + more)
        return sums

    def _measured(self, batch: Any) -> Mapping[str, Tensor]:
        found = self.measure(self.module, batch)
        if not isinstance(found, Mapping) or "loss" not in found:
            shown = ", ".join(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
            raise SpecError(f"measure returned {shown}; return a mapping from names to tensors that has 'loss'")
        for name, value in found.items():
            if not isinstance(value, Tensor):
                raise SpecError(f"measure returned a {type(value).__name__} as '{name}'; return a tensor")
        return found


def _samples(batch: Any) -> int:
    """Count the samples of a batch; one that holds no tensor counts as one."""
    from accelerate.utils import find_batch_size

    try:
        return int(find_batch_size(batch))
    except (TypeError, ValueError, IndexError):
        return 1


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Give every submodule its training or evaluation mode back."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
