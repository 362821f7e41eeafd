"""The routing plan: the one structure that every op downstream of the gate shares."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
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
        # sym_min is min, but decides nothing where sizes are symbols (torch.compile, torch.export).
        filled = num_slots if capacity is None else cast(int, torch.sym_min(num_slots, num_experts * capacity))
        # Only an expert that holds a row is padded, and by at most row_alignment - 1 rows.
        return filled + cast(int, torch.sym_min(num_experts, filled)) * (row_alignment - 1)

    def topk_of(self, num_tokens: int, topk_weights: Tensor | None = None) -> int:
        """K, from the number of slots; of no tokens at all, that of ``topk_weights``.

        Raises:
            RuntimeError: the plan was made for another number of tokens, or another K.
        """
        num_slots = self.slot_to_permuted.shape[0]
        # Sizes may be symbols while a compiler traces, which a comparison would bind to each other.
        if not torch.compiler.is_compiling():
            if topk_weights is not None and topk_weights.dim() == 2 and topk_weights.shape[0] == num_tokens:
                topk = topk_weights.shape[1]
                if num_tokens * topk != num_slots:
                    expected = f"{num_tokens} tokens with topk {topk}, as input and topk_weights"
                    raise RuntimeError(f"plan: expected a plan of {expected}, got one of {num_slots} slots")
            elif num_slots % max(num_tokens, 1):
                raise RuntimeError(
                    f"plan: expected a plan of {num_tokens} tokens, as input, got one of {num_slots} slots"
                )
        if num_tokens == 0:
            return 1 if topk_weights is None else topk_weights.shape[-1]
        return num_slots // num_tokens

    def topk_ids(self, num_tokens: int, topk_weights: Tensor | None = None) -> Tensor:
        """[T, K] int32: the expert that holds each slot's row, -1 if the slot was dropped; K as in :meth:`topk_of`."""
        expert = torch.searchsorted(self.expert_offsets[1:], self.slot_to_permuted, right=True, out_int32=True)
        expert = torch.where(self.slot_to_permuted >= 0, expert, -1)
        return expert.view(num_tokens, self.topk_of(num_tokens, topk_weights))


class A2APlan(NamedTuple):
    """Which rows go to which rank. T tokens, K = topk, R ranks, L = min(K, R), S = T * L rows at most.

    A slot here is ``t * L + i``: the i-th rank, ascending, that token t goes to.
    """

    send_counts: Tensor
    """[R] int32: rows for each rank, the input splits of ``all_to_all_single``."""
    send_offsets: Tensor
    """[R + 1] int32: rows for rank r are ``send_offsets[r] : send_offsets[r + 1]``, in token order."""
    send_to_slot: Tensor
    """[S] int32: the slot that each send row holds, -1 in the tail."""
    slot_to_send: Tensor
    """[S] int32: the send row of each slot, -1 where the token goes to fewer than L ranks."""
    rank_expert_offsets: Tensor
    """[R + 1] int32: rank r owns experts ``rank_expert_offsets[r] : rank_expert_offsets[r + 1]``."""
    slots_per_token: int
    """L."""
