"""Gates: masks of channels whose values are sampled while the model trains, by logits that learn (paper 001, §3).

A gate stands where a mask stands and gives one value a channel, [width]:

    training      z = sigmoid((logit + log u − log(1 − u)) / temperature), u uniform in (0, 1)
    evaluation    1 where the logit is positive, else 0; the largest logit always keeps its channels

The sample is the Gumbel-softmax of two states (Jang et al. 2016): a channel stays with probability sigmoid(logit).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["INITIAL", "MOMENTUM", "TEMPERATURE", "Gate", "PredictedGate", "TrainedGate", "window_means"]

INITIAL, TEMPERATURE = 3.0, 0.5
"""Logits at first, and temperature of the samples (§6.1)."""

MOMENTUM = 0.9
"""Of the average of predictions, for which the paper has no number."""


class Gate(nn.Module):
    """Samples the mask of an orbit while training, and is a mask of zeros and ones in evaluation.

    Attributes:
        width: channels of the orbit.
        block: channels that share a logit, counted from the first; the last block may be smaller (§3.1).
        temperature: of the samples; the lower, the closer they are to 0 and 1.
    """

    def __init__(self, width: int, block: int = 1, temperature: float = TEMPERATURE) -> None:
        super().__init__()
        self.width, self.block, self.temperature = width, block, temperature

    @property
    def units(self) -> int:
        """Number of blocks, each with a logit."""
        return math.ceil(self.width / self.block)

    def logits(self) -> Tensor:
        """Return one logit per block, float [units], with a gradient."""
        raise NotImplementedError

    def shared(self) -> tuple[nn.Parameter, ...]:
        """Return the parameters that all logits of the gate depend on; the others have a part for each."""
        return ()

    def probabilities(self) -> Tensor:
        """Return how probable each block is to stay, float [units], without a gradient."""
        return self.logits().detach().sigmoid()

    def mask(self) -> Tensor:
        """Return what evaluation multiplies by, zeros and ones [width]."""
        logits = self.logits().detach()
        return self.by_channel(self.stays(logits).to(logits))

    @staticmethod
    def stays(logits: Tensor) -> Tensor:
        """Return which blocks evaluation keeps, bool: those more probable than not, and the first of the best."""
        return (logits > 0).index_fill(0, logits.argmax(), True)

    def by_channel(self, values: Tensor) -> Tensor:
        """Return for every channel what `values` [units] have for its block: [width]."""
        return values if self.block == 1 else values.repeat_interleave(self.block)[: self.width]

    def values(self) -> Tensor:
        """Return what the channels are multiplied by now, [width]: a sample in training, else the mask."""
        return self.by_channel(self._sample(self.logits())) if self.training else self.mask()

    def _sample(self, logits: Tensor) -> Tensor:
        uniform = torch.rand_like(logits).clamp_(torch.finfo(logits.dtype).tiny, 1 - torch.finfo(logits.dtype).eps)
        return torch.sigmoid((logits + uniform.logit()) / self.temperature)

    def extra_repr(self) -> str:
        """Show the width, the blocks, and how many channels evaluation keeps."""
        blocks = "" if self.block == 1 else f", blocks of {self.block}"
        return f"{self.width}{blocks}, keeps {int(self.mask().count_nonzero())}"


class TrainedGate(Gate):
    """A gate whose logits are parameters of their own: what the paper's predictors are compared with.

    Args:
        width: see `Gate`.
        block: see `Gate`.
        initial: the logits at first.
        temperature: see `Gate`.

    >>> gate = TrainedGate(3).eval()
    >>> gate.logit.data[1] = -1
    >>> gate(), gate.probabilities()
    (tensor([1., 0., 1.]), tensor([0.9526, 0.2689, 0.9526]))
    """

    def __init__(
        self,
        width: int,
        block: int = 1,
        initial: float = INITIAL,
        temperature: float = TEMPERATURE,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, block, temperature)
        self.logit = nn.Parameter(torch.full((self.units,), initial, dtype=dtype))

    def logits(self) -> Tensor:
        """Return the parameter."""
        return self.logit

    def forward(self) -> Tensor:
        """Return the values of all channels, [width]."""
        return self.values()


class PredictedGate(Gate):
    """A gate whose logits are a moving average of what a small network predicts from a feature map (§3, §6.1).

    The network is the paper's: a 3×3 depthwise convolution with zero padding, a 1×1 convolution, the mean over space
    (and over the batch). All three are linear, so the same numbers come out of the means over the windows that the taps
    see, `window_means`: the features are read once, and the predictor itself costs almost nothing.

    With p the prediction and m the momentum, the average is a ← m·a + (1 − m)·p. `logits` has its value and the
    gradient of its last term, (1 − m)·∂p: earlier predictions are constants. The features themselves get no gradient;
    only the predictor learns from what it sees.

    The predictor has a weight for every pair of a channel and a logit; at first it predicts `initial` whatever it sees.
    Whatever runs the features again looks again, as activation checkpointing does. The average is a buffer: of several
    processes each predicts from its own share, and where buffers are shared all go on from the first one's average.

    Args:
        width: see `Gate`.
        channels: positions that the orbit has in the feature map: `width`, or more where several leave together.
        spatial: dimensions of space, 0 to 3: taps are 3 in each.
        dim: the dimension of channels.
        index: int64 [channels], their positions in that dimension; None where they are all of it, in order.
        block: see `Gate`.
        initial: the logits at first.
        temperature: see `Gate`.
        momentum: m.
        dtype: of the parameters, float32 or wider; the default one by default.
    """

    average: Tensor
    windows: Tensor
    index: Tensor | None

    def __init__(
        self,
        width: int,
        channels: int,
        spatial: int,
        dim: int,
        index: Tensor | None = None,
        block: int = 1,
        initial: float = INITIAL,
        temperature: float = TEMPERATURE,
        momentum: float = MOMENTUM,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, block, temperature)
        self.spatial, self.dim, self.momentum = spatial, dim, momentum
        taps = 3**spatial
        self.depthwise = nn.Parameter(torch.full((channels, taps), 1 / taps, dtype=dtype))
        self.depthwise_bias = nn.Parameter(torch.zeros(channels, dtype=dtype))
        self.pointwise = nn.Parameter(torch.zeros(self.units, channels, dtype=dtype))
        self.pointwise_bias = nn.Parameter(torch.full((self.units,), initial, dtype=dtype))
        self.register_buffer("average", torch.full((self.units,), initial, dtype=dtype))
        self.register_buffer("windows", torch.zeros(channels, taps, dtype=dtype), persistent=False)
        self.register_buffer("index", index)

    def forward(self, features: Tensor) -> Tensor:
        """Return the values of all channels, [width]; in training look at the features first.

        Args:
            features: floating, channels in dimension `dim`, space in the last `spatial` others.
        """
        if self.training:
            self.look(features)
        return self.values()

    @torch.no_grad()
    def look(self, features: Tensor) -> None:
        """Predict from a feature map, and move the average."""
        means = window_means(features, self.dim, self.spatial).to(self.windows.dtype)
        # Assigned, not written into: the gradient of an earlier look in the same step needs what that saw.
        self.windows = means if self.index is None else means.index_select(0, self.index)
        self.average.lerp_(self.predicted(), 1 - self.momentum)

    def shared(self) -> tuple[nn.Parameter, ...]:
        """Return the depthwise convolution."""
        return self.depthwise, self.depthwise_bias

    def predicted(self) -> Tensor:
        """Return the logits that the predictor gives for what it saw last, float [units], with a gradient."""
        with torch.autocast(self.windows.device.type, enabled=False):  # half has no room for a moving average
            seen = (self.windows * self.depthwise).sum(1) + self.depthwise_bias
            return torch.mv(self.pointwise, seen) + self.pointwise_bias

    def logits(self) -> Tensor:
        """Return the moving average, with the gradient of its last term."""
        predicted = self.predicted()
        return self.average + (1 - self.momentum) * (predicted - predicted.detach())


def window_means(x: Tensor, dim: int, spatial: int) -> Tensor:
    """Return the means over batch and space of what each tap of a 3×3 depthwise convolution sees.

    Args:
        x: floating, channels in dimension `dim`, space in the last `spatial` of the other dimensions, the rest batch.
        dim: the dimension of channels.
        spatial: dimensions of space; any number.

    Returns float32 or wider [channels, 3 ** spatial], taps in the order of a flattened kernel; beyond the edges are
    zeros, which count.

    >>> window_means(torch.tensor([[[1.0, 2.0, 6.0]]]), dim=1, spatial=1)
    tensor([[1.0000, 3.0000, 2.6667]])
    """
    x = x.movedim(dim, 0)
    batch = tuple(range(1, x.dim() - spatial))
    wide = torch.promote_types(x.dtype, torch.float32)
    means = x.mean(batch, dtype=wide) if batch else x.to(wide, copy=True)
    for _ in range(spatial):
        whole, size = means.sum(1), means.shape[1]
        # The tap before sees all but the last position, the one behind all but the first.
        means = torch.stack([whole - means.select(1, -1), whole, whole - means.select(1, 0)], -1) / size
    return means.flatten(1) if spatial else means.unsqueeze(1)
