"""PHATGOOSE: routing among adapters that were trained apart ("Learning to Route Among Specialized Experts for Zero-Shot
Generalization", arXiv 2402.05859).

Every expert brings a gate vector v_e of each linear map. ``score_e = LN(x) . LN(v_e) / sqrt(d)`` (LN without learned
parameters: mean 0, variance 1), softmax over all experts, then the top two, renormalised with eps 1e-6. A gate is
trained alone, after its adapter and with everything else frozen, as ``W x + sigmoid(v . x) B A x`` from v = 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_ext.nn import LoRAExperts, LoRALinear


class GateVectorLogits(nn.Module):
    """Standardised rows against standardised ``vectors`` [num_experts, in_features]."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors.detach())

    def forward(self, hidden: Tensor) -> Tensor:
        size = hidden.shape[-1:]
        return F.linear(F.layer_norm(hidden, size), F.layer_norm(self.vectors, size)) / math.sqrt(size[0])


class PHATGOOSE(LoRALinear):
    """One linear map over trained adapters and gate vectors. hidden [..., in_features] -> MoEOutput."""

    def __init__(
        self, base: nn.Linear, experts: LoRAExperts, gate_vectors: Tensor, topk: int = 2, **options: Any
    ) -> None:
        gating = {"renormalize": True, "renormalize_eps": 1e-6}
        super().__init__(base, experts, topk, logits=GateVectorLogits(gate_vectors), gating=gating, **options)


class PHATGOOSEGate(nn.Module):
    """What trains the gate vector ``vector`` [in_features] of one adapter, given as experts of which there is one."""

    def __init__(self, base: nn.Linear, adapter: LoRAExperts) -> None:
        super().__init__()
        if adapter.num_experts != 1:
            raise ValueError(f"adapter: expected one expert, got {adapter.num_experts}")
        self.base, self.adapter = base.requires_grad_(False), adapter.requires_grad_(False)
        self.vector = nn.Parameter(torch.zeros_like(base.weight[0]))

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        output: Tensor = self.base(rows) + self.adapter.soft(rows, torch.sigmoid(rows @ self.vector)[:, None])
        return output.view(*hidden.shape[:-1], -1)
