"""MENTOR: the formula, the loss by hand, and rows of k experts only."""

from __future__ import annotations

import torch
from formulas import all_outputs, assert_same, keep_topk, mixture, rows

from compare import relative_error
from moe_ext.recipes import MENTOR, mentor_loss


def test_formula(backend):
    layer = MENTOR(10, 6, gate_size=7, backend=backend).double()
    hidden = rows(13, 10)
    first, _, last = layer.router.logits
    scores = torch.softmax(last(torch.relu(first(hidden))), dim=-1)
    expected = mixture(all_outputs(layer.experts, hidden), keep_topk(scores, 4, renormalize=True))
    output = layer(hidden)
    assert_same([output.hidden], [expected], [hidden, *layer.parameters()])
    assert output.routing.topk_ids.shape == (13, 4) and layer.experts.num_experts == 32


def test_rows_multiplied_are_those_of_the_picked():
    layer, plans = MENTOR(10, 6), []
    layer.experts.register_forward_pre_hook(lambda _, inputs: plans.append(inputs[1]))
    layer(rows(13, 10).float())
    # Of 13 * 32 rows of a dense mixture; the products run over a plan's rows and no others.
    assert plans[0].expert_offsets[-1] == len(plans[0].permuted_to_slot) == 13 * 4


def test_loss_by_hand():
    logits = torch.tensor([[3.0, 1.0], [3.0, 1.0]], dtype=torch.float64).log()
    entropy = -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log())
    assert relative_error(mentor_loss(logits), 0.25**2 + entropy) < 1e-6
    even = torch.tensor([[50.0, 0.0], [0.0, 50.0]])
    assert mentor_loss(even) < 1e-6  # evenly used, each choice clear
    assert torch.autograd.gradcheck(mentor_loss, rows(5, 3))
