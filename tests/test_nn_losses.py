"""CV^2, importance, smooth load and the loss-free bias against their formulas written out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

import moe_ext
from cases import ROUTINGS, make_rows, make_topk_ids, make_topk_weights, non_contiguous
from compare import relative_error
from moe_ext.nn import (
    TopKRouter,
    cv_squared,
    dense_weights,
    device_balance_losses,
    expert_importance,
    smooth_load,
    update_selection_bias,
)


def test_cv_squared_by_hand():
    values = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64, requires_grad=True)
    assert math.isclose(cv_squared(values).item(), (4 + 1 + 0 + 9) / 3 / 9)
    assert math.isclose(cv_squared(values, correction=0).item(), (4 + 1 + 0 + 9) / 4 / 9)
    assert torch.autograd.gradcheck(cv_squared, values)
    assert math.isclose(cv_squared(torch.tensor([[1, 2], [3, 6]])).item(), 14 / 27, rel_tol=1e-6)


def test_cv_squared_of_equal_few_and_no_values():
    assert cv_squared(torch.full((7,), 2.5)) == 0 == cv_squared(torch.zeros(4))
    single = torch.ones(1, requires_grad=True)
    cv_squared(single).backward()
    assert single.grad == 0 and cv_squared(torch.empty(0)) == 0
    assert cv_squared(torch.ones(3, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("routing", ROUTINGS)
def test_dense_weights_and_importance(routing):
    ids = make_topk_ids(33, 7, 2, routing)
    ids[4] = torch.tensor([-1, 7])
    ids[5] = torch.tensor([3, 3])
    weights = make_topk_weights(33, 2, dtype=torch.float64).requires_grad_()
    expected = torch.zeros(33, 7, dtype=torch.float64)
    for t, j in torch.cartesian_prod(torch.arange(33), torch.arange(2)).tolist():
        if 0 <= ids[t, j] < 7:
            expected[t, ids[t, j]] += weights[t, j].detach()
    for given in (weights, non_contiguous(weights.detach())):
        assert relative_error(dense_weights(given, ids, 7), expected) < 1e-15
    importance = expert_importance(weights, ids, 7)
    assert relative_error(importance, expected.sum(0)) < 1e-14
    coefficients = make_rows(7, dtype=torch.float64)
    (grad,) = torch.autograd.grad(importance @ coefficients, weights)
    here = (ids >= 0) & (ids < 7)
    assert torch.equal(grad, torch.where(here, coefficients[ids.clamp(0, 6).long()], 0.0))


def device_losses_written_out(logits, ids, num_devices, devices_per_token, score, mask):
    """Device by device and token by token, as in DeepSeekMoE 3.3.2 and DeepSeek-V2 2.2.3."""
    num_experts = logits.shape[1]
    size, topk = num_experts // num_devices, ids.shape[1]
    scores = score(logits)
    scores = (scores / scores.sum(1, keepdim=True))[mask]
    computation = communication = 0.0
    for device in range(num_devices):
        experts = range(device * size, (device + 1) * size)
        counted = [row for row, kept in zip(ids.tolist(), mask.tolist(), strict=True) if kept]
        loads = [num_experts / (topk * len(counted)) * sum(row.count(e) for row in counted) for e in experts]
        sent = num_devices / (devices_per_token * len(counted)) * sum(any(e in row for e in experts) for row in counted)
        probability = sum(scores[:, e].mean() for e in experts)
        computation = computation + sum(loads) / size * probability
        communication = communication + sent * probability
    return computation, communication


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_device_balance_losses(routing, score):
    logits = make_rows(33, 12, dtype=torch.float64).requires_grad_()
    ids, mask = make_topk_ids(33, 12, 4, routing), torch.arange(33) % 5 != 2
    ids[3] = torch.tensor([-1, 12, 0, 1])
    function = {"softmax": lambda x: torch.softmax(x, 1), "sigmoid": torch.sigmoid,
                "sqrt_softplus": lambda x: F.softplus(x).sqrt()}[score]  # fmt: skip
    for devices, most, token_mask in ((4, 3, None), (3, None, mask), (1, None, None)):
        found = device_balance_losses(
            logits, ids, devices, devices_per_token=most, score_function=score, token_mask=token_mask
        )
        every = torch.ones(33, dtype=torch.bool) if token_mask is None else token_mask
        exact = device_losses_written_out(logits, ids, devices, most or min(4, devices), function, every)
        for ours, theirs in zip(found, exact, strict=True):
            assert relative_error(ours, theirs) < 1e-12
            grads = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (ours, theirs)]
            assert (grads[0] - grads[1]).abs().max() < 1e-14


def test_device_balance_losses_of_even_devices_are_one_and_masked_tokens_are_not_looked_at():
    logits = torch.zeros(8, 8)
    ids = torch.tensor([[0, 2], [1, 3], [4, 6], [5, 7]]).repeat(2, 1)
    for loss in device_balance_losses(logits, ids, 4):
        assert math.isclose(loss.item(), 1.0, rel_tol=1e-6)
    crowded = device_balance_losses(logits + 5 * (torch.arange(8) < 2), ids * 0 + torch.arange(2), 4)
    assert crowded[0] > 3.5 and crowded[1] > 1.7
    mask = torch.arange(8) != 3
    for score, bad in itertools.product(("softmax", "sigmoid", "sqrt_softplus"), (float("nan"), float("inf"))):
        held = logits.masked_fill(~mask[:, None], bad).requires_grad_()
        for loss in device_balance_losses(held, ids, 4, score_function=score, token_mask=mask):
            (grad,) = torch.autograd.grad(loss, held, retain_graph=True)
            assert loss.isfinite() and grad.isfinite().all() and not grad[3].any()
    with pytest.raises(ValueError, match="num_devices: expected a divisor of 8 experts, got 3"):
        device_balance_losses(logits, ids, 3)


def test_dense_weights_names_the_argument():
    with pytest.raises(ValueError, match=r"topk_weights, topk_ids: expected .* got \[3, 2\] and \[3, 1\]"):
        dense_weights(torch.ones(3, 2), torch.zeros(3, 1, dtype=torch.int32), 4)


def noisy_logits(num_tokens: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    clean = make_rows(num_tokens, num_experts, dtype=torch.float64)
    std = make_rows(num_tokens, num_experts, dtype=torch.float64, seed=5).abs() + 0.1
    return clean, clean + std * make_rows(num_tokens, num_experts, dtype=torch.float64, seed=6), std


def load_of(clean: torch.Tensor, noisy: torch.Tensor, std: torch.Tensor, topk: int) -> torch.Tensor:
    _, ids, next_logit = moe_ext.topk_gating(noisy, topk, return_next_logit=True)
    return smooth_load(clean, noisy, std, ids, next_logit)


@pytest.mark.parametrize("topk", [1, 2, 3])
def test_smooth_load_is_the_frequency_of_being_picked(topk):
    """Noise of one expert drawn again and again (at the quantiles of 20,001 strata), the others' as it was."""
    clean, noisy, std = noisy_logits(3, 4)
    draws = torch.special.ndtri((torch.arange(20001, dtype=torch.float64) + 0.5) / 20001)
    frequency = torch.zeros(4, dtype=torch.float64)
    for t, e in torch.cartesian_prod(torch.arange(3), torch.arange(4)).tolist():
        again = noisy[t].repeat(len(draws), 1)
        again[:, e] = clean[t, e] + std[t, e] * draws
        frequency[e] += (moe_ext.topk_gating(again, topk)[1] == e).double().sum() / len(draws)
    assert (load_of(clean, noisy, std, topk) - frequency).abs().max() < 1e-3


