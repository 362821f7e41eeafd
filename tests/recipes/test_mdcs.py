"""MDCS: the mean of the heads, and the authors' losses written out head by head."""

from __future__ import annotations

import torch
from formulas import assert_same, rows
from torch.nn import functional as F

from moe_ext.recipes import MDCS

COUNTS = torch.tensor([500, 120, 30, 5])


def make_model() -> MDCS:
    return MDCS(6, COUNTS).double()


def test_prediction_is_the_mean_of_the_heads():
    model, hidden = make_model(), rows(9, 6)
    heads = [hidden @ w.T + b for w, b in zip(model.heads.weight, model.heads.bias, strict=True)]
    assert_same([model(hidden)], [sum(heads) / 3], [hidden, *model.parameters()])


def test_losses_are_the_authors():
    model = make_model()
    views = [rows(40, 6, seed=s) for s in (3, 4)]
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
    assert_same(model.losses(*views, targets), [diversity, consistency], [*views, *model.parameters()])
