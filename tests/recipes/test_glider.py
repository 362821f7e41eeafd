"""GLIDER: no global scale is PHATGOOSE, a large one gives every sequence one set of experts; top-p."""

from __future__ import annotations

import torch
from formulas import assert_same, mixture, rows
from lora_formulas import adapters, learning, linear, trained_experts
from torch.nn import functional as F

from moe_ext.recipes import GLIDER, PHATGOOSE


def make_layer(**settings) -> GLIDER:
    return GLIDER(
        linear(10, 7), trained_experts(5, 10, 7), rows(5, 10, seed=8), rows(5, 4, seed=6).detach(), **settings
    )


def probabilities(layer: GLIDER, hidden: torch.Tensor, instructions: torch.Tensor) -> torch.Tensor:
    vectors = layer.router.logits.vectors
    local = F.layer_norm(hidden, (10,)) @ F.layer_norm(vectors, (10,)).T / 10**0.5
    cosine = F.cosine_similarity(instructions[:, None], rows(5, 4, seed=6).detach(), dim=-1)
    return torch.softmax(local + layer.global_scale * cosine[:, None], dim=-1).flatten(0, 1)


def test_formula(backend):
    layer = make_layer(global_scale=3.0, backend=backend)
    hidden, instructions = rows(3, 6, 10), rows(3, 4, seed=9)
    scores = probabilities(layer, hidden, instructions)
    best = scores.topk(2)
    values = best.values / (best.values.sum(-1, keepdim=True) + 1e-6)
    weights = torch.zeros_like(scores).scatter(-1, best.indices, values)
    x = hidden.flatten(0, 1)
    expected = layer.shared(x) + mixture(adapters(layer.experts, x), weights)
    inputs = [hidden, instructions, *learning(layer)]
    assert_same([layer(hidden, instructions).hidden], [expected.view(3, 6, 7)], inputs)


def test_scales():
    hidden, instructions = rows(3, 6, 10), rows(3, 4, seed=9)
    layer = make_layer(global_scale=0.0)
    local = PHATGOOSE(layer.shared, layer.experts, layer.router.logits.vectors)
    assert torch.equal(layer(hidden, instructions).hidden, local(hidden).hidden)
    ids = make_layer(global_scale=1000.0)(hidden, instructions).routing.topk_ids.view(3, 6, 2)
    assert (ids == ids[:, :1]).all() and not torch.equal(ids[0], ids[1])


def test_top_p(backend):
    layer = make_layer(global_scale=3.0, topk=5, top_p=0.8, backend=backend)
    hidden, instructions = rows(3, 6, 10), rows(3, 4, seed=9)
    scores = probabilities(layer, hidden, instructions)
    ordered, order = scores.sort(descending=True)
    kept = ordered.cumsum(-1) - ordered < 0.8
    counts = kept.sum(-1)
    routing = layer(hidden, instructions).routing
    assert counts.min() < counts.max() and torch.equal((routing.topk_ids >= 0).sum(-1), counts)
    values = torch.where(kept, ordered, 0.0)
    values = values / (values.sum(-1, keepdim=True) + 1e-6)
    weights = torch.zeros_like(scores).scatter(-1, order, values)
    x = hidden.flatten(0, 1)
    expected = layer.shared(x) + mixture(adapters(layer.experts, x), weights)
    inputs = [hidden, instructions, *learning(layer)]
    assert_same([layer(hidden, instructions).hidden], [expected.view(3, 6, 7)], inputs)
