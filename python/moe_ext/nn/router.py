"""The router: one linear map to logits, then :func:`moe_ext.topk_gating`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_ext.nn.backend import Backend, BackendModule
from moe_ext.ops.autocast import without_autocast
from moe_ext.ops.gating import ScoreFunction, ScoreOrder


class TopKRouter(BackendModule):
    """Picks ``topk`` of ``num_experts`` for every token. Logits are computed in fp32, under autocast too.

    Args:
        hidden_size, num_experts, topk: sizes.
        score_function, score_order, num_groups, topk_groups, renormalize, scale: as in :func:`moe_ext.topk_gating`.
        selection_bias: keep a buffer ``selection_bias`` [num_experts] that is added to the scores for the selection
            only; whoever trains moves it (loss-free balancing, DeepSeek-V3).
        backend: ``kernels``, or ``reference`` for the ops in plain torch.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        topk: int,
        *,
        score_function: ScoreFunction = "softmax",
        score_order: ScoreOrder = "score_then_select",
        num_groups: int = 1,
        topk_groups: int = 1,
        renormalize: bool = False,
        scale: float = 1.0,
        selection_bias: bool = False,
        backend: Backend = "kernels",
    ) -> None:
        super().__init__(backend)
        self.topk = topk
        self.score_function: ScoreFunction = score_function
        self.score_order: ScoreOrder = score_order
        self.num_groups, self.topk_groups = num_groups, topk_groups
        self.renormalize, self.scale = renormalize, scale
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.selection_bias: Tensor | None
        self.register_buffer("selection_bias", torch.zeros(num_experts) if selection_bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.selection_bias is not None:
            nn.init.zeros_(self.selection_bias)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [num_tokens, hidden_size] -> topk_weights, topk_ids [num_tokens, topk], logits [num_tokens, E]."""
        precision = torch.promote_types(hidden.dtype, torch.float32)
        with without_autocast(hidden):
            logits = F.linear(hidden.to(precision), self.weight.to(precision))
        bias = None if self.selection_bias is None else self.selection_bias.to(precision)
        weights, ids = self.ops.topk_gating(
            logits,
            self.topk,
            score_function=self.score_function,
            score_order=self.score_order,
            selection_bias=bias,
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
            renormalize=self.renormalize,
            scale=self.scale,
        )
        return weights, ids, logits

    def extra_repr(self) -> str:
        num_experts, hidden_size = self.weight.shape
        return f"hidden_size={hidden_size}, num_experts={num_experts}, topk={self.topk}, {self.score_function}"
