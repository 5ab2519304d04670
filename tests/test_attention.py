"""What leaves attention: the same dimensions of every head, or whole heads; every way to write it, both policies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import fxprune
from fxprune.errors import PlanError, SpecError, UsageError
from fxprune.graph.passes import Pipeline, parse_spec
from fxprune.labels.attention import POLICIES
from fxprune.plan import read_plan
from passes import PASSES, ChannelSelection, ChannelSurgery, MaskInsertion, OrbitDetection, PlanApplication
from tests.laws import Cut, assert_laws
from tests.test_hard_cases import Net

BATCH, TOKENS, WIDTH = 2, 9, 6
HEADS, SIZE = 4, 6
"""Heads, and dimensions of each."""

INNER = HEADS * SIZE


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def tokens() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH)


def projections(heads: int = HEADS, size: int = SIZE, groups: int | None = None, **more: Any) -> dict[str, Any]:
    """The parts of attention: query, key, value and output projections; `groups` heads of keys and values."""
    shared = (groups or heads) * size
    return {
        "q": nn.Linear(WIDTH, heads * size),
        "k": nn.Linear(WIDTH, shared),
        "v": nn.Linear(WIDTH, shared),
        "out": nn.Linear(heads * size, 3),
        **more,
    }


def split(y: Tensor, heads: int = HEADS) -> Tensor:
    """[batch, tokens, heads × size] → [batch, heads, tokens, size]."""
    return y.view(y.shape[0], y.shape[1], heads, y.shape[2] // heads).transpose(1, 2)


def join(y: Tensor) -> Tensor:
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores + bias).softmax(-1) @ v


def split_all(m: Any, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    context = x if context is None else context
    return split(m.q(x)), split(m.k(context)), split(m.v(context))


# The ways to write it.


def fused(m: Any, x: Tensor) -> Tensor:
    batch, length, _ = x.shape
    q, k, v = m.qkv(x).reshape(batch, length, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
    return m.out(join((q * SIZE**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v))


def fused_and_indexed(m: Any, x: Tensor) -> Tensor:
    batch, length, _ = x.shape
    qkv = m.qkv(x).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    return m.out(join(F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])))


def fused_and_chunked(m: Any, x: Tensor) -> Tensor:
    q, k, v = (split(part) for part in m.qkv(x).chunk(3, dim=-1))
    return m.out(join(attend(q, k, v)))


def by_hand(m: Any, x: Tensor) -> Tensor:
    return m.out(join(attend(*split_all(m, x))))


def by_division(m: Any, x: Tensor) -> Tensor:
    q, k, v = split_all(m, x)
    return m.out(join(torch.matmul((torch.matmul(q, k.mT) / q.size(-1) ** 0.5).softmax(-1), v)))


def in_one_call(m: Any, x: Tensor) -> Tensor:
    return m.out(join(F.scaled_dot_product_attention(*split_all(m, x))))


def causal(m: Any, x: Tensor) -> Tensor:
    return m.out(join(F.scaled_dot_product_attention(*split_all(m, x), is_causal=True)))


def masked_for_every_head(m: Any, x: Tensor) -> Tensor:
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(x.shape[0], HEADS, TOKENS, TOKENS)
    return m.out(join(F.scaled_dot_product_attention(*split_all(m, x), attn_mask=mask)))


def by_einsum(m: Any, x: Tensor) -> Tensor:
    q, k, v = (layer(x).unflatten(-1, (HEADS, SIZE)) for layer in (m.q, m.k, m.v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q * SIZE**-0.5, k)
    return m.out(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(-2))


def by_einsum_heads_first(m: Any, x: Tensor) -> Tensor:
    q, k, v = (layer(x).view(BATCH, TOKENS, HEADS, SIZE).permute(2, 0, 1, 3) for layer in (m.q, m.k, m.v))
    scores = torch.einsum("hbid,hbjd->hbij", q, k) * SIZE**-0.5
    return m.out(torch.einsum("hbij,hbjd->bihd", scores.softmax(-1), v).reshape(BATCH, TOKENS, -1))


def rotary(m: Any, x: Tensor) -> Tensor:
    def turned(y: Tensor) -> Tensor:
        first, second = y.chunk(2, -1)
        return y * m.cosine + torch.cat([-second, first], -1) * m.sine

    q, k, v = split_all(m, x)
    return m.out(join(attend(turned(q), turned(k), v)))


def relative_positions(m: Any, x: Tensor) -> Tensor:
    """Swin: a table [(2w − 1)², heads], looked up by a constant index, is added to the scores."""
    bias = m.table[m.index.view(-1)].view(TOKENS, TOKENS, -1).permute(2, 0, 1).contiguous()
    return m.out(join(attend(*split_all(m, x), bias.unsqueeze(0))))


def shifted_windows(m: Any, x: Tensor) -> Tensor:
    """Scores of all windows of one image get one mask each, for which the batch is divided."""
    q, k, v = split_all(m, x)
    scores = q @ k.transpose(-2, -1)
    scores = scores.view(1, BATCH, HEADS, TOKENS, TOKENS) + m.offsets.unsqueeze(1).unsqueeze(0)
    return m.out(join(scores.view(-1, HEADS, TOKENS, TOKENS).softmax(-1) @ v))


def slopes(m: Any, x: Tensor) -> Tensor:
    """ALiBi: every head has its slope, in a buffer."""
    return m.out(join(attend(*split_all(m, x), m.slope.view(1, -1, 1, 1) * m.distance)))


def cosine(m: Any, x: Tensor) -> Tensor:
    q, k, v = split_all(m, x)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return m.out(join((scores * m.logit_scale.clamp(max=4.6).exp()).softmax(-1) @ v))


def normalised(m: Any, x: Tensor) -> Tensor:
    q, k, v = split_all(m, x)
    return m.out(join(attend(m.q_norm(q), m.k_norm(k), v)))


def talking(m: Any, x: Tensor) -> Tensor:
    """Scores and weights are mixed across heads by linear layers."""
    q, k, v = split_all(m, x)
    scores = m.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).softmax(-2)
    return m.out(join(m.after(scores).permute(0, 3, 1, 2) @ v))


def bottleneck(m: Any, x: Tensor) -> Tensor:
    """BoTNet: heads are merged with the batch, and channels come first."""
    image = x.transpose(1, 2).unflatten(2, (3, 3))
    q, k, v = (layer(image).reshape(BATCH * HEADS, SIZE, TOKENS) for layer in (m.q, m.k, m.v))
    y = (q.transpose(1, 2) @ k * SIZE**-0.5).softmax(-1) @ v.transpose(1, 2)
    return m.out(y.transpose(1, 2).reshape(BATCH, -1, 3, 3))


def tokens_first(m: Any, x: Tensor) -> Tensor:
    """nn.MultiheadAttention: [tokens, batch × heads, size]."""
    y = x.transpose(0, 1)
    q, k, v = (layer(y).view(TOKENS, BATCH * HEADS, SIZE).transpose(0, 1) for layer in (m.q, m.k, m.v))
    y = torch.baddbmm(m.bias, q, k.transpose(1, 2)).softmax(-1).bmm(v)
    return m.out(y.transpose(0, 1).contiguous().view(TOKENS, BATCH, INNER))


def gated(m: Any, x: Tensor) -> Tensor:
    return m.out(join(attend(*split_all(m, x)) * m.gate))


def locally_enhanced(m: Any, x: Tensor) -> Tensor:
    """CSWin: a depthwise convolution of the values is added to what attention makes of them."""
    q, k = split(m.q(x)), split(m.k(x))
    v = m.v(x)
    local = m.local(v.transpose(1, 2)).transpose(1, 2)
    return m.out(join(attend(q, k, split(v))) + local)


def linear_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = split_all(m, x)
    return m.out(join(F.relu(q) @ (F.relu(k).transpose(-2, -1) @ v)))


def grouped_by_repeat_interleave(m: Any, x: Tensor) -> Tensor:
    q, k, v = split(m.q(x), 6), split(m.k(x), 2), split(m.v(x), 2)
    return m.out(join(attend(q, k.repeat_interleave(3, dim=1), v.repeat_interleave(3, 1))))


def grouped_by_expand(m: Any, x: Tensor) -> Tensor:
    def repeated(y: Tensor) -> Tensor:
        return y[:, :, None].expand(BATCH, 2, 3, TOKENS, SIZE).reshape(BATCH, 6, TOKENS, SIZE)

    q, k, v = split(m.q(x), 6), split(m.k(x), 2), split(m.v(x), 2)
    return m.out(join(attend(q, repeated(k), repeated(v))))


def grouped_in_one_call(m: Any, x: Tensor) -> Tensor:
    q, k, v = split(m.q(x), 6), split(m.k(x), 2), split(m.v(x), 2)
    return m.out(join(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))


def grouped_by_broadcasting(m: Any, x: Tensor) -> Tensor:
    q = m.q(x).view(BATCH, TOKENS, 2, 3, SIZE).permute(0, 2, 3, 1, 4)
    k, v = split(m.k(x), 2).unsqueeze(2), split(m.v(x), 2).unsqueeze(2)
    return m.out(attend(q, k, v).permute(0, 3, 1, 2, 4).reshape(BATCH, TOKENS, -1))


def one_key_for_all_by_einsum(m: Any, x: Tensor) -> Tensor:
    q, k, v = split(m.q(x)), m.k(x), m.v(x)
    scores = torch.einsum("bhid,bjd->bhij", q, k).softmax(-1)
    return m.out(join(torch.einsum("bhij,bjd->bhid", scores, v)))


def one_key_for_all_by_broadcasting(m: Any, x: Tensor) -> Tensor:
    return m.out(join(attend(split(m.q(x)), m.k(x).unsqueeze(1), m.v(x).unsqueeze(1))))


Layout = dict[tuple[str, int], tuple[tuple[int, ...], int | None, int | None]]
"""Dimension of a parameter → the sizes of its axes, and the axis along which channels leave when heads and when
dimensions may; None where it is then pinned."""


@dataclass(frozen=True)
class Way:
    """A way to write attention; `approximate` are the policies under which channels share statistics."""

    body: Callable[[Any, Tensor], Tensor]
    parts: Callable[[], dict[str, Any]]
    layout: Layout
    approximate: tuple[str, ...] = ()


SEPARATE: Layout = dict.fromkeys(
    [("q.weight", 0), ("k.weight", 0), ("v.weight", 0), ("out.weight", 1)], ((HEADS, SIZE), 0, 1)
)


def separate(
    body: Callable[[Any, Tensor], Tensor], layout: Layout | None = None, *approximate: str, **parts: Any
) -> Way:
    """Projections of their own for queries, keys and values; `parts` and their `layout` are what comes on top."""
    return Way(body, lambda: projections(**copy.deepcopy(parts)), SEPARATE | (layout or {}), approximate)


def one_projection(body: Callable[[Any, Tensor], Tensor], *axes: int) -> Way:
    """One projection whose width is divided into `axes`, the last two of which are heads and dimensions."""
    layout: Layout = {("qkv.weight", 0): (axes, len(axes) - 2, len(axes) - 1), ("out.weight", 1): ((HEADS, SIZE), 0, 1)}
    return Way(body, lambda: {"qkv": nn.Linear(WIDTH, 3 * INNER), "out": nn.Linear(INNER, 3)}, layout)


def grouped(body: Callable[[Any, Tensor], Tensor]) -> Way:
    """Two heads of keys and values, each for three heads of queries."""
    queries, keys = ((2, 3, SIZE), 0, 2), ((2, SIZE), 0, 1)
    layout: Layout = {
        ("q.weight", 0): queries,
        ("k.weight", 0): keys,
        ("v.weight", 0): keys,
        ("out.weight", 1): queries,
    }
    return Way(body, lambda: projections(6, groups=2), layout)


def one_key(body: Callable[[Any, Tensor], Tensor]) -> Way:
    """One head of keys and values for all heads of queries."""
    queries, keys = ((HEADS, SIZE), 0, 1), ((SIZE,), None, 0)
    layout: Layout = {
        ("q.weight", 0): queries,
        ("k.weight", 0): keys,
        ("v.weight", 0): keys,
        ("out.weight", 1): queries,
    }
    return Way(body, lambda: projections(groups=1), layout)


def convolutions() -> dict[str, Any]:
    return {name: nn.Conv2d(WIDTH, INNER, 1) for name in "qkv"} | {"out": nn.Conv2d(INNER, 3, 1)}


OF_HEADS = ((HEADS,), 0, None)
HIDDEN = ((HEADS,), 0, 0)
INDEX = torch.arange(TOKENS).unsqueeze(0) - torch.arange(TOKENS).unsqueeze(1) + TOKENS - 1

WAYS = {
    "fused": one_projection(fused, 3, HEADS, SIZE),
    "fused, indexed": one_projection(fused_and_indexed, 3, HEADS, SIZE),
    "by hand": separate(by_hand),
    "by division": separate(by_division),
    "sdpa": separate(in_one_call),
    "sdpa, causal": separate(causal),
    "sdpa, masked": separate(masked_for_every_head),
    "einsum": separate(by_einsum),
    "einsum, heads first": separate(by_einsum_heads_first),
    "rotary": separate(
        rotary, {(f"{name}.weight", 0): ((HEADS, 2, SIZE // 2), 0, 2) for name in "qk"},
        cosine=torch.rand(TOKENS, SIZE), sine=torch.rand(TOKENS, SIZE),
    ),
    "relative positions": separate(
        relative_positions, {("table", 1): OF_HEADS},
        table=nn.Parameter(torch.randn(2 * TOKENS - 1, HEADS)), index=INDEX,
    ),
    "shifted windows": separate(shifted_windows, offsets=torch.randn(BATCH, TOKENS, TOKENS)),
    "slopes": separate(slopes, slope=torch.rand(HEADS), distance=-INDEX.double()),
    "cosine": separate(
        cosine, {("logit_scale", 0): OF_HEADS}, "dimensions", logit_scale=nn.Parameter(torch.rand(HEADS, 1, 1))
    ),
    "normalised": separate(
        normalised, {("q_norm.weight", 0): ((SIZE,), None, 0)}, "dimensions",
        q_norm=nn.LayerNorm(SIZE), k_norm=nn.LayerNorm(SIZE),
    ),
    "talking": separate(
        talking,
        {
            ("before.weight", 1): OF_HEADS, ("before.weight", 0): HIDDEN,
            ("after.weight", 1): HIDDEN, ("after.weight", 0): OF_HEADS,
        },
        before=nn.Linear(HEADS, HEADS), after=nn.Linear(HEADS, HEADS),
    ),
    "bottleneck": Way(bottleneck, convolutions, SEPARATE),
    "tokens first": separate(tokens_first, bias=nn.Parameter(torch.randn(1, 1, TOKENS))),
    "gated": separate(gated, {("gate", 0): OF_HEADS}, gate=nn.Parameter(torch.rand(HEADS, 1, 1))),
    "locally enhanced": separate(
        locally_enhanced, {("local.weight", 0): ((HEADS, SIZE), 0, 1)},
        local=nn.Conv1d(INNER, INNER, 3, padding=1, groups=INNER),
    ),
    "linear": separate(linear_attention),
    "grouped, repeat_interleave": grouped(grouped_by_repeat_interleave),
    "grouped, expand": grouped(grouped_by_expand),
    "grouped, sdpa": grouped(grouped_in_one_call),
    "grouped, broadcast": grouped(grouped_by_broadcasting),
    "one key, einsum": one_key(one_key_for_all_by_einsum),
    "one key, broadcast": one_key(one_key_for_all_by_broadcasting),
}  # fmt: skip


@pytest.mark.parametrize("attention", POLICIES)
@pytest.mark.parametrize("name", WAYS)
def test_what_leaves_is_exact(name: str, attention: str) -> None:
    way = WAYS[name]
    approximate = attention in way.approximate
    cut = assert_laws(Net(way.body, **way.parts()), tokens(), attention=attention, approximate=approximate)
    for (parameter, dimension), (sizes, heads, dimensions) in way.layout.items():
        assert_leaves(cut, parameter, dimension, sizes, heads if attention == "heads" else dimensions)


def assert_leaves(cut: Cut, parameter: str, dimension: int, sizes: tuple[int, ...], axis: int | None) -> None:
    """Channels of a parameter's dimension leave along one axis of `sizes`, all positions of the others with them."""
    found = cut.channels(parameter, dimension)
    if axis is None:
        assert set(found) == {None}
        return
    positions = torch.arange(len(found)).view(sizes).movedim(axis, 0).reshape(sizes[axis], -1).tolist()
    rows = [{found[i] for i in row} for row in positions]
    assert all(len(row) == 1 for row in rows), f"{parameter}[{dimension}] does not leave by whole rows: {found}"
    assert len(set.union(*rows)) == sizes[axis], f"{parameter}[{dimension}] has other channels: {found}"
    assert None not in found
    assert cut.width(parameter, dimension) < len(found)


