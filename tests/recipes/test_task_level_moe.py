"""Task-level MoE: hard samples with the gradient of the softmax; argmax in use."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from cases import make_rows
from compare import relative_error
from moe_ext.nn import gumbel_noise
from moe_ext.recipes import TaskLevelMoE


def run_expert(model: TaskLevelMoE, e: int, rows: torch.Tensor) -> torch.Tensor:
    experts = model.experts
    up = F.gelu(F.linear(rows, experts.gate_up_weight[e], experts.gate_up_bias[e]))
    return F.linear(up, experts.down_weight[e], experts.down_bias[e])


def test_samples_are_hard_and_their_gradient_soft():
    torch.manual_seed(0)
    model = TaskLevelMoE(8, 12, 4, task_size=6, temperature=0.7).double()
    hidden = make_rows(5, 3, 8, dtype=torch.float64).requires_grad_()
    task = make_rows(5, 6, dtype=torch.float64, seed=3).requires_grad_()
    output, routing = model(hidden, task, generator=torch.Generator().manual_seed(1))
    logits = task @ model.router.logits.weight.T
    soft = torch.softmax(gumbel_noise(logits, temperature=0.7, generator=torch.Generator().manual_seed(1)), dim=1)
    picks = soft.argmax(1)
    assert torch.equal(routing.topk_ids[:, 0].long(), picks) and (routing.topk_weights == 1).all()
    assert not torch.equal(picks, logits.argmax(1))
    weight = soft.gather(1, picks[:, None]).squeeze(1)
    hard = 1 + weight - weight.detach()
    expected = torch.stack([hard[i] * run_expert(model, e, hidden[i]) for i, e in enumerate(picks.tolist())])
    assert relative_error(output, expected) < 1e-12
    inputs, grad = [hidden, task, *model.parameters()], make_rows(5, 3, 8, dtype=torch.float64, seed=4)
    found = torch.autograd.grad(output, inputs, grad)
    for a, b in zip(found, torch.autograd.grad(expected, inputs, grad), strict=True):
        assert relative_error(a, b) < 1e-10
    assert (found[1] != 0).any()


def test_in_use_the_argmax_answers():
    torch.manual_seed(0)
    model = TaskLevelMoE(8, 12, 4, task_size=6).double().eval()
    hidden, task = make_rows(5, 3, 8, dtype=torch.float64), make_rows(5, 6, dtype=torch.float64, seed=3)
    output, routing = model(hidden, task)
    picks = (task @ model.router.logits.weight.T).argmax(1)
    assert torch.equal(routing.topk_ids[:, 0].long(), picks)
    expected = torch.stack([run_expert(model, e, hidden[i]) for i, e in enumerate(picks.tolist())])
    assert relative_error(output, expected) < 1e-12
