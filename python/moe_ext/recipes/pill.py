"""PILL: an adapter per modality and gated values ("PILL: Plug Into LLM with Adapter Expert and Attention Gate", arXiv
2311.02126).

A token's modality is known, so the routing is hard and has no weights: ``x + E_m(x)`` with E a narrow gated MLP of its
own for every modality. In attention the values of the added modalities pass a gate that starts closed. Our reading:
``v + tanh(a_m) * v`` with one a per modality and channel, zero at first, so that an untrained model is the model
without modalities.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import moe_ext
from moe_ext.nn import Experts


class PILLAdapters(nn.Module):
    """hidden [..., hidden_size] and ``modalities`` [...] integers -> the shape of hidden, adapters added.

    A modality outside ``[0, num_modalities)``, such as -1 for text, has no adapter.
    """

    def __init__(self, hidden_size: int, bottleneck_size: int, num_modalities: int) -> None:
        super().__init__()
        self.experts = Experts(num_modalities, hidden_size, bottleneck_size, activation="swiglu")
        nn.init.zeros_(self.experts.down_weight)

    def forward(self, hidden: Tensor, modalities: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        ids = modalities.expand(hidden.shape[:-1]).reshape(-1, 1)
        added: Tensor = self.experts(rows, moe_ext.routing_plan(ids, self.experts.num_experts))
        return hidden + added.view_as(hidden)


class PILLValueGate(nn.Module):
    """values [..., width] and ``modalities`` [...] -> gated values; modalities as in :class:`PILLAdapters`."""

    def __init__(self, width: int, num_modalities: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(num_modalities, width))

    def forward(self, values: Tensor, modalities: Tensor) -> Tensor:
        modalities = modalities.expand(values.shape[:-1])
        here = (modalities >= 0) & (modalities < self.gate.shape[0])
        gate = torch.tanh(self.gate)[torch.where(here, modalities, 0).long()]
        return torch.where(here[..., None], values + gate * values, values)
