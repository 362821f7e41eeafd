"""MoE-Fusion and MoE-VRD: image by image in log space, and noisy gates of which the router learns."""

from __future__ import annotations

import pytest
import torch
from formulas import assert_same, rows
from torch import nn

from cases import make_rows
from moe_ext.recipes import MoEFusion, MoEVRD


def set_gates(router: nn.Module, seed: int = 20) -> None:
    for s, parameter in enumerate((router.logits.weight, router.noise.weight)):
        parameter.data.copy_(make_rows(*parameter.shape, dtype=torch.float64, seed=seed + s))


def test_fusion_of_two_modalities_image_by_image():
    experts = [nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)) for _ in range(4)]
    model = MoEFusion(experts, (3, 6, 5), gate_size=7).double()
    set_gates(model.router)
    images, gate_input = rows(5, 2, 3, 6, 5), rows(5, 7, seed=3)
    output, routing = model(images, gate_input, generator=torch.Generator().manual_seed(2))
    assert (torch.autograd.grad(routing.balance_loss, model.router.noise.weight, retain_graph=True)[0] != 0).any()
    # The weights of the reference are ours, detached from the first graph by routing again.
    again = model.router(gate_input, generator=torch.Generator().manual_seed(2))
    expected = []
    for image, weights, ids in zip(images, again.topk_weights, again.topk_ids.tolist(), strict=True):
        total = sum(w * experts[e](image[None, e // 2]).exp() for w, e in zip(weights, ids, strict=True))
        expected.append(total.log().flatten())
    assert output.shape == (5, 2 * 6 * 5)
    assert_same([output], [torch.stack(expected)], [images, gate_input, *model.parameters()])


@pytest.mark.parametrize("training", [True, False])
def test_detection_heads_are_added_unweighted(training):
    experts = [nn.Sequential(nn.Linear(6, 4), nn.LogSoftmax(-1)) for _ in range(5)]
    model = MoEVRD(experts, 6, topk=4, test_topk=2).double().train(training)
    set_gates(model.router)
    features = rows(9, 6)
    output, routing = model(features, generator=torch.Generator().manual_seed(2))
    assert routing.topk_ids.shape == (9, 4 if training else 2)
    expected = torch.stack(
        [
            torch.logsumexp(torch.stack([experts[e](x) for e in ids]), 0)
            for x, ids in zip(features, routing.topk_ids.tolist(), strict=True)
        ]
    )
    assert torch.autograd.grad(output.sum(), model.router.logits.weight, allow_unused=True, retain_graph=True) == (
        None,
    )
    assert_same([output], [expected], [features, *model.experts.parameters()])


def test_what_underflows_is_the_least_number():
    model = MoEVRD([nn.Linear(2, 3) for _ in range(2)], 2, 1, 1)
    for parameter in model.experts.parameters():
        parameter.data.fill_(-1e4)
    features = torch.ones(4, 2, requires_grad=True)
    output, _ = model(features)
    output.sum().backward()
    assert (output == torch.tensor(2.0**-52).log()).all() and features.grad.isfinite().all()
