"""Symbolic tracing: values on demand, opaque functions, expansions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import einsum, rearrange, reduce, repeat
from einops.layers.torch import Rearrange
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812

import fxprune
from fxprune.errors import InputError, TraceError
from fxprune.graph.dump import dump
from fxprune.graph.facts import trace_facts
from fxprune.graph.shapes import input_pixels
from tests.laws import assert_close, assert_laws

FOLLOWED = "control flow that depends on sizes was followed for the sizes of the example inputs"


class Net(nn.Module):
    """A network whose forward is a function of itself and its input."""

    def __init__(self, body: Callable[[Any, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 4, 1)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def by_branch(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y) if y.shape[-1] > 4 and y.dim() == 4 else m.b(-y)


def by_length(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y * len(y.shape) + len(y))


def by_loop(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    rows = [y[:, :, i] * (i + 1) for i in range(y.shape[2])]
    return m.b(torch.stack(rows, 2))


def by_iteration(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(sum(part * i for i, part in enumerate(y.split(2, dim=3))))


def by_numbers(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    side = int(math.sqrt(y.shape[2] * y.shape[3]))
    return m.b(y.flatten(2).view(y.shape[0], -1, side, side) / float(y.shape[2]))


def by_factory(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    grid = torch.arange(y.shape[-1], dtype=y.dtype) + torch.zeros(y.shape[-2], 1)
    return m.b(y + grid + torch.tensor([y.shape[0]]))


def by_assignment(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    mask = y.new_zeros((y.shape[-2], y.shape[-1]))
    mask[1:, : y.shape[-1] // 2] = 1
    return m.b(y * mask)


def by_membership(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)) if 8 in x.shape else x


def by_dictionary(m: Any, x: Tensor) -> dict[str, Tensor]:
    found = m.paths(m.a(x))
    assert set(found.keys()) == {"left", "right"}
    return {name: m.b(y) for name, y in found.items()} | {"sum": m.b(sum(found.values()))}


class Paths(nn.Module):
    """Not traceable by itself: chooses by data."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"left": x, "right": -x if bool(x.sum() > 1e9) else x * 2}


