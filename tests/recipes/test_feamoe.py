"""FEAMOE: the mixture by hand, Shapley values against all coalitions, growth that changes nothing yet."""

from __future__ import annotations

import itertools
import math

import torch
from formulas import assert_same, rows
from torch.nn import functional as F

from cases import make_rows
from compare import relative_error
from moe_ext.recipes import FEAMOE


def make_model(hidden_size: int = 3, num_experts: int = 4) -> FEAMOE:
    return FEAMOE(hidden_size, num_experts).double()


def test_output_is_the_gated_sum_of_linear_models():
    model, hidden = make_model(), rows(9, 3)
    gates = torch.softmax(model.gate(hidden), dim=1)
    expected = sum(gates[:, e] * (hidden @ model.experts.weight[e, 0] + model.experts.bias[e, 0]) for e in range(4))
    assert_same([model(hidden)], [expected], [hidden, *model.parameters()])


def test_shapley_values_over_all_coalitions():
    """phi_j = sum over coalitions S without j of |S|! (n-|S|-1)! / n! (f(S + j) - f(S)), the gate held at x."""
    model, hidden = make_model(), make_rows(5, 3, dtype=torch.float64)
    background = make_rows(50, 3, dtype=torch.float64, seed=8)
    found = model.shapley_values(hidden, background)
    for t, j in itertools.product(range(5), range(3)):
        gate = model.gates(hidden[t : t + 1])[0]

        def value(present, t=t, gate=gate):
            filled = background.clone()
            filled[:, list(present)] = hidden[t, list(present)]
            return (gate * (filled @ model.experts.weight[:, 0].T + model.experts.bias[:, 0])).sum(1).mean()

        others = [i for i in range(3) if i != j]
        phi = 0.0
        for size in range(3):
            share = math.factorial(size) * math.factorial(2 - size) / math.factorial(3)
            for coalition in itertools.combinations(others, size):
                phi = phi + share * (value((*coalition, j)) - value(coalition))
        assert math.isclose(found[t, j].item(), phi.item(), rel_tol=1e-9, abs_tol=1e-12)


def test_a_new_expert_changes_nothing_until_it_is_trained():
    model, hidden = make_model(), make_rows(9, 3, dtype=torch.float64)
    grown = model.grow(2)
    assert grown.experts.num_experts == 5 and relative_error(grown(hidden), model(hidden)) < 1e-12
    assert torch.equal(grown.experts.weight[4], model.experts.weight[2])
    grown(hidden).sum().backward()
    assert all(p.grad is not None for p in grown.parameters())


def test_best_expert_explains_the_targets():
    model, hidden = make_model(), make_rows(64, 3, dtype=torch.float64)
    targets = (hidden @ model.experts.weight[1, 0] + model.experts.bias[1, 0] > 0).double()
    losses = [
        F.binary_cross_entropy_with_logits(hidden @ model.experts.weight[e, 0] + model.experts.bias[e, 0], targets)
        for e in range(4)
    ]
    assert model.best_expert(hidden, targets) == torch.stack(losses).argmin()


def test_growth_recovers_from_drift():
    """After the rule flips on one side, a grown expert brings the loss below what the old model reaches alone."""
    torch.manual_seed(0)
    hidden = torch.randn(200, 3)
    targets = ((hidden[:, 0] > 0) ^ (hidden[:, 1] > 0)).float()
    losses = {}
    for grows in (False, True):
        torch.manual_seed(1)
        model = FEAMOE(3)
        for step in range(120):
            if step == 0:
                optimizer = torch.optim.Adam(model.parameters(), lr=0.2)
            if grows and step in (20, 40):
                model = model.grow(int(model.best_expert(hidden, targets)))
                model.experts.weight.data.add_(0.1 * torch.randn_like(model.experts.weight))
                optimizer = torch.optim.Adam(model.parameters(), lr=0.2)
            loss = F.binary_cross_entropy_with_logits(model(hidden), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[grows] = loss.item()
    assert losses[False] > 0.6 > 0.3 > losses[True]
