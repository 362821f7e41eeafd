"""Dense ("soft") routing, and the outputs of experts before they are combined."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

import moe_ext
from moe_ext.plan_types import RoutingPlan

ExpertsModule = Callable[[Tensor, RoutingPlan, Tensor | None], Tensor]
"""Called with rows, plan and weights: :class:`moe_ext.nn.Experts` and every other kind."""


def dense_plan(num_tokens: int, num_experts: int, *, device: torch.device | str) -> RoutingPlan:
    """The plan of ids ``0 .. num_experts - 1`` for every token, known without ids and without a sort.

    Row ``e * num_tokens + t`` is token t at expert e, so that rows in expert order are ``view(num_experts, num_tokens,
    ...)``. Everything that takes a :func:`moe_ext.routing_plan` takes it, with ``topk = num_experts``.
    """
    if num_tokens < 0 or num_experts < 1:
        raise ValueError(f"num_tokens, num_experts: expected >= 0 and >= 1, got {num_tokens} and {num_experts}")
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=device)
    experts = torch.arange(num_experts, dtype=torch.int32, device=device)
    return RoutingPlan(
        expert_offsets=torch.arange(num_experts + 1, dtype=torch.int32, device=device) * num_tokens,
        tokens_per_expert=torch.full_like(experts, num_tokens),
        permuted_to_slot=(tokens * num_experts + experts[:, None]).reshape(-1),
        slot_to_permuted=(experts * num_tokens + tokens[:, None]).reshape(-1),
    )


def dense_mixture(experts: ExpertsModule, hidden: Tensor, weights: Tensor) -> Tensor:
    """``sum_e weights[t, e] * expert_e(hidden[t])``: one grouped product per projection over all experts.

    Args:
        experts: any kind of experts.
        hidden: [num_tokens, hidden_size].
        weights: [num_tokens, num_experts] float32 (float64 for float64 ``hidden``): any, a softmax or none.

    Returns:
        What ``experts`` returns, differentiable in ``hidden``, ``weights`` and the experts' parameters.

    Raises:
        ValueError: ``weights`` is not [num_tokens, num_experts].
    """
    if weights.dim() != 2 or weights.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"weights: expected [num_tokens, num_experts] with num_tokens = {hidden.shape[0]}, "
            f"got {list(weights.shape)}"
        )
    return experts(hidden, dense_plan(*weights.shape, device=hidden.device), weights)


def dense_outputs(experts: ExpertsModule, hidden: Tensor, num_experts: int, *, ops: ModuleType = moe_ext) -> Tensor:
    """Every expert's own output for every token, for mixtures that do not add them up.

    Args:
        experts: any kind of experts, ``num_experts`` of them.
        hidden: [num_tokens, hidden_size].
        ops: ``moe_ext`` or ``moe_ext.reference``.

    Returns:
        [num_experts, num_tokens, out_features], differentiable in ``hidden`` and the experts' parameters.
    """
    plan = dense_plan(hidden.shape[0], num_experts, device=hidden.device)
    rows = expert_rows(experts, hidden, plan, num_experts, ops=ops)
    return rows.view(num_experts, hidden.shape[0], rows.shape[1])


def expert_rows(
    experts: ExpertsModule, hidden: Tensor, plan: RoutingPlan, topk: int, *, ops: ModuleType = moe_ext
) -> Tensor:
    """What experts of any kind give for each row of a plan, not yet combined.

    The rows are gathered once and run under a plan in which each is a token of its own.

    Args:
        experts: any kind of experts.
        hidden: [num_tokens, hidden_size].
        plan: a :func:`moe_ext.routing_plan` without row alignment.
        topk: slots per token of ``plan``.
        ops: ``moe_ext`` or ``moe_ext.reference``.

    Returns:
        [M, out_features] in the order of ``plan``, zeros in its tail.
    """
    rows = ops.permute(hidden, plan.permuted_to_slot, plan.slot_to_permuted, topk)
    own = torch.arange(rows.shape[0], dtype=torch.int32, device=hidden.device)
    own = torch.where(plan.permuted_to_slot >= 0, own, -1)
    return experts(rows, plan._replace(permuted_to_slot=own, slot_to_permuted=own), None)
