"""Rocket: experts chosen from open models with a few examples ("Leveraging Open Knowledge for Advancing Task Expertise
in Large Language Models", arXiv 2408.15915).

``W x + sum_j g_j B_j A_j x`` at every linear map, g the softmax of the picked two, renormalised; the experts start from
published adapters of other tasks. Which: of the candidates that reason best on K examples of the task (lowest
perplexity), the group whose parameters differ most. Our reading: the best candidate is always in it, and "differ" is
the least sum of cosines over its pairs.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_ext.nn import LoRAExperts, LoRALinear


class Rocket(LoRALinear):
    """One linear map over trained adapters. hidden [..., in_features] -> MoEOutput of [..., out_features]."""

    def __init__(self, base: nn.Linear, experts: LoRAExperts, topk: int = 2, **options: Any) -> None:
        super().__init__(base, experts, topk, gating={"renormalize": True}, **options)


def select_experts(
    perplexity: Tensor, parameters: Tensor, num_experts: int, *, num_candidates: int | None = None
) -> list[int]:
    """Which adapters become experts, ascending.

    Args:
        perplexity: [num_models], of each adapter on the K examples; ties to the earlier one.
        parameters: [num_models, any], of each adapter.
        num_experts: how many to choose.
        num_candidates: how many of the lowest perplexity come into question; None for twice ``num_experts``. All groups
            of them are tried.
    """
    num_models = perplexity.shape[0]
    wanted = min(num_models, 2 * num_experts if num_candidates is None else num_candidates)
    if not 1 <= num_experts <= wanted:
        raise ValueError(f"num_experts: expected 1 to {wanted}, the number of candidates, got {num_experts}")
    best, *others = torch.sort(perplexity, stable=True).indices[:wanted].tolist()
    unit = F.normalize(parameters.flatten(1).to(torch.float64), dim=1)
    cosine = unit @ unit.T
    groups = torch.tensor([(best, *rest) for rest in combinations(others, num_experts - 1)])
    # The diagonal adds the same to every group.
    alike = cosine[groups[:, :, None], groups[:, None]].sum((1, 2))
    chosen: list[int] = groups[alike.argmin()].sort().values.tolist()
    return chosen
