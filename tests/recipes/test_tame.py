"""TAME: a jump of the loss makes one expert, an old task finds its own again, the selector is hard, pruning lasts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cases import make_rows
from compare import relative_error
from moe_ext.recipes import TAME

TASKS = [torch.tensor([3.0, -2.0, 0.5, 1.0]), torch.tensor([-3.0, 2.0, -0.5, -1.0])]


def run_tasks(model: TAME, order: list[int], generator: torch.Generator) -> list[int]:
    """The expert that every batch went to, 30 batches of each task of ``order``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    went = []
    for task in order:
        for _ in range(30):
            hidden = torch.randn(64, 4, generator=generator)
            targets = (hidden @ TASKS[task] > 0).long()
            losses = model.expert_losses(hidden, targets)
            went.append(model.observe(losses))
            optimizer.zero_grad()
            losses[went[-1]].backward()
            optimizer.step()
    return went


@pytest.fixture(scope="module")
def trained() -> tuple[TAME, list[int]]:
    torch.manual_seed(0)
    model = TAME(4, 2)
    return model, run_tasks(model, [0, 1, 0], torch.Generator().manual_seed(1))


def test_a_jump_makes_one_expert_and_the_old_task_finds_its_own(trained):
    model, went = trained
    assert went == [0] * 30 + [1] * 30 + [0] * 30 and model.num_active == 2
    assert (model.num_batches == torch.tensor([60.0, 30, 0, 0, 0, 0, 0, 0])).all()


def test_losses_and_their_gradients(trained):
    model, hidden = trained[0], make_rows(9, 4, dtype=torch.float32).requires_grad_()
    targets = torch.arange(9) % 2
    losses = model.expert_losses(hidden, targets)
    pairs = zip(model.experts.weight, model.experts.bias, strict=True)
    expected = torch.stack([F.cross_entropy(F.linear(hidden, w, b), targets) for w, b in pairs])
    assert relative_error(losses, expected) < 1e-6
    inputs = [hidden, *model.experts.parameters()]
    for a, b in zip(torch.autograd.grad(losses[1], inputs), torch.autograd.grad(expected[1], inputs), strict=True):
        assert relative_error(a, b) < 1e-5


def test_the_selector_picks_one_expert_that_exists(trained):
    model, hidden = trained[0], make_rows(40, 4, dtype=torch.float32)
    scores = model.selector.logits(hidden)
    assert (scores.argmax(1) >= 2).any()
    picks = scores[:, :2].argmax(1)
    expected = torch.stack(
        [F.linear(x, model.experts.weight[e], model.experts.bias[e]) for x, e in zip(hidden, picks, strict=True)]
    )
    assert 0 < picks.sum() < 40 and relative_error(model(hidden), expected) < 1e-6
    assert relative_error(model.selector_loss(hidden, picks), F.cross_entropy(scores[:, :2], picks)) < 1e-6


def test_what_is_pruned_stays_away():
    torch.manual_seed(0)
    model = TAME(6, 5, max_experts=3)
    before = model.experts.weight.detach().clone()
    model.prune_expert(1, 0.5)
    weight = model.experts.weight.detach()
    assert torch.equal(weight[[0, 2]], before[[0, 2]]) and (weight[1] == 0).sum() == 15
    assert before[1][weight[1] == 0].abs().max() < before[1][weight[1] != 0].abs().min()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.expert_losses(make_rows(9, 6, dtype=torch.float32), torch.arange(9) % 5).sum().backward()
    optimizer.step()
    model.prune_expert(0, 0.1)
    model(make_rows(9, 6, dtype=torch.float32))
    assert torch.equal(model.experts.weight[1] == 0, weight[1] == 0) and (model.experts.weight[0] == 0).sum() == 3
