"""Every call of a graph is timed, once a run, and shares add up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune import Inputs
from fxprune.timing.layers import LayerTimer, LayerTimes
from tests.timing.nets import IMAGE, Clock, Named, Slow, net


class Leaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Slow) or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module) -> fx.GraphModule:
    return fx.GraphModule(model, Leaves().trace(model))


def _timed(clock: Clock) -> LayerTimer:
    model = nn.Sequential(Slow(clock, 100, 1, 5, 2), nn.ReLU(), Slow(clock, 6))
    return LayerTimer("eager", _traced(model), Inputs((torch.zeros(2),)))


def test_every_call_has_the_median_of_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = _timed(Clock(monkeypatch))
    for _ in range(4):
        timer.run()
    times = timer.times(slice(1, None), {"0"})
    assert [(x.layer, x.kind, x.is_lowered) for x in times.layers] == [
        ("0", "Slow", True),
        ("1", "ReLU", False),
        ("2", "Slow", False),
    ]
    assert [x.milliseconds for x in times.layers] == pytest.approx([2, 0, 6])
    assert times.total == pytest.approx(8)
    assert times.share(times.lowered) == pytest.approx(0.25)
    assert [(kind.kind, kind.calls) for kind in times.kinds] == [("Slow", 2), ("ReLU", 1)]
    assert times.kinds[0].milliseconds == pytest.approx(8)


def test_some_of_the_runs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = _timed(Clock(monkeypatch))
    for _ in range(4):
        timer.run()
    assert timer.times(slice(0, None, 2)).layers[0].milliseconds == pytest.approx(52.5)


def test_a_graph_without_time_has_no_shares() -> None:
    assert LayerTimes("eager", ()).share(0.0) == 0.0


def test_a_timed_run_computes_what_the_graph_does() -> None:
    graph = fxprune.trace(net(), IMAGE)
    timer = LayerTimer("eager", graph, Inputs((IMAGE,)))
    assert torch.equal(timer.run(), graph(IMAGE))
    assert len(timer.times().layers) == sum(node.op.startswith("call") for node in graph.graph.nodes)


class Written(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + 1).flatten(1)


def test_functions_and_methods_are_named() -> None:
    timer = LayerTimer("eager", fx.symbolic_trace(Written()), Inputs((IMAGE,)))
    timer.run()
    assert [(x.layer, x.kind) for x in timer.times().layers] == [("", "add"), ("", "relu"), ("", ".flatten")]


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_inputs_by_name_find_their_placeholders(frontend: str) -> None:
    model, a, b = Named().eval(), torch.rand(2, 4), torch.rand(2, 4)
    inputs = Inputs((), {"b": b, "scale": 3.0, "a": a})
    outputs = LayerTimer("eager", fxprune.trace(model, inputs, frontend=frontend), inputs).run()
    expected = model(a, b=b, scale=3.0)
    assert torch.equal(outputs["y"], expected["y"])
    assert torch.equal(outputs["z"][0], expected["z"][0])
