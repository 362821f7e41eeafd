"""MixLoRA: the formula expert by expert, and how often the frozen FFN runs."""

from __future__ import annotations

import pytest
import torch
from formulas import assert_same, keep_topk, mixture, rows, switch_loss
from lora_formulas import adapter, learning, linear, train
from torch.nn import functional as F

from moe_ext.recipes import MixLoRA


def make_layer(**options) -> tuple[MixLoRA, list[torch.nn.Linear]]:
    base = [linear(10, 14), linear(10, 14), linear(14, 10)]
    layer = MixLoRA(*base, rank=3, **options)
    for seed, part in enumerate((layer.experts.gate, layer.experts.up, layer.experts.down)):
        train(part, seed)
    return layer, base


def test_formula(backend):
    layer, (gate, up, down) = make_layer(backend=backend)
    hidden = rows(2, 9, 10)
    x = hidden.view(18, 10)
    scores = torch.softmax(x @ layer.router.logits.weight.T, dim=-1)
    weights = keep_topk(scores, 2, renormalize=True)
    parts = layer.experts
    outputs = []
    for e in range(8):
        h = F.silu(gate(x) + adapter(parts.gate, e, x)) * (up(x) + adapter(parts.up, e, x))
        outputs.append(down(h) + adapter(parts.down, e, h))
    expected = [mixture(torch.stack(outputs), weights).view(2, 9, 10), switch_loss(scores, weights, 2)]
    output = layer(hidden)
    assert parts.up.scaling == 32.0 / 3
    assert_same([output.hidden, output.balance_loss], expected, [hidden, *learning(layer)])
    assert len(learning(layer)) == 7  # the router, A and B of three projections


def test_frozen_ffn_runs_once_per_token():
    layer, _ = make_layer()
    with torch.profiler.profile(record_shapes=True) as profile:
        layer(rows(11, 10))
    products = [event.input_shapes[:2] for event in profile.events() if event.name == "aten::mm"]
    # The router's product beside those of gate and up, in one, and of down.
    assert sorted(products) == sorted([[[11, 10], [10, 8]], [[11, 10], [10, 28]], [[11, 14], [14, 10]]])


def test_biases_are_refused():
    with pytest.raises(ValueError, match="gate, up, down: expected linear maps without biases"):
        MixLoRA(linear(10, 14, bias=True), linear(10, 14), linear(14, 10))
