"""Noise in routing: distributions, explicit generators, gradients; the noisy router against Shazeer's formula."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import moe_ext
from cases import make_rows
from compare import relative_error
from moe_ext.nn import NoisyTopKRouter, gaussian_noise, gumbel_noise, input_jitter, straight_through


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_gaussian_noise_has_the_learned_deviation():
    logits, noise_logits = torch.zeros(20000, 3), torch.tensor([-9.0, 0.0, 2.0]).expand(20000, 3)
    noisy, std = gaussian_noise(logits, noise_logits, generator=seeded())
    assert torch.equal(std[0], F.softplus(noise_logits[0]) + 0.01)
    assert relative_error(noisy.std(0), std[0]) < 0.02 and (noisy.mean(0).abs() < 0.03 * std[0]).all()
    with pytest.raises(ValueError, match="noise_logits: expected the shape of logits"):
        gaussian_noise(logits, noise_logits[:2])


@pytest.mark.parametrize(
    "draw",
    [lambda x, g: gaussian_noise(x, x, generator=g)[0], lambda x, g: gumbel_noise(x, generator=g), lambda x, g: input_jitter(x, generator=g)],
    ids=["gaussian", "gumbel", "jitter"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_generator_alone_decides(draw, dtype):
    rows = make_rows(9, 5, dtype=dtype)
    first = draw(rows, seeded(3))
    torch.manual_seed(1)
    assert torch.equal(first, draw(rows, seeded(3))) and not torch.equal(first, draw(rows, seeded(4)))
    assert first.dtype == dtype and draw(rows[:0], seeded(3)).shape == (0, 5)


def test_gumbel_top_1_samples_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    _, ids = moe_ext.topk_gating(gumbel_noise(logits.expand(40000, 4), generator=seeded()), 1)
    frequency = torch.bincount(ids.flatten(), minlength=4) / 40000
    assert (frequency - torch.softmax(logits, 0)).abs().max() < 0.01
    cold = gumbel_noise(logits, temperature=0.5, generator=seeded())
    assert torch.equal(cold, 2 * gumbel_noise(logits, generator=seeded()))
    with pytest.raises(ValueError, match="temperature: expected > 0, got 0"):
        gumbel_noise(logits, temperature=0)


def test_straight_through_is_one_with_the_gradient_of_the_weight():
    logits = make_rows(17, 6, dtype=torch.float32).requires_grad_()
    mask = torch.arange(6) < 2
    weights, ids = moe_ext.topk_gating(logits, 3, expert_mask=mask)
    hard = straight_through(weights, ids)
    assert torch.equal(hard, torch.tensor([1.0, 1.0, 0.0]).expand(17, 3))
    coefficients = make_rows(17, 3, dtype=torch.float32, seed=4)
    (through,) = torch.autograd.grad((hard * coefficients).sum(), logits, retain_graph=True)
    (soft,) = torch.autograd.grad((weights * coefficients).sum(), logits)
    assert torch.equal(through, soft) and (soft != 0).any()


def test_input_jitter_stays_within_epsilon():
    rows = make_rows(64, 8, dtype=torch.float32).requires_grad_()
    factor = input_jitter(rows, 0.1, generator=seeded()) / rows
    assert factor.min() < 0.91 and 1.09 < factor.max() < 1.1 + 1e-6 and factor.min() > 0.9 - 1e-6
    assert input_jitter(rows, 0.0) is rows
    with pytest.raises(ValueError, match="epsilon: expected >= 0"):
        input_jitter(rows, -0.1)


def shazeer(router: NoisyTopKRouter, hidden: torch.Tensor, normal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates [num_tokens, num_experts] and loss as the paper has them, expert by expert."""
    clean = hidden @ router.logits.weight.T
    std = F.softplus(hidden @ router.noise.weight.T) + router.epsilon
    noisy = clean + normal * std
    kept = noisy >= noisy.topk(router.topk, dim=1).values[:, -1:]
    gates = torch.softmax(noisy.masked_fill(~kept, float("-inf")), dim=1)
    load = []
    for e in range(router.num_experts):
        others = torch.cat([noisy[:, :e], noisy[:, e + 1 :]], dim=1).topk(router.topk, dim=1).values[:, -1]
        load.append(torch.distributions.Normal(0.0, 1.0).cdf((clean[:, e] - others) / std[:, e]).sum())
    losses = [x.var() / (x.mean() ** 2 + 1e-10) for x in (gates.sum(0), torch.stack(load))]
    return gates, losses[0] + losses[1]


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("topk", [1, 2])
def test_noisy_router_is_shazeers(topk, backend):
    router = NoisyTopKRouter(8, 5, topk, backend=backend).double()
    for seed, parameter in enumerate(router.parameters()):
        parameter.data.copy_(make_rows(5, 8, dtype=torch.float64, seed=seed))
    hidden = make_rows(33, 8, dtype=torch.float64, seed=7).requires_grad_()
    routing = router(hidden, generator=seeded(1))
    gates, loss = shazeer(router, hidden, torch.randn(33, 5, generator=seeded(1), dtype=torch.float64))
    coefficients = make_rows(33, 5, dtype=torch.float64, seed=9)
    ours = (routing.topk_weights * coefficients.gather(1, routing.topk_ids.long())).sum()
    inputs = [hidden, *router.parameters()]
    for value, expected in ((ours, (gates * coefficients).sum()), (routing.balance_loss, loss)):
        assert relative_error(value, expected) < 1e-12
        found = torch.autograd.grad(value, inputs, retain_graph=True)
        exact = torch.autograd.grad(expected, inputs, retain_graph=True)
        for a, b in zip(found, exact, strict=True):
            assert (a - b).norm() <= 1e-10 * (1 + b.norm())


