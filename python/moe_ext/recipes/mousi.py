"""MouSi: several visual encoders as experts, all of them on (Fan et al. 2024, "MouSi: Poly-Visual-Expert
Vision-Language Models", arXiv 2401.17221).

Their features are fused without a gate by an MLP whose first layer is each expert's own and whose second is shared:
``MLP2(sum_i MLP1_i(V_i))``. Our reading: MLP1_i is linear and the activation follows the sum, so that all first layers
are one product with the features side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MouSiFusion(nn.Module):
    """Features of ``len(encoder_sizes)`` encoders to visual tokens of a language model of ``hidden_size``."""

    def __init__(self, encoder_sizes: Sequence[int], hidden_size: int) -> None:
        super().__init__()
        self.encoder_sizes = tuple(encoder_sizes)
        self.first = nn.Linear(sum(encoder_sizes), hidden_size)
        self.second = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """One [batch, num_patches, encoder_size] per encoder -> [batch, num_patches, hidden_size]."""
        if (found := tuple(f.shape[-1] for f in features)) != self.encoder_sizes:
            raise ValueError(f"features: expected last sizes {self.encoder_sizes}, got {found}")
        output: Tensor = self.second(F.gelu(self.first(torch.cat(list(features), dim=-1))))
        return output
