"""Canonical text of a graph, one line a node, and the difference of two."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from fxprune.runtime.gates import Gate
from fxprune.runtime.int8.layer import Int8Layer
from fxprune.runtime.int8.linear import BlockSparseInt8Linear, Int8Linear, traits
from fxprune.runtime.masks import is_mask
from fxprune.runtime.weight_masks import WeightMask, kind_of, parametrized

__all__ = ["diff", "dump", "dump_around", "type_text"]

_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "b8",
}


def dump(module: fx.GraphModule) -> str:
    """Return one deterministic line per node: name, operation, arguments, type, and orbits where detected.

    >>> from torch import nn
    >>> gm = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 2), nn.ReLU()))
    >>> print(dump(gm))
    %input_1 = placeholder()
    %_0 = 0 Linear(4→2)(%input_1)
    %_1 = 1 ReLU()(%_0)
    output %_1
    """
    return "\n".join(_line(module, node) for node in module.graph.nodes)


def dump_around(module: fx.GraphModule, name: str, lines: int = 4) -> str:
    """Return the lines of a dump around the node `name`, or the first ones when there is no such node."""
    names = [node.name for node in module.graph.nodes]
    middle = names.index(name) if name in names else 0
    return "\n".join(dump(module).splitlines()[max(middle - lines, 0) : middle + lines + 1])


def diff(before: fx.GraphModule, after: fx.GraphModule) -> str:
    """Return the unified diff of two dumps; empty when they are equal."""
    lines = difflib.unified_diff(dump(before).splitlines(), dump(after).splitlines(), "before", "after", lineterm="")
    return "\n".join(lines)


def _line(module: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "output":
        return f"output {_argument(node.args[0])}"
    if node.op == "get_attr":
        return f"%{node.name} = get {node.target}{_kept(module, str(node.target))}"
    arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    text = f"%{node.name} = {_target(module, node)}({', '.join(arguments)})"
    if "val" in node.meta:
        text += f" : {type_text(node.meta['val'])}"
    if node.meta.get("orbits"):
        text += f"  # {node.meta['orbits']}"
    return text


def _kept(module: fx.GraphModule, target: str) -> str:
    """Say how many channels a mask keeps."""
    if not is_mask(target) or not module.get_buffer(target).is_floating_point():
        return ""
    mask = module.get_buffer(target)
    return f" : keeps {int(mask.count_nonzero())} of {mask.numel()}"


def _target(module: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "placeholder":
        return "placeholder"
    if node.op == "call_module":
        leaf = module.get_submodule(str(node.target))
        return f"{node.target} {_leaf(leaf)}"
    if node.op == "call_method":
        return f".{node.target}"
    if isinstance(node.target, OpOverload):
        return str(node.target).removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def _leaf(leaf: torch.nn.Module) -> str:
    """Name a leaf by its type and, where it has a weight, the sizes that surgery changes and the share of zeros."""
    kind = kind_of(leaf)
    if isinstance(leaf, (Int8Linear, BlockSparseInt8Linear)):
        return f"{kind}({leaf.in_features}→{leaf.out_features}, {traits(leaf)})"
    if isinstance(leaf, (Int8Layer, Gate)):
        return f"{kind}({leaf.extra_repr()})"
    for source, target in (("in_channels", "out_channels"), ("in_features", "out_features")):
        if hasattr(leaf, source):
            groups = f", groups={leaf.groups}" if getattr(leaf, "groups", 1) != 1 else ""
            return f"{kind}({getattr(leaf, source)}→{getattr(leaf, target)}{groups}{_sparsity(leaf)})"
    size = getattr(leaf, "num_features", getattr(leaf, "normalized_shape", None))
    return f"{kind}({size if size is not None else ''})"


def _sparsity(leaf: torch.nn.Module) -> str:
    masks = [part.mask for _, _, name, part in parametrized(leaf, WeightMask) if name == "weight"]
    return f", {1 - masks[0].float().mean().item():.1%} sparse" if masks else ""


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_argument(v) for v in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_argument(v)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        parts = (value.start, value.stop) if value.step is None else (value.start, value.stop, value.step)
        return ":".join("" if part is None else _argument(part) for part in parts)
    return repr(value)


def type_text(value: Any) -> str:
    """Return a value's type as dumps write it: `f32[1, 3, 8, 8]`, also of nested ones."""
    if isinstance(value, Tensor):
        return f"{_DTYPES.get(value.dtype, str(value.dtype))}{list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(type_text(v) for v in value)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {type_text(v)}" for k, v in value.items()) + "}"
    return repr(value)
