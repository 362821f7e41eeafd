"""Several gates over one set of experts: what any gate asks for is computed once, each gate combines it for itself."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

import moe_ext
from moe_ext.nn.soft import ExpertsModule, expert_rows
from moe_ext.plan_types import RoutingPlan


class GateMaps(NamedTuple):
    """Where one gate finds its slots among the rows of the shared plan."""

    permuted_to_slot: Tensor
    """[M] int32: the gate's slot ``t * topk + j`` that each row holds, -1 for rows that only other gates asked for."""
    slot_to_permuted: Tensor
    """[T * topk] int32: the row of each of the gate's slots, -1 if it was dropped."""
    topk: int


class MultiGatePlan(NamedTuple):
    """From :func:`multi_gate_plan`."""

    plan: RoutingPlan
    """Of the union of all gates' ids: one row per pair of token and expert that any gate asked for."""
    gates: tuple[GateMaps, ...]


def multi_gate_plan(topk_ids: Sequence[Tensor], num_experts: int, *, ops: ModuleType = moe_ext) -> MultiGatePlan:
    """Plan for the union of several gates' experts, on the device, without a host sync.

    Args:
        topk_ids: one [num_tokens, topk] int32 or int64 per gate; the gates may differ in topk. An id out of range is
            dropped, as in :func:`moe_ext.routing_plan`; so is a repeated id of one token within one gate, the first
            stays.
        num_experts: E.
        ops: ``moe_ext`` or ``moe_ext.reference``.

    Raises:
        ValueError: no gate, or gates over different numbers of tokens.
    """
    if not topk_ids or any(ids.dim() != 2 or ids.shape[0] != topk_ids[0].shape[0] for ids in topk_ids):
        raise ValueError(
            "topk_ids: expected at least one gate, all [num_tokens, topk] with one num_tokens, "
            f"got {[list(ids.shape) for ids in topk_ids]}"
        )
    num_tokens, device = topk_ids[0].shape[0], topk_ids[0].device
    width = min(sum(ids.shape[1] for ids in topk_ids), num_experts)
    # Column E collects ids out of range.
    columns = [torch.where((ids >= 0) & (ids < num_experts), ids, num_experts).long() for ids in topk_ids]
    asked = torch.zeros(num_tokens, num_experts + 1, dtype=torch.bool, device=device)
    asked = asked.scatter(1, torch.cat(columns, dim=1), True)[:, :num_experts]
    # The asked experts of a token, ascending, packed into `width` slots; column `width` collects the rest.
    place = torch.where(asked, asked.cumsum(1) - 1, width)
    experts = torch.arange(num_experts, dtype=torch.int32, device=device).expand(num_tokens, -1)
    union = torch.full((num_tokens, width + 1), -1, dtype=torch.int32, device=device)
    union = union.scatter(1, place, torch.where(asked, experts, -1))[:, :width].contiguous()
    plan = ops.routing_plan(union, num_experts)

    rows = plan.slot_to_permuted.view(num_tokens, width)
    nowhere = rows.new_full((num_tokens, 1), -1)
    row_of_expert = torch.cat([rows, nowhere], dim=1).gather(1, place)
    row_of_expert = torch.cat([row_of_expert, nowhere], dim=1)
    num_rows = plan.permuted_to_slot.shape[0]
    gates = []
    for column in columns:
        slot_to_permuted = row_of_expert.gather(1, column).view(-1)
        slots = torch.arange(slot_to_permuted.shape[0], dtype=torch.int32, device=device)
        row = torch.where(slot_to_permuted >= 0, slot_to_permuted, num_rows).long()
        none = torch.iinfo(torch.int32).max
        first = slots.new_full((num_rows + 1,), none).scatter_reduce(0, row, slots, "amin")
        slot_to_permuted = torch.where(first[row] == slots, slot_to_permuted, -1)
        permuted_to_slot = torch.where(first == none, -1, first)[:num_rows]
        gates.append(GateMaps(permuted_to_slot, slot_to_permuted, column.shape[1]))
    return MultiGatePlan(plan, tuple(gates))


def multi_gate_combine(
    rows: Tensor, plan: MultiGatePlan, topk_weights: Sequence[Tensor | None], *, ops: ModuleType = moe_ext
) -> list[Tensor]:
    """One weighted sum per gate of expert rows that were computed once.

    Args:
        rows: [M, out_features], the experts' outputs in the order of ``plan.plan``.
        plan: from :func:`multi_gate_plan`.
        topk_weights: one [num_tokens, topk] float32 (float64 for float64 rows) per gate, or None for a plain sum.
        ops: ``moe_ext`` or ``moe_ext.reference``.

    Returns:
        One [num_tokens, out_features] per gate in the dtype of ``rows``, differentiable in ``rows`` and all weights.

    Raises:
        ValueError: not one entry of ``topk_weights`` per gate.
    """
    if len(topk_weights) != len(plan.gates):
        raise ValueError(f"topk_weights: expected one per gate, {len(plan.gates)}, got {len(topk_weights)}")
    return [ops.unpermute(rows, *maps, weights) for maps, weights in zip(plan.gates, topk_weights, strict=True)]


def multi_gate_mixture(
    experts: ExpertsModule,
    hidden: Tensor,
    topk_ids: Sequence[Tensor],
    topk_weights: Sequence[Tensor | None],
    num_experts: int,
    *,
    ops: ModuleType = moe_ext,
) -> list[Tensor]:
    """N gates over one set of experts: each (token, expert) that any gate asks for is one row of one grouped product.

    Args:
        experts: any kind of experts, ``num_experts`` of them.
        hidden: [num_tokens, hidden_size].
        topk_ids, topk_weights: one of each per gate, as in :func:`multi_gate_plan` and :func:`multi_gate_combine`.
        ops: ``moe_ext`` or ``moe_ext.reference``.

    Returns:
        One [num_tokens, out_features] per gate: what N layers of the same experts would give.
    """
    plan = multi_gate_plan(topk_ids, num_experts, ops=ops)
    width = plan.plan.topk_of(hidden.shape[0])
    return multi_gate_combine(expert_rows(experts, hidden, plan.plan, width, ops=ops), plan, topk_weights, ops=ops)
