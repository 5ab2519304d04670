"""Recipes: what they may say, what becomes of mistakes, and runs that are killed, resumed and repeated."""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fxprune
from fxprune import artifacts
from fxprune.api import recipes as api
from fxprune.api.learning import learn_channels
from fxprune.api.recipes import check_recipe, read_recipe, run_recipe
from fxprune.batchnorm import recalibrate_batchnorm
from fxprune.errors import UsageError
from fxprune.insights.widths import layer_widths, stage_widths
from fxprune.recipes import changed_keys, open_task
from fxprune.recipes.folders import Summary
from fxprune.recipes.task import LOSSES, MEASURES
from fxprune.training import Training, classification, loop
from fxprune.training.distillation import distill
from fxprune.zoo import ModelSource, build_model

FILE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

def net(width=8, outputs=2):
    torch.manual_seed(3)
    first = [nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    then = [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*first, *then, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, outputs))

def wide():
    return net(12)

def three():
    return net(8, 3)

def one():
    return net(8, 1)

def denoiser():
    torch.manual_seed(4)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1)]
    return nn.Sequential(*layers), torch.zeros(1, 1, 8, 8)

def images():
    images = torch.rand(64, 1, 8, 8)
    return TensorDataset(images, (images[:, 0, :4].mean((1, 2)) > images[:, 0, 4:].mean((1, 2))).long())

def loader():
    return DataLoader(images(), 16, shuffle=True)

def batches():
    return list(DataLoader(images(), 16))

def noisy():
    clean = torch.rand(4, 8, 1, 8, 8).round()
    return [(one + 0.1 * torch.randn(one.shape), one) for one in clean]

def generator():
    yield images()[:16]

class Stream(IterableDataset):
    def __iter__(self):
        yield from images()

def stream():
    return Stream()

class Broken(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        raise OSError(f"no file {index * 0}")

def empty():
    return TensorDataset(torch.zeros(0, 1))

def number():
    return 3

def nothing():
    return []

def failing():
    raise KeyError("images")

def loss(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1])

def confused(module, batch):
    return module(batch["images"]).sum()

def vector(module, batch):
    return module(batch[0]).sum(1)

def measure(module, batch):
    return {"accuracy": (module(batch[0]).argmax(1) == batch[1]).float()}

def gap(student, teacher):
    return (student.mean(1) - teacher[:, 0]).square().mean()

def adam(groups):
    return torch.optim.Adam(groups)
"""

RECIPE = """
# What is learned here is of no use.
seed = 5

[model]
name = "mine.py:net"
input = ["1x1x8x8"]

[data]
train = "mine.py:images"
held_out = "25%"
batch_size = 16

[task]
loss = "cross-entropy"
measure = "classification"

[learn]
macs = "50%"
epochs = 2
learning_rate = 0.05

[finetune]
epochs = 3
teachers = [{name = "mine.py:net"}, {name = "mine.py:wide"}]
weight = 2.0
"""

DENOISING = """
[model]
name = "mine.py:denoiser"

[data]
train = "mine.py:noisy"
validation = "mine.py:noisy"

[task]
loss = "mse"
measure = "reconstruction"

[learn]
macs = "50%"
epochs = 1

[finetune]
epochs = 1
optimizer = "adamw"
learning_rate = 1.0
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("recipes")
    (place / "mine.py").write_text(FILE)
    (place / "recipe.toml").write_text(RECIPE)
    return place


@pytest.fixture(scope="module")
def write(place: Path) -> Callable[..., Path]:
    """Write a recipe with replacements."""

    def written(*replaced: tuple[str, str], text: str = RECIPE) -> Path:
        for old, new in replaced:
            assert old in text
            text = text.replace(old, new, 1)
        path = place / "other.toml"
        path.write_text(text)
        return path

    return written


