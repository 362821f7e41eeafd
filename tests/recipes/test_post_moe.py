"""Post-MoE: in training the family's expert is there, its weight gathered; copies are the dense FFN."""

from __future__ import annotations

import torch
from formulas import all_outputs, assert_same, mixture, rows

from compare import relative_error
from moe_ext.nn import Experts
from moe_ext.recipes import PostMoE


def make(backend: str) -> tuple[Experts, PostMoE]:
    dense = Experts(1, 10, 6).double()
    return dense, PostMoE(dense, backend=backend)


def test_copies_are_the_dense_ffn(backend):
    dense, layer = make(backend)
    hidden = rows(3, 5, 10)
    families = torch.tensor([[0], [6], [-1]])
    expected = all_outputs(dense, hidden.view(15, 10))[0].view(3, 5, 10)
    for training in (True, False):
        assert relative_error(layer.train(training)(hidden, families).hidden, expected) < 1e-12


def test_the_family_is_forced_in_training(backend):
    _, layer = make(backend)
    torch.nn.init.normal_(layer.experts.down_weight)
    hidden = rows(3, 5, 10)
    families = torch.tensor([[2], [6], [-1]])
    x, forced = hidden.view(15, 10), families.expand(3, 5).reshape(15)
    scores = torch.softmax(x @ layer.router.logits.weight.T, dim=-1)
    ids = scores.topk(2).indices
    absent = (forced >= 0) & ~(ids == forced[:, None]).any(1)
    assert absent.any() and not absent.all()
    ids = torch.where(absent[:, None] & (torch.arange(2) == 1), forced[:, None], ids)
    gathered = scores.gather(1, ids)
    weights = torch.zeros_like(scores).scatter(1, ids, gathered / gathered.sum(-1, keepdim=True))
    expected = mixture(all_outputs(layer.experts, x), weights).view(3, 5, 10)
    output = layer(hidden, families)
    assert_same([output.hidden], [expected], [hidden, *layer.parameters()])
    assert ((output.routing.topk_ids == forced[:, None]).any(1) | (forced < 0)).all()
    layer.eval()
    assert torch.equal(layer(hidden, families).hidden, layer(hidden).hidden)
