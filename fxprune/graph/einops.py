"""einops on proxies: its functions are recorded as the reshapes and permutes that they come to."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

from torch import fx

__all__ = ["teach_einops"]


def teach_einops() -> None:
    """Let einops, where it is in use, work on the proxies of a tracer as on tensors."""
    if "einops" in sys.modules:
        _backend()


@functools.cache
def _backend() -> type:
    """Define the backend once; einops finds it among the subclasses of its own."""
    base: Any = importlib.import_module("einops._backends").TorchBackend

    class ProxyBackend(base):
        """What einops does to a tensor, for a proxy of one."""

        framework_name = "torch.fx"

        def is_appropriate_type(self, tensor: Any) -> bool:
            """Whether this backend is the one for a value."""
            return isinstance(tensor, fx.Proxy)

        def shape(self, x: Any) -> list[Any]:
            """Return sizes in a list, which einops does not keep: it would hold the tracer."""
            return [x.shape[i] for i in range(x.dim())]

    return ProxyBackend
