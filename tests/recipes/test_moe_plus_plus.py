"""MoE++ against its formula, and what its zero-computation experts do not cost, counted."""

from __future__ import annotations

import math

import pytest
import torch
from counting_exchange import CountingExchange
from formulas import all_outputs, assert_same, keep_topk, rows

import moe_ext
from compare import relative_error
from moe_ext.distributed import DispatchOptions, expert_parallel
from moe_ext.recipes import MoEPlusPlus
from rank_pool import RankPool

HIDDEN, FFN, TOTAL = 16, 5, 9


def formula(layer: MoEPlusPlus, x, previous):
    """Ids: 5 FFN experts, 2 constant, 1 copy, 1 zero; the experts see 2 x."""
    map = layer.router.logits
    logits = torch.tanh(x @ map.first.weight.T) @ map.second.weight.T
    if previous is not None:
        logits = logits + previous @ map.residual.weight.T
    scores = torch.softmax(logits, dim=-1)
    weights = keep_topk(scores, 2)
    slots = (weights > 0).sum(0)
    weights = weights * (torch.arange(TOTAL) < TOTAL - 1)
    weights = weights / weights.sum(-1, keepdim=True)
    ffn, rest = layer.experts
    x = 2 * x
    mixing = [torch.softmax(x @ w.T, dim=-1) for w in rest.mixing_weight]
    constant = [m[:, :1] * x + m[:, 1:] * v for m, v in zip(mixing, rest.constants, strict=True)]
    outputs = torch.cat([all_outputs(ffn, x), torch.stack([*constant, x, torch.zeros_like(x)])])
    eta = torch.tensor([1.0] * FFN + [0.75] * (TOTAL - FFN), dtype=torch.float64)
    loss = (eta * slots / x.shape[0] * scores.mean(0)).sum()
    return torch.einsum("eth,te->th", outputs, weights), loss, logits


def test_two_layers_with_the_gating_residual(backend):
    first, second = (MoEPlusPlus(HIDDEN, 12, FFN, backend=backend).double() for _ in range(2))
    hidden = rows(33, HIDDEN)
    ours = first(hidden)
    later = second(ours.hidden, ours.routing.logits)
    middle, first_loss, logits = formula(first, hidden, None)
    expected, second_loss, _ = formula(second, middle, logits)
    assert_same(
        [later.hidden, ours.balance_loss, later.balance_loss],
        [expected, first_loss, second_loss],
        [hidden, *first.parameters(), *second.parameters()],
    )
    assert ours.routing.topk_ids.max() == TOTAL - 1  # the zero expert is among the picked


@pytest.mark.parametrize("capacity_factor", [None, 0.6])
def test_zero_computation_takes_no_rows_and_no_bytes(capacity_factor, backend):
    """Rows that are permuted and multiplied, and rows that are sent, are those of FFN slots."""
    layer = MoEPlusPlus(HIDDEN, 12, FFN, capacity_factor=capacity_factor, backend=backend).double()
    hidden = rows(64, HIDDEN)
    ids = layer(hidden).routing.topk_ids
    ffn_slots = (ids < FFN).sum()
    assert 0 < ffn_slots < ids.numel()
    plans = []
    handles = [g.register_forward_pre_hook(lambda _, inputs: plans.append(inputs[1])) for g in layer.experts]
    layer(hidden)
    for handle in handles:
        handle.remove()
    multiplied = plans[0].expert_offsets[-1]
    if capacity_factor is None:
        assert multiplied == ffn_slots and layer.statistics.dropped_slots == 0
    else:
        limits = [layer.capacity(64, g) for g in range(2)]
        assert limits == [math.ceil(0.6 * s * 2 * 64 / (0.75 * FFN + TOTAL - FFN)) for s in (0.75, 1)]
        asked = layer.statistics.tokens_per_expert
        kept = torch.minimum(asked, torch.tensor([limits[0]] * FFN + [limits[1]] * (TOTAL - FFN)))
        assert multiplied == kept[:FFN].sum() and layer.statistics.dropped_slots == (asked - kept).sum() > 0
    # Over two ranks that own the FFN experts, a token travels once to each rank that it has an FFN expert on.
    offsets = torch.tensor([0, 3, FFN]).int()
    sent = moe_ext.a2a_plan(ids, offsets)
    needed = torch.stack([(ids < 3).any(1), ((ids >= 3) & (ids < FFN)).any(1)]).sum()
    assert sent.send_offsets[-1] == needed < moe_ext.a2a_plan(ids, torch.tensor([0, 3, TOTAL]).int()).send_offsets[-1]


