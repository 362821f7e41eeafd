"""MENTOR: a mixture as the trunk of a visual policy ("MENTOR: Mixture-of-Experts Network with Task-Oriented
Perturbation for Visual Reinforcement Learning", arXiv 2410.14972).

A ReLU MLP gives the logits, softmax, the top 4 of 32 experts are renormalised; experts are ReLU MLPs, of which only the
picked ones run. Our reading of the loss: the variance of the load ``mean_t p_te`` over the experts, plus the mean
entropy of a token's p: experts used evenly, each choice clear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_ext.nn import Experts, MoE, TopKRouter


class MENTOR(MoE):
    """hidden [..., hidden_size] -> MoEOutput."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int = 32,
        topk: int = 4,
        *,
        gate_size: int = 128,
        **options: Any,
    ) -> None:
        ops = {"backend": options.get("backend", "kernels")}
        logits = nn.Sequential(nn.Linear(hidden_size, gate_size), nn.ReLU(), nn.Linear(gate_size, num_experts))
        router = TopKRouter(hidden_size, num_experts, topk, logits=logits, renormalize=True, **ops)
        experts = Experts(num_experts, hidden_size, intermediate_size, activation="relu", bias=True, **ops)
        super().__init__(router, experts, **options)


def mentor_loss(logits: Tensor) -> Tensor:
    """Of ``routing.logits`` [num_tokens, num_experts]: variance of the load plus mean entropy, a scalar."""
    log_scores = torch.log_softmax(logits, dim=-1)
    scores = log_scores.exp()
    return scores.mean(0).var(correction=0) - (scores * log_scores).sum(-1).mean()