class FusedAttention(nn.Module):
    """Heads of any number and size."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv, self.out = nn.Linear(WIDTH, 3 * heads * size), nn.Linear(heads * size, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        return self.out(join(attend(q, k, v)))


@pytest.mark.parametrize(("attention", "axis"), [("heads", 1), ("dimensions", 2)])
@pytest.mark.parametrize(("heads", "size"), [(6, 2), (2, 6), (4, 4), (3, 3)])
@pytest.mark.parametrize("batch", [1, 2])
def test_sizes_do_not_decide(attention: str, axis: int, heads: int, size: int, batch: int) -> None:
    cut = assert_laws(FusedAttention(heads, size), tokens()[:batch], attention=attention)
    assert_leaves(cut, "qkv.weight", 0, (3, heads, size), axis)
    assert_leaves(cut, "out.weight", 1, (heads, size), axis - 1)


@pytest.mark.parametrize("attention", POLICIES)
def test_one_head_loses_dimensions(attention: str) -> None:
    assert_leaves(assert_laws(FusedAttention(1, 6), tokens(), attention=attention), "qkv.weight", 0, (3, 6), 1)


@pytest.mark.parametrize("attention", POLICIES)
@pytest.mark.parametrize("name", ["grouped, repeat_interleave", "grouped, sdpa", "bottleneck", "tokens first"])
@pytest.mark.parametrize("seed", [1, 2])
def test_every_choice_of_channels(name: str, attention: str, seed: int) -> None:
    way = WAYS[name]
    assert_laws(Net(way.body, **way.parts()), tokens(), attention=attention, seed=seed, fraction=0.3)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("name", ["fused", "sdpa", "einsum", "grouped, sdpa", "bottleneck"])
def test_heads_leave_exported_graphs(name: str, frontend: str) -> None:
    way = WAYS[name]
    cut = assert_laws(Net(way.body, **way.parts()), tokens(), attention="heads", frontend=frontend)
    for (parameter, dimension), (sizes, heads, _) in way.layout.items():
        assert_leaves(cut, parameter, dimension, sizes, heads)


@pytest.mark.parametrize(("attention", "axis"), [("heads", 1), ("dimensions", 2)])
def test_the_module_of_torch(attention: str, axis: int) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    cut = assert_laws(Block(), torch.randn(2, 5, 12), attention=attention)
    sizes = {"heads": 3, "dimensions": 4}[attention]
    assert {orbit.width for orbit in cut.orbits} == {sizes}
    assert_leaves(cut, "attention.out_proj.weight", 1, (3, 4), axis - 1)


def test_cross_attention() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict(projections())
            self.kv = nn.Linear(5, 2 * INNER)

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            k, v = self.kv(context).view(BATCH, -1, 2, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
            return self.parts["out"](join(F.scaled_dot_product_attention(split(self.parts["q"](x)), k, v)))

    for attention, axis in (("heads", 1), ("dimensions", 2)):
        cut = assert_laws(Cross(), (tokens(), torch.randn(BATCH, 4, 5)), attention=attention)
        assert_leaves(cut, "kv.weight", 0, (2, HEADS, SIZE), axis)
        assert_leaves(cut, "parts.q.weight", 0, (HEADS, SIZE), axis - 1)


def test_channel_attention_keeps_dimensions_under_softmax() -> None:
    """XCiT: scores are made of dimensions, so that only whole heads can leave; dimensions are pinned, and named."""

    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = (y.transpose(-2, -1) for y in split_all(m, x))
        y = (q @ k.transpose(-2, -1) * m.temperature).softmax(-1) @ v
        return m.out(y.permute(0, 3, 1, 2).reshape(BATCH, TOKENS, -1))

    parts = projections(temperature=nn.Parameter(torch.rand(HEADS, 1, 1)))
    cut = assert_laws(Net(body, **parts), tokens(), attention="heads")
    for place in SEPARATE:
        assert_leaves(cut, *place, (HEADS, SIZE), 0)
    pinned = assert_laws(Net(body, **parts), tokens(), attention="dimensions", removed_at_least=0)
    assert pinned.pinned_by("k.weight", 0) == {"aten._softmax"}


def test_what_is_no_attention_is_left_alone() -> None:
    """Channel shuffle and products with weights divide channels too."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).view(BATCH, TOKENS, 4, 6).transpose(2, 3).reshape(BATCH, TOKENS, 24)
        return m.out(torch.einsum("bngc,gcd->bngd", y.view(BATCH, TOKENS, 4, 6), m.blocks).flatten(2))

    parts = {"a": nn.Linear(WIDTH, 24), "blocks": nn.Parameter(torch.randn(4, 6, 5)), "out": nn.Linear(20, 3)}
    graph = fxprune.trace(Net(body, **parts), tokens())
    assert str(fxprune.find_orbits(graph, "heads")) == str(fxprune.find_orbits(graph, "dimensions"))


