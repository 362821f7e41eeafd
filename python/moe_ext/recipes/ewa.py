"""EWA: a mixture while training, a plain FFN afterwards ("Experts Weights Averaging: A New General Training Scheme for
Vision Transformers", arXiv 2308.06093).

There is no router: every training step deals the tokens out at random and in equal parts. After each step every
expert moves towards the others, ``w_i <- (1 - beta) w_i + beta / (E - 1) sum_{j != i} w_j``, which keeps their mean and
shrinks their spread by ``|1 - beta E / (E - 1)|``. What is left in the end is the mean of the experts, a dense FFN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ext.nn import Experts
from moe_ext.nn.transforms import share, to_dense


class EWA(Experts):
    """hidden [..., hidden_size] -> the same shape: of one random expert per token in training, of the mean of all
    experts otherwise. Call :meth:`average` after every optimizer step."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_experts: int, *, activation: str = "gelu", **options: Any
    ) -> None:
        super().__init__(num_experts, hidden_size, intermediate_size, activation=activation, bias=True, **options)

    def forward(self, hidden: Tensor, generator: torch.Generator | None = None) -> Tensor:  # type: ignore[override]
        rows = hidden.reshape(-1, self.hidden_size)
        if self.training:
            dealt = torch.randperm(rows.shape[0], generator=generator, device=rows.device) % self.num_experts
            output = super().forward(rows, self.ops.routing_plan(dealt[:, None], self.num_experts))
        else:
            ids = torch.zeros(rows.shape[0], 1, dtype=torch.int32, device=rows.device)
            output = to_dense(self, method="average")(rows, self.ops.routing_plan(ids, 1))
        return output.view(hidden.shape)

    def average(self, beta: float) -> None:
        share(self, beta)
