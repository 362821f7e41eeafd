"""Several gates over shared experts: as N separate layers, with every expert row computed once."""

from __future__ import annotations

import pytest
import torch

import moe_ext
from cases import ROUTINGS, make_rows, make_topk_ids, make_topk_weights
from compare import relative_error
from moe_ext import reference
from moe_ext.nn import Experts, multi_gate_combine, multi_gate_mixture, multi_gate_plan


def gates_of(num_tokens: int, num_experts: int, topks: tuple[int, ...], routing: str) -> list[torch.Tensor]:
    return [make_topk_ids(num_tokens, num_experts, topk, routing, seed=n) for n, topk in enumerate(topks)]


def distinct(gates: list[torch.Tensor], num_experts: int) -> int:
    """Pairs of token and expert that any gate asks for."""
    pairs = {
        (t, e) for ids in gates for t, row in enumerate(ids.tolist()) for e in row if 0 <= e < num_experts
    }  # fmt: skip
    return len(pairs)


@pytest.mark.parametrize("ops", [moe_ext, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", [(0, 4, (2, 1)), (33, 7, (2, 3, 1)), (20, 5, (5, 5)), (17, 48, (8, 8, 8))])
def test_each_gate_gets_its_own_sum(shape, routing, ops):
    num_tokens, num_experts, topks = shape
    gates = gates_of(num_tokens, num_experts, topks, routing)
    if num_tokens > 9:
        gates[0][4] = -1
        gates[1][5, 0] = num_experts
    plan = multi_gate_plan(gates, num_experts, ops=ops)
    assert plan.plan.tokens_per_expert.sum() == distinct(gates, num_experts)
    assert plan.plan.permuted_to_slot.shape[0] == num_tokens * min(sum(topks), num_experts)

    hidden = make_rows(num_tokens, 6, dtype=torch.float64).requires_grad_()
    matrix = make_rows(num_experts, 5, 6, dtype=torch.float64, seed=3).requires_grad_()
    weights = [make_topk_weights(num_tokens, k, dtype=torch.float64, seed=k).requires_grad_() for k in topks]
    shared, topk = plan.plan, min(sum(topks), num_experts)
    rows = ops.grouped_gemm(hidden, matrix, shared.expert_offsets, weight_layout="enk",
                            gather=(shared.permuted_to_slot, shared.slot_to_permuted, topk))  # fmt: skip
    outputs = multi_gate_combine(rows, plan, weights, ops=ops)
    alone = []
    for ids, w in zip(gates, weights, strict=True):
        own = reference.routing_plan(ids, num_experts)
        maps = (own.permuted_to_slot, own.slot_to_permuted, ids.shape[1])
        own_rows = reference.grouped_gemm(hidden, matrix, own.expert_offsets, weight_layout="enk", gather=maps)
        alone.append(reference.unpermute(own_rows, *maps, w))
    for a, b in zip(outputs, alone, strict=True):
        assert relative_error(a, b) < 1e-12
    grads = [make_rows(num_tokens, 5, dtype=torch.float64, seed=n) for n in range(len(topks))]
    inputs = [hidden, matrix, *weights]
    for a, b in zip(
        torch.autograd.grad(outputs, inputs, grads), torch.autograd.grad(alone, inputs, grads), strict=True
    ):
        assert relative_error(a, b) < 1e-12


def test_unweighted_gates_and_two_runs():
    gates = gates_of(33, 7, (2, 3), "zipf")
    rows = make_rows(33 * 5, 4, dtype=torch.float32)
    first, second = (
        multi_gate_combine(rows, multi_gate_plan(gates, 7), [None, make_topk_weights(33, 3)]) for _ in "ab"
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    plan = multi_gate_plan(gates, 7)
    held = plan.gates[0].slot_to_permuted.view(33, 2).long()
    assert torch.equal(first[0], rows[held[:, 0]] + rows[held[:, 1]])


def test_a_repeated_id_counts_once_in_both_directions():
    """Within one gate the first of equal ids stays, so that forward and backward agree."""
    ids = torch.tensor([[2, 2], [1, 0]], dtype=torch.int32)
    plan = multi_gate_plan([ids, ids[:, :1]], 3)
    weights = torch.tensor([[0.25, 0.5], [1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    rows = make_rows(plan.plan.permuted_to_slot.shape[0], 4, dtype=torch.float64).requires_grad_()
    combine = lambda r, w: multi_gate_combine(r, plan, [w, None])[0]  # noqa: E731
    assert torch.equal(combine(rows, weights)[0], 0.25 * rows[plan.gates[0].slot_to_permuted[0]])
    assert torch.autograd.gradcheck(combine, (rows, weights))


def test_errors_name_the_argument():
    ids = torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"topk_ids: expected .* got \[\[3, 2\], \[2, 2\]\]"):
        multi_gate_plan([ids, ids[:2]], 4)
    with pytest.raises(ValueError, match=r"topk_ids: expected at least one gate"):
        multi_gate_plan([], 4)
    with pytest.raises(ValueError, match="topk_weights: expected one per gate, 1, got 2"):
        multi_gate_combine(torch.zeros(6, 2), multi_gate_plan([ids], 4), [None, None])


def test_one_set_of_experts_under_two_gates_multiplies_each_row_once():
    """The experts see one row per pair that any gate asks for; outputs are those of one layer per gate."""
    gates = gates_of(33, 7, (2, 3), "zipf")
    weights = [make_topk_weights(33, k, dtype=torch.float64, seed=k) for k in (2, 3)]
    experts = Experts(7, 12, 5).double()
    hidden = make_rows(33, 12, dtype=torch.float64).requires_grad_()
    rows_seen = []
    hook = experts.register_forward_hook(
        lambda module, args, output: rows_seen.append(int(args[1].tokens_per_expert.sum()))
    )
    outputs = multi_gate_mixture(experts, hidden, gates, weights, 7)
    hook.remove()
    assert rows_seen == [distinct(gates, 7)] and rows_seen[0] < 33 * 5
    alone = [experts(hidden, moe_ext.routing_plan(ids, 7), w) for ids, w in zip(gates, weights, strict=True)]
    inputs = [hidden, *experts.parameters()]
    grads = [make_rows(33, 12, dtype=torch.float64, seed=n) for n in range(2)]
    for a, b in zip(outputs, alone, strict=True):
        assert relative_error(a, b) < 1e-12
    for a, b in zip(
        torch.autograd.grad(outputs, inputs, grads), torch.autograd.grad(alone, inputs, grads), strict=True
    ):
        assert relative_error(a, b) < 1e-12
