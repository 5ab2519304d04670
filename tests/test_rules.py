"""The tables of rules against the operators themselves."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision  # noqa: F401 (registers its operators)
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.graph.tracing import trace
from fxprune.labels.detection import find_orbits
from fxprune.labels.flow import Labelled
from fxprune.labels.propagation import Labelling, propagate_labels
from fxprune.labels.rules import FAMILIES, RULES, find_rule, operator_name
from tests.laws import assert_laws, pin_reasons

aten = torch.ops.aten


# Movement: the labels of the result say where each position came from.


@dataclass(frozen=True)
class Movement:
    """One call of a movement operator: shapes of its floating arguments, a constant index, and the call."""

    shapes: tuple[tuple[int, ...], ...]
    apply: Callable[..., Any]
    index: tuple[int, ...] = ()


class Moved(nn.Module):
    """Applies a movement to bare parameters and absorbs everything, so that the output pins nothing."""

    def __init__(self, movement: Movement) -> None:
        super().__init__()
        self.movement = movement
        self.tensors = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in movement.shapes])
        self.register_buffer("index", torch.tensor(movement.index, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        operands = [*self.tensors, self.index] if self.movement.index else self.tensors
        moved = self.movement.apply(*operands)
        results = [moved] if isinstance(moved, fx.Proxy) else moved
        for result in results:
            x = x + result.sum()
        return x


def _shape(rng: random.Random, ndim: int, most: int = 6) -> tuple[int, ...]:
    return tuple(rng.randint(2, most) for _ in range(ndim))


def _factored(rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes of equal size: some adjacent dimensions merged, some split."""
    fine = [rng.randint(1, 4) for _ in range(rng.randint(2, 5))]

    def merged() -> tuple[int, ...]:
        out = [fine[0]]
        for size in fine[1:]:
            if rng.random() < 0.5:
                out[-1] *= size
            else:
                out.append(size)
        return tuple(out)

    return merged(), merged()


def _view(op: Callable[..., Any]) -> Callable[[random.Random], Movement]:
    def draw(rng: random.Random) -> Movement:
        before, after = _factored(rng)
        return Movement((before,), lambda t: op(t, list(after)))

    return draw


def _reshape_alias(rng: random.Random) -> Movement:
    before, after = _factored(rng)
    strides = torch.empty(after).stride()
    return Movement((before,), lambda t: aten._reshape_alias(t, list(after), list(strides)))


def _squeeze(rng: random.Random) -> Movement:
    shape = (rng.randint(2, 5), 1, rng.randint(2, 5), 1)
    ways = (
        lambda t: aten.squeeze.default(t),
        lambda t: aten.squeeze.dim(t, -1),
        lambda t: aten.squeeze.dim(t, 0),
        lambda t: aten.squeeze.dims(t, [1, 2]),
    )
    return Movement((shape,), rng.choice(ways))


def _unsqueeze(rng: random.Random) -> Movement:
    dim = rng.randint(-4, 3)
    return Movement((_shape(rng, 3),), lambda t: aten.unsqueeze(t, dim))


def _permute(rng: random.Random) -> Movement:
    order = rng.sample(range(4), 4)
    return Movement((_shape(rng, 4),), lambda t: aten.permute(t, [d - 4 if d % 2 else d for d in order]))


def _transpose(rng: random.Random) -> Movement:
    a, b = rng.randint(-3, 2), rng.randint(-3, 2)
    return Movement((_shape(rng, 3),), lambda t: aten.transpose.int(t, a, b))


def _expand(rng: random.Random) -> Movement:
    shape = (1, rng.randint(2, 5), 1, rng.randint(2, 5))
    sizes = [rng.randint(1, 3), rng.randint(1, 3), rng.choice([-1, shape[1]]), rng.randint(1, 3), shape[3]]
    return Movement((shape,), lambda t: aten.expand(t, sizes))


def _slice(rng: random.Random) -> Movement:
    shape, dim = _shape(rng, 3, 8), rng.randint(-3, 2)
    start = rng.randint(-shape[dim], shape[dim] - 1)
    end = rng.choice([None, 2**62, start % shape[dim] + 1])
    step = rng.choice([1, 1, 1, 2])
    return Movement((shape,), lambda t: aten.slice.Tensor(t, dim, start, end, step))


