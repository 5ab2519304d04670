"""Every law on random graphs: programs that hypothesis draws over a pool of feature maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.laws import Cut, assert_laws

SIZE = 6
WIDEST = 24

Program = list[tuple[str, int, int, int]]
"""Operations (name, which feature map, and two numbers), each adding one or more feature maps to the pool."""

Apply = Callable[..., Any]
"""What an operation does at run time, to feature maps of [batch, channels, 6, 6]."""


@dataclass(frozen=True)
class Step:
    """One operation of a built program: positions of its inputs in the pool, and what it does to them."""

    inputs: tuple[int, ...]
    outputs: int
    apply: Apply


class Builder:
    """Turns a program into steps and modules; every number is taken modulo what is legal."""

    def __init__(self) -> None:
        self.parts = nn.ModuleDict()
        self.steps: list[Step] = []
        self.widths = [3]
        self.used: set[int] = set()

    def pick(self, which: int) -> int:
        """Return the position of a feature map, counted from the newest."""
        return len(self.widths) - 1 - which % len(self.widths)

    def like(self, width: int, which: int, but: int) -> int:
        """Return a map of the same width, made by a 1×1 convolution where there is none."""
        equal = [i for i, w in enumerate(self.widths) if w == width and i not in (0, but)]
        if equal and which % 3:
            return equal[which % len(equal)]
        source = self.pick(which + 1)
        return self.layer(source, nn.Conv2d(self.widths[source], width, 1), width)

    def keep(self, part: nn.Module) -> str:
        """Hold a module; return its name."""
        name = f"{type(part).__name__.lower()}{len(self.parts)}"
        self.parts[name] = part
        return name

    def parameter(self, *shape: int) -> str:
        """Hold a bare parameter; return its name."""
        return self.keep(nn.ParameterList([torch.randn(shape)]))

    def add(self, inputs: tuple[int, ...], widths: tuple[int, ...], apply: Apply) -> int:
        """Add a step that makes maps of the given widths; return the position of the first."""
        self.steps.append(Step(inputs, len(widths), apply))
        self.used.update(inputs)
        self.widths.extend(widths)
        return len(self.widths) - len(widths)

    def layer(self, source: int, part: nn.Module, width: int) -> int:
        """Add a step that calls a module."""
        name = self.keep(part)
        return self.add((source,), (width,), lambda parts, x: parts[name](x))


def _width(number: int) -> int:
    return 4 + number % 9


def _divisor(width: int, number: int, least: int = 2) -> int:
    divisors = [d for d in range(least, width + 1) if width % d == 0]
    return divisors[number % len(divisors)] if divisors else 1


def _conv(b: Builder, x: int, i: int, j: int) -> None:
    kernel = (3, 1)[j % 2]
    b.layer(x, nn.Conv2d(b.widths[x], _width(i), kernel, padding=kernel // 2, bias=j % 3 == 0), _width(i))


def _conv_bn_relu(b: Builder, x: int, i: int, j: int) -> None:
    width = _width(i)
    layers = nn.Conv2d(b.widths[x], width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=j % 2 == 0)
    b.layer(x, nn.Sequential(*layers), width)


def _grouped(b: Builder, x: int, i: int, j: int) -> None:
    groups = _divisor(b.widths[x], i)
    width = groups * (1 + j % 3)
    b.layer(x, nn.Conv2d(b.widths[x], width, 3, padding=1, groups=groups), width)


def _depthwise(b: Builder, x: int, i: int, j: int) -> None:
    width = b.widths[x] * (1 + i % 2)
    b.layer(x, nn.Conv2d(b.widths[x], width, 3, padding=1, groups=b.widths[x], bias=j % 2 == 0), width)


def _transposed(b: Builder, x: int, i: int, j: int) -> None:
    groups = _divisor(b.widths[x], j, 1) if j % 2 else 1
    width = groups * (1 + i % 4)
    b.layer(x, nn.ConvTranspose2d(b.widths[x], width, 3, padding=1, groups=groups), width)


def _functional(b: Builder, x: int, i: int, j: int) -> None:
    groups = _divisor(b.widths[x], j, 1)
    width = groups * (1 + i % 4)
    name = b.parameter(width, b.widths[x] // groups, 1, 1)
    b.add((x,), (width,), lambda parts, y: F.conv2d(y, parts[name][0], groups=groups))


def _norm(b: Builder, x: int, i: int, j: int) -> None:
    width = b.widths[x]
    kinds = (nn.BatchNorm2d(width), nn.GroupNorm(_divisor(width, j, 1), width), nn.InstanceNorm2d(width, affine=True))
    b.layer(x, kinds[i % 3], width)


ACTIVATIONS: tuple[Apply, ...] = (
    lambda _, y: torch.relu(y),
    lambda _, y: F.hardtanh(y + 0.5),
    lambda _, y: torch.sigmoid(y),
    lambda _, y: F.relu6(y * 2 - 1, inplace=True),
    lambda _, y: F.gelu(y),
    lambda _, y: F.max_pool2d(y, 3, 1, 1),
    lambda _, y: F.interpolate(F.avg_pool2d(y, 2), scale_factor=2),
    lambda _, y: F.dropout(y, 0.5, training=False),
)


def _activation(b: Builder, x: int, i: int, j: int) -> None:
    b.add((x,), (b.widths[x],), ACTIVATIONS[(i + j) % len(ACTIVATIONS)])


JOINERS: tuple[Apply, ...] = (
    lambda _, x, y: x + y,
    lambda _, x, y: x * y.sigmoid(),
    lambda _, x, y: torch.maximum(x, y),
    lambda _, x, y: torch.stack([x, y], 1).sum(1),
    lambda _, x, y: (x * 0.5).add_(y),
    lambda _, x, y: torch.where(y > 0, x, y),
)


def _join(b: Builder, x: int, i: int, j: int) -> None:
    b.add((x, b.like(b.widths[x], j, x)), (b.widths[x],), JOINERS[i % len(JOINERS)])


def _residual(b: Builder, x: int, i: int, j: int) -> None:
    width = b.widths[x]
    name = b.keep(nn.Sequential(nn.Conv2d(width, _width(i), 1), nn.ReLU(), nn.Conv2d(_width(i), width, 3, padding=1)))
    b.add((x,), (width,), lambda parts, y: y + (parts[name](y) if j % 2 == 0 else parts[name](parts[name](y))))


def _cat(b: Builder, x: int, i: int, j: int) -> None:
    sources = [x, b.pick(i), b.pick(j)][: 2 + j % 2]
    if sum(b.widths[s] for s in sources) <= WIDEST:
        b.add(tuple(sources), (sum(b.widths[s] for s in sources),), lambda _, *ys: torch.cat(ys, 1))


def _chunk(b: Builder, x: int, i: int, _: int) -> None:
    if b.widths[x] >= 4:
        sizes = [t.numel() for t in torch.arange(b.widths[x]).chunk(2 + i % 2)]
        b.add((x,), tuple(sizes), lambda _, y: y.chunk(2 + i % 2, dim=1))


def _split(b: Builder, x: int, i: int, j: int) -> None:
    if b.widths[x] >= 4:
        first = 1 + i % (b.widths[x] - 2)
        sizes = [first, b.widths[x] - first]
        b.add((x,), tuple(sizes), lambda _, y: torch.split(y, sizes, 1) if j % 2 else (y[:, :first], y[:, first:]))


def _slice(b: Builder, x: int, i: int, j: int) -> None:
    start = i % b.widths[x]
    stop = start + 1 + j % (b.widths[x] - start)
    b.add((x,), (stop - start,), lambda _, y: y[:, start:stop] if i % 2 else y.narrow(1, start, stop - start))


def _shuffle(b: Builder, x: int, i: int, j: int) -> None:
    width = b.widths[x]
    groups = _divisor(width, i)

    def literal(_: Any, y: Tensor) -> Tensor:
        return y.view(-1, groups, width // groups, SIZE, SIZE).transpose(1, 2).reshape(-1, width, SIZE, SIZE)

    def computed(_: Any, y: Tensor) -> Tensor:
        n, c, h, w = y.shape
        return y.reshape(n, groups, c // groups, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)

    b.add((x,), (width,), computed if j % 2 else literal)


def _pixels(b: Builder, x: int, *_: int) -> None:
    if b.widths[x] % 4 == 0:
        b.add((x,), (b.widths[x] // 4,), lambda _, y: F.avg_pool2d(F.pixel_shuffle(y, 2), 2))
    elif 4 * b.widths[x] <= WIDEST:
        b.add((x,), (b.widths[x] * 4,), lambda _, y: F.pixel_unshuffle(F.interpolate(y, scale_factor=2), 2))


def _pad(b: Builder, x: int, i: int, j: int) -> None:
    amounts = [0, 0, 0, 0, i % 3, j % 3 + 1]
    width = b.widths[x] + i % 3 + j % 3 + 1
    value = float(j % 2)
    b.add((x,), (width,), lambda _, y: F.pad(y, amounts, value=value))


def _squeeze_excite(b: Builder, x: int, i: int, j: int) -> None:
    width = b.widths[x]
    gate = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 2 + i % 4, 1), nn.ReLU(), nn.Conv2d(2 + i % 4, width, 1)
    )
    name = b.keep(gate)
    b.add((x,), (width,), lambda parts, y: y * (parts[name](y).sigmoid() if j % 2 else F.hardsigmoid(parts[name](y))))


def _spatial_gate(b: Builder, x: int, i: int, _: int) -> None:
    name = b.keep(nn.Conv2d(b.widths[x], 1, 3, padding=1))
    gates: tuple[Apply, ...] = (
        lambda parts, y: y * parts[name](y).sigmoid(),
        lambda _, y: y * torch.tanh(y.sum(1, keepdim=True)),
        lambda _, y: y * torch.tanh(y.mean(1, keepdim=True)),
        lambda _, y: y * torch.tanh(y.amax(1, keepdim=True)),
        lambda _, y: y.softmax(1),
    )
    b.add((x,), (b.widths[x],), gates[i % len(gates)])


def _scale(b: Builder, x: int, i: int, j: int) -> None:
    name = b.parameter(b.widths[x], 1, 1)
    if i % 2:
        b.add((x,), (b.widths[x],), lambda parts, y: y * parts[name][0] if j % 2 else y + parts[name][0])
    else:
        b.add((x,), (b.widths[x],), lambda parts, y: y * parts[name][0].view(1, -1, 1, 1))


def _reorder(b: Builder, x: int, i: int, j: int) -> None:
    width = b.widths[x]
    generator = torch.Generator().manual_seed(i)
    order = torch.randperm(width, generator=generator)[: width if j % 2 else max(width - 2, 1)]
    if i % 3 == 0:
        b.add((x,), (width,), lambda _, y: y.flip(1))
        return
    table = nn.Module()
    table.register_buffer("order", order)
    name = b.keep(table)
    b.add((x,), (order.numel(),), lambda parts, y: y[:, parts[name].order] if i % 3 == 1 else y.index_select(1, order))


def _again(b: Builder, x: int, i: int, j: int) -> None:
    """Call a convolution that exists once more, on another map where one fits."""
    layers = [(n, m) for n, m in b.parts.items() if isinstance(m, nn.Conv2d)]
    fitting = [(n, m) for n, m in layers if m.in_channels == b.widths[x]]
    if fitting:
        name, part = fitting[i % len(fitting)]
        b.add((x,), (part.out_channels,), lambda parts, y: parts[name](y))
    elif layers:
        name, part = layers[i % len(layers)]
        source = b.like(part.in_channels, j, -1)
        b.add((source,), (part.out_channels,), lambda parts, y: parts[name](y))


def _tied(b: Builder, x: int, i: int, _: int) -> None:
    """A convolution whose weight is that of another one."""
    layers = [m for m in b.parts.values() if isinstance(m, nn.Conv2d) and m.in_channels == b.widths[x]]
    if layers:
        other = layers[i % len(layers)]
        part = nn.Conv2d(
            other.in_channels, other.out_channels, other.kernel_size, padding=other.padding, groups=other.groups
        )
        part.weight = other.weight
        b.layer(x, part, part.out_channels)


def _through_linear(b: Builder, x: int, i: int, j: int) -> None:
    """Flatten, a linear layer, and back into a map."""
    width = _width(i)
    names = b.keep(nn.Linear(b.widths[x] * 9, width)), b.keep(nn.Linear(width, _width(j) * SIZE))

    def literal(parts: Any, y: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(y, 3)
        y = parts[names[1]](torch.relu(parts[names[0]](torch.flatten(y, 1) if i % 2 else y.reshape(y.size(0), -1))))
        return y.view(-1, _width(j), SIZE, 1).expand(-1, -1, SIZE, SIZE)

    b.add((x,), (_width(j),), literal)


def _attention(b: Builder, x: int, i: int, j: int) -> None:
    """Self-attention over the positions of the map."""
    heads, per_head = 1 + i % 2, 2 + j % 3
    width = heads * per_head
    layers = [b.keep(nn.Linear(b.widths[x], width)) for _ in range(3)]

    def attend(parts: Any, y: Tensor) -> Tensor:
        tokens = y.flatten(2).transpose(1, 2)
        q, k, v = (parts[n](tokens).view(y.shape[0], -1, heads, per_head).transpose(1, 2) for n in layers)
        if j % 2:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return out.transpose(1, 2).reshape(y.shape[0], SIZE * SIZE, width).transpose(1, 2).unflatten(2, (SIZE, SIZE))

    b.add((x,), (width,), attend)


OPERATIONS: dict[str, Callable[[Builder, int, int, int], None]] = {
    "conv": _conv,
    "conv-bn-relu": _conv_bn_relu,
    "activation": _activation,
    "join": _join,
    "cat": _cat,
    "residual": _residual,
    "split": _split,
    "chunk": _chunk,
    "slice": _slice,
    "grouped": _grouped,
    "depthwise": _depthwise,
    "transposed": _transposed,
    "functional": _functional,
    "norm": _norm,
    "shuffle": _shuffle,
    "pixels": _pixels,
    "pad": _pad,
    "squeeze-excite": _squeeze_excite,
    "spatial-gate": _spatial_gate,
    "scale": _scale,
    "reorder": _reorder,
    "again": _again,
    "tied": _tied,
    "through-linear": _through_linear,
    "attention": _attention,
}

ENDS: tuple[Callable[[Builder, int], Apply], ...] = (
    lambda b, w: _end(b, nn.Linear(w, 3), lambda part, y: part(y.mean((2, 3)))),
    lambda b, w: _end(b, nn.Conv2d(w, 2, 1), lambda part, y: part(y)),
    lambda b, w: _end(b, nn.Linear(w * 36, 3), lambda part, y: part(y.view(-1, w * 36) if w % 2 else y.flatten(1))),
    lambda _b, _w: lambda _, y: y.sum(1),
    lambda _b, _w: lambda _, y: y,
)
"""What becomes of a feature map that nothing else reads. A map that is returned as it is pins its channels."""


def _end(b: Builder, part: nn.Module, use: Callable[[nn.Module, Tensor], Tensor]) -> Apply:
    name = b.keep(part)
    contiguous = isinstance(part, nn.Linear)
    return lambda parts, y: use(parts[name], y.contiguous() if contiguous else y)


class RandomNet(nn.Module):
    """Runs a program; of the maps that nothing reads, `ends[i]` says what becomes of the i-th."""

    def __init__(self, program: Program, ends: list[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        b = Builder()
        _conv_bn_relu(b, 0, 4, 0)
        for name, which, i, j in program:
            OPERATIONS[name](b, b.pick(which), i, j)
        unread = [i for i in range(len(b.widths)) if i not in b.used]
        self.ends = [(x, ENDS[ends[n % len(ends)]](b, b.widths[x])) for n, x in enumerate(unread)]
        self.parts = b.parts
        self.steps = b.steps

    def forward(self, x: Tensor) -> list[Tensor]:
        pool = [x]
        for step in self.steps:
            made = step.apply(self.parts, *(pool[i] for i in step.inputs))
            pool.extend([made] if step.outputs == 1 else [made[i] for i in range(step.outputs)])
        return [end(self.parts, pool[i]) for i, end in self.ends]


PROGRAMS = st.lists(
    st.tuples(st.sampled_from(list(OPERATIONS)), st.integers(0, 7), st.integers(0, 11), st.integers(0, 11)),
    min_size=1,
    max_size=12,
)
USES = st.lists(st.sampled_from([0, 1, 0, 2, 3, 4]), min_size=1, max_size=3)


def check(program: Program, ends: list[int], mask_seed: int, fraction: float) -> Cut:
    torch.manual_seed(1)
    return assert_laws(
        RandomNet(program, ends), torch.randn(2, 3, SIZE, SIZE), seed=mask_seed, fraction=fraction, removed_at_least=0.0
    )


def explore(examples: int, *, derandomize: bool) -> list[float]:
    """Check that many random graphs; return the fraction that left each."""
    removed: list[float] = []

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=derandomize,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(PROGRAMS, USES, st.integers(0, 3), st.sampled_from([0.5, 0.25, 0.9]))
    def laws(program: Program, ends: list[int], mask_seed: int, fraction: float) -> None:
        cut = check(program, ends, mask_seed, fraction)
        event("slimmer by a tenth" if cut.removed > 0.1 else "hardly slimmer")
        removed.append(cut.removed)

    laws()
    return removed


def assert_worthwhile(removed: list[float]) -> None:
    """Most graphs must lose channels, or the laws hold for want of anything to cut."""
    slimmer = sum(fraction > 0.1 for fraction in removed) / len(removed)
    assert slimmer > 0.75, f"only {slimmer:.0%} of {len(removed)} graphs lost a tenth of their MACs or parameters"


def test_laws_hold_on_random_graphs() -> None:
    assert_worthwhile(explore(120, derandomize=True))


@pytest.mark.slow
def test_laws_hold_on_many_random_graphs() -> None:
    assert_worthwhile(explore(1000, derandomize=False))


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_alone(name: str) -> None:
    """Each operation between two convolutions, with several numbers, so that none is only ever drawn with others."""
    for i, j in ((0, 0), (1, 1), (2, 5), (3, 2), (4, 7), (5, 4)):
        check([(name, 0, i, j), ("conv", 0, 1, 1)], [0], i, 0.5)
