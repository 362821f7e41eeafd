"""Reference twin of the lora family."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_experts(input: Tensor, lora_a: Tensor, lora_b: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """See :func:`moe_ext.low_rank_experts`."""
    accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
    held = (topk_ids >= 0) & (topk_ids < lora_a.shape[0])
    ids = torch.where(held, topk_ids, 0).long()
    weights = torch.where(held, topk_weights, torch.zeros_like(topk_weights))
    projection = torch.einsum("th,tkrh->tkr", input.to(accumulate), lora_a[ids].to(accumulate))
    return torch.einsum("tk,tkr,tkro->to", weights, projection, lora_b[ids].to(accumulate)).to(input.dtype)
