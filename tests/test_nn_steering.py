"""Steering: what each buffer does, that the router's own options stay, and that nothing is compiled again."""

from __future__ import annotations

import copy

import pytest
import torch

from cases import make_rows
from compare import relative_error
from moe_ext.nn import Experts, MoE, SteeredRouter, TopKRouter


def make_router(**options) -> TopKRouter:
    torch.manual_seed(0)
    return TopKRouter(16, 8, 2, renormalize=True, **options)


HIDDEN = make_rows(65, 16, dtype=torch.float32)


@pytest.mark.parametrize(
    "options", [{}, {"score_function": "sigmoid", "selection_bias": True, "num_groups": 4, "topk_groups": 2}]
)
def test_unsteered_it_is_the_router(options):
    router = make_router(**options)
    steered = SteeredRouter.of(router)
    assert set(steered.state_dict()) == set(router.state_dict()) and steered.logits is router.logits
    for ours, theirs in zip(steered(HIDDEN), router(HIDDEN), strict=True):
        assert torch.equal(ours, theirs)
    if options:
        router.selection_bias[3] = 5.0
        assert (steered(HIDDEN).topk_ids == 3).any(1).all()


def test_off_is_a_mask():
    router = make_router()
    steered = SteeredRouter.of(router)
    steered.steer(off=[1, 4])
    mask = torch.ones(8, dtype=torch.bool)
    mask[[1, 4]] = False
    for ours, theirs in zip(steered(HIDDEN), router(HIDDEN, expert_mask=mask), strict=True):
        assert torch.equal(ours, theirs)
    own = make_router(expert_mask=torch.arange(8) != 6)
    steered = SteeredRouter.of(own)
    steered.steer(off=[1])
    assert not set(steered(HIDDEN).topk_ids.unique().tolist()) & {1, 6}
    steered.steer(off=range(8))
    assert (steered(HIDDEN).topk_ids == -1).all() and (steered(HIDDEN).topk_weights == 0).all()


@pytest.mark.parametrize("order", ["score_then_select", "select_then_score"])
def test_on_is_in_every_selection_and_weighed_by_its_score(order):
    torch.manual_seed(0)
    router = TopKRouter(16, 8, 2, score_order=order)
    steered = SteeredRouter.of(router)
    steered.steer(on=[5])
    weights, ids, logits = steered(HIDDEN)
    assert (ids[:, 0] == 5).all()
    best_other = torch.where(torch.arange(8) == 5, float("-inf"), logits).argmax(1)
    assert torch.equal(ids[:, 1].long(), best_other)
    expected = torch.softmax(logits if order == "score_then_select" else logits.gather(1, ids.long()), dim=1)
    expected = expected.gather(1, ids.long()) if order == "score_then_select" else expected
    assert relative_error(weights, expected) < 1e-6
    steered.steer(on=[7, 3, 6])
    assert (steered(HIDDEN).topk_ids == torch.tensor([3, 6])).all()
    steered.steer(on=[7], off=[7])
    assert not (steered(HIDDEN).topk_ids == 7).any()


def test_gain_multiplies_the_weight():
    router = make_router(scale=2.0, expert_gain=torch.arange(8.0))
    steered = SteeredRouter.of(router)
    steered.steer(gain={2: 0.0, 3: 1.5})
    weights, ids, _ = router(HIDDEN)
    factor = torch.ones(8)
    factor[2], factor[3] = 0.0, 1.5
    assert torch.equal(steered(HIDDEN).topk_ids, ids)
    assert relative_error(steered(HIDDEN).topk_weights, weights * factor[ids.long()]) < 1e-6


def test_wrong_ids_are_named():
    with pytest.raises(ValueError, match="on: expected ids of 8 experts, got 8"):
        SteeredRouter.of(make_router()).steer(on=[8])
    with pytest.raises(ValueError, match="gain: expected ids of 8 experts, got -1"):
        SteeredRouter.of(make_router()).steer(gain={-1: 2.0})


def test_steering_compiles_nothing_again():
    torch._dynamo.reset()  # what other tests compiled of the same code
    layer = MoE(SteeredRouter.of(make_router()), Experts(8, 16, 12))
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for command in ({}, {"off": [1, 4]}, {"on": [5]}, {"gain": {2: 0.0}}, {}):
            layer.router.steer(**command)
            compiled.router.steer(**command)
            assert torch.equal(compiled(HIDDEN).hidden, layer(HIDDEN).hidden), command
