"""Reference twin of the plan family."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ext.plan_types import RoutingPlan


def routing_plan(
    topk_ids: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop_scores: Tensor | None = None,
    row_alignment: int = 1,
) -> RoutingPlan:
    """See :func:`moe_ext.routing_plan`."""
    num_tokens, topk = topk_ids.shape
    # One copy of each instead of a wait for every expert.
    ids = topk_ids.reshape(-1).long().cpu()
    scores = None if drop_scores is None else drop_scores.reshape(-1).cpu()
    num_rows = RoutingPlan.row_bound(num_tokens, topk, num_experts, capacity, row_alignment)
    groups = []
    for expert in range(num_experts):
        slots = torch.nonzero(ids == expert).flatten()
        if capacity is not None and slots.numel() > capacity:
            if scores is None:
                slots = slots[:capacity]
            else:
                # A stable sort: equal scores keep token order, so the earlier slot wins.
                order = torch.sort(scores[slots], descending=True, stable=True).indices
                slots = slots[order[:capacity]].sort().values
        groups.append(slots)

    offsets = torch.zeros(num_experts + 1, dtype=torch.int32)
    permuted_to_slot = torch.full((num_rows,), -1, dtype=torch.int32)
    slot_to_permuted = torch.full((num_tokens * topk,), -1, dtype=torch.int32)
    for expert, slots in enumerate(groups):
        start, count = int(offsets[expert]), slots.numel()
        rows = torch.arange(start, start + count, dtype=torch.int32)
        permuted_to_slot[start : start + count] = slots.int()
        slot_to_permuted[slots] = rows
        offsets[expert + 1] = start + -(-count // row_alignment) * row_alignment
    counts = torch.tensor([slots.numel() for slots in groups], dtype=torch.int32)
    device = topk_ids.device
    return RoutingPlan(offsets.to(device), counts.to(device), permuted_to_slot.to(device), slot_to_permuted.to(device))
