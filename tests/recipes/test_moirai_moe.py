"""Moirai-MoE: distances as logits, softmax after the selection."""

from __future__ import annotations

import pytest
import torch
from formulas import all_outputs, assert_same, mixture, rows

from moe_ext.recipes import MoiraiMoE


@pytest.mark.parametrize("nearest", [False, True])
def test_formula(nearest, backend):
    centroids = rows(5, 10, seed=4).detach()
    layer = MoiraiMoE(centroids, 6, nearest=nearest, backend=backend).double()
    hidden = rows(13, 10)
    distances = torch.stack([torch.stack([(x - c).norm() for c in centroids]) for x in hidden])
    best = (-distances if nearest else distances).topk(2)
    weights = torch.zeros_like(distances).scatter(1, best.indices, torch.softmax(best.values, dim=-1))
    expected = mixture(all_outputs(layer.experts, hidden), weights)
    assert_same([layer(hidden).hidden], [expected], [hidden, *layer.parameters()])
    assert "router.logits.centroids" in layer.state_dict() and not list(layer.router.parameters())
