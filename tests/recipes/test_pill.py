"""PILL: adapters by torch.where, and values that an untrained gate leaves alone."""

from __future__ import annotations

import torch
from formulas import all_outputs, assert_same, rows

from moe_ext.recipes import PILLAdapters, PILLValueGate

MODALITIES = torch.tensor([[0, -1, 1, 1, 0], [2, 0, 7, -1, 1]])


def test_adapters_by_modality():
    layer = PILLAdapters(10, 4, 3).double()
    hidden = rows(2, 5, 10)
    assert torch.equal(layer(hidden, MODALITIES), hidden)
    with torch.no_grad():
        layer.experts.down_weight.copy_(rows(3, 10, 4, seed=5))
    expected = hidden
    for modality, output in enumerate(all_outputs(layer.experts, hidden.view(10, 10))):
        expected = torch.where((modality == MODALITIES)[..., None], hidden + output.view(2, 5, 10), expected)
    assert_same([layer(hidden, MODALITIES)], [expected], [hidden, *layer.parameters()])


def test_value_gate():
    gate = PILLValueGate(6, 3).double()
    values = rows(2, 5, 6)
    assert torch.equal(gate(values, MODALITIES), values)
    with torch.no_grad():
        gate.gate.copy_(rows(3, 6, seed=5))
    expected = values
    for modality in range(3):
        gated = values * (1 + torch.tanh(gate.gate[modality]))
        expected = torch.where((modality == MODALITIES)[..., None], gated, expected)
    assert_same([gate(values, MODALITIES)], [expected], [values, gate.gate])