def test_share_of_ffn_slots_at_capacity():
    """At full load the FFN experts take tau N_F / (tau N_F + N_Z) of the slots: 0.60 at (8, 4, 0.75)."""
    layer = MoEPlusPlus(HIDDEN, 12, 8, capacity_factor=1.0)
    ffn, rest = layer.capacity(1200, 0) * 8, layer.capacity(1200, 1) * 4
    assert ffn / (ffn + rest) == pytest.approx(0.60) and ffn + rest == 2400
    assert (ffn + rest) / ffn == pytest.approx(1.67, abs=0.01)  # the most that it can gain


def over_two_ranks(group):
    """Errors of this rank's outputs and gradients, its slots at FFN experts, what it sent, and sends with FFN experts
    in the place of all others."""
    torch.manual_seed(0)
    layer = MoEPlusPlus(64, 12, FFN).double()
    ffn, rest = layer.experts
    hidden = rows(2 * 40, 64).detach().chunk(2)[group.rank()].requires_grad_()
    parameters = [hidden, *layer.router.parameters(), *rest.parameters()]
    exact = layer(hidden).hidden
    exact = [exact, *torch.autograd.grad(exact.square().sum(), parameters, allow_unused=True)]

    def send(exchange, routing, bounds):
        def compute(received):
            first, last = bounds[group.rank() : group.rank() + 2]
            plan = moe_ext.routing_plan(received.topk_ids, last - first)
            ids = torch.arange(first, last) % FFN  # beyond the FFN experts: stand-ins of the same cost
            weights = [ffn.gate_up_weight[ids], ffn.down_weight[ids]]
            return moe_ext.moe_mlp(received.hidden, *weights, plan, received.topk_weights, weight_layout="enk")

        offsets, options = torch.tensor(bounds).int(), DispatchOptions(form="slot")
        return expert_parallel(2 * hidden, routing.topk_ids, routing.topk_weights, compute, exchange, offsets, options)

    routing = layer.router(hidden, None)
    exchange = CountingExchange(group)
    output = send(exchange, routing, [0, 3, FFN]).hidden
    plan = moe_ext.routing_plan(routing.topk_ids - FFN, rest.num_experts)
    output = output + rest(2 * hidden, plan, routing.topk_weights)
    forward = (exchange.rows_sent, exchange.sent)
    found = [output, *torch.autograd.grad(output.square().sum(), parameters, allow_unused=True)]
    everything = CountingExchange(group)
    send(everything, routing, [0, 4, TOTAL])
    errors = [float((a - b).abs().max()) for a, b in zip(found, exact, strict=True) if b is not None]
    return max(errors), int((routing.topk_ids < FFN).sum()), forward, (everything.rows_sent, everything.sent)


def test_bytes_between_ranks_are_those_of_ffn_slots(tmp_path):
    """Counted at the all-to-all of two ranks, there and back; forward and backward equal one rank's."""
    with RankPool(2, tmp_path) as pool:
        answers = pool.run(2, over_two_ranks)
    # Every FFN slot is a row to its rank and, from there, a row back; every slot would be one of the whole.
    ffn_slots = sum(answer[1] for answer in answers)
    assert 0 < ffn_slots < 2 * 40 * 2
    assert sum(answer[2][0] for answer in answers) == 2 * ffn_slots
    assert sum(answer[3][0] for answer in answers) == 2 * 2 * 40 * 2
    share = sum(answer[2][1] for answer in answers) / sum(answer[3][1] for answer in answers)
    assert share == pytest.approx(ffn_slots / (2 * 40 * 2), rel=1e-12)
    assert all(answer[0] < 1e-11 for answer in answers)


def test_all_tokens_at_the_zero_expert(backend):
    """Weights 0, not NaN, where both slots are zero experts."""
    kinds = {"num_constant": 0, "num_copy": 0, "num_zero": 3}
    layer = MoEPlusPlus(HIDDEN, 12, 1, zero_computation=kinds, backend=backend).double()
    with torch.no_grad():
        layer.router.logits.second.weight[0] = 0
        layer.router.logits.first.weight.abs_()
        layer.router.logits.second.weight[1:] = 5
    hidden = rows(7, HIDDEN).detach().abs()
    output = layer(hidden)
    assert (output.routing.topk_ids > 0).all()
    assert torch.equal(output.hidden, torch.zeros_like(hidden)) and relative_error(output.hidden, 0 * hidden) == 0


def test_compiles_without_a_graph_break():
    layer = MoEPlusPlus(HIDDEN, 12, FFN, capacity_factor=1.1)
    hidden, previous = rows(33, HIDDEN).detach().float(), rows(33, TOTAL, seed=5).detach().float()
    results = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        output = run(hidden, previous)
        loss = output.hidden.square().sum() + output.balance_loss
        results.append([output.hidden, output.routing.logits, *torch.autograd.grad(loss, list(layer.parameters()))])
    for compiled, eager in zip(*results, strict=True):
        assert relative_error(compiled, eager) < 1e-5
