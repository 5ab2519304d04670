"""What a teacher adds to the loss, what becomes of it, and how several share a run."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.errors import ArtifactError, InputError, SpecError
from fxprune.training import (
    DIVERGENCES,
    Distillation,
    History,
    Hook,
    Moment,
    Training,
    classification,
    cross_entropy,
    distill,
    train,
)
from tests.training.tasks import Watch, assert_same_state, exact_loader, loader, net, state, untimed

OPTIONS = Training(2, 0.05, tolerance=None)
ONE_STEP = Training(1, 1e-3, momentum=0.0, weight_decay=0.0, schedule="constant")

Made = Callable[[nn.Module], nn.Module]


def line(seed: int = 0, outputs: int = 3) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(6, outputs).double()


def points(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 6)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nothing(module: nn.Module, batch: Any) -> Tensor:
    """Call the module, and ask nothing of it."""
    module(batch)
    return torch.zeros((), requires_grad=True)


def penalty(student: nn.Module, teacher: nn.Module, batch: Any, loss: Any = nothing, **options: Any) -> float:
    """Return the penalty of one step."""
    return distill(student, [batch], loss, ONE_STEP, teachers=[teacher], **options)[0].records[0].penalty


class Script(Hook):
    """Gives the validation losses written down, epoch by epoch through all runs, and notes what it sees."""

    name = "script"

    def __init__(self, losses: Sequence[float] = (), interrupted: int | None = None) -> None:
        self.losses, self.interrupted = losses, interrupted
        self.epoch = self.step = 0
        self.starts: list[dict[str, Tensor]] = []
        self.ends: list[dict[str, Tensor]] = []

    def before_epoch(self, module: nn.Module, moment: Moment) -> None:
        self.epoch += 1
        if moment.step == 0:
            self.starts.append(state(module))

    def after_step(self, module: nn.Module, moment: Moment) -> None:  # noqa: ARG002
        self.step += 1
        if self.step == self.interrupted:
            raise KeyboardInterrupt

    def after_epoch(self, module: nn.Module, moment: Moment, record: Any) -> bool:  # noqa: ARG002
        self.ends.append(state(module))
        return False

    def measure(self, module: nn.Module, batch: Any) -> Mapping[str, Tensor]:  # noqa: ARG002
        return {"loss": torch.tensor(self.losses[max(self.epoch - 1, 0)], dtype=torch.float64)}


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 99),
    st.floats(0.25, 8),
    st.floats(0, 10),
    st.sampled_from([(4, 6), (1, 6, 2), (3, 6, 2, 5)]),
)
def test_the_penalty_is_the_divergence_of_hinton(
    seed: int, temperature: float, weight: float, shape: tuple[int, ...]
) -> None:
    """By hand, and the gradient with it: T² · Σ p log (p / q), the mean over samples and positions."""
    torch.manual_seed(seed)
    kinds: dict[int, Callable[[], nn.Module]] = {2: lambda: nn.Linear(6, 3), 3: lambda: nn.Conv1d(6, 3, 1)}
    student, teacher = (kinds.get(len(shape), lambda: nn.Conv2d(6, 3, 1))().double() for _ in range(2))
    batch, by_hand = 3 * points(seed, *shape), copy.deepcopy(student)
    q, p = ((module(batch) / temperature).exp() for module in (by_hand, teacher))
    q, p = q / q.sum(dim=1, keepdim=True), (p / p.sum(dim=1, keepdim=True)).detach()
    positions = batch.numel() / 6
    expected = weight * temperature**2 * (p * (p / q).log()).sum() / positions
    expected.backward()
    found = penalty(student, teacher, batch, weight=weight, temperature=temperature)
    assert found == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    for parameter, before in zip(student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(parameter, before - 1e-3 * before.grad, rtol=1e-9, atol=1e-12)  # type: ignore[operator]


def test_the_loss_stays_the_loss() -> None:
    """The defaults are the paper's: five times KL; the log has it apart from the loss."""
    student, teacher = line(0, 2), line(1, 2)
    batch = (points(), torch.tensor([0, 1, 1, 0]))
    ours, theirs = (module(batch[0]).log_softmax(dim=1) for module in (student, teacher))
    expected = cross_entropy(student, batch).item()
    divergence = functional.kl_div(ours, theirs, reduction="batchmean", log_target=True).item()
    record = distill(student, [batch], cross_entropy, ONE_STEP, teachers=[teacher])[0].records[0]
    assert (record.train_loss, record.penalty) == pytest.approx((expected, 5 * divergence))


