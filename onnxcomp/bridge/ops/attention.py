"""Attention as one operator (opset 23)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from onnxcomp.bridge.ops.base import (
    Handler,
    Kernel,
    UnsupportedNodeError,
    handler,
    only_first_output,
)
from onnxcomp.model import Node


def _attention(node: Node, opset: int) -> Kernel:
    only_first_output(node)
    attrs = node.attrs
    if any(node.inputs[4:]) or attrs.get("softcap", 0.0) or attrs.get("qk_matmul_output_mode"):
        raise UnsupportedNodeError("past keys, soft caps and inner products are not made")
    scale, causal = attrs.get("scale"), bool(attrs.get("is_causal", 0))
    heads = (attrs.get("q_num_heads", 0), attrs.get("kv_num_heads", 0))

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        split = q.dim() == 3
        if split:
            q, k, v = _heads(q, heads[0]), _heads(k, heads[1]), _heads(v, heads[1])
        if mask is not None and causal:
            mask = _with_future_masked(mask, q.shape[2], k.shape[2])
        y = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            is_causal=causal and mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return y.transpose(1, 2).flatten(2) if split else y

    return attention


def _heads(x: Tensor, count: int) -> Tensor:
    """(n, length, heads x size) to (n, heads, length, size)."""
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


def _with_future_masked(mask: Tensor, rows: int, columns: int) -> Tensor:
    past = torch.ones(rows, columns, dtype=torch.bool, device=mask.device).tril()
    if mask.dtype == torch.bool:
        return mask & past
    return mask.masked_fill(~past, float("-inf"))


HANDLERS: Mapping[str, Handler] = {"Attention": handler(_attention)}
