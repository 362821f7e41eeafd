"""PMOE: density, samples and frequency loss by hand."""

from __future__ import annotations

import math

import torch
from formulas import assert_same, rows

from cases import make_rows
from compare import relative_error
from moe_ext.recipes import PMOE


def make_policy() -> PMOE:
    policy = PMOE(6, 2, num_experts=3).double()
    policy.log_std.data.copy_(make_rows(3, 2, dtype=torch.float64, scale=0.3))
    return policy


def test_log_prob_is_that_of_the_mixture():
    policy, hidden = make_policy(), rows(7, 6)
    action = make_rows(7, 2, dtype=torch.float64, seed=5)
    density = torch.zeros(7, dtype=torch.float64)
    weights = torch.softmax(policy.mixing(hidden), dim=1)
    for e in range(3):
        mean, std = hidden @ policy.heads.weight[e].T + policy.heads.bias[e], policy.log_std[e].exp()
        of_head = (-0.5 * ((action - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)).sum(1).exp()
        density = density + weights[:, e] * of_head
    assert_same([policy.log_prob(hidden, action)], [density.log()], [hidden, *policy.parameters()])


def test_every_head_draws_an_action_around_its_mean():
    policy, hidden = make_policy(), make_rows(1, 6, dtype=torch.float64).expand(20000, 6)
    actions = policy.sample(hidden, generator=torch.Generator().manual_seed(0))
    means, log_std, _ = policy(hidden[:1])
    assert actions.shape == (3, 20000, 2)
    assert ((actions.mean(1) - means[:, 0]).abs() < 0.03).all()
    assert relative_error(actions.std(1), log_std[:, 0].exp()) < 0.02


def test_frequency_loss_by_hand():
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], requires_grad=True)
    q_values = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, 5.0]])
    loss = PMOE.frequency_loss(weights, q_values)
    by_hand = (0.5**2 + 0.75**2 + 0.25**2 + 0.1**2 + 0.1**2 + 0.2**2) / 6
    assert math.isclose(loss.item(), by_hand, rel_tol=1e-6)
    loss.backward()
    expected = torch.tensor([[0.5, -0.75, 0.25], [0.1, 0.1, -0.2]]) / 3
    assert relative_error(weights.grad, expected) < 1e-6
