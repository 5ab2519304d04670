"""Models by name, checkpoints and shapes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fxprune.callables import import_callable
from fxprune.checkpoint import load_checkpoint
from fxprune.errors import InputError
from fxprune.zoo import ModelSource, build_model, read_shape

MODELS = """
import torch
from torch import nn
from neighbour import WIDTH

def bare():
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.ReLU(), nn.Conv2d(WIDTH, 4, 3))

def paired():
    return bare(), torch.zeros(1, 3, 9, 9)

def failing():
    raise RuntimeError("no file")

def wrong():
    return 3

def late():
    from late_neighbour import SHAPE
    return bare(), torch.zeros(SHAPE)
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "neighbour.py").write_text("WIDTH = 8\n")
    (tmp_path / "late_neighbour.py").write_text("SHAPE = (1, 3, 9, 9)\n")
    (tmp_path / "models.py").write_text(MODELS)
    return tmp_path / "models.py"


@pytest.fixture
def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("squeezenet1_1", [(1, 3, 224, 224)]),
        ("inception_v3", [(1, 3, 299, 299)]),
        ("lraspp_mobilenet_v3_large", [(1, 3, 520, 520)]),
        ("mc3_18", [(1, 3, 16, 112, 112)]),
        ("raft_small", [(1, 3, 128, 128), (1, 3, 128, 128)]),
    ],
)
def test_torchvision_models_come_with_their_own_inputs(name: str, shapes: list[tuple[int, ...]]) -> None:
    built = build_model(ModelSource(f"torchvision:{name}"))
    assert [tuple(tensor.shape) for tensor in built.inputs.tensors()] == shapes
    assert not any(part.training for part in built.model.modules())
    assert "the weights are random (seed 0)" in built.notes[0]


def test_a_detector_takes_a_list_of_images() -> None:
    source = ModelSource("torchvision:ssdlite320_mobilenet_v3_large")
    built = build_model(source)
    assert [image.shape for image in built.inputs.args[0]] == [(3, 320, 320)]
    assert "depend on the image's values" in built.notes[-1]
    with torch.no_grad():
        assert set(built.model(*built.inputs.args)[0]) == {"boxes", "scores", "labels"}
    given = build_model(replace(source, shapes=("3x64x64", "3x96x64")))
    assert [image.shape for image in given.inputs.args[0]] == [(3, 64, 64), (3, 96, 64)]


def test_a_vision_transformer_takes_the_size_that_it_was_built_for() -> None:
    built = build_model(ModelSource("torchvision:vit_b_32"))
    assert built.inputs.tensors()[0].shape == (1, 3, 224, 224)


def test_the_seed_decides_random_weights_and_inputs() -> None:
    first, again, other = (build_model(ModelSource("torchvision:squeezenet1_1", seed=s)) for s in (1, 1, 2))
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first.inputs.tensors()[0], again.inputs.tensors()[0])
    weights = [next(built.model.parameters()) for built in (first, other)]
    assert not torch.equal(*weights)


def test_given_shapes_replace_the_inputs_of_the_model() -> None:
    built = build_model(ModelSource("torchvision:squeezenet1_1", shapes=("2x3x64x64",)))
    assert built.inputs.tensors()[0].shape == (2, 3, 64, 64)


def test_timm_models_come_with_their_own_inputs() -> None:
    pytest.importorskip("timm")
    built = build_model(ModelSource("timm:resnet10t"))
    assert built.inputs.tensors()[0].shape == (1, 3, 176, 176)


def test_transformers_models_come_with_their_own_inputs() -> None:
    pytest.importorskip("transformers")
    built = build_model(ModelSource("transformers:segformer"))
    assert type(built.model).__name__ == "SegformerForSemanticSegmentation"
    assert built.inputs.kwargs["pixel_values"].shape == (1, 3, 224, 224)


@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_a_missing_library_says_how_to_get_it(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"pip install {package}"):
        build_model(ModelSource(f"{package}:vit"))


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("segfomer", None, "did you mean 'segformer'"),
        ("bert", None, "no vision model of type 'bert'"),
        ("segformer", "DEFAULT", "--checkpoint FILE"),
    ],
)
def test_what_is_no_vision_model_of_transformers_is_one_clear_error(
    name: str, weights: str | None, message: str
) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match=message):
        build_model(ModelSource(f"transformers:{name}", weights=weights))


def test_an_unknown_timm_model_is_answered_with_the_nearest() -> None:
    pytest.importorskip("timm")
    with pytest.raises(InputError, match="did you mean 'resnet10t'"):
        build_model(ModelSource("timm:resnet10tt"))


def test_timm_weights_are_chosen_by_tag() -> None:
    pytest.importorskip("timm")
    with pytest.raises(InputError, match=r"timm:resnet10t\.TAG"):
        build_model(ModelSource("timm:resnet10t", weights="V1"))


def test_the_library_downloads_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(url: str, **_: Any) -> dict[str, Any]:
        asked.append(url)
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    with pytest.raises(InputError, match="'squeezenet1_1' could not be built or its weights downloaded: no route"):
        build_model(ModelSource("torchvision:squeezenet1_1", weights="DEFAULT"))
    assert len(asked) == 1


def test_a_callable_gives_a_module_and_its_inputs(models: Path) -> None:
    built = build_model(ModelSource(f"{models}:paired"))
    assert built.inputs.tensors()[0].shape == (1, 3, 9, 9)
    assert not built.model.training
    assert build_model(ModelSource(f"{models}:late")).inputs.tensors()[0].shape == (1, 3, 9, 9), "imports when called"