def test_noisy_router_in_evaluation_counts_tokens():
    router = NoisyTopKRouter(8, 5, 2).eval()
    router.logits.weight.data.copy_(make_rows(5, 8, dtype=torch.float32))
    hidden = make_rows(33, 8, dtype=torch.float32, seed=7)
    first, second = router(hidden), router(hidden)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    weights, ids = moe_ext.topk_gating(hidden @ router.logits.weight.T, 2, score_order="select_then_score")
    assert torch.equal(first.topk_ids, ids) and relative_error(first.topk_weights, weights) < 1e-6
    load = torch.bincount(ids.flatten(), minlength=5).double()
    importance = torch.zeros(5, dtype=torch.float64).index_add(0, ids.flatten().long(), weights.double().flatten())
    expected = sum(x.var() / x.mean() ** 2 for x in (load, importance))
    assert relative_error(first.balance_loss, expected) < 1e-5


def test_noisy_router_of_all_experts_copies_and_low_precision():
    router = NoisyTopKRouter(8, 3, 3)
    routing = router(make_rows(9, 8, dtype=torch.bfloat16), generator=seeded())
    assert routing.topk_weights.dtype == torch.float32 and routing.balance_loss >= 0
    assert "topk=3" in repr(copy.deepcopy(router))
    empty = router(torch.zeros(0, 8))
    empty.balance_loss.backward()
    assert empty.topk_ids.shape == (0, 3) and (router.logits.weight.grad == 0).all()


def test_noisy_router_compiles_without_a_graph_break():
    """In training too, with torch's own generator; gradients of the losses are those of the eager router."""
    router = NoisyTopKRouter(8, 5, 2)
    hidden = make_rows(33, 8, dtype=torch.float32)
    results = []
    for run in (router, torch.compile(router, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        routing = run(hidden)
        results.append([*routing, *torch.autograd.grad(routing.balance_loss, list(router.parameters()))])
    for compiled, eager in zip(*results, strict=True):
        assert relative_error(compiled.float(), eager.float()) < 1e-5
