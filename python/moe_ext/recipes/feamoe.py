"""FEAMOE: linear experts under a soft gate, grown when the data drifts (Sharma et al. 2022, "FEAMOE: Fair, Explainable
and Adaptive Mixture of Experts", arXiv 2210.04995).

``y = sum_e g_e(x) (w_e . x + b_e)`` with ``g = softmax(gate(x))``: for each x a linear model, whose Shapley values are
known without sampling, ``phi_j = sum_e g_e(x) w_ej (x_j - E[x_j])``. Our reading: the gate is held at x while features
are left out, and y is the logit of the class. Drift is the caller's to detect; the answer
is a new expert, which starts as a copy of the one that fits best.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moe_ext.nn import LinearExperts, dense_mixture, dense_outputs


class FEAMOE(nn.Module):
    """Binary classifier over features [num_tokens, hidden_size]."""

    def __init__(self, hidden_size: int, num_experts: int = 1) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, num_experts)
        self.experts = LinearExperts(num_experts, hidden_size, 1, bias=True)

    def gates(self, hidden: Tensor) -> Tensor:
        """g [num_tokens, num_experts]."""
        return torch.softmax(self.gate(hidden), dim=-1, dtype=torch.promote_types(hidden.dtype, torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [num_tokens]."""
        return dense_mixture(self.experts, hidden, self.gates(hidden)).squeeze(-1)

    def shapley_values(self, hidden: Tensor, background: Tensor) -> Tensor:
        """[num_tokens, hidden_size]; a row sums to its output minus that of the mean of ``background`` [n, hidden_size]
        under the same gate."""
        weight = self.experts.weight.squeeze(1)
        return (self.gates(hidden).to(hidden.dtype) @ weight) * (hidden - background.mean(0))

    @torch.no_grad()
    def grow(self, source: int) -> FEAMOE:
        """A model with one more expert, a copy of ``source``. The two halve its gate: outputs are what they were."""
        grown = FEAMOE(self.gate.in_features, self.experts.num_experts + 1).to(self.gate.weight)
        ids = torch.arange(grown.experts.num_experts, device=self.gate.weight.device)
        ids[-1] = source
        for new, old in zip(grown.parameters(), self.parameters(), strict=True):
            new.copy_(old[ids])
        grown.gate.bias.sub_((ids == source).to(grown.gate.bias), alpha=math.log(2))
        return grown

    def best_expert(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The expert (scalar int64) that explains targets [num_tokens] best: what a new one starts from."""
        logits = dense_outputs(self.experts, hidden, self.experts.num_experts).squeeze(-1)
        loss = nn.functional.binary_cross_entropy_with_logits(
            logits, targets.to(logits.dtype).expand_as(logits), reduction="none"
        )
        return loss.mean(1).argmin()
