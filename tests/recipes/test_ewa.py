"""EWA: equal random parts in training, the mean of the experts otherwise."""

from __future__ import annotations

import torch
from formulas import all_outputs, assert_same, rows

from compare import relative_error
from moe_ext.recipes import EWA


def test_training_deals_out_equal_parts(backend):
    layer = EWA(10, 6, 4, backend=backend).double()
    hidden = rows(3, 8, 10)
    dealt = torch.randperm(24, generator=torch.Generator().manual_seed(3)) % 4
    assert dealt.bincount().tolist() == [6] * 4
    outputs = all_outputs(layer, hidden.view(24, 10))
    expected = outputs[dealt, torch.arange(24)].view(3, 8, 10)
    output = layer(hidden, torch.Generator().manual_seed(3))
    assert_same([output], [expected], [hidden, *layer.parameters()])
    assert not torch.equal(layer(hidden), layer(hidden))


def test_evaluation_is_the_mean_and_averaging_keeps_it(backend):
    layer = EWA(10, 6, 4, backend=backend).double().eval()
    hidden = rows(3, 8, 10)
    before = layer(hidden)
    spread = (layer.down_weight - layer.down_weight.mean(0)).norm()
    layer.average(0.3)
    assert relative_error(layer(hidden), before) < 1e-12
    after = (layer.down_weight - layer.down_weight.mean(0)).norm()
    assert relative_error(after, abs(1 - 0.3 * 4 / 3) * spread) < 1e-12
    layer.average(0.75)  # 1 - beta E / (E - 1) = 0: every expert is the mean
    assert relative_error(layer.train()(hidden), before) < 1e-12
