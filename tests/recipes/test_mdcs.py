"""MDCS: the mean of the heads, and the authors' losses written out head by head."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from cases import make_rows
from compare import relative_error
from moe_ext.recipes import MDCS

COUNTS = torch.tensor([500, 120, 30, 5])


def make_model() -> MDCS:
    torch.manual_seed(0)
    return MDCS(6, COUNTS).double()


def test_prediction_is_the_mean_of_the_heads():
    model, hidden = make_model(), make_rows(9, 6, dtype=torch.float64).requires_grad_()
    heads = [hidden @ w.T + b for w, b in zip(model.heads.weight, model.heads.bias, strict=True)]
    output, expected = model(hidden), sum(heads) / 3
    assert relative_error(output, expected) < 1e-12
    inputs = [hidden, *model.parameters()]
    for a, b in zip(
        torch.autograd.grad(output.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-12


def test_losses_are_the_authors():
    model = make_model()
    views = [make_rows(40, 6, dtype=torch.float64, seed=s).requires_grad_() for s in (3, 4)]
    targets = torch.randint(4, (40,), generator=torch.Generator().manual_seed(0))
    diversity = consistency = 0.0
    for e, strength in enumerate((-0.5, 1.0, 2.5)):
        shift = torch.log(COUNTS.double() ** strength)
        teacher, student = (v @ model.heads.weight[e].T + model.heads.bias[e] + shift for v in views)
        diversity = diversity + F.cross_entropy(torch.cat([teacher, student]), targets.repeat(2))
        right = teacher.argmax(1) == targets
        assert 0 < right.sum() < 40
        consistency = consistency + F.kl_div(
            torch.log_softmax(student[right], 1), torch.softmax(teacher[right], 1).detach(), reduction="batchmean"
        )
    found = model.losses(*views, targets)
    inputs = [*views, *model.parameters()]
    for value, expected in zip(found, (diversity, consistency), strict=True):
        assert relative_error(value, expected) < 1e-12
        ours = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(expected, inputs, retain_graph=True, allow_unused=True)
        for a, b in zip(ours, theirs, strict=True):
            assert relative_error(torch.zeros(1) if a is None else a, torch.zeros_like(a) if b is None else b) < 1e-10
