"""From expert ids to rows sorted by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ext import _library  # noqa: F401  (the schemas must be loaded first)
from moe_ext.plan_types import RoutingPlan

_ops = torch.ops.moe_ext

NOT_DIFFERENTIABLE = ("moe_ext::routing_plan",)


def routing_plan(
    topk_ids: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop_scores: Tensor | None = None,
    row_alignment: int = 1,
) -> RoutingPlan:
    """Sort slots by expert, stably, on the device, without a host sync.

    Args:
        topk_ids: [num_tokens, topk] int32 or int64. An id outside ``[0, num_experts)`` means "not here": its slot is
            dropped. Ids of one token need not be distinct.
        num_experts: E, at least 1; up to 6000 on CUDA.
        capacity: the most rows an expert may hold; None for no limit (dropless).
        drop_scores: [num_tokens, topk] floating, compared as float32; which slots an expert over capacity keeps: those
            with the highest scores, the earlier slot winning ties, NaN losing to everything. None keeps the earliest
            slots. Only together with ``capacity``.
        row_alignment: each expert that holds a row gets a multiple of this many rows; padding rows hold no slot.

    Returns:
        A :class:`RoutingPlan`. Its number of rows M is ``RoutingPlan.row_bound(...)``, which depends on shapes only;
        rows past ``expert_offsets[E]`` are the tail and hold no slot. Nothing in it is differentiable.

    Raises:
        RuntimeError: an argument has the wrong dtype, number of axes, size, range or device; the message names it.
    """
    if drop_scores is not None:
        drop_scores = drop_scores.detach().float()
    return RoutingPlan(*_ops.routing_plan(topk_ids, num_experts, capacity, drop_scores, row_alignment))


@torch.library.register_fake("moe_ext::routing_plan")
def _routing_plan_fake(
    topk_ids: Tensor, num_experts: int, capacity: int | None, drop_scores: Tensor | None, row_alignment: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens, topk = topk_ids.shape
    num_rows = RoutingPlan.row_bound(num_tokens, topk, num_experts, capacity, row_alignment)

    def make(size: int) -> Tensor:
        return topk_ids.new_empty(size, dtype=torch.int32)

    return make(num_experts + 1), make(num_experts), make(num_rows), make(num_tokens * topk)
