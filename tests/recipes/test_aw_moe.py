"""AW-MoE: gate and output behaviour by behaviour and expert by expert; masking; InfoNCE by hand."""

from __future__ import annotations

import torch
from formulas import all_outputs, assert_same, mixture, rows
from torch.nn import functional as F

from moe_ext.recipes import AWMoE
from moe_ext.recipes.aw_moe import contrastive_loss, mask_behaviours


def test_gate_and_score_written_out():
    model = AWMoE(8, 12, 3, behaviour_size=5, unit_size=7).double()
    hidden, target, behaviours = rows(6, 8), rows(6, 5, seed=3), rows(6, 4, 5, seed=4)
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
    gates = torch.stack(gates)
    expected = model.score(mixture(all_outputs(model.experts, hidden), gates)).squeeze(-1)
    scores, found_gates = model(hidden, behaviours, target, present)
    assert (found_gates[2] == 0).all()
    assert_same([scores, found_gates], [expected, gates], [hidden, target, behaviours, *model.parameters()])
    assert torch.equal(
        model.gate(behaviours, target), model.gate(behaviours, target, torch.ones(6, 4, dtype=torch.bool))
    )


def test_masked_behaviours_are_a_subset():
    present = torch.arange(50) < torch.tensor([[50], [20]])
    masked = mask_behaviours(present.expand(2, 50), 0.3, generator=torch.Generator().manual_seed(0))
    assert not (masked & ~present).any() and 20 < masked[0].sum() < 50
    assert not mask_behaviours(present, 1.0).any() and torch.equal(mask_behaviours(present, 0.0), present)


def test_contrastive_loss_by_hand():
    gates, masked = rows(5, 3, seed=1), rows(5, 3, seed=2)
    loss = 0.0
    for i in range(5):
        similarity = torch.stack([F.cosine_similarity(gates[i], masked[j], dim=0) / 0.1 for j in range(5)])
        loss = loss - (similarity[i] - torch.logsumexp(similarity, 0)) / 5
    found = contrastive_loss(gates, masked)
    assert_same([found], [loss], [gates, masked])
    assert contrastive_loss(gates, gates) < loss
