"""MoTE: a planted expert is found, and switched off it gets no row of any product."""

from __future__ import annotations

import torch

from cases import make_rows
from compare import relative_error
from moe_ext.nn import MoELayer, SteeredRouter
from moe_ext.recipes import activation_difference, suppress_experts

PLANTED = (1, 5)


def make_layers() -> tuple[list[MoELayer], torch.Tensor]:
    """Three layers, and a direction that expert 5 of layer 1 answers to, and no other."""
    torch.manual_seed(0)
    layers = [MoELayer(16, 12, 8, 2) for _ in range(3)]
    for layer in layers:
        layer.router = SteeredRouter.of(layer.router)
    direction = torch.nn.functional.normalize(make_rows(16, dtype=torch.float32, seed=8), dim=0)
    for layer in layers:
        weight = layer.router.logits.weight.data
        weight -= torch.outer(weight @ direction, direction)
    layers[PLANTED[0]].router.logits.weight.data[PLANTED[1]] = 3 * direction
    return layers, direction


def count(layers: list[MoELayer], hidden: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        layer(hidden)
    return torch.stack([layer.statistics.tokens_per_expert for layer in layers])


def test_the_planted_expert_is_found_switched_off_and_forced():
    layers, direction = make_layers()
    plain = make_rows(512, 16, dtype=torch.float32, scale=0.5)
    marked = plain.flip(0) + 2 * direction
    difference = activation_difference(count(layers, marked), count(layers, plain))
    assert difference.sum(1).abs().max() < 1e-12 and difference[PLANTED] > 0.2

    before = [layer(marked).hidden for layer in layers]
    routers = [layer.router for layer in layers]
    assert suppress_experts(routers, difference, 1) == [PLANTED]
    rows = []
    hook = layers[1].experts.register_forward_hook(lambda m, args, output: rows.append(args[1].tokens_per_expert))
    after = [layer(marked).hidden for layer in layers]
    # No slot, so no row of the grouped products either, and every token still has two experts.
    assert layers[1].statistics.tokens_per_expert[5] == 0 == rows[0][5] and rows[0].sum() == 2 * 512
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert relative_error(after[1], before[1]) > 0.1

    suppress_experts(routers, difference, 1, force=True)
    layers[1](plain)
    assert layers[1].statistics.tokens_per_expert[5] == 512 == rows[1][5]
    hook.remove()
    suppress_experts(routers, difference, 0)
    assert torch.equal(layers[1](marked).hidden, before[1])


def test_difference_of_shares_by_hand():
    counts, other = torch.tensor([[3, 1], [0, 0]], dtype=torch.int32), torch.tensor([[2, 2], [5, 0]])
    assert activation_difference(counts, other).tolist() == [[0.25, -0.25], [-1.0, 0.0]]
