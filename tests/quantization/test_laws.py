"""What a quantised graph computes, against float64 arithmetic, on networks that hypothesis draws."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from tests.quantization.arithmetic import assert_computes_what_its_numbers_say

ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Mish, nn.LeakyReLU),
    *(nn.ELU, nn.Softplus, nn.Hardsigmoid, nn.Identity),
)

STEPS = {
    "linear": lambda part, x: part.act(part.same(x)),
    "chain": lambda part, x: part.back(part.act(part.wide(x))),
    "residual": lambda part, x: x + part.act(part.same(x)),
    "norm": lambda part, x: part.norm(x),
    "tokens": lambda part, x: part.act(part.tokens(x.transpose(1, 2))).transpose(1, 2),
    "split": lambda part, x: torch.cat(
        [f(y) for f, y in zip((part.left, part.right), x.chunk(2, -1), strict=True)], -1
    ),
    "halves": lambda part, x: x + part.lower(part.act(part.wide(x)).chunk(2, -1)[0]),
    "both": lambda part, x: part.act(part.same(x)) - part.back(part.wide(x)),
    "slice": lambda part, x: x + part.act(part.same(x[:, ::2])).mean(1, keepdim=True),
    "dropped": lambda part, x: part.same(part.drop(part.same_too(x))),
    "float": lambda part, x: torch.sin(x),  # noqa: ARG005
    "gate": lambda part, x: x * torch.sigmoid(part.back(part.act(part.wide(x.mean(1, keepdim=True))))),
}


class Drawn(nn.Module):
    """A network of [N, tokens, features] that takes steps one after the other."""

    def __init__(self, steps: list[tuple[str, type[nn.Module]]], features: int, tokens: int, inner: int) -> None:
        super().__init__()
        self.steps = [step for step, _ in steps]
        self.parts = nn.ModuleList(_part(activation(), features, tokens, inner) for _, activation in steps)
        self.head = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        for step, part in zip(self.steps, self.parts, strict=True):
            x = STEPS[step](part, x)
        return self.head(x)


def _part(activation: nn.Module, features: int, tokens: int, inner: int) -> nn.Module:
    return nn.ModuleDict(
        {
            "act": activation,
            "same": nn.Linear(features, features),
            "same_too": nn.Linear(features, features, bias=False),
            "wide": nn.Linear(features, 2 * inner),
            "back": nn.Linear(2 * inner, features),
            "lower": nn.Linear(inner, features),
            "left": nn.Linear(features // 2, features // 2),
            "right": nn.Linear(features // 2, features // 2),
            "tokens": nn.Linear(tokens, tokens),
            "norm": nn.LayerNorm(features, eps=1.0),
            "drop": nn.Dropout(),
        }
    )


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.sampled_from(ACTIVATIONS)), min_size=1, max_size=5),
    features=st.sampled_from([4, 10]),
    tokens=st.integers(2, 7),
    inner=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
def test_a_quantised_graph_computes_what_its_numbers_say(
    steps: list[tuple[str, type[nn.Module]]], features: int, tokens: int, inner: int, seed: int
) -> None:
    torch.manual_seed(seed)
    x = 3 * torch.randn(4, tokens, features)
    graph = fxprune.trace(Drawn(steps, features, tokens, inner).eval(), x)
    assert_computes_what_its_numbers_say(graph, x)
