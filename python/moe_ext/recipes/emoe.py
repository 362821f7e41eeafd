"""EMoE: the mixture that a dense FFN already is ("Unlocking Emergent Modularity in Large Language Models", arXiv
2310.10908).

The neurons of a trained FFN are divided into experts of equal size by balanced k-means over the directions of their
keys (rows of W1). The gate of an expert is the mean of its keys, so its logit is the mean pre-activation of its
neurons; the top-k experts are summed with **weight 1**, the output bias divided by k: with ``topk = num_experts`` this
is the dense FFN. Our reading: the gate is set once, and trained by the balance loss alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_ext.nn import Experts, MoE, TopKRouter
from moe_ext.nn.transforms import split


class EMoE(MoE):
    """Made of a dense FFN (:func:`moe_ext.nn.transforms.dense_mlp`). hidden [..., hidden_size] -> MoEOutput.

    The task loss gives the gate a gradient of zero: the weights are ones.
    """

    def __init__(
        self, dense: Experts, num_experts: int, topk: int, *, generator: torch.Generator | None = None, **options: Any
    ) -> None:
        experts = split(dense, num_experts, method="balanced_kmeans", bias_divisor=topk, generator=generator)
        experts.backend = backend = options.get("backend", "kernels")
        keys = experts.gate_up_weight.detach()[:, -experts.intermediate_size :]
        gate = nn.Linear(dense.hidden_size, num_experts, bias=False)
        gate.weight = nn.Parameter(keys.mean(1))
        router = TopKRouter(dense.hidden_size, num_experts, topk, logits=gate, weight_source="ones", backend=backend)
        super().__init__(router, experts, **options)
