"""CMoE: linear classifiers as experts over a convolutional trunk (Xie et al. 2024, "Unraveling Complex Data Diversity
in Underwater Acoustic Target Recognition through Convolution-based Mixture of Experts", arXiv 2402.11919, checked
against the authors' code).

``y = E_{argmax r(x)}(x)``: the output is not multiplied by the gate, so that the router learns from the balance loss
alone, ``0.01 E sum f_e P_e``; optionally plus a shared head ("residual"). P is the softmax of the routing score here;
their code also has the raw score and the sigmoid in its place.
"""

from __future__ import annotations

from torch import nn

from moe_ext.nn import LinearExperts, MoE, TopKRouter


class CMoE(MoE):
    """Features [num_tokens, hidden_size] to logits of ``num_classes``; multiply ``balance_loss`` with 0.01."""

    def __init__(self, hidden_size: int, num_classes: int, num_experts: int = 4, *, residual: bool = False) -> None:
        logits = nn.Linear(hidden_size, num_experts)
        super().__init__(
            TopKRouter(hidden_size, num_experts, 1, logits=logits, weight_source="ones"),
            LinearExperts(num_experts, hidden_size, num_classes, bias=True),
            shared=nn.Linear(hidden_size, num_classes) if residual else None,
        )