def _split(op: Callable[..., Any]) -> Callable[[random.Random], Movement]:
    def draw(rng: random.Random) -> Movement:
        shape, dim = _shape(rng, 3, 9), rng.randint(-3, 2)
        size = rng.randint(1, shape[dim])
        parts = -(-shape[dim] // size)
        return Movement((shape,), lambda t: _items(op(t, size, dim), parts))

    return draw


def _split_with_sizes(op: Callable[..., Any]) -> Callable[[random.Random], Movement]:
    def draw(rng: random.Random) -> Movement:
        shape, dim = _shape(rng, 3, 9), rng.randint(-3, 2)
        first = rng.randint(1, shape[dim] - 1)
        return Movement((shape,), lambda t: _items(op(t, [first, shape[dim] - first], dim), 2))

    return draw


def _items(results: Any, count: int) -> list[Any]:
    """A list of results, of which a proxy does not know the length."""
    return [results[i] for i in range(count)]


def _select(rng: random.Random) -> Movement:
    shape, dim = _shape(rng, 3), rng.randint(-3, 2)
    index = rng.randint(-shape[dim], shape[dim] - 1)
    return Movement((shape,), lambda t: aten.select.int(t, dim, index))


def _unbind(rng: random.Random) -> Movement:
    shape, dim = _shape(rng, 3), rng.randint(-3, 2)
    return Movement((shape,), lambda t: _items(aten.unbind.int(t, dim), shape[dim]))


def _index_select(rng: random.Random) -> Movement:
    shape, dim = _shape(rng, 3), rng.randint(-3, 2)
    index = tuple(rng.randrange(shape[dim]) for _ in range(rng.randint(1, 7)))
    return Movement((shape,), lambda t, i: aten.index_select(t, dim, i), index)


def _index(rng: random.Random) -> Movement:
    shape, dim = _shape(rng, 3), rng.randrange(3)
    index = tuple(rng.randrange(shape[dim]) for _ in range(rng.randint(1, 7)))
    return Movement((shape,), lambda t, i: aten.index.Tensor(t, [None] * dim + [i]), index)


def _cat(rng: random.Random) -> Movement:
    shape, dim = _shape(rng, 3), rng.randint(-3, 2)
    shapes = [list(shape) for _ in range(rng.randint(1, 3))]
    for other in shapes[1:]:
        other[dim] = rng.randint(1, 6)
    return Movement(tuple(map(tuple, shapes)), lambda *ts: aten.cat(list(ts), dim))


def _stack(rng: random.Random) -> Movement:
    shape, dim = _shape(rng, 3), rng.randint(-4, 3)
    return Movement((shape,) * rng.randint(1, 3), lambda *ts: aten.stack(list(ts), dim))


def _pad(rng: random.Random) -> Movement:
    amounts = [rng.randint(0, 2) for _ in range(2 * rng.randint(1, 3))]
    if rng.random() < 0.2:
        amounts[0] = -1
    return Movement((_shape(rng, 3),), lambda t: aten.constant_pad_nd(t, amounts))


def _flip(rng: random.Random) -> Movement:
    dims = rng.sample([-1, 0, 1], rng.randint(1, 3))
    return Movement((_shape(rng, 3),), lambda t: aten.flip(t, dims))


def _roll(rng: random.Random) -> Movement:
    dims = rng.sample([-1, 0, 1], rng.randint(1, 2))
    return Movement((_shape(rng, 3),), lambda t: aten.roll(t, [rng.randint(-3, 3)] * len(dims), dims))


def _rot90(rng: random.Random) -> Movement:
    turns, dims = rng.randint(-1, 3), rng.sample([-1, 0, 1], 2)
    return Movement((_shape(rng, 3),), lambda t: aten.rot90(t, turns, dims))


def _triangle(op: Callable[..., Any]) -> Callable[[random.Random], Movement]:
    def draw(rng: random.Random) -> Movement:
        above = rng.randint(-2, 2)
        return Movement((_shape(rng, 3),), lambda t: op(t, above))

    return draw


def _diagonal(rng: random.Random) -> Movement:
    offset, dims = rng.randint(-1, 1), rng.sample([-1, 0, 1], 2)
    return Movement((_shape(rng, 3),), lambda t: aten.diagonal(t, offset, *dims))


def _windows(rng: random.Random) -> Movement:
    shape, dim = _shape(rng, 3), rng.randint(-3, 2)
    size, step = rng.randint(1, shape[dim]), rng.randint(1, 2)
    return Movement((shape,), lambda t: aten.unfold(t, dim, size, step))


def _im2col(rng: random.Random) -> Movement:
    kernel, stride = [rng.randint(1, 3), 2], [rng.randint(1, 2), 1]
    return Movement(((2, 3, 4, 5),), lambda t: aten.im2col(t, kernel, [1, 1], [1, 0], stride))


def _col2im(rng: random.Random) -> Movement:
    stride = rng.choice([(1, 9), (2, 4)])
    shape = (2, 4 * rng.randint(2, 4), stride[1])
    return Movement((shape,), lambda t: aten.col2im(t, [4, 4], [2, 2], [1, 1], [0, 0], [stride[0]] * 2))


def _channel_shuffle(op: Callable[..., Any]) -> Callable[[random.Random], Movement]:
    def draw(rng: random.Random) -> Movement:
        groups = rng.randint(2, 4)
        return Movement(((2, groups * rng.randint(2, 4), 3, 2),), lambda t: op(t, groups))

    return draw


def _repeat(rng: random.Random) -> Movement:
    times = [rng.randint(1, 3) for _ in range(rng.randint(3, 4))]
    return Movement((_shape(rng, 3, 4),), lambda t: aten.repeat(t, times))


def _pixel_shuffle(rng: random.Random) -> Movement:
    factor = rng.randint(2, 3)
    return Movement(((2, factor**2 * rng.randint(2, 4), 2, 3),), lambda t: aten.pixel_shuffle(t, factor))


def _pixel_unshuffle(rng: random.Random) -> Movement:
    factor = rng.randint(2, 3)
    return Movement(((2, rng.randint(2, 4), 2 * factor, factor),), lambda t: aten.pixel_unshuffle(t, factor))


def _as_strided(rng: random.Random) -> Movement:
    n, c = rng.randint(2, 4), rng.randint(2, 4)
    ways = (lambda t: aten.as_strided(t, [n, c, 1, 1], [c, 1, c, c]), lambda t: aten.as_strided(t, [c, n], [1, c]))
    return Movement(((n, c, 1),), rng.choice(ways))


MOVEMENTS: dict[str, Callable[[random.Random], Movement]] = {
    "aten.view": _view(aten.view),
    "aten._unsafe_view": _view(aten._unsafe_view),
    "aten.reshape": _view(aten.reshape),
    "aten._reshape_alias": _reshape_alias,
    "aten.squeeze": _squeeze,
    "aten.unsqueeze": _unsqueeze,
    "aten.permute": _permute,
    "aten.transpose": _transpose,
    "aten.t": lambda rng: Movement((_shape(rng, 2),), lambda t: aten.t(t)),
    "aten.expand": _expand,
    "aten.slice": _slice,
    "aten.split": _split(aten.split.Tensor),
    "aten.unsafe_split": _split(aten.unsafe_split.Tensor),
    "aten.split_with_sizes": _split_with_sizes(aten.split_with_sizes.default),
    "aten.unsafe_split_with_sizes": _split_with_sizes(aten.unsafe_split_with_sizes.default),
    "aten.select": _select,
    "aten.unbind": _unbind,
    "aten.index_select": _index_select,
    "aten.index": _index,
    "aten.cat": _cat,
    "aten.stack": _stack,
    "aten.constant_pad_nd": _pad,
    "aten.flip": _flip,
    "aten.roll": _roll,
    "aten.rot90": _rot90,
    "aten.tril": _triangle(aten.tril),
    "aten.triu": _triangle(aten.triu),
    "aten.diagonal": _diagonal,
    "aten.unfold": _windows,
    "aten.im2col": _im2col,
    "aten.col2im": _col2im,
    "aten.channel_shuffle": _channel_shuffle(aten.channel_shuffle),
    "aten.native_channel_shuffle": _channel_shuffle(aten.native_channel_shuffle),
    "aten.repeat": _repeat,
    "aten.pixel_shuffle": _pixel_shuffle,
    "aten.pixel_unshuffle": _pixel_unshuffle,
    "aten.as_strided": _as_strided,
}


def test_every_movement_rule_is_under_test() -> None:
    assert set(MOVEMENTS) == {*FAMILIES["movement"], *FAMILIES["reshaping"]}


def _kept_elements(labelled: Labelled, kept: Tensor) -> Tensor:
    """Return float [shape]: 1 where every label of an element is kept, `kept` bool [slots]."""
    elements = torch.ones(labelled.shape)
    for dim, label in enumerate(labelled.labels):
        if label is not None:
            sizes = [1] * len(labelled.shape)
            sizes[dim] = -1
            elements = elements * kept[label].view(sizes)
    return elements


def _random_kept(labelling: Labelling, rng: random.Random) -> Tensor:
    """Remove a random half of the classes that nothing pins; return bool [slots]."""
    part = labelling.partition
    owned = torch.zeros(part.count, dtype=torch.bool)
    for tensor in labelling.flow.slots.tensors:
        for start, size in zip(tensor.starts, tensor.shape, strict=True):
            owned[part.of_slot[start : start + size]] = True
    random_keep = torch.tensor([rng.random() < 0.5 for _ in range(part.count)])
    return (random_keep | (part.pinned >= 0) | ~owned)[part.of_slot]


def _results(labelling: Labelling, module: fx.GraphModule) -> Iterator[Labelled]:
    """Yield the labelled results of the movement: what the sums read."""
    for node in module.graph.nodes:
        if node.target == "sum":
            yield labelling.values[node.args[0].name]


def _check_movement(movement: Movement, rng: random.Random) -> int:
    """Apply the operator to the kept elements of its operands; return how many elements were removed.

    What it makes of them must be what the labels of the result say.
    """
    module = trace(Moved(movement), torch.zeros(1))
    labelling = propagate_labels(module)
    kept = _random_kept(labelling, rng)
    slots = [t for t in labelling.flow.slots.tensors if t.is_parameter]
    own = [
        Labelled(t.shape, tuple(torch.arange(s, s + n) for s, n in zip(t.starts, t.shape, strict=True))) for t in slots
    ]
    operands = [_kept_elements(labelled, kept) for labelled in own]
    index = [torch.tensor(movement.index)] if movement.index else []
    expected = pytree.tree_leaves(movement.apply(*operands, *index))
    # Padding comes from nowhere: it is zero whatever the operands hold.
    moved = pytree.tree_leaves(movement.apply(*map(torch.ones_like, operands), *index))
    found = [_kept_elements(labelled, kept) for labelled in _results(labelling, module)]
    assert len(found) == len(expected)
    for labels_say, operator_made, from_operands in zip(found, expected, moved, strict=True):
        assert torch.equal(labels_say * from_operands, operator_made)
    return sum(int((t == 0).sum()) for t in operands)


@pytest.mark.parametrize("name", MOVEMENTS)
def test_movement(name: str) -> None:
    rng = random.Random(name)
    removed = [_check_movement(MOVEMENTS[name](rng), rng) for _ in range(25)]
    assert sum(count > 0 for count in removed) >= 5, "hardly anything could be removed"


# Everything else.


def test_names_of_rules_are_operators() -> None:
    """A misspelt name would pin silently."""
    names = [name.partition(".") for name in RULES]
    assert [(home, name) for home, _, name in names if not hasattr(getattr(torch.ops, home), name)] == []


def test_no_operator_has_two_rules() -> None:
    assert sum(len(table) for table in FAMILIES.values()) == len(RULES)


def test_in_place_operators_follow_their_twins() -> None:
    assert find_rule(aten.add_.Tensor) is find_rule(aten.add.Tensor)
    assert find_rule(aten.hardtanh_.default) is find_rule(aten.hardtanh.default) is not None
    assert operator_name(aten.relu_.default) == "aten.relu_"


@torch.library.custom_op("fxprune_tests::mix", mutates_args=())
def mix(x: Tensor) -> Tensor:
    """Mixes channels in a way that no rule knows."""
    return x + x.flip(1).cumsum(1)


@mix.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _mix_backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG001
    return gradient + gradient.flip(1).cumsum(1)


mix.register_autograd(_mix_backward)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.ops.fxprune_tests.mix(self.a(x).relu())).relu())


def test_unknown_operator_pins_and_is_named() -> None:
    orbits = find_orbits(trace(Unknown(), torch.randn(2, 3, 4, 4)))
    assert pin_reasons(orbits, "a.weight", 0) == {"fxprune_tests.mix"}
    (pinned,) = (p for p in orbits.pinned if (p.parameter, p.dimension) == ("a.weight", 0))
    assert pinned.indices.tolist() == list(range(8))
    assert pinned.reason.node == "mix"
    assert "no rule" in pinned.reason.text
    assert orbits.labelling.unruled == {"fxprune_tests.mix": 1}
    assert [orbit.layers for orbit in orbits] == [("b",)]


def test_unknown_operator_keeps_every_law() -> None:
    cut = assert_laws(Unknown(), torch.randn(2, 3, 4, 4))
    assert (cut.width("a.weight", 0), cut.width("b.weight", 0)) == (8, 4)
