"""Moirai-MoE: experts picked by distance to clusters of a trained model ("Moirai-MoE: Empowering Time Series Foundation
Models with Sparse Mixture of Experts", arXiv 2410.10469).

The logit of an expert is the distance of the token from the expert's centroid, top-2, **softmax after the selection**.
The authors' code picks the largest distances; ``nearest=True`` negates them and picks the smallest. The centroids come
from k-means over the representations of a trained model and stay as they are. SwiGLU experts, here with biases.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_ext.nn import Experts, MoE, TopKRouter


class DistanceLogits(nn.Module):
    """Euclidean distance from each of ``centroids`` [num_experts, hidden_size], or minus that."""

    centroids: Tensor

    def __init__(self, centroids: Tensor, *, nearest: bool) -> None:
        super().__init__()
        self.register_buffer("centroids", centroids)
        self.nearest = nearest

    def forward(self, hidden: Tensor) -> Tensor:
        distances = torch.cdist(hidden, self.centroids)
        return -distances if self.nearest else distances


class MoiraiMoE(MoE):
    """hidden [..., hidden_size] -> MoEOutput; ``centroids`` [num_experts, hidden_size]."""

    def __init__(
        self, centroids: Tensor, intermediate_size: int, topk: int = 2, *, nearest: bool = False, **options: Any
    ) -> None:
        num_experts, hidden_size = centroids.shape
        ops = {"backend": options.get("backend", "kernels")}
        router = TopKRouter(
            hidden_size,
            num_experts,
            topk,
            logits=DistanceLogits(centroids, nearest=nearest),
            score_order="select_then_score",
            **ops,
        )
        super().__init__(router, Experts(num_experts, hidden_size, intermediate_size, bias=True, **ops), **options)