def test_equal_outputs_have_no_divergence() -> None:
    for divergence in DIVERGENCES:
        assert penalty(line(), line(), points(), divergence=divergence) == 0


def test_the_student_becomes_the_teacher() -> None:
    """Against the labels, which are the other way round."""
    teacher, student = line(7, 2).float(), line(8, 2).float()
    data = [(inputs, 1 - teacher(inputs).argmax(dim=1)) for inputs, _ in exact_loader(64, 16)]
    distill(student, data, cross_entropy, Training(80, 0.01, tolerance=None), teachers=[teacher], weight=100.0)
    inputs = torch.cat([inputs for inputs, _ in data])
    ours, theirs = student(inputs), teacher(inputs)
    assert torch.equal(ours.argmax(dim=1), theirs.argmax(dim=1))
    assert functional.kl_div(ours.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="batchmean") < 5e-3


def test_a_teacher_of_no_weight_changes_nothing() -> None:
    alone, taught = net(), net()
    train(alone, loader(), cross_entropy, OPTIONS)
    distill(taught, loader(), cross_entropy, OPTIONS, teachers=[net(1)], weight=0)
    assert_same_state(state(taught), state(alone))


@pytest.mark.parametrize("end", ["finished", "interrupted", "failed"])
def test_teachers_are_given_back_as_they_came(end: str) -> None:
    def broken(module: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(module, batch) / (0 if end == "failed" else 1)

    teachers, student = [net(1), net(2).eval()], net()
    teachers[0][1].eval()
    teachers[0][0].weight.requires_grad_(False)
    before = [(state(one), [part.training for part in one.modules()], one.__dict__.keys()) for one in teachers]
    try:
        hooks = [Script(interrupted=8 if end == "interrupted" else None)]
        distill(student, loader(), broken, OPTIONS, teachers=teachers, hooks=hooks)
        assert end == "finished"
    except (InputError, KeyboardInterrupt):
        assert end != "finished"
    for teacher, (weights, modes, attributes) in zip(teachers, before, strict=True):
        assert_same_state(state(teacher), weights)
        assert [part.training for part in teacher.modules()] == modes
        assert teacher.__dict__.keys() == attributes
        assert all(parameter.grad is None for parameter in teacher.parameters())
    assert [name for name, part in teachers[0].named_parameters() if not part.requires_grad] == ["0.weight"]
    assert not student._forward_hooks
    assert not student._forward_pre_hooks


class Parked(nn.Linear):
    """Lies on another device; its weights are ones wherever they are."""

    def to(self, device: torch.device) -> Parked:
        super().to(device) if device.type == "meta" else nn.init.ones_(self.to_empty(device=device).weight)
        return self


def test_teachers_come_to_the_device_that_trains_and_go_back() -> None:
    teachers = [Parked(6, 3, bias=False, device="meta") for _ in range(2)]
    batch = points().float()
    histories = distill(line().float(), [batch], nothing, OPTIONS, teachers=teachers, divergence="mse", weight=1)
    assert [teacher.weight.device.type for teacher in teachers] == ["meta", "meta"]
    expected = (line().float()(batch) - batch.sum(dim=1, keepdim=True)).square().mean().item()
    assert histories[0].records[0].penalty == pytest.approx(expected)


def test_teachers_answer_in_evaluation_mode() -> None:
    teacher = nn.Sequential(nn.Dropout(0.9), line(1))
    assert teacher.training
    assert penalty(line(), teacher, points()) == penalty(line(), line(1), points())


class Scaled(nn.Linear):
    """Counts its calls."""

    calls = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return super().forward(scale * x)


def test_all_calls_with_gradients_count() -> None:
    """The mean over the calls that the loss makes, with keywords or without; those of others are none of it."""

    class Others(Hook):
        def before_epoch(self, module: nn.Module, moment: Moment) -> None:  # noqa: ARG002
            module(points(2))

        def penalty(self, module: nn.Module, moment: Moment) -> None:
            module(points(2))
            assert moment.measure().keys() == {"loss"}

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad():
            module(99 * batch)
        return (module(batch) + module(batch, scale=2.0)).mean()

    student, teacher = Scaled(6, 3).double(), Scaled(6, 3).double()
    calls = [(student(scale * points()), teacher(scale * points())) for scale in (1, 2)]
    expected = [functional.mse_loss(ours, theirs).item() for ours, theirs in calls]
    others: dict[str, Any] = {"validation": [points(1)], "hooks": [Others()]}
    found = penalty(student, teacher, points(), loss, divergence="mse", weight=1, **others)
    assert found == pytest.approx(sum(expected) / 2)
    assert teacher.calls == 4


def test_a_module_wrapped_for_several_processes_is_heard() -> None:
    student, teacher = line(0, 2), line(1, 2)
    expected = penalty(student, teacher, points())
    student = line(0, 2)
    hook = Distillation(student, teacher)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(student)
        hook.overheard(nothing)(wrapped, points())
        found = hook.penalty(student, Moment(1, 0, 1, dict))
        found.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert found.item() == expected
    assert student.weight.grad is not None


class Nested(nn.Module):
    """Several outputs, nested, among them a count and nothing."""

    def __init__(self, seed: int, turned: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.turned = line(seed), line(seed + 1), turned

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        one, two = self.first(batch["x"]), self.second(batch["x"])
        count = torch.tensor(len(one) + self.turned)
        return {"b": [two, None, count], "a": one} if self.turned else {"a": one, "b": (two, None, count)}


def test_nested_outputs_are_compared_leaf_by_leaf() -> None:
    student, teacher, batch = Nested(0), Nested(5, turned=True), {"x": points()}
    ours, theirs = student(batch), teacher(batch)
    expected = sum(
        ((one - two) ** 2).mean().item() for one, two in ((ours["a"], theirs["a"]), (ours["b"][0], theirs["b"][0]))
    )
    assert penalty(student, teacher, batch, divergence="mse", weight=2.0) == pytest.approx(2 * expected)


def test_a_function_gets_both_outputs_whole() -> None:
    """It may compare what differs in shape."""

    def farthest(student: dict[str, Any], teacher: Tensor) -> Tensor:
        return (student["a"].mean(dim=1) - teacher[:, 0]).abs().max()

    student, teacher, batch = Nested(0), line(4, 1), {"x": points()}
    expected = farthest(student(batch), teacher(points())).item()
    wrapper = Unpacked(teacher)
    assert penalty(student, wrapper, batch, divergence=farthest, weight=1) == pytest.approx(expected)


class Unpacked(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.inside(batch["x"])


class InPlace(nn.Module):
    """Changes what it is given."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x.mul_(2))


def test_what_one_changes_in_place_the_other_does_not_see() -> None:
    def spoiling(module: nn.Module, batch: Tensor) -> Tensor:
        module(batch.clone()).mul_(0)
        return torch.zeros((), requires_grad=True)

    expected = penalty(line(0), line(1), 2 * points())
    assert penalty(InPlace(line(0)), InPlace(line(1)), points(), spoiling) == expected


def test_what_a_step_keeps_goes_with_it() -> None:
    kept: list[weakref.ref[Tensor]] = []

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        output = module(batch)
        kept.append(weakref.ref(output))
        return output.square().mean()

    def gap(student: Tensor, teacher: Tensor) -> Tensor:
        value = (student - teacher).square().mean()
        kept.extend((weakref.ref(teacher), weakref.ref(value)))
        return value

    class Look(Hook):
        def after_step(self, module: nn.Module, moment: Moment) -> None:  # noqa: ARG002
            assert [output() for output in kept] == [None] * 3 * moment.step

    batches = [points(seed) for seed in range(3)]
    distill(line(), batches, loss, OPTIONS, teachers=[line(1)], divergence=gap, hooks=[Look()])
    assert len(kept) == 18


def test_a_step_that_failed_leaves_nothing_to_the_next() -> None:
    student, teacher = line(0), line(1)
    hook = Distillation(student, teacher)
    with pytest.raises(InputError, match="the loss is inf at step 1 of 1"):
        train(student, [points(1)], hook.overheard(lambda m, b: m(b).sum() / 0), ONE_STEP, hooks=[hook])
    history = train(student, [points()], hook.overheard(nothing), ONE_STEP, hooks=[hook])
    assert history.records[0].penalty == penalty(line(0), teacher, points())


def test_a_copy_made_meanwhile_has_no_hooks() -> None:
    class Copy(Hook):
        def after_step(self, module: nn.Module, moment: Moment) -> None:  # noqa: ARG002
            assert not copy.deepcopy(module)._forward_hooks
            assert not copy.deepcopy(module)._forward_pre_hooks

    distill(net(), loader(), cross_entropy, OPTIONS, teachers=[net(1), net(2)], hooks=[Copy()])


def test_a_pruned_graph_learns_from_the_model_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    data = exact_loader(80, 16)
    train(model, data, cross_entropy, Training(5, 0.1))
    before = state(model)
    pruned = fxprune.prune(model, torch.zeros(2, 6), macs="50%").module
    options = Training(20, 0.02, tolerance=None, keep_best=False)
    (history,) = distill(pruned, data, cross_entropy, options, teachers=[model], validation=data)
    assert isinstance(pruned, torch.fx.GraphModule)
    assert history.records[-1].penalty < history.records[0].penalty / 2
    assert history.records[-1].measures["loss"] < history.records[0].measures["loss"]
    assert_same_state(state(model), before)


def test_mixed_precision_is_the_teachers_too() -> None:
    inside: list[torch.dtype] = []
    outside: list[torch.dtype] = []

    class Note(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside.append(x.dtype)
            return x

    def gap(student: Tensor, teacher: Tensor) -> Tensor:
        outside.extend((student.dtype, teacher.dtype))
        return (student - teacher).square().mean()

    teacher = nn.Sequential(line(1).float(), Note())
    for precision, dtype in (("bf16", torch.bfloat16), ("no", torch.float32)):
        inside.clear()
        options = Training(1, 0.1, mixed_precision=precision)
        for divergence in (gap, "kl"):
            distill(line().float(), [points().float()], nothing, options, teachers=[teacher], divergence=divergence)
        assert set(inside) == {dtype}
    assert set(outside) == {torch.float32}


@pytest.mark.parametrize(
    ("epochs", "shares"), [(4, [4]), (4, [2, 2]), (5, [2, 3]), (7, [2, 2, 3]), (8, [2, 3, 3]), (3, [1, 1, 1])]
)
def test_teachers_share_the_epochs(epochs: int, shares: list[int]) -> None:
    teachers = nn.ModuleList(line(seed) for seed in range(len(shares)))
    options = Training(epochs, 0.1, tolerance=None)
    histories = distill(line(9), [points()] * 2, nothing, options, teachers=teachers)
    assert [len(history.records) for history in histories] == shares
    assert {history.stopped_by for history in histories} == {"epochs"}


def test_each_share_is_a_run_of_its_own() -> None:
    """With hooks that see it so, the learning rate from its start on, and the next seed."""
    whole, by_hand = net(), net()
    teachers, watch = [net(1), net(2)], Watch()
    options = Training(4, 0.1, tolerance=None, seed=2**32 - 1)
    histories = distill(whole, loader(), cross_entropy, options, teachers=teachers, hooks=[watch])
    expected = []
    for teacher, seed in zip(teachers, (2**32 - 1, 0), strict=True):
        hook = Distillation(by_hand, teacher)
        share = Training(2, 0.1, tolerance=None, seed=seed)
        expected.append(train(by_hand, loader(), hook.overheard(cross_entropy), share, hooks=[hook]))
    assert_same_state(state(whole), state(by_hand))
    assert [untimed(history) for history in histories] == [untimed(history) for history in expected]
    assert [moment[1:3] for moment in watch.moments if moment[0] == "after epoch"] == [(1, 5), (2, 10)] * 2


@pytest.mark.parametrize(
    ("losses", "best", "start"),
    [
        ([3.0, 1.0, 2.0, 4.0, 2.0, 3.0], 1, 1),
        ([3.0, 2.0, 4.0, 1.0, 2.0, 3.0], 3, 3),
        ([3.0, 2.0, 2.0, 4.0, 3.0, 1.0], 5, 1),
        ([3.0, 2.0, 1.0, 4.0, 1.0, 0.5], 5, 2),
        ([2.0, 3.0, 4.0, 4.0, 2.0, 2.0], 0, 0),
    ],
)
def test_the_best_weights_of_all_runs_stay(losses: list[float], best: int, start: int) -> None:
    """Also for the run that begins: `start` is the epoch whose weights the third begins with."""
    script, module = Script(losses), net()
    histories = distill(
        module,
        loader(),
        cross_entropy,
        Training(6, 0.1, tolerance=None),
        teachers=[net(1), net(2), net(3)],
        validation=exact_loader(8, 8),
        measure=script.measure,
        hooks=[script],
    )
    assert [record.measures["loss"] for history in histories for record in history.records] == losses
    assert_same_state(state(module), script.ends[best])
    assert_same_state(script.starts[2], script.ends[start])


def test_the_last_weights_stay_where_they_shall() -> None:
    script, module = Script([1.0, 2.0, 3.0, 4.0]), net()
    options = Training(4, 0.1, tolerance=None, keep_best=False)
    checks: dict[str, Any] = {"validation": exact_loader(8, 8), "measure": script.measure}
    distill(module, loader(), cross_entropy, options, teachers=[net(1), net(2)], hooks=[script], **checks)
    assert_same_state(state(module), script.ends[-1])
    unvalidated, watch = net(), Watch()
    distill(unvalidated, loader(), cross_entropy, OPTIONS, teachers=[net(1), net(2)], hooks=[watch])
    assert_same_state(state(unvalidated), watch.states[-1])


def test_a_run_that_has_converged_makes_way_for_the_next() -> None:
    script = Script([2.0, 2.0, 1.0, 0.5, 0.25])
    histories = distill(
        net(),
        loader(),
        cross_entropy,
        Training(6, 0.1, smoothing=0.0),
        teachers=[net(1), net(2)],
        validation=exact_loader(8, 8),
        measure=script.measure,
        hooks=[script],
    )
    assert [(len(history.records), history.stopped_by) for history in histories] == [(2, "tolerance"), (3, "epochs")]


def resumable(
    module: nn.Module, folder: Path | None, interrupted: int | None = None, **options: Any
) -> tuple[History, ...]:
    return distill(
        module,
        loader(),
        cross_entropy,
        Training(5, 0.3, tolerance=None),
        teachers=[net(1), net(2)],
        validation=exact_loader(20, 8),
        measure=classification,
        folder=folder,
        hooks=[Script(interrupted=interrupted)],
        **options,
    )


@pytest.mark.parametrize("step", [3, 10, 11, 16, 25])
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path: Path, step: int) -> None:
    """The first teacher's epochs end at steps 5 and 10, the second's at 15, 20 and 25."""
    whole, again = net(), net(9)
    expected = resumable(whole, None)
    with pytest.raises(KeyboardInterrupt):
        resumable(net(), tmp_path, step)
    histories = resumable(again, tmp_path)
    assert_same_state(state(again), state(whole))
    assert [untimed(history) for history in histories] == [untimed(history) for history in expected]
    assert {path.name for path in tmp_path.iterdir()} == {"teacher-1", "teacher-2"}
    finished = net(5)
    assert resumable(finished, tmp_path, 1) == histories
    assert_same_state(state(finished), state(whole))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 4.0}, r"weight of distillation was 5\.0, is now 4\.0"),
        ({"temperature": 2}, r"divergence of distillation was 'kl, temperature=1\.0', is now 'kl, temperature=2\.0'"),
        ({"divergence": "mse"}, r"was 'kl, temperature=1\.0', is now 'mse, temperature=1\.0'"),
    ],
)
def test_other_settings_are_not_resumed(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        resumable(net(), tmp_path, 12)
    module = net(9)
    with pytest.raises(ArtifactError, match=f"teacher-1' holds a run with other settings: .*{message}"):
        resumable(module, tmp_path, **options)
    assert_same_state(state(module), state(net(9)))


class Labelled(nn.Linear):
    """Takes its inputs from a dictionary."""

    def __init__(self) -> None:
        super().__init__(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(dict(enumerate(x))["image"])  # type: ignore[index]


def deaf(module: nn.Module, batch: Any) -> Tensor:  # noqa: ARG001
    return next(module.parameters()).sum()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"teachers": []}, SpecError, "there is no teacher; give one or more, the smallest first"),
        ({"teachers": nn.Sequential(net())}, SpecError, "teachers are not a list of modules; give one, the smallest"),
        ({"teachers": ["resnet"]}, SpecError, "teachers are not a list of modules"),
        ({"teachers": [net()] * 3}, SpecError, "epochs is 2, and 3 teachers share them; give each 1 or more"),
        ({"weight": -1}, SpecError, "weight is -1; give a number, 0 or more"),
        ({"weight": math.nan}, SpecError, "weight is nan; give a number, 0 or more"),
        ({"weight": True}, SpecError, "weight is True; give a number"),
        ({"weight": "5"}, SpecError, "weight is '5'; give a number"),
        ({"temperature": 0}, SpecError, "temperature is 0; give a number above 0"),
        ({"temperature": True}, SpecError, "temperature is True; give a number above 0"),
        ({"temperature": math.inf}, SpecError, "temperature is inf; give a number above 0"),
        ({"divergence": "msee"}, SpecError, "unknown divergence 'msee'; did you mean 'mse'.*, or give a function"),
        ({"divergence": None}, SpecError, "unknown divergence None; known: kl, mse"),
        ({"divergence": "mse", "temperature": 2}, SpecError, "temperature is 2, and only the divergence 'kl' has one"),
        ({"divergence": lambda s, t: s - t}, SpecError, r"returned a tensor \[8, 2\]; return a scalar tensor"),
        ({"divergence": lambda s, t: 1.0}, SpecError, "the divergence returned a float; return a scalar"),  # noqa: ARG005
        ({"divergence": lambda s, t: (s - t).mean() / 0}, InputError, r"penalty of hook 'distillation' is -?inf"),
        (
            {"teachers": [nn.Linear(6, 5)]},
            InputError,
            r"teachers\[0\] \(Linear\) gives \[8, 5\] where the module gives \[8",
        ),
        ({"teachers": [net(), nn.Linear(6, 5)]}, InputError, r"teachers\[1\] \(Linear\) gives \[8, 5\] where .* own:"),
        (
            {"teachers": [net(), nn.LSTM(6, 2)]},
            InputError,
            r"gives \[0\] \[8, 2\], \[1\]\[0\] \[1, 2\], .*gives \[8, 2\]",
        ),
        ({"teachers": [nn.Embedding(2, 2)]}, InputError, "fails on what the loss calls .*: RuntimeError.*, or wrap it"),
        (
            {"teachers": [Labelled()]},
            InputError,
            r"teachers\[0\] \(Labelled\) fails on .*: KeyError: 'image'; give one",
        ),
        ({"loss": deaf}, InputError, "the loss did not call the module with gradients, so there is nothing to distil"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    module = net().eval()
    given: dict[str, Any] = {"loss": cross_entropy, "options": OPTIONS, "teachers": [net(1)], **arguments}
    with pytest.raises(error, match=message):
        distill(module, loader(), **given)
    for parameter, before in zip(module.parameters(), net().parameters(), strict=True):
        assert torch.equal(parameter, before)
    assert not module._forward_hooks


@pytest.mark.parametrize("outputs", [1, None])
def test_no_classes_to_compare(outputs: int | None) -> None:
    shape = r"\[4\]" if outputs is None else r"\[4, 1\]"
    modules = [nn.Sequential(line(seed, 1), nn.Flatten(0)) if outputs is None else line(seed, 1) for seed in (0, 1)]
    with pytest.raises(InputError, match=rf"classes along dim 1, and an output {shape} has none there; give diver"):
        penalty(modules[0], modules[1], points())


def test_outputs_without_numbers() -> None:
    with pytest.raises(InputError, match="gives no floating tensors where the module gives no floating tensors; give"):
        penalty(Silent(), Silent(), points())


class Silent(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 2)

    def forward(self, x: Tensor) -> str:  # type: ignore[override]
        return str(x)


def test_teachers_that_would_be_trained_too() -> None:
    module = net()
    with pytest.raises(
        InputError, match=r"teachers\[1\] \(Sequential\) is the module itself; give a copy of it from bef"
    ):
        distill(module, loader(), cross_entropy, OPTIONS, teachers=[net(1), module])
    with pytest.raises(InputError, match=r"teachers\[0\] \(.*\) shares '0.weight' with the module and would change"):
        distill(module, loader(), cross_entropy, OPTIONS, teachers=[fxprune.trace(module, torch.zeros(2, 6))])
    hook = Distillation(module, net(1))
    with pytest.raises(
        SpecError, match=r"the distillation from the teacher .* is for another module; make one for this"
    ):
        train(net(2), loader(), hook.overheard(cross_entropy), OPTIONS, hooks=[hook])
    with pytest.raises(InputError, match=r"module that it is given, and train on distillation\.overheard\(loss\)"):
        train(module, loader(), cross_entropy, OPTIONS, hooks=[hook])