class Optional(nn.Module):
    """Not traceable by itself, and gives one value that is None."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return (x if bool(x.sum() < 1e9) else -x), None


def by_none(m: Any, x: Tensor) -> Tensor:
    y, extra = m.optional(m.a(x))
    return m.b(y) if extra is None else m.b(extra)


def example(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


BODIES = [by_branch, by_length, by_loop, by_iteration, by_numbers, by_factory, by_assignment, by_membership]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_control_flow_on_sizes_is_followed(body: Callable[[Any, Tensor], Tensor]) -> None:
    model = Net(body)
    cut = assert_laws(model, example())
    assert trace_facts(cut.traced).frontend == "symbolic"
    assert not trace_facts(cut.traced).opaque
    assert cut.width("a.weight", 0) < 8


def test_a_note_says_that_sizes_decided() -> None:
    assert FOLLOWED in trace_facts(fxprune.trace(Net(by_branch), example())).notes
    assert FOLLOWED not in trace_facts(fxprune.trace(Net(by_factory), example())).notes


@pytest.mark.parametrize("body", [by_dictionary, by_none], ids=lambda body: body.__name__)
def test_containers_of_an_opaque_leaf_are_known(body: Callable[[Any, Tensor], Any]) -> None:
    model = Net(body, paths=Paths(), optional=Optional()).eval()
    module = fxprune.trace(model, example())
    assert set(trace_facts(module).opaque) == {"paths"} if body is by_dictionary else {"optional"}
    with torch.no_grad():
        found, wanted = module(example(1)), model(example(1))
    assert_close(list(found.values()) if isinstance(found, dict) else [found], _listed(wanted), "tracing")


def _listed(value: Any) -> list[Tensor]:
    return list(value.values()) if isinstance(value, dict) else [value]


class Chooser(nn.Module):
    """Chooses by data in a method, between layers that can be traced."""

    def __init__(self, needs_parameters: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
        self.gain = nn.Parameter(torch.ones(1))
        self.needs_parameters = needs_parameters
        self.threshold = 0.0

    def pick(self, x: Tensor, scale: int) -> Tensor:
        scaled = self.rescale(x, scale)
        return scaled * self.gain if self.needs_parameters else scaled

    def rescale(self, x: Tensor, scale: int) -> Tensor:
        return x * scale if x.sum() > self.threshold else -x

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.pick(self.a(x), 3)).relu())


def test_a_method_that_chooses_by_data_becomes_an_opaque_leaf() -> None:
    model = Chooser().eval()
    cut = assert_laws(model, example())
    facts = trace_facts(cut.traced)
    assert list(facts.opaque) == ["pick"]
    assert "depends on the data" in facts.opaque["pick"]
    assert cut.pinned_by("a.weight", 0) == {"Chooser.pick"}
    assert cut.width("b.weight", 0) < 8
    for seed in range(4):  # Both ways are taken.
        with torch.no_grad():
            assert_close([cut.traced(example(seed).double())], [model(example(seed).double())], "tracing")


def test_a_method_that_needs_parameters_is_opaque_only_inside() -> None:
    module = fxprune.trace(Chooser(needs_parameters=True).eval(), example())
    assert list(trace_facts(module).opaque) == ["rescale"]


def free_choice(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def test_a_function_that_chooses_by_data_becomes_an_opaque_leaf() -> None:
    model = Net(lambda m, x: m.b(free_choice(m.a(x)))).eval()
    module = fxprune.trace(model, example())
    assert "free_choice" in trace_facts(module).opaque
    with torch.no_grad():
        assert_close([module(example(1))], [model(example(1))], "tracing")
    assert free_choice.__name__ == "free_choice"
    assert not isinstance(free_choice(example()), fx.Proxy)


def test_an_opaque_function_is_saved_and_copied_with_its_module() -> None:
    result = fxprune.prune(Chooser().eval(), example(), ratio=0.5)
    assert "pick" in dict(result.module.named_modules())
    result.module.train()
    assert result.module.get_submodule("pick").training


def test_a_model_that_chooses_by_data_is_refused() -> None:
    with pytest.raises(TraceError, match="depends on the data"):
        fxprune.trace(Net(lambda m, x: m.b(m.a(x)) if x.sum() > 0 else x), example())


def halved(x: Tensor) -> Tensor:
    left, right = x.chunk(2, 1)
    return left * right if x.shape[1] % 2 == 0 else left


fx.wrap("halved")


def test_functions_marked_as_leaves_are_traced_into() -> None:
    model = Net(lambda m, x: m.c(halved(m.a(x))), c=nn.Conv2d(4, 2, 1))
    cut = assert_laws(model, example())
    assert "halved" not in dump(cut.traced)
    assert cut.width("a.weight", 0) < 8
    plain = fx.symbolic_trace(model)
    assert any(getattr(n.target, "__name__", "") == "halved" for n in plain.graph.nodes), "the mark must outlive us"


def test_modes_that_differ_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 2, 1)).train()
    model[1].eval()
    module = fxprune.trace(model, example())
    assert [part.training for part in model] == [True, False, True, True]
    assert [module.get_submodule(str(i)).training for i in range(4)] == [True, False, True, True]
    assert module.training


class Caching(nn.Module):
    """Keeps what it computed in a dictionary, as attention of LeViT keeps its biases."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "gain" not in self.cache:
            self.cache["gain"] = self.a.weight.sum() * x.shape[-1]
        return self.b(self.a(x) * self.cache["gain"])


def test_caches_are_as_before_tracing() -> None:
    model = Caching().eval()
    for _ in range(2):
        module = fxprune.trace(model, example())
        assert not model.cache
        with torch.no_grad():
            assert_close([module(example(1))], [Caching.forward(model, example(1))], "tracing")
        model.cache.clear()


class Attending(nn.Module):
    """Attention between two linears, so that every width of it may change."""

    def __init__(self, returns: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 4, **options)
        self.key, self.value = nn.Linear(16, options.get("kdim", 16)), nn.Linear(16, options.get("vdim", 16))
        self.head = nn.Linear(16, 3)
        self.returns = returns

    def forward(self, x: Tensor, other: Tensor | None = None, **masks: Any) -> Any:
        if other is None:
            found = self.attention(x, x, x, need_weights=self.returns, **masks)
        else:
            found = self.attention(x, self.key(other), self.value(other), need_weights=self.returns, **masks)
        return (self.head(found[0]), found[1]) if self.returns else self.head(found[0])


def tokens(length: int = 5, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(seed))


PADDING = torch.tensor([[False, False, False, False, True], [False, False, True, True, True]])
CAUSAL = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)

