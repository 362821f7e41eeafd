"""Test inputs, made in one place: shared by the CPU tests and the GPU tests; routings are those of the benchmark."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.routing import ROUTINGS, make_topk_ids

__all__ = ["DTYPES", "ROUTINGS", "SHAPES", "make_rows", "make_topk_ids", "make_topk_weights", "non_contiguous"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# (num_tokens, hidden_size, intermediate_size, num_experts, topk): odd sizes, one expert, E not a power of two, no tokens.
SHAPES = [
    (0, 16, 8, 4, 2),
    (1, 8, 16, 1, 1),
    (5, 24, 40, 3, 3),
    (33, 17, 13, 7, 2),
    (64, 64, 32, 48, 8),
]


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
