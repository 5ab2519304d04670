"""The model that all variants are made of."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.artifacts import write_onnx
from fxprune.errors import InputError, first_line
from fxprune.graph.inputs import Inputs, check_model
from fxprune.timing.agreement import tensors_of

__all__ = ["CHANNELS_LAST", "CONTIGUOUS", "MEMORY_FORMATS", "Subject"]

CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels-last"

MEMORY_FORMATS = {CONTIGUOUS: torch.contiguous_format, CHANNELS_LAST: torch.channels_last}
"""How the values of four dimensions lie in memory, by what users call it."""


@dataclass(frozen=True)
class Subject:
    """A copy of a model in evaluation mode, its example inputs, the threads to run on, and a folder for files."""

    model: nn.Module
    inputs: Inputs
    threads: int
    folder: Path

    @staticmethod
    def of(model: nn.Module, inputs: Inputs, threads: int, folder: Path) -> Subject:
        """Copy a model. Raises `InputError` for one that cannot be copied or does not take the inputs."""
        check_model(model, inputs)
        inputs.bind(model.forward)
        try:
            own = copy.deepcopy(model).eval()
        except Exception as error:
            raise InputError(f"the model cannot be copied: {first_line(error)}") from error
        return Subject(own, inputs, threads, folder)

    @cached_property
    def expected(self) -> list[Tensor]:
        """What the model gives, as it stands. Raises `InputError` where it gives nothing to compare with."""
        try:
            with torch.no_grad():
                outputs = tensors_of(self.model(*self.inputs.args, **self.inputs.kwargs))
        except Exception as error:
            raise InputError(f"the model does not run on the example inputs: {first_line(error)}") from error
        if not outputs:
            raise InputError("the model's outputs hold no tensor, so that no variant can be compared with it")
        return [output.clone() for output in outputs]

    @property
    def has_images(self) -> bool:
        """Whether any input has the four dimensions that can lie channels-last."""
        return any(tensor.dim() == 4 for tensor in self.inputs.tensors())

    def inputs_as(self, memory_format: str) -> Inputs:
        """Return the inputs, those of four dimensions in a memory format."""
        wanted = MEMORY_FORMATS[memory_format]

        def lay_out(tensor: Tensor) -> Tensor:
            return tensor.contiguous(memory_format=wanted) if tensor.dim() == 4 else tensor

        args, kwargs = pytree.tree_map_only(Tensor, lay_out, (self.inputs.args, self.inputs.kwargs))
        return Inputs(args, kwargs)

    def model_as(self, memory_format: str) -> nn.Module:
        """Return a copy of the model, its weights of four dimensions in a memory format."""
        return copy.deepcopy(self.model).to(memory_format=MEMORY_FORMATS[memory_format])

    @cached_property
    def onnx_file(self) -> Path:
        """The model as an ONNX file, written when it is first asked for. Raises `ArtifactError`."""
        path = self.folder / "model.onnx"
        write_onnx(self.model, self.inputs_as(CONTIGUOUS), path)
        return path
