"""What quantised layers have in common, and how their weights are quantised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.runtime.int8.affine import Affine
from fxprune.runtime.int8.requantization import Requantization

__all__ = ["MOST_FEATURES", "Int8Layer", "quantize_weight"]

MOST_FEATURES = (2**31 - 1) // (255 * 127)
"""How many products an int32 accumulator surely holds."""


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a float [N, K] weight as int8 levels in −127 … 127 and the float32 [N] scales of its rows.

    Symmetric, per output channel, by the largest magnitude; a row of zeros gets scale 1.

    >>> quantize_weight(torch.tensor([[127.0, -64.0], [0.0, 0.0]]))
    (tensor([[127, -64],
            [  0,   0]], dtype=torch.int8), tensor([1., 1.]))
    """
    exact = weight.detach().double()
    peak = exact.abs().amax(1) if exact.numel() else exact.new_zeros(len(exact))
    scales = torch.where(peak > 0, peak / 127, 1.0)
    return (exact / scales[:, None]).round().clamp(-127, 127).to(torch.int8), scales.float()


class Int8Layer(nn.Module):
    """What every quantised layer holds: how accumulators become outputs, and what inputs and outputs stand for.

    Attributes:
        source: quantisation of the input.
        target: of the output, None where it is float32.
        activation: name of the activation that the layer computes, "" for none.
    """

    offsets: Tensor
    multiplier: Tensor
    addend: Tensor
    table: Tensor | None

    def __init__(
        self, requantization: Requantization, products: int, source: Affine, target: Affine | None, activation: str
    ) -> None:
        """Hold the numbers; `products` are what one accumulator sums."""
        super().__init__()
        if products > MOST_FEATURES:
            raise ValueError(f"{products} input features may overflow int32 sums; {MOST_FEATURES} are the most")
        self.source, self.target, self.activation = source, target, activation
        self.low, self.high, self.dtype = requantization.low, requantization.high, requantization.dtype
        for name in ("offsets", "multiplier", "addend", "table"):
            self.register_buffer(name, getattr(requantization, name))

    @property
    def numbers(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float, float, torch.dtype]:
        """How accumulators become outputs, as operators take it."""
        held: Mapping[str, Any] = self._buffers  # Every call asks, and attributes of modules are slow.
        numbers = held["offsets"], held["multiplier"], held["addend"], held["table"]
        return *numbers, self.low, self.high, self.dtype

    @property
    def requantization(self) -> Requantization:
        """The same by name."""
        return Requantization(*self.numbers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Layer:
        """Move to other devices, but keep the float32 numbers float32 in `module.double()` and `module.half()`."""
        before = {name: getattr(self, name) for name in ("multiplier", "addend")}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if self._buffers[name] is not None and self._buffers[name].dtype != tensor.dtype:  # type: ignore[union-attr]
                self._buffers[name] = tensor.to(self.offsets.device)
        return self
