"""LoRAMoE: a dense mixture of adapters, half of them for world knowledge ("LoRAMoE: Alleviate World Knowledge
Forgetting in Large Language Models via MoE-Style Plugin", arXiv 2312.09979).

``W x + sum_e softmax(G x)_e B_e A_e x`` over all experts, which is two wide products. Experts and samples have a type
(world knowledge, task); with ``Q[e, s]`` the weight that sample s gives expert e, and ``I = 1 + delta`` where the types
agree, else ``1 - delta``, the loss is ``var(I Q) / mean(I Q)^2``. It is least where Q goes as ``1 / I``: types part.
Taken literally, as in the authors' code, an expert of a sample's own type then has less weight than the others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_ext.nn import LoRAExperts, cv_squared


class LoRAMoEOutput(NamedTuple):
    """What :class:`LoRAMoE` returns."""

    hidden: Tensor
    """[..., out_features]"""
    weights: Tensor
    """[..., num_experts] float32 (float64 for float64 rows), sums to 1."""


class LoRAMoE(nn.Module):
    """One linear map with all experts at work. hidden [..., in_features] -> :class:`LoRAMoEOutput`."""

    def __init__(self, base: nn.Linear, num_experts: int = 6, *, rank: int = 4, alpha: float = 32.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        device, dtype = base.weight.device, base.weight.dtype
        self.router = nn.Linear(base.in_features, num_experts, bias=False, device=device, dtype=dtype)
        experts = LoRAExperts(num_experts, base.in_features, base.out_features, rank, alpha=alpha)
        self.experts = experts.to(device, dtype)

    def forward(self, hidden: Tensor) -> LoRAMoEOutput:
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = self.router(rows)
        weights = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        output = self.base(rows) + self.experts.soft(rows, weights)
        leading = hidden.shape[:-1]
        return LoRAMoEOutput(output.view(*leading, -1), weights.view(*leading, -1))


def loramoe_loss(weights: Tensor, sample_types: Tensor, expert_types: Tensor, *, delta: float = 0.1) -> Tensor:
    """The localised balance loss of one layer.

    Args:
        weights: [num_samples, tokens per sample, num_experts] of :class:`LoRAMoEOutput`; zero where there is no token.
        sample_types: [num_samples] integers.
        expert_types: [num_experts] integers.
        delta: how far types part, in [0, 1].

    Returns:
        A scalar, the squared coefficient of variation of I Q with the sample variance.
    """
    importance = weights.sum(1)
    agree = sample_types[:, None] == expert_types
    return cv_squared(torch.where(agree, 1 + delta, 1 - delta).to(importance.dtype) * importance)
