"""MoExtend: bitwise the old layer while the new expert is out of reach; calibrated weights; what trains."""

from __future__ import annotations

import torch
from formulas import all_outputs, assert_same, keep_topk, mixture, rows

from compare import relative_error
from moe_ext.nn import MoELayer
from moe_ext.recipes import MoExtend, layers_to_extend


def make(backend: str) -> tuple[MoELayer, MoExtend]:
    base = MoELayer(10, 6, 4, 2, router={"renormalize": True}, backend=backend).double()
    return base, MoExtend(base, source=3)


def test_out_of_reach_it_is_the_old_layer(backend):
    """A new logit of minus infinity. On the twins bitwise; the kernels' softmax rounds otherwise than torch's."""
    base, layer = make(backend)
    hidden = rows(13, 10)
    mapped = layer.router.logits.forward
    layer.router.logits.forward = lambda x: mapped(x).index_fill(1, torch.tensor([4]), float("-inf"))
    ours, theirs = layer(hidden).hidden, base(hidden).hidden
    assert relative_error(ours, theirs) < 1e-14
    assert backend == "kernels" or torch.equal(ours, theirs)


def test_the_copy_is_no_identity(backend):
    """The copy takes the second slot where its source is first; where the source is second, it only ties with it."""
    base, layer = make(backend)
    hidden = rows(13, 10)
    changed = (layer(hidden).hidden - base(hidden).hidden).abs().amax(1) > 1e-6
    assert torch.equal(changed, base.statistics.topk_ids[:, 0] == 3) and changed.any() and not changed.all()


def test_formula(backend):
    _, layer = make(backend)
    for parameter in layer.calibration.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    hidden = rows(13, 10)
    old, new = layer.router.logits
    torch.nn.init.normal_(new.weight)  # no ties with its source
    scores = torch.softmax(hidden @ torch.cat([old.weight, new.weight]).T, dim=-1)
    weights = (keep_topk(scores, 2) > 0) * (scores + layer.calibration(scores))
    outputs = torch.cat([all_outputs(group, hidden) for group in layer.experts])
    expected = mixture(outputs, weights / weights.sum(-1, keepdim=True))
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert len(trained) == 1 + 2 + 4
    assert_same([layer(hidden).hidden], [expected], [hidden, *trained])


def test_layers_to_extend():
    before = torch.tensor([[10.0, 10, 10, 10]] * 4)
    after = torch.tensor([[5.0, 5, 5, 5], [4, 1, 1, 2], [9, 11, 10, 10], [1, 1, 1, 37]])
    assert layers_to_extend(before, after, 2).tolist() == [1, 3]
