"""BigMac: ascend after the sum is ascend after every expert, and what travels is d' / hidden of the bytes."""

from __future__ import annotations

import torch
from formulas import all_outputs, assert_same, keep_topk, mixture, rows

import moe_ext
from moe_ext.recipes import BigMac


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
