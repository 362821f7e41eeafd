"""How tokens pick experts, in tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

# "dropped" holds ids outside [0, num_experts), which every op must treat as "not here".
ROUTINGS = ["uniform", "zipf", "one_hot", "half_empty", "dropped"]


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
    if routing not in ROUTINGS:
        raise ValueError(f"routing: expected one of {', '.join(ROUTINGS)}, got {routing!r}")
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
