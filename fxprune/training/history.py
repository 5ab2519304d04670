"""What happened in training: one record per epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["History", "Record"]


@dataclass(frozen=True)
class Record:
    """One epoch: a row of the log.

    `step` counts optimizer steps up to its end, `learning_rate` is the main group's at its last step. `train_loss` and
    `penalty` are means over the epoch's steps and all processes; the optimizer minimised their sum. `measures` are the
    validation means (empty without validation data), `smoothed_loss` is the stop rule's, `extras` is what hooks add,
    `seconds` is wall time with validation.
    """

    epoch: int
    step: int
    learning_rate: float
    train_loss: float
    penalty: float
    measures: Mapping[str, float]
    smoothed_loss: float | None
    extras: Mapping[str, float]
    seconds: float

    def row(self) -> dict[str, float | None]:
        """Return the record as one flat row; measures are named `validation_<measure>`."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "learning_rate": self.learning_rate,
            "train_loss": self.train_loss,
            "penalty": self.penalty,
            **{f"validation_{name}": value for name, value in self.measures.items()},
            "smoothed_loss": self.smoothed_loss,
            **self.extras,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class History:
    """A whole run.

    `stopped_by` is "epochs" when all were trained, "tolerance" for the stop rule, or the name of the hook that stopped
    it; None while the run goes on. `best_epoch` is the one of the lowest validation loss, None without validation.
    """

    records: tuple[Record, ...] = ()
    stopped_by: str | None = None
    best_epoch: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the history as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> History:
        """Return the history that `to_dict` wrote."""
        return cls(tuple(Record(**record) for record in state["records"]), state["stopped_by"], state["best_epoch"])
