"""BigMac: ascend after the sum is ascend after every expert, and what travels is d' / hidden of the bytes."""

from __future__ import annotations

import torch
from counting_exchange import CountingExchange
from formulas import all_outputs, assert_same, keep_topk, mixture, rows

import moe_ext
from moe_ext.distributed import DispatchOptions
from moe_ext.recipes import BigMac
from rank_pool import RankPool


def test_ascend_after_the_sum_is_ascend_after_every_expert(backend):
    layer = BigMac(16, 12, 8, 3, bottleneck_size=4, backend=backend).double()
    hidden = rows(21, 16)
    down, up = layer.experts.descend.weight, layer.experts.ascend.weight
    scores = torch.softmax(hidden @ layer.router.logits.weight.T, dim=-1)
    every = all_outputs(layer.experts.experts, hidden @ down.T) @ up.T
    expected = mixture(every, keep_topk(scores, 3, renormalize=True))
    assert_same([layer(hidden).hidden], [expected], [hidden, *layer.parameters()])


def test_bytes_that_travel():
    layer = BigMac(16, 12, 8, 3, bottleneck_size=4)
    hidden = rows(21, 16).detach().float()
    weights, ids, _ = layer.router(hidden)
    plan = moe_ext.a2a_plan(ids, moe_ext.even_rank_expert_offsets(8, 4))
    sent = [moe_ext.a2a_pack(x, ids, weights, plan)[0] for x in (layer.experts.descend(hidden), hidden)]
    narrow, wide = (int(plan.send_counts.sum()) * x.shape[1] * x.element_size() for x in sent)
    assert narrow / wide == 4 / 16 and narrow > 0


def over_two_ranks(group):
    """Outputs and input gradients of this rank's tokens, and the bytes that it sent, with and without the descent."""
    torch.manual_seed(0)
    whole = BigMac(256, 12, 8, 2, bottleneck_size=64).double()
    hidden = rows(2 * 40, 256).detach().chunk(2)[group.rank()].requires_grad_()
    exchange = CountingExchange(group)
    options = DispatchOptions(form="slot")
    layer = BigMac.over_ranks(256, 12, 8, 2, exchange, bottleneck_size=64, dispatch=options).double()
    layer.router.load_state_dict(whole.router.state_dict())
    layer.descend.load_state_dict(whole.experts.descend.state_dict())
    layer.ascend.load_state_dict(whole.experts.ascend.state_dict())
    layer.load_experts(dict(whole.experts.experts.named_parameters()))
    found = layer(hidden).hidden
    narrow = exchange.sent
    (grad,) = torch.autograd.grad(found.square().sum(), hidden)
    expected = whole(hidden).hidden
    (exact,) = torch.autograd.grad(expected.square().sum(), hidden)
    exchange.sent = 0
    wide = BigMac.over_ranks(256, 12, 8, 2, exchange, bottleneck_size=256, dispatch=options).double()
    wide.router.load_state_dict(whole.router.state_dict())
    wide(hidden)
    error = max(float((found - expected).abs().max()), float((grad - exact).abs().max()))
    return error, narrow, exchange.sent


def test_over_ranks_it_is_the_same_layer_and_narrower_on_the_wire(tmp_path):
    with RankPool(2, tmp_path) as pool:
        answers = pool.run(2, over_two_ranks)
    for error, narrow, wide in answers:
        assert error < 1e-12
        # 16 bytes of id and padding travel beside the 64 or 256 doubles of a row, both ways.
        assert 0.25 <= narrow / wide < 0.27