# What the policy is kept by.


def model() -> nn.Module:
    torch.manual_seed(1)
    return FusedAttention(4, 6).eval()


def test_a_masked_graph_keeps_its_policy_and_so_do_its_copies() -> None:
    traced = fxprune.trace(model(), tokens())
    masked = MaskInsertion("heads")(copy.deepcopy(traced)).graph_module
    for graph in (masked, copy.deepcopy(masked), Pipeline((OrbitDetection(),))(masked).graph_module):
        assert [orbit.width for orbit in fxprune.find_orbits(graph)] == [4]
        assert all(orbit.mask is not None for orbit in fxprune.find_orbits(graph))
        with pytest.raises(UsageError, match="masked for attention=heads, not dimensions"):
            fxprune.find_orbits(graph, "dimensions")
        with pytest.raises(UsageError, match="masked for attention=heads"):
            MaskInsertion()(graph)
    assert [orbit.width for orbit in fxprune.find_orbits(traced)] == [6], "the input keeps nothing"
    slim = Pipeline((ChannelSelection(ratio=0.5), ChannelSurgery()))(masked).graph_module
    assert [orbit.width for orbit in fxprune.find_orbits(slim)] == [6], "a slim graph has no masks and no policy"
    assert [orbit.width for orbit in fxprune.find_orbits(slim, "heads")] == [2]


