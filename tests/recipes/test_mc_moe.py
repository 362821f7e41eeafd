"""MC-MoE: bits against brute force and a greedy, costs by hand, pruning token by token."""

from __future__ import annotations

import itertools

import pytest
import torch
from formulas import all_outputs, assert_same, mixture, rows

from cases import make_rows
from compare import relative_error
from moe_ext.nn import Experts, MoELayer, TopKRouter
from moe_ext.recipes import allocate_bits, compress_experts, compression_costs, prune_routing
from moe_ext.recipes.mc_moe import round_weight


def brute_force(costs: torch.Tensor, budget: int) -> float:
    return min(
        sum(costs[e, b - 1].item() for e, b in enumerate(bits))
        for bits in itertools.product((1, 2, 3), repeat=len(costs))
        if sum(bits) <= budget and 2 in bits and 3 in bits
    )


@pytest.mark.parametrize("budget", [10, 14, 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_bits_are_the_best_there_are(budget, seed):
    spread = make_rows(7, 1, dtype=torch.float64, seed=seed).exp()
    costs = 1e-6 * spread * make_rows(7, 3, dtype=torch.float64, seed=seed + 9).abs().cumsum(1).flip(1)
    bits = allocate_bits(costs, budget)
    found = costs.gather(1, bits[:, None] - 1).sum().item()
    assert bits.sum() <= budget and {2, 3} <= set(bits.tolist())
    assert found == pytest.approx(brute_force(costs, budget), rel=1e-9)


def test_a_greedy_is_far_off():
    """Bits that are handed out one by one, to whoever gains most by the next one, miss a gain that needs two."""
    costs = torch.tensor([[10.0, 9.9, 0.0], [10.0, 9.9, 0.0], [4.0, 3.0, 2.0], [4.0, 3.0, 2.0]], dtype=torch.float64)
    bits, left = [1] * 4, 9 - 4
    while left:
        gains = [costs[e, b - 1] - costs[e, b] if b < 3 else torch.tensor(-1.0) for e, b in enumerate(bits)]
        bits[int(torch.stack([g.double() for g in gains]).argmax())] += 1
        left -= 1
    greedy = sum(costs[e, b - 1].item() for e, b in enumerate(bits))
    assert greedy > 1.9 * brute_force(costs, 9)
    assert costs.gather(1, allocate_bits(costs, 9)[:, None] - 1).sum().item() == pytest.approx(brute_force(costs, 9))
    with pytest.raises(ValueError, match="budget: expected at least 7 bits for 4 experts, got 6"):
        allocate_bits(costs, 6)


@pytest.mark.parametrize("inputs", [128, 256, 20])
def test_rounding_takes_as_many_values_as_bits_allow(inputs):
    weight = make_rows(3, inputs, dtype=torch.float64)
    errors = []
    for bits in (1, 2, 3):
        rounded = round_weight(weight, bits)
        groups = rounded.view(3, -1, min(inputs, 128))
        assert all(len(g.unique()) <= 2**bits for g in groups.flatten(0, 1))
        errors.append((rounded - weight).norm())
    assert errors[0] > errors[1] > errors[2] > 0
    assert torch.equal(round_weight(torch.ones(2, 8), 2), torch.ones(2, 8))


def test_costs_by_hand():
    layer = MoELayer(16, 12, 5, 2, router={"renormalize": True}).double()
    hidden = rows(40, 16).detach()
    output = layer(hidden)
    costs = compression_costs(layer.experts, hidden, output.routing)
    exact = all_outputs(layer.experts, hidden)
    for bits in (1, 2, 3):
        narrow = compress_experts(layer.experts, torch.full((5,), bits))
        outputs = all_outputs(narrow, hidden)
        for e in range(5):
            here = output.topk_ids == e
            tokens = here.any(1)
            error = (outputs[e] - exact[e])[tokens].norm()
            weight = output.topk_weights[here].mean()
            assert relative_error(costs[e, bits - 1], tokens.double().sum() / 80 * weight**1.5 * error) < 1e-10
    mixed = compress_experts(layer.experts, torch.tensor([3, 1, 2, 2, 1]))
    assert torch.equal(mixed.down_weight[2], round_weight(layer.experts.down_weight[2], 2))
    assert (costs[:, 0] > costs[:, 2]).all()


def test_pruned_tokens_one_by_one(backend):
    router = TopKRouter(16, 8, 2, renormalize=True, backend=backend).double()
    router.logits.weight.data *= 3
    experts = Experts(8, 16, 12, backend=backend).double()
    hidden, attention = rows(50, 16), make_rows(50, dtype=torch.float64, seed=5).abs()
    routing = prune_routing(router, hidden, attention)
    scores = torch.softmax(hidden @ router.logits.weight.T, dim=-1)
    importance = attention * hidden.detach().abs().sum(1)
    expected, kept, rescued = [], [], 0
    for t in range(50):
        best = scores[t].topk(2)
        close, important = bool(best.values[1] >= 0.5 * best.values[0]), bool((importance > importance[t]).sum() < 5)
        take, rescued = [True, close or important], rescued + (important and not close)
        if (importance < importance[t]).sum() < 5:
            take = [False, False]
        weights = torch.stack([v * k for v, k in zip(best.values, take, strict=True)])
        weights = weights / weights.sum() if any(take) else weights
        expected.append(torch.zeros(8, dtype=torch.float64).scatter(0, best.indices, weights))
        kept.append(sum(take))
    assert kept.count(0) == 5 and 1 in kept and 2 in kept and rescued > 0
    assert [(ids >= 0).sum().item() for ids in routing.topk_ids] == kept
    plan = experts.ops.routing_plan(routing.topk_ids, 8)
    assert plan.tokens_per_expert.sum() == sum(kept) < 100
    exact = mixture(all_outputs(experts, hidden), torch.stack(expected))
    inputs = [hidden, *router.parameters(), *experts.parameters()]
    assert_same([experts(hidden, plan, routing.topk_weights)], [exact], inputs)
