"""MoE-Fusion and MoE-VRD: image by image in log space, and noisy gates of which the router learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cases import make_rows
from compare import relative_error
from moe_ext.recipes import MoEFusion, MoEVRD


def set_gates(router: nn.Module, seed: int = 20) -> None:
    for s, parameter in enumerate((router.logits.weight, router.noise.weight)):
        parameter.data.copy_(make_rows(*parameter.shape, dtype=torch.float64, seed=seed + s))


def check_gradients(output, expected, inputs) -> None:
    assert relative_error(output, expected) < 1e-12
    grad = make_rows(*output.shape, dtype=torch.float64, seed=9)
    ours = torch.autograd.grad(output, inputs, grad, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(expected, inputs, grad, retain_graph=True, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None or (a == 0).all()) if b is None else relative_error(a, b) < 1e-10


def test_fusion_of_two_modalities_image_by_image():
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)) for _ in range(4)]
    model = MoEFusion(experts, (3, 6, 5), gate_size=7).double()
    set_gates(model.router)
    images = make_rows(5, 2, 3, 6, 5, dtype=torch.float64).requires_grad_()
    gate_input = make_rows(5, 7, dtype=torch.float64, seed=3).requires_grad_()
    output, routing = model(images, gate_input, generator=torch.Generator().manual_seed(2))
    expected = []
    for image, weights, ids in zip(images, routing.topk_weights, routing.topk_ids.tolist(), strict=True):
        total = sum(w * experts[e](image[None, e // 2]).exp() for w, e in zip(weights, ids, strict=True))
        expected.append(total.log().flatten())
    check_gradients(output, torch.stack(expected), [images, gate_input, *model.parameters()])
    assert output.shape == (5, 2 * 6 * 5)
    (grad,) = torch.autograd.grad(routing.balance_loss, model.router.noise.weight)
    assert (grad != 0).any()


@pytest.mark.parametrize("training", [True, False])
def test_detection_heads_are_added_unweighted(training):
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Linear(6, 4), nn.LogSoftmax(-1)) for _ in range(5)]
    model = MoEVRD(experts, 6, topk=4, test_topk=2).double().train(training)
    set_gates(model.router)
    features = make_rows(9, 6, dtype=torch.float64).requires_grad_()
    output, routing = model(features, generator=torch.Generator().manual_seed(2))
    assert routing.topk_ids.shape == (9, 4 if training else 2)
    expected = torch.stack(
        [
            torch.logsumexp(torch.stack([experts[e](x) for e in ids]), 0)
            for x, ids in zip(features, routing.topk_ids.tolist(), strict=True)
        ]
    )
    check_gradients(output, expected, [features, *model.experts.parameters()])
    assert torch.autograd.grad(output.sum(), model.router.logits.weight, allow_unused=True, retain_graph=True) == (
        None,
    )


def test_what_underflows_is_the_least_number():
    model = MoEVRD([nn.Linear(2, 3) for _ in range(2)], 2, 1, 1)
    for parameter in model.experts.parameters():
        parameter.data.fill_(-1e4)
    features = torch.ones(4, 2, requires_grad=True)
    output, _ = model(features)
    output.sum().backward()
    assert (output == torch.tensor(2.0**-52).log()).all() and features.grad.isfinite().all()