def test_callables_of_a_file_share_its_globals_until_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "sharing.py"
    path.write_text("KEPT = []\nkeep = KEPT.append\ndef kept():\n    return KEPT\n")
    import_callable(f"{path}:keep")(3)
    assert import_callable(f"{path}:kept")() == [3]
    path.write_text("def kept():\n    return 'anew'\n")
    assert import_callable(f"{path}:kept")() == "anew"


def test_a_callable_that_gives_a_module_needs_a_shape(models: Path) -> None:
    assert build_model(ModelSource(f"{models}:bare", shapes=("1x3x9x9",))).inputs.args[0].shape == (1, 3, 9, 9)
    with pytest.raises(InputError, match="--input 1x3x224x224"):
        build_model(ModelSource(f"{models}:bare"))


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet18", None, "did you mean 'torchvision:resnet18'"),
        ("zzz", None, "write torchvision:NAME, timm:NAME, transformers:TYPE or path/to/file.py:callable"),
        ("torchvison:resnet18", None, "did you mean 'torchvision:resnet18'"),
        ("torchvision:resnet81", None, "torchvision has no model 'resnet81'; did you mean 'resnet18'"),
        ("torchvision:quantized_resnet18", None, "'torchvision:resnet18' and quantise then"),
        ("torchvision:resnet18", "IMAGENET1K_V9", "did you mean 'IMAGENET1K_V1'"),
        ("nowhere.py:make", None, r"there is no file 'nowhere\.py'"),
        ("{models}:pared", None, "no callable 'pared'; did you mean 'paired'"),
        ("{models}:failing", None, "failed: RuntimeError: no file"),
        ("{models}:wrong", None, "returned int"),
        ("{models}:bare", "DEFAULT", "--checkpoint FILE"),
    ],
)
def test_a_wrong_name_is_one_clear_error(models: Path, name: str, weights: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_model(ModelSource(name.format(models=models), weights=weights))


def test_a_file_that_does_not_import_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(InputError, match="could not be imported: ModuleNotFoundError"):
        build_model(ModelSource(f"{tmp_path}/broken.py:make"))


@pytest.mark.parametrize("form", ["plain.pt", "nested.pth", "parallel.pt", "plain.safetensors"])
def test_a_checkpoint_is_loaded_whatever_holds_it(tmp_path: Path, tiny: nn.Module, form: str) -> None:
    state = {
        key: torch.rand_like(value) if value.is_floating_point() else value for key, value in tiny.state_dict().items()
    }
    path = tmp_path / form
    if form.endswith("safetensors"):
        save_file(state, path)
    elif form.startswith("nested"):
        torch.save({"epoch": 3, "state_dict": state}, path)
    else:
        torch.save({f"module.{k}": v for k, v in state.items()} if "parallel" in form else state, path)
    load_checkpoint(tiny, path)
    for key, value in tiny.state_dict().items():
        assert torch.equal(value, state[key])


def _saved(path: Path, state: dict[str, torch.Tensor], drop: str = "", add: str = "", grow: str = "") -> Path:
    state = {key: value for key, value in state.items() if key != drop}
    if add:
        state[add] = torch.zeros(1)
    if grow:
        state[grow] = torch.zeros(7)
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "0.weight"}, r"it lacks '0\.weight'"),
        ({"add": "9.bias"}, r"it has an unexpected '9\.bias'"),
        ({"grow": "1.bias"}, r"'1\.bias' has shape \(7,\), the model \(4,\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_first_key(
    tmp_path: Path, tiny: nn.Module, change: dict[str, str], message: str
) -> None:
    before = {key: value.clone() for key, value in tiny.state_dict().items()}
    with pytest.raises(InputError, match=message):
        load_checkpoint(tiny, _saved(tmp_path / "state.pt", before, **change))
    for key, value in tiny.state_dict().items():
        assert torch.equal(value, before[key])


def test_old_checkpoints_without_batch_counters_fit(tmp_path: Path, tiny: nn.Module) -> None:
    load_checkpoint(tiny, _saved(tmp_path / "state.pt", tiny.state_dict(), drop="1.num_batches_tracked"))


def test_a_checkpoint_that_cannot_be_read_is_one_clear_error(tmp_path: Path, tiny: nn.Module) -> None:
    truncated, pickled, other = tmp_path / "state.safetensors", tmp_path / "model.pt", tmp_path / "list.pt"
    save_file(tiny.state_dict(), truncated)
    truncated.write_bytes(truncated.read_bytes()[:-20])
    torch.save(tiny, pickled)
    torch.save([1, 2], other)
    for path, message in (
        (truncated, "truncated or no safetensors file"),
        (pickled, "cannot be read as tensors only"),
        (other, "holds no state_dict"),
        (tmp_path / "nothing.pt", "there is no checkpoint file"),
    ):
        with pytest.raises(InputError, match=message):
            load_checkpoint(tiny, path)


@pytest.mark.parametrize("text", ["", "3x", "axb", "1x0", "1x3:int1", "1x3:nn", "1,3"])
def test_a_shape_that_cannot_be_read_is_answered_with_two_that_can(text: str) -> None:
    with pytest.raises(InputError, match=r"write 1x3x224x224, or 1x128:int64"):
        read_shape(text)
