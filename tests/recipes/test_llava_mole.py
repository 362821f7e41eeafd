"""LLaVA-MoLE: the update is not scaled, so that the router learns from the balance loss alone."""

from __future__ import annotations

import torch
from formulas import assert_same, keep_topk, rows, switch_loss
from lora_formulas import adapters, learning, linear, train

from moe_ext.recipes import LLaVAMoLE


def test_formula_and_the_routers_gradient(backend):
    base = linear(10, 7)
    layer = LLaVAMoLE(base, rank=3, backend=backend)
    train(layer.experts)
    hidden = rows(13, 10)
    router = layer.router.logits.weight
    scores = torch.softmax(hidden @ router.T, dim=-1)
    picked = adapters(layer.experts, hidden)[scores.argmax(-1), torch.arange(13)]
    output = layer(hidden)
    loss = switch_loss(scores, keep_topk(scores, 1), 1)
    assert_same([output.hidden, output.balance_loss], [base(hidden) + picked, loss], [hidden, *learning(layer)])
    output = layer(hidden)
    (of_task,) = torch.autograd.grad(output.hidden.square().sum(), router, retain_graph=True)
    (of_balance,) = torch.autograd.grad(output.balance_loss, router)
    assert (of_task == 0).all() and (of_balance != 0).any()
