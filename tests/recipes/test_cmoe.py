"""CMoE: hard picks that no gate scales; the router learns from the balance loss alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cases import make_rows
from compare import relative_error
from moe_ext.recipes import CMoE


@pytest.mark.parametrize("residual", [False, True])
def test_the_argmax_head_answers(residual):
    torch.manual_seed(0)
    model = CMoE(8, 5, residual=residual).double()
    hidden = make_rows(21, 8, dtype=torch.float64).requires_grad_()
    output = model(hidden)
    scores = model.router.logits(hidden)
    picks = scores.argmax(1)
    expected = torch.stack(
        [F.linear(x, model.experts.weight[e], model.experts.bias[e]) for x, e in zip(hidden, picks, strict=True)]
    )
    if residual:
        expected = expected + model.shared(hidden)
    load = torch.bincount(picks, minlength=4).double() / 21
    balance = 4 * (load * torch.softmax(scores, dim=1).mean(0)).sum()
    assert relative_error(output.hidden, expected) < 1e-12 and relative_error(output.balance_loss, balance) < 1e-12
    grad = make_rows(21, 5, dtype=torch.float64, seed=4)
    task = torch.autograd.grad(output.hidden, list(model.router.parameters()), grad, retain_graph=True)
    assert all((g == 0).all() for g in task)
    inputs = [hidden, *model.parameters()]
    ours, theirs = (
        (x[0] * grad).sum() + 0.01 * x[1] for x in ((output.hidden, output.balance_loss), (expected, balance))
    )
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        assert relative_error(a, b) < 1e-10