def _message(call: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as caught:
        call()
    return str(caught.value)


def test_options_and_defaults_are_those_of_the_functions(place: Path) -> None:
    recipe = read_recipe(place / "recipe.toml").recipe
    assert recipe.finetune is not None
    for job, function in ((recipe.learn, learn_channels), (recipe.finetune, distill)):
        options = {
            name: one.default
            for name, one in inspect.signature(function).parameters.items()
            if one.kind is one.KEYWORD_ONLY and one.default is not one.empty
        }
        left_out = {"validation", "measure", "folder", "frontend", "observers", "hooks", "progress"}
        assert options.keys() - left_out <= job.arguments(function).keys()
        assert (
            job.arguments(function).items() >= {k: options[k] for k in options.keys() - left_out - {"weight"}}.items()
        )
    assert recipe.learn.training(5) == Training(2, 0.05, seed=5)
    assert recipe.finetune.training(5) == Training(3, seed=5)


@settings(max_examples=30, deadline=None)
@given(
    epochs=st.integers(1, 10**6),
    rate=st.floats(1e-12, 1e12),
    precision=st.sampled_from(["no", "bf16"]),
    nesterov=st.booleans(),
    clip=st.none() | st.floats(1e-3, 1e3),
    macs=st.floats(1e-3, 1e12) | st.sampled_from(["50%", "1e6"]),
    exclude=st.lists(st.text("ab*.1", min_size=1), max_size=3).map(tuple),
)
def test_what_a_recipe_says_is_what_functions_get(
    write: Callable[..., Path], macs: float | str, exclude: tuple[str, ...], epochs: int, rate: float, **others: Any
) -> None:
    training = {"precision": "mixed_precision", "nesterov": "nesterov", "clip": "clip_norm"}
    options = {training[name]: value for name, value in others.items()} | {"epochs": epochs, "learning_rate": rate}
    table = options | {"macs": macs, "exclude": exclude}
    lines = [f"{name} = {json.dumps(False if value is None else value)}" for name, value in table.items()]
    text = RECIPE[: RECIPE.index("[learn]")] + "\n".join(["[learn]", *lines])
    learn = read_recipe(write(text=text)).recipe.learn
    assert learn.training(1) == Training(**options, seed=1)
    given = learn.arguments(learn_channels)
    assert (given["macs"], given["exclude"]) == (macs, exclude)


def test_paths_start_at_the_recipe(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(place / "recipe.toml").recipe
    assert recipe.model.name == f"{place}/mine.py:net"
    assert recipe.data.train == f"{place}/mine.py:images"
    assert recipe.finetune is not None
    assert recipe.finetune.teachers[1].name == f"{place}/mine.py:wide"


def test_checkpoints_and_functions_among_the_options_are_found(write: Callable[..., Path], place: Path) -> None:
    extra = 'epochs = 3\noptimizer = "mine.py:adam"\ndivergence = "./mine.py:loss"'
    path = write(('"1x1x8x8"]', '"1x1x8x8"]\ncheckpoint = "../x.pt"'), ("epochs = 3", extra))
    recipe = read_recipe(path).recipe
    assert recipe.model.checkpoint == str(place.parent / "x.pt")
    assert recipe.finetune is not None
    assert callable(recipe.finetune.training(0).optimizer)
    assert callable(recipe.finetune.arguments(distill)["divergence"])


def test_a_copy_means_the_same_elsewhere_and_keeps_comments(place: Path, tmp_path: Path) -> None:
    file = read_recipe(place / "recipe.toml")
    (tmp_path / "copy.toml").write_text(file.copy())
    again = read_recipe(tmp_path / "copy.toml")
    assert changed_keys(file.recipe, again.recipe) == {}
    assert "# What is learned here is of no use." in again.text
    assert again.copy() == again.text


MISTAKES = [
    ("epochs = 2", 'epochs = "3"', 'learn.epochs is "3"; give a whole number'),
    ("epochs = 2", "epochs = 2.5", "learn.epochs is 2.5; give a whole number"),
    ("epochs = 2", "epochs = true", "learn.epochs is true; give a whole number"),
    ("epochs = 2", "epoch = 2", "unknown key learn.epoch; did you mean 'epochs'? (and 1 more mistake)"),
    ("epochs = 2", "", "learn.epochs is missing; give a whole number"),
    ("epochs = 2", "epochs = 0", "learn.epochs is 0; give a whole number, 1 or more"),
    (
        "epochs = 2",
        "epochs = 2\nkeep_best = true",
        "unknown key learn.keep_best; where channels are learned, the last weig",
    ),
    ("epochs = 2", "epochs = 2\nseed = 3", "unknown key learn.seed; it stands at the top of the recipe"),
    ("weight = 2.0", "seed = 3", "unknown key finetune.seed; it stands at the top of the recipe"),
    ("epochs = 2", "epochs = 2\nmomentum = 2", "learn.momentum is 2.0; give a number in [0, 1)"),
    ("epochs = 2", "epochs = 2\nclip_norm = 0", "learn.clip_norm is 0.0; give a number above 0, or false"),
    ("epochs = 2", "epochs = 2\nclip_norm = true", "learn.clip_norm is true; give a number or false"),
    ("epochs = 2", 'epochs = 2\noptimizer = "sdg"', "learn.optimizer is 'sdg'; did you mean 'sgd'?"),
    ("epochs = 2", 'epochs = 2\noptimizer = "mine.py:adma"', "has no callable 'adma'; did you mean 'adam'?"),
    ("epochs = 2", "epochs = 2\nexclude = [3]", "learn.exclude is [3]; give a string or a list of strings"),
    ("0.05", "nan", "learn.learning_rate is nan; give a number above 0"),
    ("0.05", '"fast"', 'learn.learning_rate is "fast"; give a number'),
    ('macs = "50%"', "", "learn.macs is missing; give a number or a string"),
    ('macs = "50%"', "macs = 1979-05-27", 'learn.macs is "1979-05-27"; give a number or a string'),
    ("[task]", "[taks]", "unknown key taks; did you mean 'task'? (and 1 more mistake)"),
    ('loss = "cross-entropy"', 'loss = "cross"', "task.loss is 'cross'; did you mean 'cross-entropy'?"),
    ('loss = "cross-entropy"', 'loss = "mes"', "did you mean 'mse'? Or give path/to/file.py:callable"),
    ('measure = "classification"', "measure = 3", "task.measure is 3; give a string"),
    ('held_out = "25%"', "", "task.measure has nothing to measure on; give data.validation or data.held_out"),
    ('held_out = "25%"', 'held_out = "a lot"', "data.held_out: cannot read held_out='a lot'"),
    ('held_out = "25%"', "held_out = 0", "data.held_out is 0.0; give a fraction in (0, 1]"),
    ('held_out = "25%"', 'held_out = 0.1\nvalidation = "a.py:b"', "data has validation and held_out; give one"),
    ("batch_size = 16", "batch_size = 0", "data.batch_size is 0; give a whole number, 1 or more"),
    ("batch_size = 16", "workers = -1", "data.workers is -1; give a whole number, 0 or more"),
    ('"mine.py:images"', '"images"', "data.train is 'images'; give path/to/file.py:callable"),
    ('"1x1x8x8"', '"1y8"', "model.input: cannot read the input shape '1y8'; write 1x3x224x224"),
    ('input = ["1x1x8x8"]', 'input = "1x1x8x8"', 'model.input is "1x1x8x8"; give a list of strings'),
    ('name = "mine.py:net"', 'nam = "mine.py:net"', "unknown key model.nam; did you mean 'name'?"),
    ('{name = "mine.py:wide"}', "3", "finetune.teachers[1] is 3; give a table"),
    ('{name = "mine.py:wide"}', "{name = 3}", "finetune.teachers[1].name is 3; give a string"),
    ('{name = "mine.py:wide"}', '{names = "a"}', "unknown key finetune.teachers[1].names; did you mean 'name'?"),
    ("[{", "{", "is no TOML: Expected newline or end of document after a statement (at line 25, column 34)"),
    ("weight = 2.0", "weigth = 2.0", "unknown key finetune.weigth; did you mean 'weight'?"),
    ("teachers = [", "x = [", "unknown key finetune.x; known: teachers, recalibrate, epochs"),
    ("[finetune]", "[finetune.x]", "unknown key finetune.x"),
    ("seed = 5", "seed = -1", "seed is -1; give a whole number in [0, 2**32)"),
    ("seed = 5", "seed 5", "is no TOML: Expected '=' after a key in a key/value pair (at line 3, column 6)"),
    ("seed = 5", 'base = "here"', "base is 'here'; give an absolute path"),
    ("seed = 5", "base = 5", "base is 5; give an absolute path"),
    ("seed = 5", "model = 5", "is no TOML: Cannot overwrite a value"),
]


@pytest.mark.parametrize(
    ("old", "new", "message"), MISTAKES, ids=[f"{new or old} {i}" for i, (old, new, _) in enumerate(MISTAKES)]
)
def test_a_mistake_is_one_line_with_file_key_and_remedy(
    write: Callable[..., Path], old: str, new: str, message: str
) -> None:
    path = write((old, new))
    found = _message(lambda: read_recipe(path))
    assert found.startswith(f"'{path}'")
    assert message in found
    assert "\n" not in found


def test_options_of_distillation_need_teachers(write: Callable[..., Path]) -> None:
    path = write(('teachers = [{name = "mine.py:net"}, {name = "mine.py:wide"}]', ""))
    assert "finetune.weight is about teachers; name some: teachers = [{name = …}]" in _message(
        lambda: read_recipe(path)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no recipe '"),
        (b"\xff", "it is not UTF-8; give a TOML file"),
        (b"", "model is missing; give a table"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "recipe.toml").write_bytes(content)
    assert message in _message(lambda: read_recipe(tmp_path / "recipe.toml"))
    assert f"cannot read the recipe '{tmp_path}': Is a directory" in _message(lambda: read_recipe(tmp_path))


def test_a_byte_order_mark_is_left_out_and_a_tilde_is_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8-sig")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_recipe("~/recipe.toml").text == RECIPE


def test_without_pydantic_the_extra_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydantic", None)
    assert "pip install 'fxprune[train]'" in _message(lambda: read_recipe(place / "recipe.toml"))


def _data(path: Path) -> Any:
    return open_task(read_recipe(path).recipe)


def test_a_dataset_becomes_shuffled_batches_and_a_part_is_held_out(place: Path) -> None:
    task = _data(place / "recipe.toml")
    assert [len(labels) for _, labels in task.batches] == [16, 16, 16]
    assert [len(labels) for _, labels in task.validation] == [16]
    assert isinstance(task.batches.sampler, torch.utils.data.RandomSampler)
    held, rest = set(task.validation.dataset.indices), set(task.batches.dataset.indices)
    assert held | rest == set(range(64))
    assert not held & rest
    assert held != set(range(48, 64))
    again = _data(place / "recipe.toml")
    assert list(again.validation.dataset.indices) == list(task.validation.dataset.indices)
    assert torch.equal(next(iter(again.validation))[0], next(iter(task.validation))[0])


def test_another_seed_holds_out_other_samples(write: Callable[..., Path], place: Path) -> None:
    first, second = _data(place / "recipe.toml"), _data(write(("seed = 5", "seed = 6")))
    assert set(first.validation.dataset.indices) != set(second.validation.dataset.indices)
    assert not torch.equal(next(iter(first.validation))[0], next(iter(second.validation))[0])


@pytest.mark.parametrize(("name", "kind"), [("loader", DataLoader), ("batches", list)])
def test_batches_are_taken_as_they_are(write: Callable[..., Path], name: str, kind: type) -> None:
    path = write(
        ('"mine.py:images"\nheld_out = "25%"\nbatch_size = 16', f'"mine.py:{name}"\nvalidation = "mine.py:{name}"')
    )
    task = _data(path)
    assert type(task.batches) is kind
    assert type(task.validation) is kind


def test_a_stream_is_batched_but_not_shuffled(write: Callable[..., Path]) -> None:
    path = write(
        ('"mine.py:images"\nheld_out = "25%"', '"mine.py:stream"\nvalidation = "mine.py:images"'),
        ("epochs = 2", "epochs = 2\nsteps_per_epoch = 1"),
        ("epochs = 3", "epochs = 3\nsteps_per_epoch = 1"),
    )
    images, labels = next(iter(_data(path).batches))
    assert (images.shape, labels.shape) == ((16, 1, 8, 8), (16,))


BAD_DATA = [
    ("mine.py:number", "", "returned int; return a Dataset, a DataLoader or a list of batches"),
    ("mine.py:generator", "", "returned generator; return a Dataset"),
    ("mine.py:failing", "", "without arguments failed: KeyError: 'images'"),
    ("mine.py:imagse", "", "has no callable 'imagse'; did you mean 'images'?"),
    ("no.py:images", "", "there is no file"),
    ("mine.py:loader", "batch_size = 3", "batch_size is for a Dataset, and"),
    ("mine.py:batches", "workers = 1", "returned list, whose batches are taken as they are; leave the key out"),
    ("mine.py:loader", "held_out = 0.5", "held_out is a part of a Dataset with a length, and"),
    ("mine.py:stream", "held_out = 0.5", "returned Stream; return one, or name validation data"),
    ("mine.py:images", "held_out = 1e-3", "held_out is 0.001, and of 64 samples that is 0; leave some on both sides"),
    ("mine.py:images", 'held_out = "100%"', "that is 64; leave some on both sides"),
    ("mine.py:stream", "", "have no length; set learn.steps_per_epoch and finetune.steps_per_epoch"),
    ("mine.py:empty", "", "data: making batches of the data failed: ValueError: num_samples"),
    ("mine.py:nothing", "", "data: the training data have no batch; give one or more"),
    ("mine.py:Broken", "", "data: reading the first batch of the training data failed: OSError: no file 0"),
]


@pytest.mark.parametrize(("name", "more", "message"), BAD_DATA, ids=[f"{row[0]} {row[1]}" for row in BAD_DATA])
def test_bad_data_is_one_line(write: Callable[..., Path], name: str, more: str, message: str) -> None:
    path = write(
        ('"mine.py:images"\nheld_out = "25%"\nbatch_size = 16', f'"{name}"\n{more}'), ('measure = "classification"', "")
    )
    found = _message(lambda: check_recipe(path))
    assert found.startswith(f"'{path}': ")
    assert message in found


class Double(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return 2 * inputs


def test_losses_and_measures_are_what_their_names_say() -> None:
    inputs, wanted = torch.rand(3, 1, 4, 4), torch.rand(3, 1, 4, 4)
    batch, difference = (inputs, wanted), 2 * inputs - wanted
    torch.testing.assert_close(LOSSES["mse"](Double(), batch), (difference**2).mean())
    torch.testing.assert_close(LOSSES["l1"](Double(), batch), difference.abs().mean())
    found = MEASURES["reconstruction"](Double(), batch)
    squares = torch.stack([(one**2).mean() for one in difference])
    torch.testing.assert_close(found["loss"], squares)
    torch.testing.assert_close(found["psnr"], 20 * torch.log10(1 / squares.sqrt()))
    assert MEASURES["reconstruction"](Double(), (inputs, 2 * inputs))["psnr"].tolist() == [100, 100, 100]


def _weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def _same(first: Path, second: Path) -> bool:
    a, b = _weights(first), _weights(second)
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    run_recipe(place / "recipe.toml", place / "whole")
    return place / "whole"


def test_a_run_leaves_all_that_it_made(whole: Path) -> None:
    names = {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}
    logs = {"checkpoint.pt", "log.csv", "log.json"}
    assert names == {
        *("recipe.toml", "summary.json"),
        *(f"learn/{name}" for name in logs),
        *(f"finetune/teacher-{number}/{name}" for number in (1, 2) for name in logs),
        *(f"model/{name}" for name in ("graph.diff", "inputs.json", "model.safetensors", "plan.json", "report.json")),
    }


def test_the_summary_says_what_the_saved_model_does(whole: Path, place: Path) -> None:
    facts = json.loads((whole / "summary.json").read_text())
    model = build_model(ModelSource(f"{place}/mine.py:net", shapes=("1x1x8x8",))).model
    result = fxprune.load(whole / "model", model)
    before, after = facts["macs"]
    assert result.report.macs == (before, after)
    assert 0.3 * before < after <= 0.5 * before
    assert facts["parameters"] == list(result.report.parameters)
    summary = Summary.read(whole)
    assert summary is not None
    assert summary.stages == stage_widths(layer_widths(result.traced, result.report))
    assert facts["target"] == "50%"
    assert list(facts["measures"]) == ["before", "cut", "fine-tuned"]
    batch = next(iter(_data(place / "recipe.toml").validation))
    for stage, module in (("before", model), ("fine-tuned", result.module)):
        with torch.no_grad():
            expected = {name: value.mean().item() for name, value in classification(module.eval(), batch).items()}
        assert facts["measures"][stage] == pytest.approx(expected, rel=1e-5)
    assert list(facts["seconds"]) == ["learn", "finetune/teacher-1", "finetune/teacher-2"]
    logs = [json.loads((whole / name / "log.json").read_text()) for name in facts["seconds"]]
    assert [len(log["epochs"]) for log in logs] == [2, 1, 2]
    assert facts["seconds"]["learn"] == pytest.approx(sum(row["seconds"] for row in logs[0]["epochs"]))
    assert facts["versions"]["torch"] == version("torch")


def test_the_copy_in_the_folder_reproduces_the_run(whole: Path, tmp_path: Path) -> None:
    run_recipe(whole / "recipe.toml", tmp_path / "again")
    assert _same(whole, tmp_path / "again")
    assert (tmp_path / "again" / "recipe.toml").read_text() == (whole / "recipe.toml").read_text()


class Killed(BaseException):
    """What no handler expects."""


def _kill(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """Let one call of a function kill the process, as far as the caller can tell."""
    original, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(original)
    def deadly(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return original(*args, **options)

    monkeypatch.setattr(owner, name, deadly)


DEATHS = {
    "after an epoch of learning": (loop, "_save", 3),
    "before fine-tuning": (api, "distill", 1),
    "with the first teacher": (loop, "_save", 5),
    "with the second teacher": (loop, "_save", 8),
    "while the model is written": (artifacts, "inputs_to_json", 1),
    "before the summary is written": (Summary, "write", 1),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: str
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as context:
        context.setattr(api._Run, "rehearsed", lambda _: None)  # half of the time
        _kill(context, *DEATHS[death])
        with pytest.raises(Killed):
            run_recipe(whole / "recipe.toml", out)
    monkeypatch.setattr(api._Run, "rehearsed", pytest.fail)
    assert not (out / "summary.json").exists()
    logs = {path: path.read_bytes() for path in out.glob("learn/log.csv") if death != "after an epoch of learning"}
    run_recipe(whole / "recipe.toml", out)
    assert _same(whole, out)
    assert {path.name for path in out.iterdir()} == {"finetune", "learn", "model", "recipe.toml", "summary.json"}
    assert all(path.read_bytes() == log for path, log in logs.items()), "what is done is not trained again"


def _files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_changes_nothing(whole: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _files(whole)
    monkeypatch.setattr(api, "build_model", pytest.fail)
    again = run_recipe(place / "recipe.toml", whole)
    assert _files(whole) == before
    assert json.loads(again.to_json()) == json.loads((whole / "summary.json").read_text())
    assert again == Summary.read(whole)


OTHER_RECIPES = [
    (("epochs = 2", "epochs = 3"), "learn.epochs was 2, is now 3; go on with the same one"),
    (("seed = 5", "seed = 6"), "seed was 5, is now 6"),
    (('"mine.py:net"', '"mine.py:wide"'), 'mine.py:net", is now "'),
    (("weight = 2.0", "weight = 2.0\n[output]\nonnx = true"), "output.onnx was false, is now true; remove '"),
    (("weight = 2.0", "weight = 2.0\ndivergence = 'mse'"), 'finetune.divergence was "kl", is now "mse"'),
    ((RECIPE[RECIPE.index("[finetune]") :], ""), "finetune.teachers was [{"),
]


@pytest.mark.parametrize(("replaced", "message"), OTHER_RECIPES, ids=[row[1] for row in OTHER_RECIPES])
def test_another_recipe_is_refused_in_the_same_folder(
    whole: Path, write: Callable[..., Path], replaced: tuple[str, str], message: str
) -> None:
    before = _files(whole)
    path = write(replaced)
    found = _message(lambda: run_recipe(path, whole))
    assert f"'{whole}' holds a run of another recipe: " in found
    assert message in found
    assert _files(whole) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: (out.mkdir(), (out / "mine").touch()), "is not empty and has no recipe.toml; give a new folder"),
        (lambda out: out.write_text("mine"), "is a file; give a new folder"),
        (lambda out: (out.mkdir(), (out / "recipe.toml").write_text("seed")), "is no TOML"),
    ],
)
def test_folders_of_something_else_are_refused(
    place: Path, tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "out")
    assert message in _message(lambda: run_recipe(place / "recipe.toml", tmp_path / "out"))


def test_without_its_summary_a_run_writes_other_outputs(
    whole: Path, write: Callable[..., Path], place: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "summary.json").write_text("{}")
    found = _message(lambda: run_recipe(place / "recipe.toml", tmp_path / "out"))
    assert "is not the summary of a run (KeyError: 'macs'); remove it" in found
    (tmp_path / "out" / "summary.json").unlink()
    run_recipe(write(("weight = 2.0", "weight = 2.0\n[output]\npt2 = true")), tmp_path / "out")
    assert _same(whole, tmp_path / "out")
    assert (tmp_path / "out" / "model" / "model.pt2").is_file()
    assert "pt2 = true" in (tmp_path / "out" / "recipe.toml").read_text()


LATE_MISTAKES = [
    (('"mine.py:wide"', '"mine.py:wied"'), "finetune.teachers[1]: '", "did you mean 'wide'?"),
    (
        ('"mine.py:wide"', '"mine.py:three"'),
        "finetune: teachers[1] (Sequential) gives [16, 3] where the module gives",
        "",
    ),
    (("epochs = 3", "epochs = 1"), "finetune: epochs is 1, and 2 teachers share them", ""),
    (("weight = 2.0", "weight = -2.0"), "finetune: weight is -2.0; give a number, 0 or more", ""),
    (("weight = 2.0", "weight = 2.0\n[output]\nonnx = true"), "ONNX", "pip install"),
    (('macs = "50%"', 'macs = "0.1%"'), "learn: ", "the minimum is"),
    (('macs = "50%"', 'macs = "50%"\ncut = "tagret"'), "learn: unknown cut 'tagret'; did you mean 'target'?", ""),
    (('macs = "50%"', 'macs = "50%"\nexclude = "layer"'), "learn: no layer matches 'layer'", ""),
    (('"1x1x8x8"]', '"1x1x8x8"]\nfrontend = "jit"'), "learn: unknown front end 'jit'", ""),
    (('name = "mine.py:net"', 'name = "resnet18"'), "model: cannot tell where model 'resnet18' comes from", ""),
    (('"cross-entropy"', '"mine.py:confused"'), "learn: the loss '", "mine.py:confused' failed: TypeError"),
    (('"cross-entropy"', '"mine.py:vector"'), "learn: the loss returned a tensor [16]; return a scalar tensor", ""),
    (('"cross-entropy"', '"mine.py:lost"'), "data: '", "has no callable 'lost'; did you mean 'loss'?"),
    (('"classification"', '"mine.py:confused"'), "task: the measure '", "confused' failed: TypeError"),
    (("0.05", '0.05\noptimizer = "mine.py:failing"'), "learn: the optimizer '", "failing' failed: TypeError"),
    (("weight", 'divergence = "mine.py:loss"\nweight'), "finetune: the divergence '", "loss' failed: TypeError"),
    (('"classification"', '"mine.py:measure"'), "measure returned accuracy; return a mapping", "'loss'"),
]


@pytest.mark.parametrize(("replaced", "message", "more"), LATE_MISTAKES, ids=[row[0][1] for row in LATE_MISTAKES])
def test_a_mistake_in_any_table_shows_before_the_work(
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    replaced: tuple[str, str],
    message: str,
    more: str,
) -> None:
    if "onnx" in replaced[1]:
        monkeypatch.setattr(artifacts.importlib.util, "find_spec", lambda _: None)
    path = write(replaced)
    found = _message(lambda: run_recipe(path, tmp_path / "out"))
    assert found.startswith(f"'{path}': ")
    assert message in found
    assert more in found
    assert not (tmp_path / "out").exists()


def test_a_denoiser_learns_from_lists_of_batches(place: Path, tmp_path: Path) -> None:
    (place / "denoising.toml").write_text(DENOISING)
    told: list[str] = []
    summary = run_recipe(place / "denoising.toml", tmp_path / "out", tell=told.append)
    assert told[:3] == ["trying every stage on one batch", "measuring the model", "learning channels"]
    assert list(summary.measures) == ["before", "cut", "fine-tuned"]
    assert set(summary.measures["cut"]) == {"loss", "psnr"}
    assert list(summary.seconds) == ["learn", "finetune"]
    assert (tmp_path / "out" / "finetune" / "log.csv").is_file()
    note = artifacts.read_report(tmp_path / "out" / "model").notes[-1]
    assert f"the validation loss was {summary.measures['cut']['loss']:.4g} after the cut and is" in note
    loaded = fxprune.load(tmp_path / "out" / "model", build_model(ModelSource(f"{place}/mine.py:denoiser")).model)
    batches = _data(place / "denoising.toml").validation
    with torch.no_grad():
        losses = [LOSSES["mse"](loaded.module, batch).item() for batch in batches]
    assert summary.measures["fine-tuned"]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_without_validation_nothing_is_measured(place: Path, tmp_path: Path) -> None:
    text = DENOISING.replace('validation = "mine.py:noisy"', "").replace('measure = "reconstruction"', "")
    (place / "unmeasured.toml").write_text(text[: text.index("[finetune]")])
    summary = run_recipe(place / "unmeasured.toml", tmp_path / "out")
    assert summary.measures == {}
    assert list(summary.seconds) == ["learn"]
    assert not (tmp_path / "out" / "finetune").exists()


def test_statistics_are_estimated_anew_on_request(place: Path, tmp_path: Path) -> None:
    """A rate that moves no weight, one step, and momentum leaves nine tenths of what was estimated."""
    text = RECIPE[: RECIPE.index("[finetune]")].replace(
        '"mine.py:images"\nheld_out = "25%"\nbatch_size = 16', '"mine.py:batches"'
    )
    text = text.replace('measure = "classification"', "") + "[finetune]\nepochs = 1\nlearning_rate = 1e-30\n"
    means = {}
    for recalibrate in ("true", "false"):
        (place / "norms.toml").write_text(f"{text}recalibrate = {recalibrate}\n")
        run_recipe(place / "norms.toml", tmp_path / recalibrate)
        means[recalibrate] = _weights(tmp_path / recalibrate)["1.running_mean"]
    batches = _data(place / "norms.toml").batches
    result = fxprune.load(
        tmp_path / "true" / "model", build_model(ModelSource(f"{place}/mine.py:net", shapes=("1x1x8x8",))).model
    )
    recalibrate_batchnorm(result.module, [images for images, _ in batches])
    settled = result.module.get_buffer("1.running_mean")
    torch.testing.assert_close(means["true"], settled, rtol=0.02, atol=1e-3)
    assert not torch.allclose(means["false"], settled, rtol=0.02, atol=1e-3)


def test_plots_without_matplotlib_are_refused_before_the_work(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = write(("weight = 2.0", "weight = 2.0\n[output]\nplots = true"))
    assert "pip install 'fxprune[plots]'" in _message(lambda: run_recipe(path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_check_takes_a_step_of_everything_and_writes_nothing(
    place: Path, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a teacher that the task's loss cannot be asked of."""
    path = write(('"mine.py:wide"', '"mine.py:one"'), ("weight", 'divergence = "mine.py:gap"\nweight'))
    before = _files(place)
    monkeypatch.setattr(loop, "write_checkpoint", pytest.fail)
    summary = check_recipe(path)
    assert list(summary.seconds) == ["learn", "finetune/teacher-1", "finetune/teacher-2"]
    assert summary.macs[1] <= summary.macs[0] / 2
    assert _files(place).keys() - before.keys() == set()
