"""MDCS: classifier heads for the many, the medium and the few (Zhao et al. 2023, "MDCS: More Diverse Experts with
Consistency Self-distillation for Long-tailed Recognition", arXiv 2308.09922).

There is no gate: the prediction is the mean of the heads. What makes them differ is the loss, the cross-entropy of head
e with logits shifted by ``lambda_e * log(class counts)``, lambda = (-0.5, 1, 2.5) in the authors' code. Consistency: a
head's softmax on one view of a sample teaches the same head on another view, where the first view is classified
correctly. The trunk below the heads is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_ext.nn import LinearExperts, dense_mixture, dense_outputs


class MDCS(nn.Module):
    """Heads over features [num_tokens, hidden_size]; ``class_counts`` [num_classes] of the training data."""

    log_prior: Tensor
    strengths: Tensor

    def __init__(
        self, hidden_size: int, class_counts: Tensor, *, strengths: Sequence[float] = (-0.5, 1.0, 2.5)
    ) -> None:
        super().__init__()
        self.num_experts = len(strengths)
        self.heads = LinearExperts(self.num_experts, hidden_size, class_counts.numel(), bias=True)
        self.register_buffer("log_prior", class_counts.double().log())
        self.register_buffer("strengths", torch.tensor(strengths))

    def forward(self, hidden: Tensor) -> Tensor:
        """The mean of the heads, [num_tokens, num_classes]."""
        uniform = hidden.new_full((hidden.shape[0], self.num_experts), 1 / self.num_experts)
        return dense_mixture(self.heads, hidden, uniform.to(torch.promote_types(hidden.dtype, torch.float32)))

    def losses(self, hidden: Tensor, other_view: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Diversity (cross-entropy of both views, summed over heads) and consistency (the caller weighs it with 0.6).

        hidden and other_view [num_tokens, hidden_size] are two views of one batch, targets [num_tokens].
        """
        shift = (self.strengths[:, None] * self.log_prior).to(hidden.dtype)[:, None]
        logits = dense_outputs(self.heads, torch.cat([hidden, other_view]), self.num_experts) + shift
        log_p = torch.log_softmax(logits, dim=-1)
        every = targets.repeat(2).expand(self.num_experts, -1)
        diversity = F.nll_loss(log_p.flatten(0, 1), every.flatten()) * self.num_experts
        teacher, student = log_p.chunk(2, dim=1)
        teacher = teacher.detach()
        correct = (teacher.argmax(-1) == targets).to(log_p.dtype)
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        consistency = ((divergence * correct).sum(1) / correct.sum(1).clamp(min=1)).sum()
        return diversity, consistency
