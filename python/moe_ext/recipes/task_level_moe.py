"""Task-level MoE: a task picks its experts, not a token (Ye et al. 2022, "Eliciting and Understanding Cross-Task Skills
with Task-Level Mixture-of-Experts", arXiv 2205.12701).

The router reads a representation of the task; in training the choice is a sample, ``argmax(logits + Gumbel)``, with
weight 1 in the forward and the gradient of the softmax at that sample in the backward (straight-through); in use it is
the argmax. Our reading: one choice per sample and layer, experts are MLPs.
"""

from __future__ import annotations

from torch import Generator, Tensor, nn

import moe_ext
from moe_ext.nn import Experts, Routing, TopKRouter, gumbel_noise, straight_through


class TaskLevelMoE(nn.Module):
    """hidden [batch, length, hidden_size] and task [batch, task_size] -> the shape of hidden."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_experts: int, *, task_size: int, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.router = TopKRouter(task_size, num_experts, 1)
        self.experts = Experts(num_experts, hidden_size, intermediate_size, activation="gelu", bias=True)

    def route(self, task: Tensor, generator: Generator | None = None) -> Routing:
        """One expert per sample, weight 1."""
        logits = self.router.compute_logits(task)
        if self.training:
            logits = gumbel_noise(logits, temperature=self.temperature, generator=generator)
        routing = self.router.gate(logits)
        return routing._replace(topk_weights=straight_through(routing.topk_weights, routing.topk_ids))

    def forward(self, hidden: Tensor, task: Tensor, *, generator: Generator | None = None) -> tuple[Tensor, Routing]:
        routing = self.route(task, generator)
        length = hidden.shape[1]
        weights, ids = (x.repeat_interleave(length, dim=0) for x in (routing.topk_weights, routing.topk_ids))
        plan = moe_ext.routing_plan(ids, self.router.num_experts)
        output: Tensor = self.experts(hidden.flatten(0, 1), plan, weights)
        return output.view_as(hidden), routing
