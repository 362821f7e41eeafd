"""Adapters written out in plain torch, for the recipes to be held against."""

from __future__ import annotations

import torch
from formulas import rows
from torch import Tensor, nn

from moe_ext.nn import LoRAExperts


def linear(in_features: int, out_features: int, *, bias: bool = False) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=bias).double()


def train(experts: LoRAExperts, seed: int = 5) -> LoRAExperts:
    """Adapters that are not zero any more."""
    with torch.no_grad():
        experts.lora_b.copy_(rows(*experts.lora_b.shape, seed=seed))
    return experts


def trained_experts(num_experts: int, in_features: int, out_features: int, rank: int = 3) -> LoRAExperts:
    return train(LoRAExperts(num_experts, in_features, out_features, rank).double())


def adapter(experts: LoRAExperts, e: int, x: Tensor) -> Tensor:
    return experts.scaling * (x @ experts.lora_a[e].T) @ experts.lora_b[e]


def adapters(experts: LoRAExperts, x: Tensor) -> Tensor:
    """[num_experts, num_tokens, out_features]"""
    return torch.stack([adapter(experts, e, x) for e in range(experts.num_experts)])


def learning(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]
