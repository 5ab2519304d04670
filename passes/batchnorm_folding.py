"""Fold batch norms into the convolutions and linear layers before them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fxprune.graph.hooks import is_hooked
from fxprune.graph.passes import Pass
from fxprune.runtime.weight_masks import class_of, is_plain, place_of

__all__ = ["BatchnormFolding"]


@dataclass(frozen=True)
class BatchnormFolding(Pass):
    """Scale a layer's weight and bias as the batch norm behind it would scale what they make.

    Before: `%conv1 = conv1 Conv2d(3→64)(%x)`, `%bn1 = bn1 BatchNorm2d(64)(%conv1)`, `%relu = .relu(%bn1)`
    After: `%conv1 = conv1 Conv2d(3→64)(%x)`, `%relu = .relu(%conv1)`

    Exact to rounding in evaluation. A batch norm stays where it is

    1. in training, or without running statistics, since it then depends on the batch;
    2. where something else reads what the layer makes, or a layer is called more than once or has tied parameters;
    3. behind a layer whose weight is computed, but for masks, which zero the same weights after scaling;
    4. where it, or the layer, is of a class of its own; of timm's, which hold an activation, that is what stays;
    5. where a hook of the user's is on it, or on the layer.
    """

    name: ClassVar[str] = "batchnorm-folding"

    def rewrite(self, module: fx.GraphModule) -> bool:
        """Fold every batch norm that can be folded, and remove it."""
        calls = Counter(str(node.target) for node in module.graph.nodes if node.op == "call_module")
        held = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
        folded = [node for node in list(module.graph.nodes) if _fold(module, node, calls, held)]
        module.delete_all_unused_submodules()
        return bool(folded)


_REST: dict[str, tuple[str, ...]] = {
    **dict.fromkeys([f"torch.nn.modules.batchnorm.BatchNorm{dims}d" for dims in (1, 2, 3)], ()),
    "timm.layers.norm_act.BatchNormAct2d": ("drop", "act"),
}
"""What batch norms do after normalising, by class: modules that they hold, in order."""


def _rest_of(norm: nn.Module) -> list[nn.Module] | None:
    """Return what a batch norm does after normalising; None where that is not known."""
    kind = class_of(norm)
    names = _REST.get(f"{kind.__module__}.{kind.__qualname__}")
    held = None if names is None else [norm.get_submodule(name) for name in names]
    return None if held is None else [part for part in held if not isinstance(part, nn.Identity)]


def _fold(module: fx.GraphModule, node: fx.Node, calls: Counter[str], held: Counter[int]) -> bool:
    """Fold the batch norm that a node calls into the layer before; return whether that could be done."""
    norm, source = _leaf(module, node), node.args[0] if node.args else None
    rest = None if norm is None else _rest_of(norm)
    if not isinstance(norm, _BatchNorm) or rest is None or len(rest) > 1:
        return False
    if not isinstance(source, fx.Node) or list(source.users) != [node]:
        return False
    layer = _leaf(module, source)
    if not isinstance(layer, (_ConvNd, nn.Linear)) or not _can_scale(layer, source):
        return False
    if is_hooked(layer) or is_hooked(norm):
        return False
    if not class_of(layer).__module__.startswith("torch.nn."):
        return False
    is_own = calls[str(node.target)] == calls[str(source.target)] == 1
    if not is_own or any(held[id(p)] > 1 for p in (*layer.parameters(), *norm.parameters())):
        return False
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return False
    _scale(layer, norm)
    if rest:
        module.set_submodule(str(node.target), rest[0])
        return True
    node.replace_all_uses_with(source)
    module.graph.erase_node(node)
    return True


def _leaf(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _can_scale(layer: _ConvNd | nn.Linear, node: fx.Node) -> bool:
    """Whether the channels of what a layer makes are the outputs of its weight, which is a parameter as it is."""
    if parametrize.is_parametrized(layer, "bias") or not is_plain(layer, "weight"):
        return False
    if isinstance(layer, _ConvTransposeNd):
        return layer.groups == 1
    value = node.meta.get("val")
    # Behind tokens [N, L, C] a batch norm has the L of them for channels.
    return isinstance(layer, _ConvNd) or (isinstance(value, Tensor) and value.dim() == 2)


def _scale(layer: _ConvNd | nn.Linear, norm: _BatchNorm) -> None:
    """Give a layer the weight and bias that make what the batch norm would."""
    owner, name = place_of(layer, "weight")
    assert norm.running_mean is not None
    assert norm.running_var is not None
    statistics = norm.running_mean, norm.running_var, norm.eps
    transposed = isinstance(layer, _ConvTransposeNd)
    scaled, bias = fuse_conv_bn_weights(
        getattr(owner, name), layer.bias, *statistics, norm.weight, norm.bias, transposed
    )
    setattr(owner, name, scaled)
    layer.bias = bias.requires_grad_(scaled.requires_grad)  # torch freezes a bias that it makes
