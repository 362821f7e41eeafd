"""Task-level MoE: hard samples with the gradient of the softmax; argmax in use."""

from __future__ import annotations

import torch
from formulas import assert_same, mlp, rows

from compare import relative_error
from moe_ext.nn import gumbel_noise
from moe_ext.recipes import TaskLevelMoE


def test_samples_are_hard_and_their_gradient_soft():
    model = TaskLevelMoE(8, 12, 4, task_size=6, temperature=0.7).double()
    hidden, task = rows(5, 3, 8), rows(5, 6, seed=3)
    output, routing = model(hidden, task, generator=torch.Generator().manual_seed(1))
    logits = task @ model.router.logits.weight.T
    soft = torch.softmax(gumbel_noise(logits, temperature=0.7, generator=torch.Generator().manual_seed(1)), dim=1)
    picks = soft.argmax(1)
    assert torch.equal(routing.topk_ids[:, 0].long(), picks) and (routing.topk_weights == 1).all()
    assert not torch.equal(picks, logits.argmax(1))
    weight = soft.gather(1, picks[:, None]).squeeze(1)
    hard = 1 + weight - weight.detach()
    expected = torch.stack([hard[i] * mlp(model.experts, e, hidden[i]) for i, e in enumerate(picks.tolist())])
    assert (torch.autograd.grad(output.sum(), task, retain_graph=True)[0] != 0).any()
    assert_same([output], [expected], [hidden, task, *model.parameters()])


def test_in_use_the_argmax_answers():
    model = TaskLevelMoE(8, 12, 4, task_size=6).double().eval()
    hidden, task = rows(5, 3, 8), rows(5, 6, seed=3)
    output, routing = model(hidden, task)
    picks = (task @ model.router.logits.weight.T).argmax(1)
    assert torch.equal(routing.topk_ids[:, 0].long(), picks)
    expected = torch.stack([mlp(model.experts, e, hidden[i]) for i, e in enumerate(picks.tolist())])
    assert relative_error(output, expected) < 1e-12
