"""FSMoE: one interface, four routers ("FSMoE: A Flexible and Scalable Training System for Sparse Mixture-of-Experts
Models", arXiv 2501.10714). Its scheduling of communication is not here, only what it schedules.

GShard (arXiv 2006.16668): softmax, top-k, renormalised (without the random second expert). Sigmoid (BASE layers,
arXiv 2103.16716): ``sigmoid(x W)``, top-k. X-MoE (arXiv 2204.09179): softmax of ``cos(P x, e_i) / tau`` with a learned
tau, in a low dimension. Expert choice (arXiv 2202.09368): every expert picks its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_ext.nn import ExpertChoiceRouter, Experts, MoE, Router, TopKRouter

RouterName = Literal["gshard", "sigmoid", "xmoe", "expert_choice"]


class CosineLogits(nn.Module):
    """``cos(P x, e_i) / tau``; the projection has half as many columns as there are experts (X-MoE)."""

    def __init__(self, hidden_size: int, num_experts: int, temperature: float = 0.07) -> None:
        super().__init__()
        size = max(num_experts // 2, 1)
        self.projection = nn.Linear(hidden_size, size, bias=False)
        self.embeddings = nn.Parameter(torch.empty(num_experts, size))
        self.temperature = nn.Parameter(torch.tensor(temperature))
        nn.init.orthogonal_(self.embeddings, gain=0.32)

    def forward(self, hidden: Tensor) -> Tensor:
        directions = F.normalize(self.projection(hidden), dim=-1)
        return directions @ F.normalize(self.embeddings, dim=-1).T / self.temperature


class FSMoE(MoE):
    """A layer behind any of the four routers. hidden [..., hidden_size] -> MoEOutput."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        topk: int,
        *,
        router: RouterName = "gshard",
        capacity_factor: float | None = 1.2,
        **options: Any,
    ) -> None:
        ops = {"backend": options.get("backend", "kernels")}
        sizes = (hidden_size, num_experts, topk)
        makers: dict[str, Callable[[], Router]] = {
            "gshard": lambda: TopKRouter(*sizes, renormalize=True, **ops),
            "sigmoid": lambda: TopKRouter(*sizes, score_function="sigmoid", **ops),
            "xmoe": lambda: TopKRouter(*sizes, logits=CosineLogits(hidden_size, num_experts), **ops),
            "expert_choice": lambda: ExpertChoiceRouter(*sizes, **ops),
        }
        if router not in makers:
            raise ValueError(f"router: expected one of {', '.join(makers)}, got {router!r}")
        experts = Experts(num_experts, hidden_size, intermediate_size, **ops)
        super().__init__(makers[router](), experts, capacity_factor=capacity_factor, **options)
