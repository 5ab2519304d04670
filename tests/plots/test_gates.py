"""Pictures of gates over time: densities, shares, means of orbits."""

from __future__ import annotations

import pytest
import torch

from fxprune import plots
from fxprune.gating.trail import GateTrail
from tests.plots.samples import TRAIL

figures = pytest.importorskip("matplotlib.figure")


def test_gates_are_counted_by_probability_and_step() -> None:
    density = plots.plot_gates(TRAIL, figures.Figure()).axes[0]
    counts = density.collections[0].get_array()
    assert counts.shape == (40, 3)
    assert counts.sum(0).tolist() == [5, 5, 5]
    assert counts[38].tolist() == [5, None, None], "probabilities from 0.95 to 0.975"
    assert counts[:, 1].nonzero()[0].tolist() == [4, 8, 16, 20, 28]
    assert counts[:, 2].nonzero()[0].tolist() == [0, 12, 39], "0 and 1 lie in the outer bins"


def test_expected_macs_and_open_gates_are_drawn_over_the_steps() -> None:
    shares = plots.plot_gates(TRAIL, figures.Figure()).axes[1]
    macs, gates = shares.lines
    assert list(macs.get_xdata()) == list(gates.get_xdata()) == [0, 10, 30]
    assert list(macs.get_ydata()) == pytest.approx([90, 60, 25])
    assert list(gates.get_ydata()) == pytest.approx([100, 40, 40])
    labels = [text.get_text() for text in shares.get_legend().get_texts()]
    assert labels == ["expected MACs, 25.0% in the end", "gates at 0.5 or above, 40.0% in the end"]


def test_orbits_are_drawn_by_their_mean_where_their_steps_are() -> None:
    orbits = plots.plot_gates(TRAIL, figures.Figure()).axes[2]
    (mesh,) = orbits.collections
    means = torch.stack([found.mean(1) for found in TRAIL.probabilities.values()])
    assert torch.from_numpy(mesh.get_array().data).allclose(means)
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 5, 20, 30], "columns meet half way between steps"
    assert [label.get_text() for label in orbits.get_yticklabels()] == ["stem (2)", "left.conv +2 (3)"]
    assert orbits.yaxis_inverted(), "the first orbit is on top"


def test_of_many_steps_and_orbits_some_are_drawn() -> None:
    steps = tuple(range(0, 3000, 3))
    many = {f"orbit_{i}": torch.linspace(1, 0, 1000)[:, None] for i in range(120)}
    trail = GateTrail(steps, many, (1.0,) * 1000, {name: (name,) for name in many})
    density, shares, orbits = plots.plot_gates(trail, figures.Figure()).axes[:3]
    columns = density.collections[0].get_coordinates()[0, :, 0]
    assert (len(columns), columns[0], columns[-1]) == (401, 0, 2997)
    assert len(shares.lines[0].get_xdata()) == 1000
    assert orbits.collections[0].get_array().shape == (120, 400)
    assert len(orbits.get_yticks()) <= 50


def test_gates_that_were_looked_at_once_are_drawn() -> None:
    once = GateTrail((7,), {"orbit_0": torch.full((1, 4), 0.5, requires_grad=True)}, (0.5,), {"orbit_0": ("stem",)})
    density, shares, _ = plots.plot_gates(once, figures.Figure()).axes[:3]
    assert density.get_xlim() == (6.5, 7.5)
    assert [tick for tick in density.get_xticks() if 6.5 <= tick <= 7.5] == [7], "steps are whole"
    assert shares.lines[0].get_marker() == "o"


def test_gates_are_drawn_in_a_part_of_a_figure() -> None:
    part = figures.Figure().subfigures(1, 2)[1]
    assert plots.plot_gates(TRAIL, part) is part
    assert len(part.axes) == 5, "three panels, two of them with a scale of colours"
