"""AW-MoE: experts weighted by attention over what a user did (Gong et al. 2023, "Attention Weighted Mixture of Experts
with Contrastive Learning for Personalized Ranking in E-commerce", arXiv 2306.05011).

Every behaviour j of a user has an opinion on the experts, ``u_j = gate_unit(b_j)`` [num_experts], and a weight,
``a_j = activation_unit(b_j, target)``; the gate is ``g = sum_j a_j u_j``, the output ``sum_e g_e expert_e(x)``, dense.
InfoNCE pulls the gate of a user to the gate of the same user with some behaviours masked, away from other users'.
The formulas are our reading of the paper: neither ``a`` nor ``g`` is normalised (as in DIN, whose attention this is),
the activation unit sees behaviour, target and their product, and gates are compared by cosine.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from moe_ext.nn import Experts, dense_mixture


class AWMoE(nn.Module):
    """Features [batch, hidden_size], behaviours [batch, length, behaviour_size], target [batch, behaviour_size].

    ``present`` [batch, length] bool marks behaviours that exist; None for all.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_experts: int, *, behaviour_size: int, unit_size: int = 32
    ) -> None:
        super().__init__()
        self.experts = Experts(num_experts, hidden_size, intermediate_size, activation="relu", bias=True)
        self.gate_unit = nn.Sequential(
            nn.Linear(behaviour_size, unit_size), nn.ReLU(), nn.Linear(unit_size, num_experts)
        )
        self.activation_unit = nn.Sequential(
            nn.Linear(3 * behaviour_size, unit_size), nn.ReLU(), nn.Linear(unit_size, 1)
        )
        self.score = nn.Linear(hidden_size, 1)

    def gate(self, behaviours: Tensor, target: Tensor, present: Tensor | None = None) -> Tensor:
        """[batch, num_experts]; a user without behaviours gets 0."""
        against = target[:, None].expand_as(behaviours)
        attention = self.activation_unit(torch.cat([behaviours, against, behaviours * against], dim=-1))
        if present is not None:
            attention = attention * present[..., None]
        gates: Tensor = (attention * self.gate_unit(behaviours)).sum(1)
        return gates

    def forward(
        self, hidden: Tensor, behaviours: Tensor, target: Tensor, present: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores [batch] and gates [batch, num_experts]."""
        gates = self.gate(behaviours, target, present)
        precision = torch.promote_types(hidden.dtype, torch.float32)
        return self.score(dense_mixture(self.experts, hidden, gates.to(precision))).squeeze(-1), gates


def mask_behaviours(present: Tensor, share: float, *, generator: Generator | None = None) -> Tensor:
    """``present`` [batch, length] with each behaviour dropped with probability ``share``: a user of few."""
    return present & (torch.rand(present.shape, generator=generator, device=present.device) >= share)


def contrastive_loss(gates: Tensor, masked_gates: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE over a batch: row i of ``masked_gates`` [batch, num_experts] is the positive of row i of ``gates``."""
    similarity = F.normalize(gates, dim=-1) @ F.normalize(masked_gates, dim=-1).T
    users = torch.arange(gates.shape[0], device=gates.device)
    return F.cross_entropy(similarity / temperature, users)
