"""LoRAMoE: the dense mixture, its loss by hand, and where the loss moves the gates of each type."""

from __future__ import annotations

import torch
from formulas import assert_same, mixture, rows
from lora_formulas import adapters, learning, linear, train

from moe_ext.recipes import LoRAMoE, loramoe_loss


def test_formula():
    layer = LoRAMoE(linear(10, 7, bias=True), rank=3)
    train(layer.experts)
    hidden = rows(2, 6, 10)
    x = hidden.view(12, 10)
    weights = torch.softmax(x @ layer.router.weight.T, dim=-1)
    expected = layer.base(x) + mixture(adapters(layer.experts, x), weights)
    output = layer(hidden)
    assert output.weights.shape == (2, 6, 6) and not layer.base.bias.requires_grad
    assert_same(
        [output.hidden, output.weights], [expected.view(2, 6, 7), weights.view(2, 6, 6)], [hidden, *learning(layer)]
    )


def test_loss_by_hand():
    """Two samples of one token, two experts: I Q = [[.6, .36], [.24, .72]] with delta .2; mean .48, variance .0464."""
    weights = torch.tensor([[[0.5, 0.45]], [[0.3, 0.6]]], dtype=torch.float64)
    types = torch.tensor([0, 1])
    loss = loramoe_loss(weights, types, types, delta=0.2)
    torch.testing.assert_close(loss.item(), (0.12**2 + 0.12**2 + 0.24**2 + 0.24**2) / 3 / 0.48**2)


def test_loss_parts_the_types():
    logits = torch.zeros(4, 3, 6, dtype=torch.float64, requires_grad=True)
    samples, experts = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
    for _ in range(200):
        loss = loramoe_loss(torch.softmax(logits, dim=-1), samples, experts, delta=0.3)
        (grad,) = torch.autograd.grad(loss, logits)
        logits.data -= 5.0 * grad
    weights = torch.softmax(logits, dim=-1)
    own = (samples[:, None] == experts).double()
    # I Q is even, so weights are as 1 / I: each type leans on one group, that of the other label.
    assert loss < 1e-6
    expected = 1 / torch.where(own > 0, 1.3, 0.7).double()
    torch.testing.assert_close(weights.sum(1), 3 * expected / expected.sum(1, keepdim=True), rtol=1e-2, atol=0)
