"""Save a pruned model to a folder and load it again. No pickled modules, ever.

A folder holds `model.safetensors` (weights), `plan.json`, `report.json`, `inputs.json` (shapes of the example inputs),
`graph.diff` (what the passes changed), and on request `model.pt2` (`torch.export`) and `model.onnx`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.errors import ArtifactError, PlanError
from fxprune.graph.inputs import Inputs
from fxprune.plan import Plan
from fxprune.report import Report
from fxprune.runtime.int8.layer import Int8Layer
from fxprune.runtime.weight_masks import finalize, masked_weights

__all__ = [
    "inputs_from_json",
    "inputs_to_json",
    "read_diff",
    "read_inputs",
    "read_plan_file",
    "read_report",
    "read_weights",
    "write_folder",
    "write_onnx",
]


def write_folder(
    folder: str | os.PathLike[str],
    module: fx.GraphModule,
    plan: Plan,
    report: Report,
    changes: str,
    inputs: Inputs,
    *,
    pt2: bool = False,
    onnx: bool = False,
) -> Path:
    """Write an artifact aside and rename it into place, so that a folder is whole or absent.

    Weight masks are baked into the saved weights, which have plain names; the plan says what the masks were.

    Raises `ArtifactError` when the folder is not empty or cannot be written; nothing is overwritten.
    """
    target = Path(folder).absolute()
    check_free(target)
    shipped = finalize(copy.deepcopy(module)) if masked_weights(module) else module
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ArtifactError(
            f"cannot write to '{target.parent}': {error.strerror}; choose a folder you may write"
        ) from error
    try:
        save_model(shipped, str(aside / "model.safetensors"), metadata={"format": "pt"})
        (aside / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        (aside / "report.json").write_text(report.json(), encoding="utf-8")
        (aside / "inputs.json").write_text(inputs_to_json(inputs), encoding="utf-8")
        (aside / "graph.diff").write_text(changes + "\n", encoding="utf-8")
        if pt2:
            _write_pt2(shipped, inputs, aside / "model.pt2")
        if onnx:
            write_onnx(shipped, inputs, aside / "model.onnx")
        aside.chmod(0o755)
        aside.rename(target)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot write '{target}': {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def check_free(target: Path) -> None:
    """Raise `ArtifactError` unless `target` is absent or an empty folder."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        kind = "is not empty" if target.is_dir() else "is a file"
        raise ArtifactError(f"'{target}' {kind}; give a new folder or remove it first, nothing is overwritten")


def _write_pt2(module: fx.GraphModule, inputs: Inputs, path: Path) -> None:
    with _explained("torch.export"):
        program = torch.export.export(copy.deepcopy(module).eval(), inputs.args, inputs.kwargs, strict=False)
        # Written by torch itself, a file on a full disk ends the process.
        torch.export.save(program, file := io.BytesIO())
    path.write_bytes(file.getbuffer())


def write_onnx(module: nn.Module, inputs: Inputs, path: Path) -> None:
    """Write a module in evaluation mode as an ONNX file. Raises `ArtifactError` where it cannot be exported."""
    if any(isinstance(part, Int8Layer) for part in module.modules()):
        raise ArtifactError(
            "ONNX has no operators for layers that compute on integers; save the lowered model as model.pt2, or export "
            "the float model"
        )
    if importlib.util.find_spec("onnxscript") is None:
        raise ArtifactError("writing ONNX needs the extra: pip install 'fxprune[export]'")
    model = copy.deepcopy(module).eval()
    # What the exporter writes about a failure is whole graphs; its message is kept.
    with _explained("torch.onnx"), contextlib.redirect_stderr(io.StringIO()):
        torch.onnx.export(
            model, inputs.args, str(path), kwargs=inputs.kwargs, dynamo=True, external_data=False, verbose=False
        )


@contextmanager
def _explained(exporter: str) -> Iterator[None]:
    """Turn whatever an exporter raises into an `ArtifactError` that names it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ArtifactError(
            f"{exporter} cannot export this model: {_first_line(error.__cause__ or error)}; leave that format out"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def inputs_to_json(inputs: Inputs) -> str:
    """Return the shapes and dtypes of example inputs, and the values of what is no tensor, as JSON.

    >>> inputs_to_json(Inputs((torch.zeros(1, 3),)))
    '{"args": [{"tensor": [1, 3], "dtype": "float32"}], "kwargs": {}}'
    """

    def spell(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return {"tensor": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")}
        return leaf

    try:
        return json.dumps(
            {"args": pytree.tree_map(spell, list(inputs.args)), "kwargs": pytree.tree_map(spell, inputs.kwargs)}
        )
    except TypeError as error:
        raise ArtifactError(f"the example inputs cannot be described in JSON: {error}") from None


def inputs_from_json(text: str, device: torch.device) -> Inputs:
    """Return zero tensors of the described shapes on `device`."""

    def build(value: Any) -> Any:
        if isinstance(value, dict) and value.keys() == {"tensor", "dtype"}:
            return torch.zeros(value["tensor"], dtype=getattr(torch, value["dtype"]), device=device)
        if isinstance(value, dict):
            return {k: build(v) for k, v in value.items()}
        return [build(v) for v in value] if isinstance(value, list) else value

    data = json.loads(text)
    return Inputs(tuple(build(data["args"])), build(data["kwargs"]))


def _text(folder: str | os.PathLike[str], name: str) -> str:
    path = Path(folder) / name
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(f"'{folder}' has no {name}; is it a folder that fxprune saved?") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"cannot read '{path}': {error}") from None


def read_plan_file(folder: str | os.PathLike[str]) -> Plan:
    """Read the plan of an artifact."""
    try:
        return Plan.from_json(_text(folder, "plan.json"))
    except PlanError as error:
        raise PlanError(f"'{Path(folder) / 'plan.json'}': {error}") from None


def read_report(folder: str | os.PathLike[str]) -> Report:
    """Read the report of an artifact."""
    try:
        return Report.from_json(_text(folder, "report.json"))
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"'{Path(folder) / 'report.json'}' is not a report of this fxprune: {error}") from None


def read_diff(folder: str | os.PathLike[str]) -> str:
    """Read what the passes changed."""
    return _text(folder, "graph.diff")


def read_inputs(folder: str | os.PathLike[str], device: torch.device) -> Inputs:
    """Read the example inputs of an artifact, as zeros on `device`."""
    try:
        return inputs_from_json(_text(folder, "inputs.json"), device)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"'{Path(folder) / 'inputs.json'}' cannot be read: {_first_line(error)}") from None


def read_weights(folder: str | os.PathLike[str], module: nn.Module) -> None:
    """Load the weights of an artifact into the slim module."""
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise ArtifactError(f"'{folder}' has no model.safetensors; is it a folder that fxprune saved?")
    try:
        load_model(module, str(path), strict=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        first = str(error).splitlines()[0]
        raise ArtifactError(f"'{path}' does not fit the plan beside it, or is truncated: {first}") from None
