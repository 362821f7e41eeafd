"""SMoRA: every rank of one LoRA adapter is an expert ("Each Rank Could be an Expert: Single-Ranked Mixture of Experts
LoRA for Multi-task Learning", arXiv 2501.15103).

``W x + s B diag(g(x)) A x`` where g keeps the top 8 of 64 ranks. Balanced without a loss: a bias moves the selection
(:func:`moe_ext.nn.update_selection_bias`). Our reading: g is the softmax over all ranks, not renormalised; ``gating``
takes any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_ext.nn import MoE, RankOneExperts, Routing, TopKRouter


class SMoRA(MoE):
    """One linear map. hidden [..., in_features] -> MoEOutput of [..., out_features]."""

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 64,
        topk: int = 8,
        *,
        alpha: float | None = None,
        gating: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        ops = {"backend": options.get("backend", "kernels")}
        router = TopKRouter(base.in_features, rank, topk, selection_bias=True, **ops, **(gating or {}))
        experts = RankOneExperts(rank, base.in_features, base.out_features, alpha=alpha, **ops)
        parts = [module.to(base.weight.device, base.weight.dtype) for module in (router, experts)]
        super().__init__(*parts, shared=base.requires_grad_(False), **options)  # type: ignore[arg-type]

    def run_experts(self, rows: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """No plan: tokens read their ranks where they lie."""
        output: Tensor = self.experts(rows, routing.topk_ids, routing.topk_weights)
        return output, torch.zeros((), dtype=torch.int64, device=rows.device)
