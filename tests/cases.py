"""Test inputs, made in one place: shared by the CPU tests, the GPU tests and the benchmark harness."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# How tokens pick experts. "dropped" holds ids outside [0, num_experts), which every op must treat as "not here".
ROUTINGS = ["uniform", "zipf", "one_hot", "half_empty", "dropped"]

# (num_tokens, hidden_size, intermediate_size, num_experts, topk): odd sizes, one expert, E not a power of two, no tokens.
SHAPES = [
    (0, 16, 8, 4, 2),
    (1, 8, 16, 1, 1),
    (5, 24, 40, 3, 3),
    (33, 17, 13, 7, 2),
    (64, 64, 32, 48, 8),
]


def make_topk_ids(
    num_tokens: int,
    num_experts: int,
    topk: int,
    routing: str,
    device: str = "cpu",
    seed: int = 0,
    dtype: torch.dtype = torch.int32,
) -> Tensor:
    """[num_tokens, topk] expert ids; distinct in each row wherever enough experts take part."""
    generator = torch.Generator().manual_seed(seed)
    if routing == "one_hot":
        ids = torch.arange(topk).expand(num_tokens, topk) % num_experts
    else:
        weights = torch.ones(num_experts, dtype=torch.float64)
        if routing == "zipf":
            weights = 1.0 / torch.arange(1, num_experts + 1, dtype=torch.float64)
        elif routing == "half_empty":
            # Every other expert stays empty; at least topk take part, so that rows stay distinct.
            used = max(topk, (num_experts + 1) // 2)
            order = torch.cat([torch.arange(0, num_experts, 2), torch.arange(1, num_experts, 2)])
            weights[order[used:]] = 0.0
        rows = weights.expand(num_tokens, num_experts)
        distinct = topk <= int((weights > 0).sum())
        ids = torch.multinomial(rows, topk, replacement=not distinct, generator=generator)
    if routing == "dropped":
        drop = torch.rand(num_tokens, topk, generator=generator)
        ids = torch.where(drop < 0.15, torch.full_like(ids, -1), ids)
        ids = torch.where(drop > 0.9, torch.full_like(ids, num_experts + 3), ids)
    return ids.to(dtype).to(device)


def make_topk_weights(
    num_tokens: int, topk: int, device: str = "cpu", seed: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[num_tokens, topk] positive weights that sum to one per token."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(num_tokens, topk, generator=generator, dtype=torch.float64) + 0.05
    return (weights / weights.sum(1, keepdim=True)).to(dtype).to(device)


def make_rows(*sizes: int, dtype: torch.dtype, device: str = "cpu", seed: int = 2, scale: float = 1.0) -> Tensor:
    """Normal random numbers, the same on every device; made in float64 and rounded once."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*sizes, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)


def non_contiguous(tensor: Tensor) -> Tensor:
    """The same values behind strides that are not contiguous (every axis of a 0-d tensor is)."""
    wide = tensor.new_empty(*tensor.shape[:-1], 2 * tensor.shape[-1])
    wide[..., ::2] = tensor
    return wide[..., ::2]
