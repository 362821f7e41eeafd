"""Post-MoE: language families as experts of the last layers ("Efficiently Democratizing Medical LLMs for 50 Languages
via a Mixture of Language Family Experts", arXiv 2410.10626).

Top-2 of softmax over the experts of seven language families, in the last two layers only. In training the expert of
the token's own family replaces the last slot if it is not among the picked; its weight is gathered from the softmax
like any other. Our reading: the two weights are renormalised.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_ext.nn import Experts, MoE, MoEOutput, TopKRouter
from moe_ext.nn.transforms import select


class PostMoE(MoE):
    """One layer from a dense FFN (:func:`moe_ext.nn.transforms.dense_mlp`), a copy of it per family.

    hidden [..., hidden_size] and ``families`` [...] integers of the same leading dimensions (-1 for unknown) ->
    MoEOutput; ``families`` acts in training only.
    """

    def __init__(self, dense: Experts, num_families: int = 7, topk: int = 2, **options: Any) -> None:
        experts = select(dense, [0] * num_families)
        experts.backend = backend = options.get("backend", "kernels")
        router = TopKRouter(dense.hidden_size, num_families, topk, renormalize=True, backend=backend)
        super().__init__(router.to(experts.down_weight), experts, **options)

    def forward(self, hidden: Tensor, families: Tensor | None = None) -> MoEOutput:
        if families is None or not self.training:
            return super().forward(hidden)
        return super().forward(hidden, forced_ids=families.expand(hidden.shape[:-1]).reshape(-1))
