"""The routing plan: the one structure that every op downstream of the gate shares."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RoutingPlan(NamedTuple):
    """Where each slot's row lies once rows are sorted by expert. T tokens, K = topk, E experts, M rows.

    A slot is ``t * topk + j``: choice j of token t. Rows of one expert keep slot order (the sort is stable).
    """

    expert_offsets: Tensor
    """[E + 1] int32: rows of expert e are ``expert_offsets[e] : expert_offsets[e + 1]``, padding included."""
    tokens_per_expert: Tensor
    """[E] int32: real rows of each expert."""
    permuted_to_slot: Tensor
    """[M] int32: the slot that each row holds, -1 for padding and tail rows."""
    slot_to_permuted: Tensor
    """[T * K] int32: the row of each slot, -1 if the slot was dropped."""

    @staticmethod
    def row_bound(num_tokens: int, topk: int, num_experts: int, capacity: int | None, row_alignment: int) -> int:
        """M: the most rows that any routing can need, known without looking at the ids."""
        num_slots = num_tokens * topk
        filled = num_slots if capacity is None else min(num_slots, num_experts * capacity)
        # Only an expert that holds a row is padded, and by at most row_alignment - 1 rows.
        return filled + min(num_experts, filled) * (row_alignment - 1)

    def topk_of(self, num_tokens: int, topk_weights: Tensor | None = None) -> int:
        """K, from the number of slots; of no tokens at all, that of ``topk_weights``."""
        if num_tokens == 0:
            return 1 if topk_weights is None else topk_weights.shape[-1]
        return self.slot_to_permuted.shape[0] // num_tokens
