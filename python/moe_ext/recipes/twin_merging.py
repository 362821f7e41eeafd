"""Twin-Merging: one merged model plus what each task keeps for itself ("Twin-Merging: Dynamic Integration of Modular
Expertise in Model Merging", arXiv 2406.15479).

Shared: ``W* = W_0 + lambda sum_t (W_t - W_0)`` (task arithmetic). Exclusive: ``D_t = W_t - W*``, cut down to its
largest singular values. At run time a router gives every sample weights r and the weight is ``W* + sum_t softmax(r)_t
D_t``: with D in low rank that is a soft mixture of adapters, and no weight is ever put together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_ext.nn import LoRAExperts


class TwinMerging(nn.Module):
    """One linear map of several fine-tunes of one model.

    Args:
        pretrained: where the fine-tunes started; its bias is kept.
        fine_tunes: linear maps of the same sizes, one per task.
        rank: singular values that a task keeps; ``min(in_features, out_features)`` keeps all.
        merge_scale: lambda.

    hidden [batch, ..., in_features] and router logits [batch, num_tasks] -> [batch, ..., out_features].
    """

    def __init__(
        self, pretrained: nn.Linear, fine_tunes: Sequence[nn.Linear], rank: int, *, merge_scale: float = 0.3
    ) -> None:
        super().__init__()
        weights = torch.stack([linear.weight.detach() for linear in fine_tunes])
        merged = pretrained.weight.detach() + merge_scale * (weights - pretrained.weight.detach()).sum(0)
        self.weight = nn.Parameter(merged, requires_grad=False)
        self.bias = pretrained.bias
        self.experts = LoRAExperts.from_deltas(weights - merged, rank).requires_grad_(False)

    def forward(self, hidden: Tensor, router_logits: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        weights = torch.softmax(router_logits, dim=-1)
        weights = weights.repeat_interleave(hidden[0, ..., 0].numel(), dim=0)
        output = nn.functional.linear(rows, self.weight, self.bias) + self.experts.soft(rows, weights)
        return output.view(*hidden.shape[:-1], -1)
