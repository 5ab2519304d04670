"""Leaf modules of torch.nn that are recorded as explicit operators, so that labels, masks and surgery see inside.

`EXPANSIONS` maps a module type to a function that computes the same from the module's own parameters and submodules.
It takes the place of the module's forward while a model is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fxprune.errors import InputError

__all__ = ["expansion_of"]


def _attention(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`nn.MultiheadAttention`: project, split into heads, attend, merge, project.

    Shapes as there: query [N, L, E] with `batch_first`, [L, N, E] without, or [L, E]; weights [N, L, S].
    """
    if is_causal and attn_mask is None:
        raise InputError("is_causal is a hint about attn_mask; give attn_mask as well")
    is_batched = query.dim() == 3
    swaps = not module.batch_first and is_batched
    q, k, v = _project(module, query, key, value)
    q, k, v = (_with_batch(x, is_batched, swaps) for x in (q, k, v))
    k, v, added = _extend(module, k, v)
    q, k, v = (x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    masks = _masks(module, key_padding_mask, attn_mask, is_batched, added)
    bias = _additive(masks, q)
    if need_weights or module.dropout > 0:
        scores = (q * (module.head_dim**-0.5)) @ k.transpose(-2, -1)
        # The fused kernel, which torch.nn takes where no weights are wanted, gives zero where all keys are masked.
        softmax = torch.softmax if need_weights else torch._safe_softmax
        weights = softmax(scores if bias is None else scores + bias, -1)
        weights = F.dropout(weights, module.dropout, module.training)
        out = weights @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, bias)
    out = out.transpose(1, 2).flatten(2)
    out = module.out_proj(_with_batch(out, True, swaps) if is_batched else out.squeeze(0))
    if not need_weights:
        return out, None
    weights = weights.mean(1) if average_attn_weights else weights
    return out, weights if is_batched else weights.squeeze(0)


def _project(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    bias = module.in_proj_bias
    weights: list[Tensor]
    if not module._qkv_same_embed_dim:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    elif query is key and key is value:
        return list(F.linear(query, module.in_proj_weight, bias).chunk(3, -1))
    else:
        weights = list(module.in_proj_weight.chunk(3))
    biases = [None] * 3 if bias is None else list(bias.chunk(3))
    return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]


def _with_batch(x: Tensor, is_batched: bool, swaps: bool) -> Tensor:
    if not is_batched:
        return x.unsqueeze(0)
    return x.transpose(0, 1) if swaps else x


def _extend(module: nn.MultiheadAttention, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
    """Append the learned key and value (`add_bias_kv`) and zeros (`add_zero_attn`); return how many were appended."""
    added = 0
    if module.bias_k is not None and module.bias_v is not None:
        k = torch.cat([k, module.bias_k.expand(k.shape[0], 1, -1)], 1)
        v = torch.cat([v, module.bias_v.expand(v.shape[0], 1, -1)], 1)
        added += 1
    if module.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        added += 1
    return k, v, added


def _masks(
    module: nn.MultiheadAttention, padding: Tensor | None, mask: Tensor | None, is_batched: bool, added: int
) -> list[Tensor]:
    """Return the masks that were given, broadcastable to [N, heads, L, S]; appended keys are not masked."""
    masks = []
    if mask is not None:
        masks.append(mask.unflatten(0, (-1, module.num_heads)) if mask.dim() == 3 else mask)
    if padding is not None:
        padding = padding if is_batched else padding.unsqueeze(0)
        masks.append(padding.unsqueeze(1).unsqueeze(1))
    return [F.pad(m, (0, added)) for m in masks] if added else masks


def _additive(masks: list[Tensor], like: Tensor) -> Tensor | None:
    """Return the sum of masks as numbers that are added to scores: minus infinity where a boolean one is set."""
    total = None
    for mask in masks:
        number = mask
        if mask.dtype == torch.bool:
            number = torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
        total = number if total is None else total + number
    return total


EXPANSIONS: dict[type[nn.Module], Callable[..., Any]] = {nn.MultiheadAttention: _attention}


def expansion_of(module: nn.Module) -> Callable[..., Any] | None:
    """Return what computes the same as `module.forward`, None for a module that is no leaf or has its own forward."""
    for kind, expansion in EXPANSIONS.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return expansion
    return None
