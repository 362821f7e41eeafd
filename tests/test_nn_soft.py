"""Dense routing: the plan is that of a sort, the mixture that of a loop over experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import moe_ext
from cases import make_rows
from compare import assert_deterministic, relative_error
from moe_ext.nn import Experts, LinearExperts, ModuleExperts, dense_mixture, dense_outputs, dense_plan, expert_rows


@pytest.mark.parametrize("sizes", [(0, 4), (1, 1), (33, 7), (5, 64)])
def test_dense_plan_is_the_plan_of_all_ids(sizes):
    num_tokens, num_experts = sizes
    ids = torch.arange(num_experts, dtype=torch.int32).expand(num_tokens, -1).contiguous()
    ours, sorted_plan = dense_plan(*sizes, device="cpu"), moe_ext.routing_plan(ids, num_experts)
    for name, a, b in zip(ours._fields, ours, sorted_plan, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b) and a.is_contiguous(), name


def loop(hidden, weights, gate_up_weight, down_weight, gate_up_bias, down_bias):
    output = torch.zeros_like(hidden)
    for e in range(weights.shape[1]):
        gate, up = F.linear(hidden, gate_up_weight[e], gate_up_bias[e]).chunk(2, dim=-1)
        output = output + weights[:, e : e + 1] * F.linear(F.silu(gate) * up, down_weight[e], down_bias[e])
    return output


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("num_tokens", [0, 1, 33])
def test_dense_mixture(num_tokens, backend):
    experts = Experts(5, 12, 7, bias=True, backend=backend).double()
    hidden = make_rows(num_tokens, 12, dtype=torch.float64).requires_grad_()
    # One-hot rows, empty rows and negative weights beside a softmax.
    weights = torch.softmax(make_rows(num_tokens, 5, dtype=torch.float64, seed=3), dim=1)
    weights[1:9] = torch.eye(5, dtype=torch.float64)[torch.arange(num_tokens)[1:9] % 5]
    weights[9:12] = 0
    weights[12:15] *= -1
    weights.requires_grad_()
    inputs = [hidden, weights, *experts.parameters()]
    output, expected = dense_mixture(experts, hidden, weights), loop(*inputs)
    assert output.shape == hidden.shape and relative_error(output, expected) < 1e-12
    grad = make_rows(num_tokens, 12, dtype=torch.float64, seed=4)
    for a, b in zip(
        torch.autograd.grad(output, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert relative_error(a, b) < 1e-12


def test_dense_mixture_is_deterministic_in_bfloat16():
    experts = Experts(5, 12, 7).bfloat16()
    hidden = make_rows(33, 12, dtype=torch.bfloat16)
    weights = torch.softmax(make_rows(33, 5, dtype=torch.float32), dim=1)
    assert_deterministic(lambda x, w: dense_mixture(experts, x, w), (hidden, weights), [hidden])


def test_errors_name_the_argument():
    with pytest.raises(
        ValueError, match=r"weights: expected \[num_tokens, num_experts\] with num_tokens = 3, got \[4, 2\]"
    ):
        dense_mixture(Experts(2, 4, 4), torch.zeros(3, 4), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="num_tokens, num_experts: expected >= 0 and >= 1, got 3 and 0"):
        dense_plan(3, 0, device="cpu")


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("num_tokens", [0, 33])
def test_dense_outputs_are_what_the_mixture_adds_up(num_tokens, backend):
    experts = Experts(5, 12, 7, bias=True, backend=backend).double()
    hidden = make_rows(num_tokens, 12, dtype=torch.float64).requires_grad_()
    outputs = dense_outputs(experts, hidden, 5, ops=experts.ops)
    ones = torch.eye(5, dtype=torch.float64)
    expected = torch.stack([loop(hidden, w.expand(num_tokens, 5), *experts.parameters()) for w in ones])
    assert relative_error(outputs, expected) < 1e-12
    inputs = [hidden, *experts.parameters()]
    grad = make_rows(5, num_tokens, 12, dtype=torch.float64, seed=4)
    for a, b in zip(
        torch.autograd.grad(outputs, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert relative_error(a, b) < 1e-12


def test_expert_rows_of_any_kind_with_dropped_slots():
    ids = torch.tensor([[2, -1], [0, 2], [-1, 5]], dtype=torch.int32)
    plan = moe_ext.routing_plan(ids, 3)
    hidden = make_rows(3, 4, dtype=torch.float32)
    for experts in (LinearExperts(3, 4, 6), ModuleExperts([nn.Linear(4, 6) for _ in range(3)]), Experts(3, 4, 5)):
        rows = expert_rows(experts, hidden, plan, 2)
        assert rows.shape[0] == 6 and (rows[3:] == 0).all()
        summed = moe_ext.unpermute(rows, plan.permuted_to_slot, plan.slot_to_permuted, 2)
        assert relative_error(summed, experts(hidden, plan, None)) < 1e-6
