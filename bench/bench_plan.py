"""The routing plan, against a sort in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

import moe_ext

from .case import Case, Cases, Context
from .shapes import OLMOE, QWEN3_30B, TINY_LAYERS

OPS = ("routing_plan",)
TABLES = ("C",)


def sorted_plan(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets and both maps by a stable argsort."""
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(flat.numel(), device=ids.device)
    offsets = torch.cat([flat.new_zeros(1), torch.bincount(flat, minlength=num_experts).cumsum(0)])
    return offsets, order, rows


def cases(context: Context) -> Cases:
    sizes = {
        "gpu": [QWEN3_30B.with_tokens(t) for t in (16, 4096, 32768)],
        "cpu": [OLMOE.with_tokens(t) for t in (16, 4096)],
        "quick": TINY_LAYERS,
    }
    for shape in sizes[context.profile]:
        for routing in ("uniform", "zipf"):
            ids = context.topk_ids(shape, routing)

            def ours(ids: Tensor = ids, num_experts: int = shape.num_experts) -> tuple[Tensor, ...]:
                plan = moe_ext.routing_plan(ids, num_experts)
                return plan.expert_offsets, plan.permuted_to_slot, plan.slot_to_permuted

            def peer(ids: Tensor = ids, num_experts: int = shape.num_experts) -> tuple[Tensor, ...]:
                return sorted_plan(ids, num_experts)

            yield Case("routing_plan", "C", f"{shape.name} T={shape.num_tokens}", torch.float32, routing, "forward",
                       ours, {"torch argsort": peer}, bytes=ids.numel() * 12.0, tolerance=0.0)  # fmt: skip
