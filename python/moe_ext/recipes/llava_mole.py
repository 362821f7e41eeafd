"""LLaVA-MoLE: one hard expert per token ("LLaVA-MoLE: Sparse Mixture of LoRA Experts for Mitigating Data Conflicts in
Instruction Finetuning MLLMs", arXiv 2401.16160).

``W x + B_e A_e x`` with e the argmax of the router: the update is **not** scaled by the router's score, so the task
loss gives the router no gradient and it learns from Switch's balance loss alone. Our reading: a router at each linear
map of the MLPs.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moe_ext.nn import LoRAExperts, LoRALinear


class LLaVAMoLE(LoRALinear):
    """One linear map. hidden [..., in_features] -> MoEOutput of [..., out_features]."""

    def __init__(
        self, base: nn.Linear, num_experts: int = 3, *, rank: int = 32, alpha: float = 64.0, **options: Any
    ) -> None:
        experts = LoRAExperts(num_experts, base.in_features, base.out_features, rank, alpha=alpha)
        super().__init__(base, experts, 1, gating={"weight_source": "ones"}, **options)
