"""Reference twins of the all_to_all family."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ext.packed_row import SCALE_BLOCK, PackedRow, Payload
from moe_ext.plan_types import A2APlan, RoutingPlan
from moe_ext.reference.permutation import permute, unpermute
from moe_ext.reference.plan import routing_plan


def a2a_plan(topk_ids: Tensor, rank_expert_offsets: Tensor) -> A2APlan:
    """See :func:`moe_ext.a2a_plan`."""
    num_tokens, topk = topk_ids.shape
    num_ranks = rank_expert_offsets.shape[0] - 1
    slots = min(topk, num_ranks)
    first, end = rank_expert_offsets[:-1], rank_expert_offsets[1:]
    # [T, R], copied once instead of a wait for every token
    goes = ((topk_ids[..., None] >= first) & (topk_ids[..., None] < end)).any(1).cpu()
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
    found = (part.to(device) for part in (counts, offsets, send_to_slot, slot_to_send))
    return A2APlan(*found, rank_expert_offsets, slots)


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


def quantise_blocks(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[S, H] -> e4m3 [S, H] and scales [S, ceil(H / 128)] fp32: largest magnitude / 448, or the smallest normal."""
    width = rows.shape[1]
    padded = torch.nn.functional.pad(rows.float(), (0, -width % SCALE_BLOCK))
    blocks = padded.view(rows.shape[0], padded.shape[1] // SCALE_BLOCK, SCALE_BLOCK)
    scales = (blocks.abs().amax(-1) / 448.0).clamp(min=torch.finfo(torch.float32).tiny)
    return (blocks / scales[..., None]).to(torch.float8_e4m3fn).flatten(1)[:, :width], scales


def a2a_pack_rows(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    plan: A2APlan,
    *,
    payload: Payload = "native",
    copies: int = 1,
) -> Tensor:
    """See :func:`moe_ext.a2a_pack_rows`."""
    router_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    weights = topk_ids.new_zeros(topk_ids.shape, dtype=router_dtype) if topk_weights is None else topk_weights
    rows, ids, weights = a2a_pack(hidden.repeat_interleave(copies, 0), topk_ids, weights, plan)
    layout = PackedRow.of(hidden.shape[1], topk_ids.shape[1], hidden.dtype, payload, topk_weights is not None)
    packed = rows.new_zeros(rows.shape[0], layout.row_bytes, dtype=torch.uint8)

    def place(part: Tensor, at: int) -> None:
        as_bytes = part.contiguous().view(torch.uint8)
        packed[:, at : at + as_bytes.shape[1]] = as_bytes

    if payload == "fp8":
        rows, scales = quantise_blocks(rows)
        place(scales, layout.scales_at)
    place(rows, 0)
    if topk_weights is not None:
        place(weights, layout.weights_at)
    place(ids, layout.ids_at)
    return packed


def a2a_unpack_rows(
    rows: Tensor, hidden_size: int, topk: int, dtype: torch.dtype, *, payload: Payload = "native", weighted: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moe_ext.a2a_unpack_rows`."""
    layout = PackedRow.of(hidden_size, topk, dtype, payload, weighted)

    def take(at: int, count: int, part_dtype: torch.dtype) -> Tensor:
        return rows[:, at : at + count * part_dtype.itemsize].contiguous().view(part_dtype)

    if payload == "fp8":
        scales = take(layout.scales_at, layout.num_scales, torch.float32).repeat_interleave(SCALE_BLOCK, 1)
        hidden = (take(0, hidden_size, torch.float8_e4m3fn).float() * scales[:, :hidden_size]).to(dtype)
    else:
        hidden = take(0, hidden_size, dtype)
    weights = torch.empty(0, topk, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    if layout.weight_dtype is not None:
        weights = take(layout.weights_at, topk, layout.weight_dtype)
    return hidden, take(layout.ids_at, topk, torch.int32), weights.to(rows.device)
