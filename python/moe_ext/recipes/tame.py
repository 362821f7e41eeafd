"""TAME: a new expert when the loss jumps (Zhu et al. 2022, "TAME: Task Agnostic Continual Learning using Multiple
Experts", arXiv 2210.03869).

Training sees one task after another and is not told when they change. A batch whose loss lies far above what its expert
is used to marks a new task; it goes to an expert that finds it ordinary, or else to a new one. In use, a selector picks
one expert per token, hard. Experts are pruned by magnitude, so that they stay small. Our reading: "far above" is
``mean + threshold * deviation`` of an exponential moving average of the expert's own losses, after a few batches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import moe_ext
from moe_ext.nn import LinearExperts, TopKRouter, dense_outputs


class TAME(nn.Module):
    """Linear experts over features [num_tokens, hidden_size]; the first ``num_active`` of ``max_experts`` exist yet."""

    loss_mean: Tensor
    loss_variance: Tensor
    num_batches: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_classes: int,
        max_experts: int = 8,
        *,
        threshold: float = 4.0,
        momentum: float = 0.9,
        warmup: int = 5,
    ) -> None:
        super().__init__()
        self.max_experts, self.threshold, self.momentum, self.warmup = max_experts, threshold, momentum, warmup
        self.num_active, self.current = 1, 0
        self.experts = LinearExperts(max_experts, hidden_size, num_classes, bias=True)
        logits = nn.Linear(hidden_size, max_experts)
        self.selector = TopKRouter(hidden_size, max_experts, 1, logits=logits)
        # On the host, where the decisions are made.
        self.loss_mean, self.loss_variance = torch.zeros(max_experts), torch.zeros(max_experts)
        self.num_batches = torch.zeros(max_experts)

    def expert_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """[max_experts]: every expert's cross-entropy on a batch; train on the entry that :meth:`observe` names."""
        logits = dense_outputs(self.experts, hidden, self.max_experts)
        every = targets.expand(self.max_experts, -1)
        return F.cross_entropy(logits.flatten(0, 1), every.flatten(), reduction="none").view(every.shape).mean(1)

    def observe(self, losses: Tensor) -> int:
        """Say which expert a batch with these ``losses`` [max_experts] belongs to. Waits for the device."""
        values = losses.detach().cpu()
        used_to = self.loss_mean + self.threshold * self.loss_variance.sqrt()
        surprised = (self.num_batches >= self.warmup) & (values > used_to)
        if surprised[self.current]:
            at_home = torch.where(surprised, float("inf"), values)[: self.num_active]
            if at_home.isfinite().any():
                self.current = int(at_home.argmin())
            elif self.num_active < self.max_experts:
                self.current, self.num_active = self.num_active, self.num_active + 1
        e, value = self.current, values[self.current]
        rate = 1 - self.momentum if self.num_batches[e] > 0 else 1.0
        change = value - self.loss_mean[e]
        self.loss_mean[e] += rate * change
        self.loss_variance[e] = (1 - rate) * (self.loss_variance[e] + rate * change**2)
        self.num_batches[e] += 1
        return e

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [num_tokens, num_classes] of the expert that the selector picks."""
        active = torch.arange(self.max_experts, device=hidden.device) < self.num_active
        routing = self.selector(hidden, expert_mask=active)
        plan = moe_ext.routing_plan(routing.topk_ids, self.max_experts)
        logits: Tensor = self.experts(hidden, plan, None)
        return logits

    def selector_loss(self, hidden: Tensor, experts: Tensor) -> Tensor:
        """Cross-entropy of the selector on remembered features [n, hidden_size] and their experts [n]."""
        return F.cross_entropy(self.selector.compute_logits(hidden)[:, : self.num_active], experts)

    def prune_expert(self, expert: int, share: float) -> None:
        """Set the ``share`` of smallest weights of one expert to 0 for good; it only grows from call to call."""
        weight = self.experts.weight[expert]
        smallest = weight.detach().abs().flatten().topk(int(share * weight.numel()), largest=False).indices
        mask = torch.ones_like(self.experts.weight)
        mask[expert] = torch.ones_like(weight).flatten().index_fill(0, smallest, 0.0).view_as(weight)
        prune.custom_from_mask(self.experts, "weight", mask)  # type: ignore[no-untyped-call]
