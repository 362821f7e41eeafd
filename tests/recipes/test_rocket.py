"""Rocket: the formula over trained adapters, and which of them are chosen."""

from __future__ import annotations

import pytest
import torch
from formulas import assert_same, keep_topk, mixture, rows
from lora_formulas import adapters, learning, linear, trained_experts

from moe_ext.recipes import Rocket, select_experts


def test_formula(backend):
    base, experts = linear(10, 7), trained_experts(5, 10, 7)
    layer = Rocket(base, experts, backend=backend)
    hidden = rows(13, 10)
    weights = keep_topk(torch.softmax(hidden @ layer.router.logits.weight.T, dim=-1), 2, renormalize=True)
    expected = base(hidden) + mixture(adapters(experts, hidden), weights)
    assert_same([layer(hidden).hidden], [expected], [hidden, *learning(layer)])


def test_selection():
    """Model 4 is the best, 1 its twin, 2 points elsewhere; 0 points elsewhere still but is no candidate."""
    directions = torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.1, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    perplexity = torch.tensor([9.0, 2.0, 4.0, 3.0, 1.0])
    assert select_experts(perplexity, directions, 2, num_candidates=4) == [2, 4]
    assert select_experts(perplexity, directions, 2, num_candidates=3) == [3, 4]
    assert select_experts(perplexity, directions, 3, num_candidates=5) == [0, 2, 4]
    assert select_experts(perplexity, directions, 1) == [4]
    with pytest.raises(ValueError, match="num_experts: expected 1 to 2, the number of candidates, got 3"):
        select_experts(perplexity, directions, 3, num_candidates=2)
