"""TaskExpert: task by task and expert by expert, with the experts run once for all tasks."""

from __future__ import annotations

import pytest
import torch
from formulas import all_outputs, assert_same, keep_topk, mixture, rows
from torch.nn import functional as F

from moe_ext.recipes import TaskExpert


def written_out(model: TaskExpert, hidden: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    outputs, features, updated = all_outputs(model.experts, hidden), [], []
    for n in range(model.num_tasks):
        own = slice(n * (model.num_experts + 1), (n + 1) * (model.num_experts + 1))
        gate = torch.softmax(F.linear(hidden, model.gate.weight[own], model.gate.bias[own]), dim=1)
        feature = mixture(outputs, keep_topk(gate[:, :-1], model.topk)) + gate[:, -1:] * memory[n]
        features.append(feature)
        updated.append(memory[n] + F.linear(feature, model.write.weight[n], model.write.bias[n]))
    return torch.stack(features), torch.stack(updated)


@pytest.mark.parametrize("topk", [None, 2])
def test_every_task_gets_its_own_sum_of_shared_experts(topk):
    model = TaskExpert(8, 12, 5, 3, topk=topk).double()
    hidden, memory, multiplied = rows(17, 8), rows(3, 17, 8, seed=3), []
    model.experts.register_forward_hook(
        lambda module, args, output: multiplied.append(args[1].tokens_per_expert.sum().item())
    )
    found, expected = model(hidden, memory), written_out(model, hidden, memory)
    asked = model.gates(hidden)[..., :-1]
    union = (asked >= asked.topk(model.topk, dim=-1).values[..., -1:]).any(0).sum()
    # One product of as many rows as pairs of token and expert that any task asks for.
    assert multiplied == [union] and (union == 17 * 5 if topk is None else union < 17 * 5)
    assert_same(found, expected, [hidden, memory, *model.parameters()])


def test_compiles_without_a_graph_break():
    model, hidden, memory = TaskExpert(8, 12, 5, 3, topk=2).double(), rows(17, 8), rows(3, 17, 8, seed=3)
    inputs = [hidden, memory, *model.parameters()]
    assert_same(
        torch.compile(model, backend="aot_eager", fullgraph=True)(hidden, memory), model(hidden, memory), inputs
    )
