"""The sparsely-gated mixture that the noisy gate comes from (Shazeer et al. 2017, "Outrageously Large Neural Networks:
The Sparsely-Gated Mixture-of-Experts Layer", arXiv 1701.06538).

``H(x)_e = (x W_g)_e + N(0, 1) softplus((x W_n)_e)``, softmax over the top k of H, ReLU experts. Balance loss: 0.1 times
``CV^2`` of importance (the sum of gates) plus ``CV^2`` of the smooth load, which is ``balance_loss`` here.
"""

from __future__ import annotations

from typing import Any

from moe_ext.nn import Experts, MoE, NoisyTopKRouter


class SparselyGatedMoE(MoE):
    """hidden [..., hidden_size] -> MoEOutput; ``generator`` may be given to the call."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_experts: int, topk: int = 4, **options: Any
    ) -> None:
        backend = {"backend": options.get("backend", "kernels")}
        super().__init__(
            NoisyTopKRouter(hidden_size, num_experts, topk, **backend),
            Experts(num_experts, hidden_size, intermediate_size, activation="relu", **backend),
            **options,
        )
