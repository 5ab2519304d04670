"""Runtimes that are not torch: each reads the model's ONNX file, in float32, on as many threads as torch has."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy
from torch import Tensor

from fxprune.errors import InputError
from fxprune.timing.subject import CONTIGUOUS, Subject

__all__ = ["onnxruntime", "openvino"]

Engine = tuple[Callable[[], Any], str]
"""What runs the model once, and how it was made."""


def onnxruntime(subject: Subject) -> Engine:
    """Load the model into ONNX Runtime. Raises `InputError` where that is not installed or cannot take the inputs."""
    runtime = _library("onnxruntime", "export")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = subject.threads
    options.inter_op_num_threads = 1
    # Or its threads go on waiting actively while the next variant is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(str(subject.onnx_file), options, providers=["CPUExecutionProvider"])
    feed = _feed([source.name for source in session.get_inputs()], subject)
    return lambda: session.run(None, feed), f"float32, {runtime.__version__}"


_OPENVINO = {
    "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": 1,
    # By default it computes in bfloat16 where the processor can.
    "INFERENCE_PRECISION_HINT": "f32",
    # Pinned, its threads would stay on cores that the others' may leave.
    "ENABLE_CPU_PINNING": False,
}


def openvino(subject: Subject) -> Engine:
    """Load the model into OpenVINO. Raises `InputError` where that is not installed or cannot take the inputs."""
    runtime = _library("openvino", "openvino")
    options = _OPENVINO | {"INFERENCE_NUM_THREADS": subject.threads}
    core = runtime.Core()
    # Read, not converted: openvino.convert_model sends telemetry.
    compiled = core.compile_model(core.read_model(str(subject.onnx_file)), "CPU", options)
    request = compiled.create_infer_request()
    feed = _feed([source.get_any_name() for source in compiled.inputs], subject)

    def run() -> list[Any]:
        return list(request.infer(feed, share_inputs=True, share_outputs=True).values())

    return run, f"float32, {runtime.__version__.partition('-')[0]}"


def _library(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(f"it needs the extra: pip install 'fxprune[{extra}]'") from None


def _feed(names: list[str], subject: Subject) -> dict[str, numpy.ndarray[Any, Any]]:
    """Return an array for every input of the ONNX file: by name, or, where names differ, in the model's order."""
    inputs = subject.inputs_as(CONTIGUOUS)
    tensors = inputs.tensors()
    if any(tensor.device.type != "cpu" for tensor in tensors):
        raise InputError("it runs on the CPU; move the model and the inputs there with .to('cpu')")
    bound = inputs.bind(subject.model.forward)
    if all(isinstance(bound.get(name), Tensor) for name in names):
        tensors = [bound[name] for name in names]
    if len(names) != len(tensors):
        raise InputError(f"its ONNX file takes {len(names)} inputs ({', '.join(names)}), the model {len(tensors)}")
    return {name: tensor.detach().numpy() for name, tensor in zip(names, tensors, strict=True)}
