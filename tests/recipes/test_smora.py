"""SMoRA: rank-one experts; all ranks with weight one are plain LoRA."""

from __future__ import annotations

import torch
from formulas import assert_same, keep_topk, rows
from lora_formulas import learning, linear

from moe_ext.nn import update_selection_bias
from moe_ext.recipes import SMoRA


def make_layer(backend: str, **settings) -> SMoRA:
    layer = SMoRA(linear(10, 7, bias=True), 12, alpha=24.0, backend=backend, **settings)
    with torch.no_grad():
        layer.experts.lora_b.copy_(rows(12, 7, seed=5))
    return layer


def test_is_a_mixture_of_rank_one_adapters(backend):
    layer = make_layer(backend, topk=4)
    hidden = rows(3, 5, 10)
    x = hidden.view(15, 10)
    gates = keep_topk(torch.softmax(x @ layer.router.logits.weight.T, dim=-1), 4)
    a, b = layer.experts.lora_a, layer.experts.lora_b
    expected = layer.shared(x) + 2.0 * (x @ a.T * gates) @ b
    assert_same([layer(hidden).hidden], [expected.view(3, 5, 7)], [hidden, *learning(layer)])


def test_all_ranks_with_weight_one_are_lora(backend):
    layer = make_layer(backend, topk=12, gating={"weight_source": "ones"})
    hidden, parts = rows(15, 10), layer.experts
    expected = layer.shared(hidden) + 2.0 * hidden @ parts.lora_a.T @ parts.lora_b
    assert_same([layer(hidden).hidden], [expected], [hidden, parts.lora_a, parts.lora_b])


def test_bias_balances_the_ranks():
    """Tokens that all want the same ranks are spread over all of them by the bias alone."""
    layer = make_layer("kernels", topk=3)
    hidden = (rows(1, 10) + 0.3 * rows(200, 10, seed=4)).detach()
    loads = []
    for _ in range(300):
        layer(hidden)
        loads.append(layer.statistics.tokens_per_expert.double())
        update_selection_bias(layer.router.selection_bias, layer.statistics.tokens_per_expert, rate=2e-3)
    assert loads[0].max() > 2 * loads[0].mean() and loads[-1].max() < 1.3 * loads[-1].mean()
