"""MoE++: experts that cost nothing, and routers that hear the layer before ("MoE++: Accelerating Mixture-of-Experts
Methods with Zero-Computation Experts", arXiv 2410.07348).

``logits_l = W2 tanh(W1 x) + G logits_{l-1}``, softmax, top-2; the weight of the zero expert is set to 0 and the others
are renormalised; the experts see ``topk * x``. Behind the FFN experts stand constant experts ``a1 x + a2 v`` with
``[a1, a2] = softmax(W x)``, a copy expert and a zero expert; tokens that go there take no row of a product and travel
to no rank. ``tau`` divides capacity, ``tau : 1`` for an FFN and another expert, and weighs the balance loss, ``1 :
tau``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_ext.nn import ExpertGroups, Experts, MoE, MoEOutput, Routing, TopKRouter, ZeroComputationExperts


class GatingResidual(nn.Module):
    """``W2 tanh(W1 x) + G logits_{l-1}``, without the second term in the first layer."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.first = nn.Linear(hidden_size, 8 * num_experts, bias=False)
        self.second = nn.Linear(8 * num_experts, num_experts, bias=False)
        self.residual = nn.Linear(num_experts, num_experts, bias=False)

    def forward(self, hidden: Tensor, previous_logits: Tensor | None) -> Tensor:
        logits: Tensor = self.second(torch.tanh(self.first(hidden)))
        return logits if previous_logits is None else logits + self.residual(previous_logits)


class MoEPlusPlus(MoE):
    """``num_experts`` FFN experts and ``zero_computation`` (how many of each kind) behind them.

    hidden [..., hidden_size] and ``routing.logits`` of the layer before, or None -> MoEOutput. ``capacity_factor`` (1.1
    in the paper's training) is gamma: an FFN expert takes at most ``gamma tau topk T / (tau N_ffn + N_rest)`` tokens,
    one of the others ``1 / tau`` times as many.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        topk: int = 2,
        *,
        tau: float = 0.75,
        zero_computation: dict[str, int] | None = None,
        **options: Any,
    ) -> None:
        ops = {"backend": options.get("backend", "kernels")}
        rest = ZeroComputationExperts(hidden_size, **(zero_computation or {}))
        total = num_experts + rest.num_experts
        ids = torch.arange(total, device="cpu")
        router = TopKRouter(
            hidden_size,
            total,
            topk,
            logits=GatingResidual(hidden_size, total),
            renormalize=True,
            zero_weight_experts=ids >= total - rest.num_zero,
            **ops,
        )
        experts = ExpertGroups(
            [Experts(num_experts, hidden_size, intermediate_size, **ops), rest], capacity_shares=[tau, 1.0]
        )
        losses = {"expert_weights": torch.where(ids < num_experts, 1.0, tau), "load": "fraction"}
        super().__init__(router, experts, losses=losses, **options)

    def forward(self, hidden: Tensor, previous_logits: Tensor | None = None) -> MoEOutput:
        return super().forward(hidden, previous_logits)

    def run_experts(self, rows: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        return super().run_experts(rows * self.router.topk, routing)