def test_smooth_load_gradient_and_precision():
    clean, noisy, std = noisy_logits(5, 6)
    inputs = [x.requires_grad_() for x in (clean, noisy.detach(), std)]
    assert torch.autograd.gradcheck(lambda *x: load_of(*x, 2), inputs)
    half = load_of(clean.bfloat16(), noisy.bfloat16(), std.bfloat16(), 2)
    assert half.dtype == torch.float32 and relative_error(half, load_of(*inputs, 2)) < 2e-2
    assert load_of(clean[:0], noisy[:0], std[:0], 2).tolist() == [0] * 6


def test_smooth_load_names_the_argument():
    logits, ids, next_logit = torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2)
    with pytest.raises(ValueError, match="clean_logits, noisy_logits, noise_std: expected"):
        smooth_load(logits, logits, torch.ones(4), ids, next_logit)
    with pytest.raises(ValueError, match=r"topk_ids: expected .* = \[2, 1 to 3\], got \[2, 4\]"):
        smooth_load(logits, logits, logits, ids.expand(2, 4), next_logit)
    with pytest.raises(ValueError, match=r"next_logit: expected \[num_tokens\] = \[2\], got \[3\]"):
        smooth_load(logits, logits, logits, ids, torch.zeros(3))


def test_selection_bias_moves_by_the_sign_of_the_violation():
    bias = torch.zeros(4)
    update_selection_bias(bias, torch.tensor([1, 4, 7, 4], dtype=torch.int32), rate=0.25)
    assert bias.tolist() == [0.25, 0, -0.25, 0]
    with pytest.raises(ValueError, match="tokens_per_expert: expected the shape of selection_bias"):
        update_selection_bias(bias, torch.ones(3))


def test_selection_bias_balances_a_skewed_router():
    """Loss-free balancing at work: a router that sends most tokens to two experts ends near the uniform load."""
    torch.manual_seed(0)
    router = TopKRouter(16, 8, 2, score_function="sigmoid", selection_bias=True)
    hidden = torch.randn(512, 16) + 1.0
    loads = []
    for _ in range(200):
        load = torch.bincount(router(hidden)[1].flatten(), minlength=8)
        update_selection_bias(router.selection_bias, load, rate=0.01)
        loads.append(load.max() / load.float().mean())
    assert loads[0] > 2 and loads[-1] < 1.2
