"""The kinds of experts against loops over tokens and slots, in float64, with capacity, empty experts and no tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moe_ext
from cases import ROUTINGS, make_rows, make_topk_ids, make_topk_weights, non_contiguous
from compare import relative_error
from moe_ext.nn import (
    ExpertGroups,
    Experts,
    LinearExperts,
    ModuleExperts,
    MoE,
    ProjectedExperts,
    TopKRouter,
    ZeroComputationExperts,
)

HIDDEN = 10


def apply_linear(experts: LinearExperts, e: int, x: Tensor) -> Tensor:
    return F.linear(x, experts.weight[e], experts.bias[e])


def apply_zero_computation(experts: ZeroComputationExperts, e: int, x: Tensor) -> Tensor:
    if e < experts.num_constant:
        a1, a2 = torch.softmax(experts.mixing_weight[e] @ x, dim=0)
        return a1 * x + a2 * experts.constants[e]
    return x if e < experts.num_constant + experts.num_copy else torch.zeros_like(x)


def apply_module(experts: ModuleExperts, e: int, x: Tensor) -> Tensor:
    return experts.experts[e](x.view(1, *experts.row_shape)).flatten()


def apply_projected(experts: ProjectedExperts, e: int, x: Tensor) -> Tensor:
    """The ascent after every expert, not after the sum."""
    return experts.ascend(apply_linear(experts.experts, e, experts.descend(x)))


def make_convolutions(count: int) -> list[nn.Module]:
    return [nn.Conv1d(2, 3, kernel_size=3, padding=1) for _ in range(count)]


KINDS = {
    "linear": (lambda: LinearExperts(5, HIDDEN, 7, bias=True), apply_linear),
    "linear reference": (lambda: LinearExperts(5, HIDDEN, 7, bias=True, backend="reference"), apply_linear),
    "zero computation": (lambda: ZeroComputationExperts(HIDDEN), apply_zero_computation),
    "no constants": (
        lambda: ZeroComputationExperts(HIDDEN, num_constant=0, num_copy=2, num_zero=2),
        apply_zero_computation,
    ),
    "modules": (lambda: ModuleExperts(make_convolutions(5), row_shape=(2, HIDDEN // 2)), apply_module),
    "projected": (
        lambda: ProjectedExperts(nn.Linear(HIDDEN, 4), LinearExperts(5, 4, 4, bias=True), nn.Linear(4, HIDDEN, bias=False)),
        apply_projected,
    ),
}  # fmt: skip


@pytest.mark.parametrize("capacity", [None, 3])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_loop_over_slots(kind, routing, capacity):
    """Ids past the last expert and below 0 are not here."""
    torch.manual_seed(0)
    make, apply = KINDS[kind]
    experts = make().double()
    ids = make_topk_ids(13, experts.num_experts + 1, 3, routing) - (torch.arange(13) == 5).int()[:, None] * 99
    plan = moe_ext.routing_plan(ids, experts.num_experts, capacity=capacity)
    hidden = non_contiguous(make_rows(13, HIDDEN, dtype=torch.float64)).requires_grad_()
    weights = make_topk_weights(13, 3, dtype=torch.float64).requires_grad_()

    output = experts(hidden, plan, weights)
    expected = torch.zeros_like(output)
    taken = (plan.slot_to_permuted.view(ids.shape) >= 0).tolist()
    assert capacity is None or sum(map(sum, taken)) <= capacity * experts.num_experts
    for t, j in torch.cartesian_prod(torch.arange(13), torch.arange(3)).tolist():
        if taken[t][j]:
            expected = expected.index_add(
                0, torch.tensor([t]), weights[t, j] * apply(experts, ids[t, j], hidden[t])[None]
            )
    inputs = [hidden, weights, *experts.parameters()]
    results = []
    for result in (output, expected):
        loss = (result * make_rows(*output.shape, dtype=torch.float64, seed=4)).sum()
        grads = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True) if loss.requires_grad else []
        results.append(
            [result, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=False))]
        )
    for ours, exact in zip(*results, strict=True):
        assert relative_error(ours, exact) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind):
    experts = KINDS[kind][0]()
    hidden = torch.zeros(0, HIDDEN, requires_grad=True)
    weights = torch.zeros(0, 2)
    output = experts(hidden, moe_ext.routing_plan(torch.zeros(0, 2).int(), experts.num_experts), weights)
    output.sum().backward()
    assert output.shape[0] == 0 and hidden.grad.shape == (0, HIDDEN)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_and_twice_the_same(kind):
    torch.manual_seed(0)
    experts = KINDS[kind][0]().bfloat16()
    plan = moe_ext.routing_plan(make_topk_ids(33, experts.num_experts, 2, "zipf"), experts.num_experts)
    hidden, weights = make_rows(33, HIDDEN, dtype=torch.bfloat16), make_topk_weights(33, 2)
    output = experts(hidden, plan, weights)
    assert output.dtype == torch.bfloat16 and torch.equal(output, experts(hidden, plan, weights))
    exact = experts.double()(hidden.double(), plan, weights.double())
    assert relative_error(output, exact) < 1e-2


def make_groups(**options) -> MoE:
    torch.manual_seed(0)
    groups = ExpertGroups(
        [Experts(4, HIDDEN, 6), Experts(2, HIDDEN, 9, activation="gelu", bias=True), ZeroComputationExperts(HIDDEN)],
        capacity_shares=[2, 1, 0.5],
    )
    return MoE(TopKRouter(HIDDEN, 10, 3, renormalize=True), groups, **options).double()


def test_groups_add_up():
    """Each group on its own sees only the slots of its ids."""
    layer, hidden = make_groups(), make_rows(2, 17, HIDDEN, dtype=torch.float64)
    output = layer(hidden)
    weights, ids, _ = output.routing
    expected = torch.zeros(34, HIDDEN, dtype=torch.float64)
    for first, experts in zip((0, 4, 6), layer.experts, strict=True):
        here = (ids >= first) & (ids < first + experts.num_experts)
        plan = moe_ext.routing_plan(torch.where(here, ids - first, -1), experts.num_experts)
        expected += experts(hidden.view(34, HIDDEN), plan, weights)
    assert relative_error(output.hidden.view(34, HIDDEN), expected) < 1e-12
    assert layer.statistics.dropped_slots == 0 and layer.statistics.tokens_per_expert.sum() == 34 * 3


def test_capacity_is_shared_out():
    layer = make_groups(capacity_factor=1.0)
    # 60 tokens, 3 slots each, over 2 * 4 + 1 * 2 + 0.5 * 4 = 12 shares.
    assert [layer.capacity(60, g) for g in range(3)] == [30, 15, 8]
    layer(make_rows(60, HIDDEN, dtype=torch.float64))
    limits = torch.tensor([30] * 4 + [15] * 2 + [8] * 4)
    over = (layer.statistics.tokens_per_expert - limits).clamp(min=0).sum()
    assert over > 0 and layer.statistics.dropped_slots == over


def test_bad_parts():
    with pytest.raises(ValueError, match="experts: expected 8, the router's number, got 4"):
        MoE(TopKRouter(HIDDEN, 8, 2), Experts(4, HIDDEN, 6))
    with pytest.raises(TypeError, match="experts: expected a module with an integer num_experts, got Linear"):
        MoE(TopKRouter(HIDDEN, 8, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="capacity_shares: expected 1 numbers, got 2"):
        ExpertGroups([Experts(4, HIDDEN, 6)], capacity_shares=[1, 2])
    with pytest.raises(TypeError, match="nope: expected an option of router_losses"):
        MoE(TopKRouter(HIDDEN, 4, 2), Experts(4, HIDDEN, 6), losses={"nope": 1})


@pytest.mark.parametrize("bias", [False, True])
def test_frozen_experts_get_gradient_zero_and_no_product(bias):
    torch.manual_seed(0)
    experts = Experts(6, 64, 48, bias=bias)
    hidden = torch.randn(240, 64, requires_grad=True)
    plan = moe_ext.routing_plan(torch.arange(240)[:, None] % 6, 6)
    inputs = [hidden, *experts.parameters()]
    whole = torch.autograd.grad(experts(hidden, plan).square().sum(), inputs)
    experts.freeze_experts([0, 4])
    some = torch.autograd.grad(experts(hidden, plan).square().sum(), inputs)
    assert torch.equal(some[0], whole[0])
    for found, before in zip(some[1:], whole[1:], strict=True):
        assert not found[[0, 4]].any() and torch.equal(found[[1, 2, 3, 5]], before[[1, 2, 3, 5]])
    assert "trainable_experts" not in experts.state_dict()
    experts.freeze_experts([])
    assert torch.equal(torch.autograd.grad(experts(hidden, plan).square().sum(), inputs)[1], whole[1])
    with pytest.raises(ValueError, match="ids: expected ids of 6 experts, got 6"):
        experts.freeze_experts([6])
