"""SCMoE: the weak model's experts by rank, and the contrast written out."""

from __future__ import annotations

import pytest
import torch
from formulas import all_outputs, assert_same, mixture, rows

from moe_ext.nn import MoELayer
from moe_ext.recipes import random_routing, self_contrast, weak_routing


@pytest.mark.parametrize("renormalize", [True, False])
def test_weak_model_is_one_expert_of_its_rank(renormalize, backend):
    layer = MoELayer(16, 12, 8, 3, router={"renormalize": renormalize}, backend=backend).double()
    hidden = rows(33, 16)
    strong = layer(hidden).hidden
    for rank in (1, 4):
        with weak_routing([layer.router], rank):
            weak = layer(hidden).hidden
        scores = torch.softmax(hidden @ layer.router.logits.weight.T, dim=-1)
        picked = scores.argsort(dim=-1, descending=True)[:, rank : rank + 1]
        value = torch.ones_like(picked, dtype=torch.float64) if renormalize else scores.gather(1, picked)
        weights = torch.zeros_like(scores).scatter(1, picked, value)
        expected = mixture(all_outputs(layer.experts, hidden), weights)
        inputs = [hidden, *layer.experts.parameters()]
        assert_same([weak], [expected], inputs if renormalize else [*inputs, layer.router.logits.weight])
    # Outside, and with the window [0, topk), it is the strong model.
    assert torch.equal(layer(hidden).hidden, strong)
    with weak_routing([layer.router], 0, 3):
        assert torch.equal(layer(hidden).hidden, strong)


@pytest.mark.parametrize("renormalize", [True, False])
def test_weak_model_is_a_random_expert(renormalize, backend):
    layer = MoELayer(16, 12, 8, 3, router={"renormalize": renormalize}, backend=backend).double()
    hidden = rows(200, 16)
    strong = layer(hidden).hidden
    with random_routing([layer.router], torch.Generator().manual_seed(4)):
        output = layer(hidden)
    drawn = torch.randint(8, (200,), generator=torch.Generator().manual_seed(4))
    assert torch.equal(output.topk_ids[:, 0].long(), drawn) and drawn.bincount(minlength=8).min() > 10
    expected = all_outputs(layer.experts, hidden)[drawn, torch.arange(200)]
    assert_same([output.hidden], [expected], [hidden, *layer.experts.parameters()])
    assert torch.equal(layer(hidden).hidden, strong)


def test_an_error_inside_gives_the_strong_model_back():
    layer = MoELayer(16, 12, 8, 3)
    with pytest.raises(ZeroDivisionError), weak_routing([layer.router]):
        assert layer.router.topk == 1
        raise ZeroDivisionError
    assert layer.router.topk == 3 and "first_rank" not in layer.router.gating.options


def test_contrast_by_hand():
    strong, weak = rows(6, 20, seed=1), rows(6, 20, seed=2)
    found = self_contrast(strong, weak)
    probability = torch.softmax(strong, dim=-1)
    plausible = probability >= 0.1 * probability.amax(-1, keepdim=True)
    assert torch.equal(found.isfinite(), plausible) and (~plausible).any() and (plausible.sum(-1) > 1).any()
    assert_same([found[plausible]], [(1.5 * strong - 0.5 * weak)[plausible]], [strong, weak])
    assert torch.equal(self_contrast(strong, weak, beta=0.0).argmax(-1), strong.argmax(-1))
