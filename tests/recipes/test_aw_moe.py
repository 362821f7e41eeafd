"""AW-MoE: gate and output behaviour by behaviour and expert by expert; masking; InfoNCE by hand."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from cases import make_rows
from compare import relative_error
from moe_ext.recipes import AWMoE
from moe_ext.recipes.aw_moe import contrastive_loss, mask_behaviours


def test_gate_and_score_written_out():
    torch.manual_seed(0)
    model = AWMoE(8, 12, 3, behaviour_size=5, unit_size=7).double()
    hidden, target = make_rows(6, 8, dtype=torch.float64).requires_grad_(), make_rows(6, 5, dtype=torch.float64, seed=3)
    behaviours = make_rows(6, 4, 5, dtype=torch.float64, seed=4).requires_grad_()
    present = torch.arange(4) < torch.tensor([4, 1, 0, 2, 3, 4])[:, None]
    gates = []
    for user in range(6):
        gate = torch.zeros(3, dtype=torch.float64)
        for j in range(4):
            if present[user, j]:
                b = behaviours[user, j]
                weight = model.activation_unit(torch.cat([b, target[user], b * target[user]]))
                gate = gate + weight * model.gate_unit(b)
        gates.append(gate)
    gates, experts = torch.stack(gates), model.experts
    mixed = sum(
        gates[:, e : e + 1]
        * F.linear(
            F.relu(F.linear(hidden, experts.gate_up_weight[e], experts.gate_up_bias[e])),
            experts.down_weight[e],
            experts.down_bias[e],
        )
        for e in range(3)
    )
    expected = model.score(mixed).squeeze(-1)
    scores, found_gates = model(hidden, behaviours, target, present)
    assert relative_error(found_gates, gates) < 1e-12 and (found_gates[2] == 0).all()
    assert relative_error(scores, expected) < 1e-12
    inputs = [hidden, behaviours, *model.parameters()]
    grad = make_rows(6, dtype=torch.float64, seed=5)
    for a, b in zip(
        torch.autograd.grad(scores, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert relative_error(a, b) < 1e-10
    assert torch.equal(
        model.gate(behaviours, target), model.gate(behaviours, target, torch.ones(6, 4, dtype=torch.bool))
    )


def test_masked_behaviours_are_a_subset():
    present = torch.arange(50) < torch.tensor([[50], [20]])
    masked = mask_behaviours(present.expand(2, 50), 0.3, generator=torch.Generator().manual_seed(0))
    assert not (masked & ~present).any() and 20 < masked[0].sum() < 50
    assert not mask_behaviours(present, 1.0).any() and torch.equal(mask_behaviours(present, 0.0), present)


def test_contrastive_loss_by_hand():
    gates, masked = (make_rows(5, 3, dtype=torch.float64, seed=s).requires_grad_() for s in (1, 2))
    loss = 0.0
    for i in range(5):
        similarity = torch.stack([F.cosine_similarity(gates[i], masked[j], dim=0) / 0.1 for j in range(5)])
        loss = loss - (similarity[i] - torch.logsumexp(similarity, 0)) / 5
    found = contrastive_loss(gates, masked)
    assert relative_error(found, loss) < 1e-12
    for a, b in zip(
        torch.autograd.grad(found, (gates, masked)), torch.autograd.grad(loss, (gates, masked)), strict=True
    ):
        assert relative_error(a, b) < 1e-10
    assert contrastive_loss(gates, gates) < loss
