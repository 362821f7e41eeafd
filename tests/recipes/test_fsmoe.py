"""FSMoE: four routers, one layer."""

from __future__ import annotations

import pytest
import torch
from formulas import all_outputs, assert_same, keep_topk, mixture, rows
from torch.nn import functional as F

from moe_ext.recipes import FSMoE


def formula(name: str, layer: FSMoE, x):
    """[num_tokens, num_experts] weights."""
    map = layer.router.logits
    if name == "xmoe":
        directions = F.normalize(x @ map.projection.weight.T, dim=-1)
        logits = directions @ F.normalize(map.embeddings, dim=-1).T / map.temperature
    else:
        logits = x @ map.weight.T
    if name == "sigmoid":
        return keep_topk(torch.sigmoid(logits), 2)
    scores = torch.softmax(logits, dim=-1)
    if name == "expert_choice":
        return keep_topk(scores.T, -(-x.shape[0] * 2 // 8)).T
    return keep_topk(scores, 2, renormalize=name == "gshard")


@pytest.mark.parametrize("name", ["gshard", "sigmoid", "xmoe", "expert_choice"])
def test_formula(name, backend):
    layer = FSMoE(16, 12, 8, 2, router=name, capacity_factor=8.0, backend=backend).double()
    hidden = rows(21, 16)
    expected = mixture(all_outputs(layer.experts, hidden), formula(name, layer, hidden))
    assert_same([layer(hidden).hidden], [expected], [hidden, *layer.parameters()])


def test_capacity_and_unknown_router():
    layer = FSMoE(16, 12, 8, 2)
    layer(rows(64, 16).detach().float())
    assert layer.capacity(64) == 20  # ceil(1.2 * 64 * 2 / 8)
    assert layer.statistics.dropped_slots == (layer.statistics.tokens_per_expert - 20).clamp(min=0).sum()
    with pytest.raises(ValueError, match="router: expected one of gshard, sigmoid, xmoe, expert_choice, got 'x'"):
        FSMoE(16, 12, 8, 2, router="x")