def test_known_orbits_are_those_of_the_policy() -> None:
    traced = fxprune.trace(model(), tokens())
    for attention, width in (("heads", 4), ("dimensions", 6), ("heads", 4)):
        assert [orbit.width for orbit in fxprune.find_orbits(traced, attention)] == [width]


def test_the_spec_parses_back_and_prunes_alike() -> None:
    result = fxprune.prune(model(), tokens(), ratio=0.5, attention="heads")
    assert result.plan.spec == "mask-insertion{attention=heads},channel-selection{ratio=0.5},channel-surgery"
    assert str(Pipeline(parse_spec(result.plan.spec, PASSES))) == result.plan.spec
    again = fxprune.run_passes(model(), tokens(), result.plan.spec)
    assert fxprune.dump(again) == fxprune.dump(result.module)
    assert result.module.get_submodule("out").weight.shape == (3, 12)


def test_a_saved_plan_replays_its_policy(tmp_path: Any) -> None:
    result = fxprune.prune(model(), tokens(), macs="70%", attention="heads")
    fxprune.save(result, tmp_path / "slim")
    plan = fxprune.Plan.from_json((tmp_path / "slim" / "plan.json").read_text())
    assert plan.attention == "heads"
    loaded = fxprune.load(tmp_path / "slim", model())
    x = tokens()
    assert torch.equal(loaded.module(x), result.module(x))
    assert loaded.plan == result.plan


