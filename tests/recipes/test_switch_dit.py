"""Switch-DiT: the block written out sample by sample, the start at m = 1, the prior and its loss."""

from __future__ import annotations

import itertools

import torch
from formulas import assert_same, rows
from torch import nn
from torch.nn import functional as F

from cases import make_rows
from moe_ext.nn import Routing
from moe_ext.recipes import SwitchDiTBlock
from moe_ext.recipes.switch_dit import diffusion_prior, diffusion_prior_loss


def make_block() -> SwitchDiTBlock:
    return SwitchDiTBlock(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), 8).double()


def test_starts_with_a_mask_of_ones():
    block, hidden = make_block(), make_rows(2, 5, 8, dtype=torch.float64)
    output, routing = block(hidden, make_rows(2, 8, dtype=torch.float64, seed=3))
    assert (block.mask(hidden, routing) == 1).all() and torch.equal(output, block.block(hidden))
    assert routing.topk_ids.shape == (2, 2)


def test_block_sample_by_sample():
    block = make_block()
    for seed, parameter in enumerate(block.experts.parameters()):
        parameter.data.copy_(make_rows(*parameter.shape, dtype=torch.float64, seed=seed))
    hidden, timestep = rows(4, 5, 8), rows(4, 8, seed=3)
    linear = block.router.logits[1]
    outputs = []
    for x, t in zip(hidden, timestep, strict=True):
        gates = torch.softmax(F.linear(F.silu(t), linear.weight, linear.bias), dim=0)
        mask = torch.ones_like(x)
        for e in gates.topk(2).indices.tolist():
            mask = mask + gates[e] * F.linear(x, block.experts.weight[e], block.experts.bias[e])
        outputs.append(block.block(x * mask) + (1 - mask) * x)
    output, _ = block(hidden, timestep)
    assert_same([output], [torch.stack(outputs)], [hidden, timestep, *block.parameters()])


def test_prior_is_a_window_that_slides():
    prior = diffusion_prior(5, 2, 3, 2)
    assert prior.shape == (5, 6) and (prior.sum(1) == 4).all()
    assert prior[0].tolist() == [1, 1, 1, 1, 0, 0] and prior[-1].tolist() == [0, 0, 1, 1, 1, 1]
    starts = [int(row.nonzero()[0]) for row in prior]
    assert starts == [round((t / 4) ** 4 * 2) for t in range(5)]


def make_routings(num_rows: int, seed: int) -> list[Routing]:
    routings = []
    for layer in range(2):
        logits = make_rows(num_rows, 3, dtype=torch.float64, seed=seed + layer)
        weights, ids = torch.softmax(logits, dim=1).topk(2, dim=1)
        routings.append(Routing(weights, ids.int(), logits))
    return routings


def test_prior_loss_over_the_best_matching():
    """The matching by brute force over all 720 permutations; the divergence as a symmetric pair of KL."""
    everywhere, prior = make_routings(20, seed=30), diffusion_prior(20, 2, 3, 2)
    timesteps = torch.tensor([0, 7, 19])
    logits = [r.logits[timesteps].clone().requires_grad_() for r in everywhere]
    batch = [r._replace(logits=x) for r, x in zip(everywhere, logits, strict=True)]
    picked = torch.zeros(20, 6)
    for t, (layer, routing) in itertools.product(range(20), enumerate(everywhere)):
        picked[t, 3 * layer + routing.topk_ids[t].long()] = 1
    cost = (picked[:, :, None] - prior[:, None]).abs().sum(0)
    best = min(cost[range(6), list(p)].sum().item() for p in itertools.permutations(range(6)))
    matchings = [p for p in itertools.permutations(range(6)) if cost[range(6), list(p)].sum() == best]
    losses = []
    for columns in matchings:
        gates = torch.cat([torch.softmax(x, 1) for x in logits], 1) / 2
        wanted = prior[timesteps][:, list(columns)].double()
        wanted = wanted / wanted.sum(1, keepdim=True)
        log = [torch.log(x + 1e-6) for x in (gates, wanted, (gates + wanted) / 2)]
        losses.append(((gates * (log[0] - log[2])).sum(1) / 2 + (wanted * (log[1] - log[2])).sum(1) / 2).mean())
    found = diffusion_prior_loss(batch, timesteps, everywhere, prior)
    assert_same([found], [min(losses, key=lambda x: abs(x - found).item())], logits)
