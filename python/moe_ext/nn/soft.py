"""Dense ("soft") routing: every token through every expert, combined by a matrix of weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_ext.plan_types import RoutingPlan


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


def dense_mixture(
    experts: Callable[[Tensor, RoutingPlan, Tensor | None], Tensor], hidden: Tensor, weights: Tensor
) -> Tensor:
    """``sum_e weights[t, e] * expert_e(hidden[t])``: one grouped product per projection over all experts.

    Args:
        experts: :class:`moe_ext.nn.Experts`, or anything that is called as it is.
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
