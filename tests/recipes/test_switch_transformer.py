"""Switch Transformer: the formula with capacity, jitter in training only."""

from __future__ import annotations

import torch
from formulas import assert_same, mlp, rows

from cases import make_rows
from compare import relative_error
from moe_ext.recipes import SwitchTransformer


def test_one_expert_per_token_within_capacity():
    layer = SwitchTransformer(16, 12, 4, capacity_factor=0.75).double().eval()
    hidden = rows(3, 7, 16)
    x = hidden.view(21, 16)
    scores = torch.softmax(x @ layer.router.logits.weight.T, dim=1)
    weight, pick = scores.max(1)
    expected, dropped = torch.zeros_like(x), 0
    for e in range(4):
        # ceil(0.75 * 21 / 4) = 4 tokens per expert, those with the highest weight.
        tokens = (pick == e).nonzero().squeeze(1)
        kept = tokens[weight[tokens].argsort(descending=True)[:4]]
        dropped += len(tokens) - len(kept)
        expected = expected.index_put((kept,), weight[kept, None] * mlp(layer.experts, e, x[kept]))
    balance = 4 * (torch.bincount(pick, minlength=4).double() / 21 * scores.mean(0)).sum()
    output = layer(hidden)
    assert dropped > 0 and layer.statistics.dropped_slots == dropped
    assert_same([output.hidden, output.balance_loss], [expected.view(3, 7, 16), balance], [hidden, *layer.parameters()])


def test_jitter_is_for_the_router_in_training():
    layer = SwitchTransformer(16, 12, 4, jitter=0.3)
    hidden = make_rows(21, 16, dtype=torch.bfloat16)
    draw = torch.rand(21, 16, generator=torch.Generator().manual_seed(3))
    seen = hidden.float() * (0.7 + 0.6 * draw)
    logits = layer.bfloat16()(hidden, generator=torch.Generator().manual_seed(3)).routing.logits
    assert relative_error(logits, seen @ layer.router.logits.weight.float().T) < 1e-5
    layer.eval()
    assert relative_error(layer(hidden).routing.logits, hidden.float() @ layer.router.logits.weight.float().T) < 1e-5
