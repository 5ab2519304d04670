"""HF Accelerate as training uses it: devices, processes and mixed precision. Imported only when something trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from torch import nn

from fxprune.errors import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["gathered", "open_accelerator", "share_buffers"]

T = TypeVar("T")

SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA")
"""Ways to train that keep no whole module in every process, or that cannot exchange Python objects."""


def open_accelerator(mixed_precision: str) -> Accelerator:
    """Return an Accelerator for the environment that `accelerate launch` made, or for one process.

    Raises `UsageError` when the extra is missing, or when this device or environment cannot do what was asked.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise UsageError("training needs the extra: pip install 'fxprune[train]'") from error
    AcceleratorState._reset_state()  # it holds the precision of the process's last run, and refuses another
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision)
    except ValueError as error:
        raise UsageError(f"cannot train with mixed_precision '{mixed_precision}' here: {error}") from error
    if mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("mixed_precision 'fp16' needs a GPU; give 'bf16' or 'no'")
    if accelerator.distributed_type.value in SHARDED:
        raise UsageError(
            f"fxprune trains a whole module in every process, but this was launched for "
            f"{accelerator.distributed_type.value}; launch with --multi_gpu, or --cpu, or one process"
        )
    return accelerator


def gathered(value: T) -> list[T]:
    """Return what every process gives, in their order; all must call it."""
    from accelerate.utils import gather_object

    return list(gather_object([value]))


def share_buffers(module: nn.Module) -> None:
    """Give every process the buffers of the first, such as running means; all must call it."""
    from accelerate.utils import broadcast

    for buffer in module.buffers():
        broadcast(buffer)