ATTENTIONS: dict[str, tuple[dict[str, Any], tuple[Tensor, ...], dict[str, Any]]] = {
    "self": ({"batch_first": True}, (tokens(),), {}),
    "sequence first": ({}, (tokens(),), {}),
    "not batched": ({"batch_first": True}, (tokens()[0],), {}),
    "no bias": ({"batch_first": True, "bias": False}, (tokens(),), {}),
    "weights": ({"batch_first": True, "returns": True}, (tokens(),), {}),
    "weights, not batched": ({"returns": True}, (tokens()[0],), {}),
    "weights of heads": ({"batch_first": True, "returns": True}, (tokens(),), {"average_attn_weights": False}),
    "cross": ({"batch_first": True}, (tokens(), tokens(7, seed=1)), {}),
    "cross of other widths": ({"batch_first": True, "kdim": 12, "vdim": 10}, (tokens(), tokens(7, seed=1)), {}),
    "dropout": ({"batch_first": True, "dropout": 0.3}, (tokens(),), {}),
    "padding": ({"batch_first": True}, (tokens(),), {"key_padding_mask": PADDING}),
    "causal": ({"batch_first": True}, (tokens(),), {"attn_mask": CAUSAL, "is_causal": True}),
    "both masks": ({"batch_first": True}, (tokens(),), {"attn_mask": CAUSAL, "key_padding_mask": PADDING}),
    "additive mask": ({"batch_first": True}, (tokens(),), {"attn_mask": torch.linspace(-1, 1, 25).view(5, 5)}),
    "mask of every head": ({"batch_first": True}, (tokens(),), {"attn_mask": torch.linspace(-1, 1, 200).view(8, 5, 5)}),
    "learned key": ({"batch_first": True, "add_bias_kv": True}, (tokens(),), {"key_padding_mask": PADDING}),
    "zero key": ({"batch_first": True, "add_zero_attn": True}, (tokens(),), {"attn_mask": CAUSAL}),
}


@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention_is_expanded_exactly(case: str) -> None:
    options, inputs, masks = ATTENTIONS[case]
    model = Attending(**options)
    cut = assert_laws(model, fxprune.Inputs(inputs, masks), removed_at_least=0.05)
    assert "attention" not in {n.target for n in cut.traced.graph.nodes}
    assert cut.slim.get_parameter("attention.out_proj.weight").shape[1] < 16
    names = set(dict(cut.slim.named_parameters()))
    assert names <= set(dict(model.named_parameters()))


def test_dropout_of_attention_obeys_train() -> None:
    model = Attending(batch_first=True, dropout=0.5).eval()
    module = fxprune.trace(model, tokens())
    assert torch.equal(module(tokens()), module(tokens()))
    module.train()
    assert not torch.equal(module(tokens()), module(tokens()))


def test_a_hint_without_its_mask_is_refused() -> None:
    with pytest.raises(InputError, match="give attn_mask as well"):
        fxprune.trace(Attending(batch_first=True), fxprune.Inputs((tokens(),), {"is_causal": True}))


class OwnAttention(nn.MultiheadAttention):
    """Has a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.in_proj_weight)


def test_attention_with_its_own_forward_is_not_expanded() -> None:
    model = nn.Sequential(OwnAttention(16, 4), nn.Linear(48, 3)).eval()
    module = fxprune.trace(model, tokens())
    with torch.no_grad():
        assert_close([module(tokens())], [model(tokens())], "tracing")


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformers_of_torch_are_traced_into(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True, norm_first=norm_first)
    model = nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    cut = assert_laws(model, tokens())
    assert cut.width("1.layers.0.linear1.weight", 0) < 32
    assert cut.width("1.layers.1.self_attn.out_proj.weight", 1) < 16


@pytest.mark.parametrize(
    ("given", "pixels"),
    [
        (torch.rand(2, 3, 8, 8), 128),
        (torch.rand(2, 3, 4, 8, 8), 512),
        (torch.rand(2, 3), 2),
        (torch.rand(()), 1),
        ([torch.rand(3, 8, 4), torch.rand(3, 2, 2)], 36),
    ],
)
def test_pixels_of_an_input(given: Any, pixels: int) -> None:
    class Summing(nn.Module):
        def forward(self, x: Any) -> Tensor:
            return sum(part.sum() for part in x) if isinstance(x, list) else x.sum()

    assert input_pixels(fxprune.trace(Summing(), (given,))) == pixels


class WithEinops(nn.Module):
    """Attention as einops writes it, and a layer of einops that takes patches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.patches = Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2)
        self.qkv, self.out, self.head = nn.Linear(32, 48), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(self.stem(x))
        q, k, v = rearrange(self.qkv(tokens), "b n (t h d) -> t b h n d", t=3, h=4)
        weights = einsum(q, k, "b h i d, b h j d -> b h i j").softmax(-1)
        out = rearrange(einsum(weights, v, "b h i j, b h j d -> b h i d"), "b h n d -> b n (h d)")
        pooled = reduce(self.out(out), "b n d -> b d", "mean")
        return self.head(pooled) + self.head(repeat(pooled.mean(0), "d -> b d", b=2))


@pytest.mark.parametrize("attention", ["dimensions", "heads"])
def test_einops_is_recorded_as_reshapes(attention: str) -> None:
    cut = assert_laws(WithEinops(), example(), attention=attention)
    assert not trace_facts(cut.traced).opaque
    assert cut.width("stem.weight", 0) == 4
    assert cut.width("qkv.weight", 0) == 24
    assert cut.width("out.weight", 0) == 8


