"""Whether a layer computes with its weight as it is: zeros of a weight that is standardised first are no zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from fxprune.runtime.weight_masks import class_of

__all__ = ["reads_plainly"]

_CONTRACTIONS: frozenset[Callable[..., Any]] = frozenset(
    [
        nn.functional.linear,
        *(torch.conv1d, torch.conv2d, torch.conv3d),
        *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    ]
)


def reads_plainly(layer: nn.Linear | _ConvNd) -> bool:
    """Whether all that a layer does with its weight is to contract it.

    Those of torch.nn do. Another class is run once on meta tensors; one that does not run so is not trusted.

    >>> class Centred(nn.Linear):
    ...     def forward(self, x):
    ...         return nn.functional.linear(x, self.weight - self.weight.mean())
    >>> reads_plainly(nn.Linear(4, 4)), reads_plainly(Centred(4, 4))
    (True, False)
    """
    kind: Any = class_of(layer)
    if kind.__module__.startswith("torch."):
        return True
    probe: Any = kind.__new__(kind)
    held = {name: _on_meta(tensor) for name in ("weight", "bias") if (tensor := getattr(layer, name)) is not None}
    probe.__dict__.update(layer.__dict__ | {"_parameters": {"bias": None} | held, "_modules": {}})
    with _Watch(held["weight"]) as watch:
        try:
            probe.forward(_input(layer))
        except Exception:
            return False
    return not watch.others


class _Watch(TorchFunctionMode):
    """Notes the functions other than contractions that get a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor
        self.others: set[str] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function."""
        given = (*args, *(kwargs or {}).values())
        result = func(*args, **(kwargs or {}))
        if any(value is self.tensor for value in given) and func not in _CONTRACTIONS and isinstance(result, Tensor):
            self.others.add(str(func))
        return result


def _on_meta(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)


def _input(layer: nn.Linear | _ConvNd) -> Tensor:
    """Return a meta tensor that a layer takes, as small as its kernel."""
    dtype = layer.weight.dtype
    if isinstance(layer, nn.Linear):
        return torch.empty(1, layer.in_features, dtype=dtype, device="meta")
    sizes = ((k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
    return torch.empty(1, layer.in_channels, *sizes, dtype=dtype, device="meta")
