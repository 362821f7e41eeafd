"""ExpertFlow: serve with few experts in device memory (He et al. 2024, "ExpertFlow: Efficient Mixture-of-Experts
Inference via Predictive Expert Caching and Token Scheduling", arXiv 2410.17954). **A simulation: no weight is moved**;
what is here says what a predictor, a schedule and a cache would do on recorded routes.

A small network says from a token's embedding which experts every layer will pick; it learns from recorded routes, one
binary cross-entropy per expert. Tokens of two batches are regrouped so that each batch needs fewer experts, and their
outputs put back. The cache of experts makes room by what the running batch is predicted to need, and fetches ahead. Our
reading: the predictor is an MLP over one token (the paper's is a small transformer over the sequence).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_ext.distributed.offload_simulation import (
    CacheCounts,
    needed_experts,
    regroup_tokens,
    simulate_expert_cache,
)
from moe_ext.nn import dense_weights


class RoutePredictor(nn.Module):
    """Embeddings [num_tokens, hidden_size] to logits [num_layers, num_tokens, num_experts], before any layer ran."""

    def __init__(self, hidden_size: int, num_layers: int, num_experts: int, topk: int, *, width: int = 128) -> None:
        super().__init__()
        self.num_layers, self.num_experts, self.topk = num_layers, num_experts, topk
        self.net = nn.Sequential(nn.Linear(hidden_size, width), nn.GELU(), nn.Linear(width, num_layers * num_experts))

    def forward(self, embeddings: Tensor) -> Tensor:
        logits: Tensor = self.net(embeddings)
        return logits.view(embeddings.shape[0], self.num_layers, self.num_experts).transpose(0, 1)

    def loss(self, embeddings: Tensor, topk_ids: Tensor) -> Tensor:
        """Binary cross-entropy to the routes topk_ids [num_layers, num_tokens, topk] that were taken."""
        logits = self(embeddings)
        ids = topk_ids.flatten(0, 1)
        taken = dense_weights(logits.new_ones(ids.shape), ids, self.num_experts).view_as(logits)
        return F.binary_cross_entropy_with_logits(logits, taken)

    @torch.no_grad()
    def predict(self, embeddings: Tensor) -> Tensor:
        """Routes [num_layers, num_tokens, topk] int64: the ``topk`` likeliest experts of every layer."""
        routes: Tensor = self(embeddings).topk(self.topk, dim=-1).indices
        return routes


def run_regrouped(run: Callable[[Tensor], Tensor], hidden: Tensor, topk_ids: Tensor, num_experts: int) -> Tensor:
    """``run`` on two batches of like-routed tokens; rows come back in the order of hidden [num_tokens, hidden_size].

    ``topk_ids`` [num_layers, num_tokens, topk] are the routes to group by, predicted or recorded; on the host.
    """
    order = torch.from_numpy(regroup_tokens(topk_ids.cpu().numpy(), num_experts)).to(hidden.device)
    half = -(-len(order) // 2)
    outputs = torch.cat([run(hidden[order[:half]]), run(hidden[order[half:]])])
    return torch.empty_like(outputs).index_copy(0, order, outputs)


def compare_caches(
    topk_ids: Tensor,
    predicted_ids: Tensor,
    num_experts: int,
    *,
    batch_size: int,
    capacity: int,
    prefetch_per_layer: int = 4,
) -> tuple[CacheCounts, CacheCounts]:
    """Hits and misses of the predictive cache, and of one that throws out the expert used longest ago.

    Both hold ``capacity`` experts of all layers together; routes are [num_layers, num_tokens, topk], taken and
    predicted, in batches of ``batch_size`` consecutive tokens.
    """
    needed, predicted = (
        needed_experts(ids.cpu().numpy(), num_experts, batch_size) for ids in (topk_ids, predicted_ids)
    )
    predictive = simulate_expert_cache(
        needed, capacity, "predicted", predicted=predicted, prefetch_per_layer=prefetch_per_layer
    )
    return predictive, simulate_expert_cache(needed, capacity, "lru")
