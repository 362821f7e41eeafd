"""FactorLLM: an FFN cut into equal parts, a router taught by the whole ("FactorLLM: Factorizing Knowledge via Mixture
of Experts for Large Language Models", arXiv 2408.11855).

Neighbouring neurons make an expert, without any training; the top ``k = E / 2`` are summed with **weight 1** and scaled
by ``E / k``. The router learns only from the prior-approximate loss ``KL(softmax(logits) || softmax(target))``, where
``target`` is 1 for the k experts whose output lies closest to ``k / E`` of the dense FFN's (by mean squared error).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ext.nn import Experts, MoE, TopKRouter, dense_outputs
from moe_ext.nn.transforms import split


class FactorLLM(MoE):
    """Made of a dense FFN (:func:`moe_ext.nn.transforms.dense_mlp`). hidden [..., hidden_size] -> MoEOutput."""

    def __init__(self, dense: Experts, num_experts: int, topk: int | None = None, **options: Any) -> None:
        topk = topk or max(num_experts // 2, 1)
        experts = split(dense, num_experts, method="contiguous")
        experts.backend = backend = options.get("backend", "kernels")
        scale = num_experts / topk
        router = TopKRouter(dense.hidden_size, num_experts, topk, weight_source="ones", scale=scale, backend=backend)
        super().__init__(router.to(dense.down_weight), experts, **options)

    def prior_approximate_loss(self, hidden: Tensor, teacher: Tensor) -> Tensor:
        """Teach the router, and nothing else: every expert runs on every row.

        Args:
            hidden: [num_tokens, hidden_size].
            teacher: [num_tokens, hidden_size], what the dense FFN gives for it.
        """
        topk, num_experts = self.router.topk, self.router.num_experts
        logits = self.router.compute_logits(hidden)
        with torch.no_grad():
            outputs = dense_outputs(self.experts, hidden, num_experts, ops=self.ops)
            errors = (outputs - teacher * (topk / num_experts)).square().mean(-1).T
            target = torch.zeros_like(logits).scatter(1, (-errors).topk(topk).indices, 1.0)
        log_router = torch.log_softmax(logits, dim=-1)
        return (log_router.exp() * (log_router - torch.log_softmax(target, dim=-1))).sum(-1).mean()
