"""Reference twins of the permutation family."""

from __future__ import annotations

import torch
from torch import Tensor


def permute(input: Tensor, permuted_to_slot: Tensor, slot_to_permuted: Tensor, topk: int) -> Tensor:
    """See :func:`moe_ext.permute`."""
    held = permuted_to_slot >= 0
    rows = input[torch.where(held, permuted_to_slot, 0).long() // topk]
    return torch.where(held[:, None], rows, torch.zeros_like(rows))


def unpermute(
    input: Tensor,
    permuted_to_slot: Tensor,
    slot_to_permuted: Tensor,
    topk: int,
    topk_weights: Tensor | None = None,
) -> Tensor:
    """See :func:`moe_ext.unpermute`."""
    accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
    held = slot_to_permuted >= 0
    rows = input.new_zeros(slot_to_permuted.numel(), input.shape[1], dtype=accumulate)
    rows = rows.index_put((held,), input[slot_to_permuted[held].long()].to(accumulate))
    rows = rows.view(-1, topk, input.shape[1])
    if topk_weights is not None:
        rows = rows * topk_weights[..., None]
    return rows.sum(1).to(input.dtype)
