"""Whether a model obeys the laws of exactness and prediction, in float64 and with random channels removed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fxprune import Inputs
from fxprune.graph.passes import Pipeline
from fxprune.graph.tracing import trace
from fxprune.labels.detection import find_orbits
from passes import ChannelSurgery, MaskInsertion
from tests.laws import (
    EXACT,
    as_double,
    assert_macs_counted,
    assert_prediction,
    in_double,
    randomise,
    relative_errors,
    run,
    run_around_choices,
    zero_masks,
)

__all__ = ["Lawfulness", "check_laws"]


@dataclass(frozen=True)
class Lawfulness:
    """Relative errors of a model's outputs.

    Attributes:
        traced: of the traced graph against the model.
        slim: of the slim graph against the masked one; None where no orbit is exact, so that only prediction holds.
        masked: of the masked graph against the model; it says that the masks were felt and is meant to be large.
    """

    traced: float
    slim: float | None
    masked: float


def check_laws(model: nn.Module, inputs: Inputs, *, counted: bool, frontend: str = "auto") -> Lawfulness:
    """Remove half of the channels of every exact orbit at random; raise `AssertionError` where a law is broken.

    Where no orbit is exact, half of the channels of the statistical ones leave.

    Args:
        model: converted to float64 and given random normalisation in place.
        inputs: of any floating-point type.
        counted: whether MACs are compared with PyTorch's counter, for which they must not depend on values.
        frontend: of the tracer.
    """
    with in_double():
        return _check(model.double().eval(), as_double(inputs), counted, frontend)


def _check(model: nn.Module, inputs: Inputs, counted: bool, frontend: str) -> Lawfulness:
    generator = torch.Generator().manual_seed(0)
    randomise(model, generator)
    expected = run(model, inputs)
    traced = trace(model, inputs, frontend=frontend)
    tracing = largest(relative_errors(run(traced, inputs), expected, "tracing"))
    assert tracing <= EXACT, f"the traced graph is off by {tracing:.1e}"
    masked = Pipeline((MaskInsertion(),))(traced).graph_module
    orbits = find_orbits(masked)
    is_exact = any(orbit.mask is not None and orbit.statistical is None for orbit in orbits)
    keep = zero_masks(masked, orbits, generator, approximate=not is_exact)
    slim = Pipeline((ChannelSurgery(),))(masked).graph_module
    exactness = largest(relative_errors(*run_around_choices(masked, slim, inputs), "exactness")) if is_exact else None
    assert exactness is None or exactness <= EXACT, f"the slim graph is off by {exactness:.1e}"
    before, after = assert_prediction(masked, slim, orbits, keep)
    if counted:
        assert_macs_counted(masked, inputs, before, "masked")
        assert_macs_counted(slim, inputs, after, "slim")
    assert largest(relative_errors(run(model, inputs), expected, "the model afterwards")) == 0, "the model was changed"
    return Lawfulness(
        tracing, exactness, largest(relative_errors(*run_around_choices(traced, masked, inputs), "masking"))
    )


def largest(errors: list[float]) -> float:
    """Return the largest error, 0 where there is nothing to compare."""
    return max(errors, default=0.0)
