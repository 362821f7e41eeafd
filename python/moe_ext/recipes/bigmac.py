"""BigMac: descend before the all-to-all, ascend after it ("BigMac: A Communication-Efficient Mixture-of-Experts Model
Structure for Fast Training and Inference", arXiv 2502.16927).

``y = A sum_topk g_e E_e(D x)`` with a shared ``D: hidden -> d'`` before the dispatch and a shared ``A: d' -> hidden``
after the combine: what travels is ``d' / hidden`` of the bytes, and by linearity the result is that of an ascent inside
every expert. Our reading (of the abstract): both projections linear, without bias; softmax, top-k, renormalised.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moe_ext.distributed import Exchange
from moe_ext.nn import ExpertParallelMoE, Experts, MoE, ProjectedExperts, TopKRouter


class BigMac(MoE):
    """The router looks at hidden rows, experts run in the width ``bottleneck_size``. hidden [..., hidden_size] ->
    MoEOutput."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        topk: int,
        *,
        bottleneck_size: int,
        **options: Any,
    ) -> None:
        ops = {"backend": options.get("backend", "kernels")}
        experts = ProjectedExperts(
            nn.Linear(hidden_size, bottleneck_size, bias=False),
            Experts(num_experts, bottleneck_size, intermediate_size, **ops),
            nn.Linear(bottleneck_size, hidden_size, bias=False),
        )
        super().__init__(TopKRouter(hidden_size, num_experts, topk, renormalize=True, **ops), experts, **options)

    @staticmethod
    def over_ranks(
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        topk: int,
        exchange: Exchange,
        *,
        bottleneck_size: int,
        **options: Any,
    ) -> ExpertParallelMoE:
        """The same layer with its experts spread over ranks: rows travel in the width ``bottleneck_size``."""
        return ExpertParallelMoE(
            hidden_size,
            intermediate_size,
            num_experts,
            topk,
            exchange,
            bottleneck_size=bottleneck_size,
            router={"renormalize": True},
            **options,
        )
