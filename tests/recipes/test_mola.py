"""MoLA: the formula, the allocation of experts, and a whole model's parameter counts."""

from __future__ import annotations

import pytest
import torch
from formulas import assert_same, keep_topk, mixture, rows, switch_loss
from lora_formulas import adapters, learning, linear, train
from torch import nn

from moe_ext.nn import InPlaceOfMLP
from moe_ext.recipes import MoLA, apply_mola, experts_per_layer

MAPS = ("q", "k", "v", "o", "gate", "up", "down")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in MAPS:
            setattr(self, name, linear(6, 6))

    def forward(self, hidden):
        for name in MAPS:
            hidden = getattr(self, name)(hidden)
        return hidden


def test_formula(backend):
    base = linear(10, 7, bias=True)
    layer = MoLA(base, 5, rank=3, backend=backend)
    train(layer.experts)
    hidden = rows(13, 10)
    scores = torch.softmax(hidden @ layer.router.logits.weight.T, dim=-1)
    weights = keep_topk(scores, 2, renormalize=True)
    expected = base(hidden) + mixture(adapters(layer.experts, hidden), weights)
    output = layer(hidden)
    assert_same(
        [output.hidden, output.balance_loss], [expected, switch_loss(scores, weights, 2)], [hidden, *learning(layer)]
    )
    assert base.weight.grad is None and not base.bias.requires_grad


def test_allocation():
    counts = experts_per_layer(32)
    assert sum(counts) == 160 == sum(experts_per_layer(32, (5, 5, 5, 5)))
    assert counts[:8] == [2] * 8 and counts[8:16] == [4] * 8 and counts[-8:] == [8] * 8
    with pytest.raises(ValueError, match="num_layers: expected a positive multiple of 4, got 30"):
        experts_per_layer(30)


def test_parameters_of_a_model():
    """Seven maps a block; every expert has A and B of rank 2, every map a router row per expert."""
    layers = nn.ModuleList(Block() for _ in range(4))
    model = nn.ModuleDict({"layers": layers})
    hidden = rows(9, 6)
    expected = [block(hidden) for block in layers]
    made = apply_mola(model, [f"layers.*.{name}" for name in MAPS], rank=2)
    assert len(made) == 28 and all(isinstance(layers[0].get_submodule(name), InPlaceOfMLP) for name in MAPS)
    assert [layer.experts.num_experts for layer in made[:4]] == [2, 4, 6, 8]
    per_expert = 2 * (6 + 6) + 6
    assert sum(p.numel() for p in learning(model)) == len(MAPS) * (2 + 4 + 6 + 8) * per_expert
    for block, before in zip(layers, expected, strict=True):
        torch.testing.assert_close(block(hidden), before, rtol=1e-12, atol=1e-12)
        assert block.down.output.balance_loss > 0
