"""PHATGOOSE: the formula, rows of any scale, a planted expert, and the training of a gate."""

from __future__ import annotations

import pytest
import torch
from formulas import assert_same, mixture, rows
from lora_formulas import adapter, adapters, learning, linear, trained_experts

from compare import relative_error
from moe_ext.recipes import PHATGOOSE, PHATGOOSEGate


def standard(x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def make_layer(backend: str = "kernels") -> PHATGOOSE:
    return PHATGOOSE(linear(10, 7), trained_experts(5, 10, 7), rows(5, 10, seed=8), backend=backend)


def test_formula(backend):
    layer = make_layer(backend)
    hidden = rows(13, 10)
    scores = torch.softmax(standard(hidden) @ standard(layer.router.logits.vectors).T / 10**0.5, dim=-1)
    best = scores.topk(2)
    values = best.values / (best.values.sum(-1, keepdim=True) + 1e-6)
    weights = torch.zeros_like(scores).scatter(-1, best.indices, values)
    expected = layer.shared(hidden) + mixture(adapters(layer.experts, hidden), weights)
    assert_same([layer(hidden).hidden], [expected], [hidden, *learning(layer)])


def test_scale_of_rows_and_vectors_does_not_matter():
    layer = make_layer()
    hidden = 100 * rows(13, 10)
    before = layer.router(hidden)
    with torch.no_grad():
        layer.router.logits.vectors.mul_(50.0)
    after = layer.router(40 * hidden + 3)
    assert torch.equal(before.topk_ids, after.topk_ids)
    assert relative_error(after.topk_weights, before.topk_weights) < 1e-4


def test_planted_expert_wins():
    layer = make_layer()
    hidden = rows(13, 10)
    with torch.no_grad():
        layer.router.logits.vectors[3] = hidden[4]
    assert layer.router(hidden).topk_ids[4, 0] == 3


def test_gate_training():
    base, experts = linear(10, 7), trained_experts(1, 10, 7)
    gate = PHATGOOSEGate(base, experts)
    hidden = rows(13, 10)
    assert relative_error(gate(hidden), base(hidden) + 0.5 * adapter(experts, 0, hidden)) < 1e-12
    with torch.no_grad():
        gate.vector.copy_(rows(10, seed=9))
    expected = base(hidden) + torch.sigmoid(hidden @ gate.vector)[:, None] * adapter(experts, 0, hidden)
    assert learning(gate)[0] is gate.vector and len(learning(gate)) == 1
    assert_same([gate(hidden)], [expected], [hidden, gate.vector])
    with pytest.raises(ValueError, match="adapter: expected one expert, got 5"):
        PHATGOOSEGate(base, trained_experts(5, 10, 7))