class Scale:
    """No module, but chooses by data as well."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def pick(self, x: Tensor) -> Tensor:
        return x * self.factor if x.sum() < 1e9 else x


class Owners(nn.Module):
    """Calls one method of several owners, of one owner in several states, and functions named as its own parts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.free_choice = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 8, 1)
        self.one, self.other = Scale(2.0), Scale(3.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.one.pick(x) + 10 * self.other.pick(x)
        self.one.factor = 5.0
        y = y + 100 * self.one.pick(x)
        self.one.factor = 2.0
        return self.b(free_choice(self.free_choice(y)))


def test_opaque_calls_have_their_own_owners_and_names() -> None:
    cut = assert_laws(Owners(), example(), removed_at_least=0)
    assert list(trace_facts(cut.traced).opaque) == ["pick", "pick_1", "pick_2", "free_choice_1"]


class WritesInTraining(nn.Module):
    """Writes into what evaluation reads, in training alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.register_buffer("average", torch.ones(8))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) * self.average.view(-1, 1, 1)
        if self.training and self.kind == "noise":
            x.view(-1).mul_(2)
        if self.training and self.kind == "part":
            x[:, :2] = 0
        if self.training and self.kind == "average":
            self.average.mul_(0.9).add_(x.detach().mean((0, 2, 3)))
        if self.training and self.kind == "inplace":
            F.relu(x, inplace=True)
        return self.b(x)


@pytest.mark.parametrize("kind", ["noise", "part", "average", "inplace"])
@pytest.mark.parametrize("training", [False, True])
def test_writes_in_training_do_not_reach_evaluation(kind: str, training: bool) -> None:
    model = WritesInTraining(kind).train(training)
    module = fxprune.trace(model, example())
    assert "could not be joined" in trace_facts(module).notes[0]
    x, before = example(1), model.average.clone()
    with torch.no_grad():
        expected, written = model(x), model.average.clone()
        model.average.copy_(before)
        found = module(x)
    assert_close([found, model.average], [expected, written], "tracing")


def test_what_training_writes_for_itself_alone_is_joined() -> None:
    def body(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return (m.b(y), m.b(F.relu(m.c(y), inplace=True))) if m.training else m.b(y)

    class Auxiliary(Net):
        def forward(self, x: Tensor) -> Any:
            return body(self, x) if self.training else self.b(self.a(x))

    module = fxprune.trace(Auxiliary(body, c=nn.Conv2d(8, 8, 1)).eval(), example())
    assert not trace_facts(module).notes
    assert len(module.train()(example())) == 2


def test_an_augmented_assignment_is_seen_by_other_names() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        part = y[:, :4]
        part += 1.0
        part += y[:, 4:] * 2
        return m.b(y)

    assert_laws(Net(body), example())


def test_multiply_accumulates_of_a_leaf_that_fails_half_way_count_once() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.c(x)
            return x if x.sum() > 0 else -x

    assert_laws(Net(lambda m, x: m.b(m.leaf(m.a(x))), leaf=Half()), example(), removed_at_least=0)


def test_queries_without_any_key_get_zero() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)

        def forward(self, x: Tensor, masked: Tensor) -> Tensor:
            out: Tensor = self.of(x, x, x, key_padding_mask=masked, need_weights=False)[0]
            return out

    model, inputs = Masked().eval(), (torch.randn(2, 3, 8), torch.tensor([[False, True, False], [True, True, True]]))
    # Without gradients torch.nn takes another kernel, for which there is no such promise.
    assert_close(fxprune.trace(model, inputs)(*inputs), model(*inputs), "tracing", 1e-5)


@pytest.mark.parametrize("kind", ["padding", "mask"])
def test_masked_encoders_are_traced(kind: str) -> None:
    """A mask of keys is followed; whether a mask of places is causal depends on its data."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.o = nn.Linear(8, 8), nn.Linear(8, 4)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.of = nn.TransformerEncoder(layer, 1, enable_nested_tensor=kind == "padding")

        def forward(self, x: Tensor, masked: Tensor) -> Tensor:
            x = self.l(x)
            return self.o(self.of(x, **{"src_key_padding_mask" if kind == "padding" else "mask": masked}))

    masked = torch.zeros(2, 5, dtype=torch.bool) if kind == "padding" else torch.ones(5, 5).triu(1).bool()
    cut = assert_laws(Encoder(), (torch.randn(2, 5, 8), masked), removed_at_least=0)
    facts = trace_facts(cut.traced)
    assert facts.frontend == "symbolic"
    assert list(facts.opaque) == ([] if kind == "padding" else ["of"])


def test_a_whole_transformer_is_traced_into() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of, self.o = nn.Transformer(8, 2, 1, 1, 16, batch_first=True), nn.Linear(8, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.o(self.of(x, y))

    cut = assert_laws(Whole(), (torch.randn(2, 5, 8), torch.randn(2, 3, 8)))
    assert cut.width("of.decoder.layers.0.linear1.weight", 0) < 16
