"""TaskExpert: task by task and expert by expert, with the experts run once for all tasks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cases import make_rows
from compare import relative_error
from moe_ext.recipes import TaskExpert


def written_out(model: TaskExpert, hidden: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    experts, features, updated = model.experts, [], []
    for n in range(model.num_tasks):
        rows = slice(n * (model.num_experts + 1), (n + 1) * (model.num_experts + 1))
        gate = torch.softmax(F.linear(hidden, model.gate.weight[rows], model.gate.bias[rows]), dim=1)
        least = gate[:, :-1].topk(model.topk, dim=1).values[:, -1:]
        feature = gate[:, -1:] * memory[n]
        for e in range(model.num_experts):
            up = F.gelu(F.linear(hidden, experts.gate_up_weight[e], experts.gate_up_bias[e]))
            output = F.linear(up, experts.down_weight[e], experts.down_bias[e])
            feature = feature + torch.where(gate[:, e : e + 1] >= least, gate[:, e : e + 1], 0.0) * output
        features.append(feature)
        updated.append(memory[n] + F.linear(feature, model.write.weight[n], model.write.bias[n]))
    return torch.stack(features), torch.stack(updated)


@pytest.mark.parametrize("topk", [None, 2])
def test_every_task_gets_its_own_sum_of_shared_experts(topk):
    torch.manual_seed(0)
    model = TaskExpert(8, 12, 5, 3, topk=topk).double()
    hidden = make_rows(17, 8, dtype=torch.float64).requires_grad_()
    memory = make_rows(3, 17, 8, dtype=torch.float64, seed=3).requires_grad_()
    rows = []
    model.experts.register_forward_hook(
        lambda module, args, output: rows.append(args[1].tokens_per_expert.sum().item())
    )
    found, expected = model(hidden, memory), written_out(model, hidden, memory)
    asked = model.gates(hidden)[..., :-1]
    union = (asked >= asked.topk(model.topk, dim=-1).values[..., -1:]).any(0).sum()
    # One product of as many rows as pairs of token and expert that any task asks for.
    assert rows == [union] and (union == 17 * 5 if topk is None else union < 17 * 5)
    inputs = [hidden, memory, *model.parameters()]
    grads = [make_rows(3, 17, 8, dtype=torch.float64, seed=s) for s in (5, 6)]
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-12
    for a, b in zip(
        torch.autograd.grad(found, inputs, grads), torch.autograd.grad(expected, inputs, grads), strict=True
    ):
        assert relative_error(a, b) < 1e-10
