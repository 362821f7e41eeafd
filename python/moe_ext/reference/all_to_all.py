"""Reference twins of the all_to_all family."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ext.plan_types import A2APlan, RoutingPlan
from moe_ext.reference.permutation import permute, unpermute
from moe_ext.reference.plan import routing_plan


def a2a_plan(topk_ids: Tensor, rank_expert_offsets: Tensor) -> A2APlan:
    """See :func:`moe_ext.a2a_plan`."""
    num_tokens, topk = topk_ids.shape
    num_ranks = rank_expert_offsets.shape[0] - 1
    slots = min(topk, num_ranks)
    first, end = rank_expert_offsets[:-1], rank_expert_offsets[1:]
    goes = ((topk_ids[..., None] >= first) & (topk_ids[..., None] < end)).any(1)  # [T, R]
    send_to_slot = torch.full((num_tokens * slots,), -1, dtype=torch.int32)
    slot_to_send = torch.full((num_tokens * slots,), -1, dtype=torch.int32)
    row = 0
    for rank in range(num_ranks):
        for token in torch.nonzero(goes[:, rank]).flatten().tolist():
            slot = token * slots + int(goes[token, :rank].sum())
            send_to_slot[row], slot_to_send[slot] = slot, row
            row += 1
    counts = goes.sum(0).int()
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0).int()])
    device = topk_ids.device
    return A2APlan(counts, offsets, send_to_slot.to(device), slot_to_send.to(device), rank_expert_offsets, slots)


def a2a_pack(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, plan: A2APlan) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moe_ext.a2a_pack`."""
    rows = torch.arange(plan.send_to_slot.numel(), device=hidden.device)
    held = plan.send_to_slot >= 0
    token = torch.where(held, plan.send_to_slot, 0).long() // plan.slots_per_token
    rank = (torch.bucketize(rows, plan.send_offsets, right=True) - 1).clamp(max=plan.send_counts.numel() - 1)
    first = plan.rank_expert_offsets[rank][:, None]
    end = plan.rank_expert_offsets[rank + 1][:, None]
    ids = topk_ids[token]
    here = held[:, None] & (ids >= first) & (ids < end)
    weights = topk_weights[token]
    return (
        torch.where(held[:, None], hidden[token], torch.zeros_like(hidden[token])),
        torch.where(here, ids - first, -1).int(),
        torch.where(here, weights, torch.zeros_like(weights)),
    )


def a2a_unpack(
    recv_hidden: Tensor, recv_ids: Tensor, num_local_experts: int, *, row_alignment: int = 1
) -> tuple[Tensor, RoutingPlan]:
    """See :func:`moe_ext.a2a_unpack`."""
    plan = routing_plan(recv_ids, num_local_experts, row_alignment=row_alignment)
    return permute(recv_hidden, plan.permuted_to_slot, plan.slot_to_permuted, recv_ids.shape[1]), plan


def a2a_combine(recv_rows: Tensor, plan: A2APlan) -> Tensor:
    """See :func:`moe_ext.a2a_combine`."""
    return unpermute(recv_rows, plan.send_to_slot, plan.slot_to_send, plan.slots_per_token)
