"""MixLoRA: LoRA experts of whole FFNs over one frozen FFN ("MixLoRA: Enhancing Large Language Models Fine-Tuning with
LoRA-based Mixture of Experts", arXiv 2404.15159).

``sum_j g_j E_j(x)``, g the softmax of the picked two of eight, renormalised; E_e is the model's FFN with an adapter at
each of its projections. Switch's balance loss, times 0.001. The projections of the frozen FFN run once per token, the
one down by linearity: ``Wd sum_j g_j h_j + sum_j g_j B_j A_j h_j``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_ext.nn import LoRAMLPExperts, MoE, TopKRouter


class MixLoRA(MoE):
    """One layer from the three projections of a gated FFN without biases. hidden [..., hidden_size] -> MoEOutput."""

    def __init__(
        self,
        gate: nn.Linear,
        up: nn.Linear,
        down: nn.Linear,
        num_experts: int = 8,
        topk: int = 2,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        activation: str = "swiglu",
        **options: Any,
    ) -> None:
        if any(linear.bias is not None for linear in (gate, up, down)):
            raise ValueError("gate, up, down: expected linear maps without biases")
        ops = {"backend": options.get("backend", "kernels")}
        gate_up = torch.cat([gate.weight, up.weight]).detach()
        experts = LoRAMLPExperts(gate_up, down.weight, num_experts, rank, alpha=alpha, activation=activation, **ops)
        router = TopKRouter(gate.in_features, num_experts, topk, renormalize=True, **ops)
        super().__init__(router.to(gate.weight.device, gate.weight.dtype), experts, **options)
