"""permute and unpermute, against index_select and index_add in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

import moe_ext

from .case import Case, Cases, Context
from .shapes import DEEPSEEK_V3, OLMOE, TINY_LAYERS, LayerShape

OPS = ("permute", "unpermute", "unpermute_backward")
TABLES = ("C",)


def cases(context: Context) -> Cases:
    shapes = {
        "gpu": [DEEPSEEK_V3.with_tokens(4096), OLMOE.with_tokens(8192)],
        "cpu": [OLMOE.with_tokens(1024)],
        "quick": TINY_LAYERS,
    }
    for shape in shapes[context.profile]:
        for dtype in context.dtypes:
            yield from context.attempt(f"permutation of {shape.name}", row_cases(context, shape, dtype))


def row_cases(context: Context, shape: LayerShape, dtype: torch.dtype) -> Cases:
    ids = context.topk_ids(shape, "uniform")
    plan = moe_ext.routing_plan(ids, shape.num_experts)
    maps, topk = (plan.permuted_to_slot, plan.slot_to_permuted), shape.topk
    tokens = plan.permuted_to_slot.long() // topk
    hidden = context.rows(shape.num_tokens, shape.hidden_size, dtype=dtype)
    rows = context.rows(ids.numel(), shape.hidden_size, dtype=dtype, seed=1)
    weights = torch.softmax(context.rows(shape.num_tokens, topk, dtype=torch.float32, seed=2), dim=-1)
    row_weights = weights.flatten()[plan.permuted_to_slot.long()]
    row_bytes = shape.hidden_size * hidden.element_size()
    copied = torch.empty(ids.numel() + shape.num_tokens, shape.hidden_size // 2, dtype=dtype, device=context.device)
    copy = {"copy of equal bytes": lambda: copied.copy_(torch.empty_like(copied))}
    bytes_moved = float(row_bytes * (ids.numel() + shape.num_tokens))

    def index_add(x: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros(shape.num_tokens, shape.hidden_size, dtype=torch.float32, device=context.device)
        return out.index_add_(0, tokens, x.float() * w[:, None]).to(dtype)

    def make(op: str, direction: str, ours, peers, amount: float, ceilings=None) -> Case:
        return Case(op, "C", f"{shape.name} T={shape.num_tokens}", dtype, "uniform", direction, ours, peers,
                    ceilings or {}, bytes=amount)  # fmt: skip

    yield make("permute", "forward", lambda: moe_ext.permute(hidden, *maps, topk),
               {"index_select": lambda: hidden.index_select(0, tokens)}, bytes_moved, copy)  # fmt: skip
    yield make("unpermute", "forward", lambda: moe_ext.unpermute(rows, *maps, topk, weights),
               {"index_add": lambda: index_add(rows, row_weights)}, bytes_moved, copy)  # fmt: skip

    leaf, weight_leaf = rows.clone().requires_grad_(), weights.clone().requires_grad_()
    grad = context.rows(shape.num_tokens, shape.hidden_size, dtype=dtype, seed=3)
    slots = plan.permuted_to_slot.long()

    def ours_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(moe_ext.unpermute(leaf, *maps, topk, weight_leaf), (leaf, weight_leaf), grad)

    def peer_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(index_add(leaf, weight_leaf.flatten()[slots]), (leaf, weight_leaf), grad)

    yield make(
        "unpermute_backward",
        "forward+backward",
        ours_backward,
        {"index_add": peer_backward},
        float(row_bytes * (3 * ids.numel() + 2 * shape.num_tokens)),
    )
