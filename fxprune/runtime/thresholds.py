"""Learned thresholds: a weight is kept while its square is above a threshold that is trained with the weights.

Learned threshold pruning, Azarian et al. 2020 (arXiv:2003.00075); equations are numbered as there. Per tensor:

    v  = w · s           with s = sigmoid((w² − τ) / T)      soft pruning, Eq. 2
    L0 = Σ s                                                 soft L0 norm, Eq. 6
    v  = w where w² > τ, else 0                              hard pruning, Eq. 1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["LearnedThreshold", "SoftPruning", "hard_pruning", "temperature_of"]


class SoftPruning(torch.autograd.Function):
    """Soft-prune a tensor and count softly what is left: (w, τ, T, exact) → (v, L0).

    With d = s (1 − s) / T, so that σ_T(w) of Eq. 4 is 2·w·d, the gradients are

        ∂v/∂τ = −w·d          ∂L0/∂τ = −Σ d              Eq. 3 and 7
        ∂v/∂w =  s            ∂L0/∂w =  0                Eq. 14: the sigmoid taken as constant, the default
        ∂v/∂w =  s + 2·w²·d   ∂L0/∂w =  2·w·d            Eq. 3 and 7, `exact`

    The exact gradient pushes weights away from the threshold, which then meets none and stalls (§3.3, figure 1).

    `w` has any shape and floating dtype, `v` has the same; τ and T are scalars, T > 0. The arithmetic is float32 at
    least: squares of small weights vanish in half precision.
    """

    @staticmethod
    def forward(w: Tensor, threshold: Tensor, temperature: Tensor, exact: bool) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        """Return v of the shape and dtype of `w`, and L0, a scalar in float32 or wider."""
        kept = torch.sigmoid(_distance(w, threshold, temperature))
        return (w * kept).to(w.dtype), kept.sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        """Save the inputs; the sigmoid is computed anew, which costs less than keeping it."""
        w, threshold, temperature, ctx.exact = inputs
        ctx.save_for_backward(w, threshold, temperature)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_v: Tensor, grad_norm: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients of w and τ, as the class says."""
        w, threshold, temperature = ctx.saved_tensors
        distance = _distance(w, threshold, temperature)
        kept = torch.sigmoid(distance)
        # Not 1 − s, which is zero long before sigmoid(−x) is; divided by T first, for w / T may overflow.
        density = kept * torch.sigmoid(-distance) / temperature
        through = density * (grad_v * w.to(density.dtype) + grad_norm)
        grad_w = grad_v * kept
        if ctx.exact:
            grad_w = grad_w + 2 * w * through
        return grad_w.to(w.dtype), -through.sum().to(threshold.dtype), None, None


def _distance(w: Tensor, threshold: Tensor, temperature: Tensor) -> Tensor:
    """Return (w² − τ) / T in float32 or wider."""
    return (_square(w) - threshold) / temperature


def _square(w: Tensor) -> Tensor:
    return w.to(torch.promote_types(w.dtype, torch.float32)).square()


def temperature_of(weight: Tensor, scale: float = 1e-3) -> Tensor:
    """Return T = T₀ · σ² of the absolute weights (Eq. 15), a positive scalar in float32 or wider.

    Where σ² says nothing of the weights' size (a single weight, all of one magnitude), their mean square stands in
    for it; 1 where all are zero.

    >>> temperature_of(torch.tensor([1.0, -3.0]), 0.5), temperature_of(torch.tensor([2.0, -2.0]), 0.5)
    (tensor(0.5000), tensor(2.))
    """
    magnitude = weight.detach().abs().to(torch.promote_types(weight.dtype, torch.float32))
    variance, square = magnitude.var(correction=0), magnitude.square().mean()
    spread = torch.where(variance > torch.finfo(magnitude.dtype).eps * square, variance, square)
    return scale * torch.where(spread > 0, spread, torch.ones_like(spread))


class LearnedThreshold(nn.Module):
    """Prunes the tensor it is attached to, softly, by a threshold that learns: a `torch.nn.utils.parametrize` module.

    Attributes:
        threshold: τ, a scalar parameter that starts at 0; compared with squared weights.
        temperature: T, a scalar buffer, fixed when the module is made (Eq. 15).
        exact: take the gradient of Eq. 3 and 7 for the weights instead of Eq. 14.
        hard: prune by Eq. 1 instead of Eq. 2; see `hard_pruning`.

    The module keeps nothing of a forward pass, so that copies, shared layers, gradient checkpointing and distributed
    training see the same: the penalty asks for `soft_norm` of the weights it is about.

    Args:
        weight: the tensor that it is going to prune.
        temperature: T₀.
        exact: see above.

    >>> prune = LearnedThreshold(torch.tensor([0.1, -1.0, 2.0]))
    >>> _ = prune.threshold.data.fill_(0.5)
    >>> prune.hard_mask(torch.tensor([0.1, -1.0, 2.0]))
    tensor([False,  True,  True])
    """

    threshold: nn.Parameter
    temperature: Tensor

    def __init__(self, weight: Tensor, temperature: float = 1e-3, exact: bool = False) -> None:
        super().__init__()
        scale = temperature_of(weight, temperature)
        self.threshold = nn.Parameter(torch.zeros_like(scale))
        self.register_buffer("temperature", scale)
        self.exact = exact
        self.hard = False

    def forward(self, w: Tensor) -> Tensor:
        """Return the pruned tensor: v of Eq. 2, or of Eq. 1 where `hard` is set."""
        if self.hard:
            return self.harden(w)
        return self._soft(w)[0]

    def soft_norm(self, w: Tensor) -> Tensor:
        """Return how many of the weights are kept, softly: L0 of Eq. 6, a scalar with a gradient."""
        return self._soft(w)[1]

    def hard_mask(self, w: Tensor) -> Tensor:
        """Return which weights are kept: w² > τ, bool of the shape of `w` (Eq. 1)."""
        return _square(w.detach()) > self.threshold.detach()

    def harden(self, w: Tensor) -> Tensor:
        """Return the weights that are kept as they are, and zero for the others (Eq. 1)."""
        return torch.where(self.hard_mask(w), w, 0)

    def _soft(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return SoftPruning.apply(w, self.threshold, self.temperature, self.exact)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedThreshold:
        """Move and convert as every module does, but to no less than float32: half cannot hold τ and T."""

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            return converted if converted.dtype.itemsize >= 4 else tensor.to(converted.device)

        return super()._apply(convert, recurse)

    def extra_repr(self) -> str:
        """Show the threshold and the options where the module is printed."""
        return f"threshold={self.threshold.item():.3g}, temperature={self.temperature.item():.3g}, exact={self.exact}"


@contextmanager
def hard_pruning(module: nn.Module) -> Iterator[None]:
    """Let every learned threshold of a module prune by Eq. 1 inside the block, and as before after it."""
    thresholds = [part for part in module.modules() if isinstance(part, LearnedThreshold)]
    before = [part.hard for part in thresholds]
    try:
        for part in thresholds:
            part.hard = True
        yield
    finally:
        for part, hard in zip(thresholds, before, strict=True):
            part.hard = hard
