"""FactorLLM: the parts sum to the whole, weight E / k, and a router that only its own loss teaches."""

from __future__ import annotations

import torch
from formulas import all_outputs, assert_same, mixture, rows

from compare import relative_error
from moe_ext.nn import Experts
from moe_ext.recipes import FactorLLM


def make(backend: str, topk: int | None = None) -> tuple[Experts, FactorLLM]:
    dense = Experts(1, 10, 24).double()
    return dense, FactorLLM(dense, 4, topk, backend=backend)


def test_all_parts_are_the_dense_ffn(backend):
    dense, layer = make(backend, topk=4)
    hidden = rows(13, 10)
    assert relative_error(layer(hidden).hidden, all_outputs(dense, hidden)[0]) < 1e-12


def test_half_of_the_parts_twice(backend):
    _, layer = make(backend)
    hidden = rows(13, 10)
    picked = (hidden @ layer.router.logits.weight.T).topk(2).indices
    weights = torch.zeros(13, 4, dtype=torch.float64).scatter(1, picked, 4 / 2)
    expected = mixture(all_outputs(layer.experts, hidden), weights)
    assert_same([layer(hidden).hidden], [expected], [hidden, *layer.experts.parameters()])
    (grad,) = torch.autograd.grad(layer(hidden).hidden.square().sum(), layer.router.logits.weight)
    assert not grad.any()


def test_prior_approximate_loss(backend):
    dense, layer = make(backend)
    hidden = rows(13, 10)
    teacher = all_outputs(dense, hidden)[0].detach()
    loss = layer.prior_approximate_loss(hidden, teacher)
    expected = []
    for t, logits in enumerate(hidden @ layer.router.logits.weight.T):
        errors = torch.stack([((o[t] - teacher[t] / 2) ** 2).mean() for o in all_outputs(layer.experts, hidden)])
        target = torch.zeros(4, dtype=torch.float64)
        target[errors.argsort()[:2]] = 1
        p, q = logits.softmax(0), target.softmax(0)
        expected.append((p * (p / q).log()).sum())
    assert_same([loss], [torch.stack(expected).mean()], [layer.router.logits.weight])
    layer.prior_approximate_loss(hidden, teacher).backward()
    assert all(p.grad is None for p in layer.experts.parameters())
