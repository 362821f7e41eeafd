"""MoExtend: a new expert for a new modality in a trained mixture ("MoExtend: Tuning New Experts for Modality and Task
Extension", arXiv 2408.03511).

An expert and its router row are copied, everything old is frozen. The experts are picked by ``p = softmax(logits)`` and
weighted by ``p + MLP(p)``, renormalised; the last layer of the MLP starts at zero. Layers to extend are those whose
routing a trial run shifts most.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_ext.nn import MoE, Routing
from moe_ext.nn.transforms import grow


class MoExtend(MoE):
    """``layer``, with a linear router, and one expert more, a copy of expert ``source``. hidden [..., hidden_size] ->
    MoEOutput. Trainable are the new expert, its router row and the calibration MLP."""

    def __init__(self, layer: MoE, source: int) -> None:
        grown = grow(layer, source)
        super().__init__(
            grown.router,
            grown.experts,
            shared=grown.shared,
            capacity_factor=grown.capacity_factor,
            sequence_level=grown.sequence_level,
            backend=grown.backend,
        )
        self.losses = grown.losses
        num_experts, like = self.router.num_experts, next(self.experts.parameters())
        last = nn.Linear(num_experts, num_experts)
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        self.calibration = nn.Sequential(nn.Linear(num_experts, num_experts), nn.ReLU(), last).to(like)

    def route(self, rows: Tensor, *context: Any, **gating: Any) -> Routing:
        logits = self.router.compute_logits(rows, *context)
        scores = torch.softmax(logits, dim=-1)
        weights = scores + self.calibration(scores.to(rows.dtype))
        return self.router.gate(
            logits, **{"weight_source": "external", "external_weights": weights, "renormalize": True} | gating
        )


def layers_to_extend(before: Tensor, after: Tensor, count: int) -> Tensor:
    """[count] int64: the layers whose share of tokens per expert moved most.

    Args:
        before, after: [num_layers, num_experts], the load in the trained model and after a trial run on the new task.
        count: how many layers.
    """
    shift = after / after.sum(-1, keepdim=True) - before / before.sum(-1, keepdim=True)
    return shift.std(-1).topk(count).indices.sort().values