def test_a_plan_needs_masks_of_its_policy() -> None:
    plan = fxprune.prune(model(), tokens(), ratio=0.5, attention="heads").plan
    with pytest.raises(PlanError, match=r"insert masks with mask-insertion\{attention=heads\}"):
        fxprune.run_passes(model(), tokens(), [MaskInsertion(), PlanApplication(plan)])


def test_a_plan_of_before_policies_is_for_dimensions() -> None:
    text = fxprune.prune(model(), tokens(), ratio=0.5).plan.to_json()
    assert '"attention": "dimensions",' in text
    old = fxprune.Plan.from_json(text.replace('"attention": "dimensions",', ""))
    assert old.attention == "dimensions"
    with pytest.raises(PlanError, match="unknown attention policy 'head'"):
        fxprune.Plan.from_json(text.replace('"dimensions"', '"head"'))


def test_the_plan_of_a_masked_graph_names_its_policy() -> None:
    masked = MaskInsertion("heads")(fxprune.trace(model(), tokens())).graph_module
    assert read_plan(masked).attention == "heads"


@pytest.mark.parametrize(
    "call",
    [
        lambda: fxprune.prune(model(), tokens(), ratio=0.5, attention="head"),
        lambda: fxprune.find_orbits(fxprune.trace(model(), tokens()), "head"),
        lambda: parse_spec("mask-insertion{attention=head}", PASSES),
        lambda: fxprune.run_passes(model(), tokens(), "orbit-detection{attention=head}"),
    ],
)
def test_an_unknown_policy_is_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(SpecError, match="unknown attention policy 'head'; known policies: dimensions, heads"):
        call()


def test_orbit_detection_shows_the_orbits_of_the_policy() -> None:
    shown = fxprune.dump(fxprune.run_passes(model(), tokens(), "orbit-detection{attention=heads}"))
    assert "makes orbit_0×4" in shown
