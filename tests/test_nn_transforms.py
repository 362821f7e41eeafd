"""Weight transforms: what must stay equal stays equal, bitwise where nothing is computed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moe_ext
from cases import make_rows
from compare import relative_error
from moe_ext.nn import Experts, MoE, MoELayer, TopKRouter
from moe_ext.nn.clustering import balanced_kmeans
from moe_ext.nn.transforms import dense_mlp, grow, select, share, split, stack, to_dense

KINDS = [("relu", True), ("gelu", False), ("swiglu", True), ("swiglu", False)]


def make_dense(activation="relu", bias=True) -> Experts:
    torch.manual_seed(0)
    return Experts(1, 10, 24, activation=activation, bias=bias).double()


def apply(experts: Experts, ids: list[int], hidden: Tensor) -> Tensor:
    """The plain sum of these experts for every row."""
    topk_ids = torch.tensor([ids]).int().expand(hidden.shape[0], -1).contiguous()
    return experts(hidden, moe_ext.routing_plan(topk_ids, experts.num_experts))


HIDDEN = make_rows(7, 10, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_dense_mlp(gated, bias):
    up, gate, down = (nn.Linear(*sizes, bias=bias, dtype=torch.float64) for sizes in ((10, 24), (10, 24), (24, 10)))
    mlp = dense_mlp(up, down, gate=gate if gated else None, activation="swiglu" if gated else "relu")
    expected = down(F.silu(gate(HIDDEN)) * up(HIDDEN) if gated else F.relu(up(HIDDEN)))
    assert relative_error(apply(mlp, [0], HIDDEN), expected) < 1e-12


@pytest.mark.parametrize("method", ["contiguous", "random", "balanced_kmeans"])
@pytest.mark.parametrize("activation, bias", KINDS)
def test_split_sums_to_the_dense_and_back(activation, bias, method):
    if method == "balanced_kmeans":
        pytest.importorskip("scipy")
    dense = make_dense(activation, bias)
    parts = split(dense, 4, method=method, generator=torch.Generator().manual_seed(1))
    assert parts.num_experts == 4 and parts.intermediate_size == 6
    expected = apply(dense, [0], HIDDEN)
    assert relative_error(apply(parts, [0, 1, 2, 3], HIDDEN), expected) < 1e-12
    assert relative_error(apply(parts, [0, 1, 2], HIDDEN), expected) > 1e-2
    back = to_dense(parts, method="concatenate")
    assert relative_error(apply(back, [0], HIDDEN), expected) < 1e-12
    if method == "contiguous":
        pairs = zip(back.named_parameters(), dense.parameters(), strict=True)
        assert all(torch.equal(ours, theirs) for (name, ours), theirs in pairs if name != "down_bias")


def test_split_divides_the_output_bias():
    parts = split(make_dense(), 4, bias_divisor=2)
    assert torch.equal(parts.down_bias, (make_dense().down_bias / 2).expand(4, -1))


def test_balanced_kmeans_finds_planted_clusters():
    """Directions count, lengths do not; every cluster has its size."""
    pytest.importorskip("scipy")
    generator = torch.Generator().manual_seed(3)
    planted = torch.randperm(20, generator=generator) % 4
    points = torch.eye(4, 6)[planted] + 0.05 * torch.randn(20, 6, generator=generator)
    lengths = torch.rand(20, 1, generator=generator).add(0.1) * 10
    same = [balanced_kmeans(p, 4, generator=torch.Generator().manual_seed(0)) for p in (points, points * lengths)]
    assert torch.equal(*same)
    # The first centres are drawn: the best of a few draws, as k-means is used.
    found = [balanced_kmeans(points, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    assert all(clusters.bincount().tolist() == [5] * 4 for clusters in found)
    assert any(all((clusters[planted == c] == clusters[planted == c][0]).all() for c in range(4)) for clusters in found)


def test_select_and_stack_are_bitwise():
    experts = Experts(4, 10, 6, bias=True).double()
    chosen = select(experts, [2, 0, 2])
    assert torch.equal(apply(chosen, [0, 1], HIDDEN), apply(experts, [2, 0], HIDDEN))
    assert torch.equal(chosen.down_weight[0], chosen.down_weight[2])
    both = stack([experts, chosen])
    assert both.num_experts == 7 and torch.equal(both.gate_up_bias[4:], chosen.gate_up_bias)
    chosen.down_weight.data.zero_()
    assert experts.down_weight.abs().sum() > 0 and both.down_weight[4:].abs().sum() > 0


def test_share_keeps_the_mean_and_shrinks_the_spread():
    experts = Experts(4, 10, 6, bias=True).double()
    before = copy.deepcopy(experts)
    share(experts, 0.3)
    for after, weight in zip(experts.parameters(), before.parameters(), strict=True):
        assert relative_error(after.mean(0), weight.mean(0)) < 1e-12
        spread = (1 - 0.3 * 4 / 3) * (weight - weight.mean(0))
        assert relative_error(after - after.mean(0), spread) < 1e-12
        assert relative_error(after[1], 0.7 * weight[1] + 0.1 * (weight[0] + weight[2] + weight[3])) < 1e-12
    dense = to_dense(experts, method="average")
    assert dense.num_experts == 1 and relative_error(dense.down_weight[0], before.down_weight.mean(0)) < 1e-12


def test_grow_freezes_and_keeps():
    """A new expert out of reach: bitwise the old layer; within reach: a copy that trains alone."""
    torch.manual_seed(0)
    layer = MoELayer(10, 6, 4, 2, router={"renormalize": True}).double()
    grown = grow(layer, 3)
    assert grown.router.num_experts == 5 and layer.router.num_experts == 4
    logits = grown.router(HIDDEN).logits
    assert torch.equal(logits[:, :4], layer.router(HIDDEN).logits)
    assert relative_error(logits[:, 4], logits[:, 3]) < 1e-12
    mask = torch.arange(5) < 4
    assert torch.equal(grown(HIDDEN, expert_mask=mask).hidden, layer(HIDDEN).hidden)

    ids = torch.full((7, 1), 4).int()
    only = MoE(TopKRouter(10, 5, 1), grown.experts).double()
    output = only.run_experts(
        HIDDEN, only.router(HIDDEN)._replace(topk_ids=ids, topk_weights=torch.ones(7, 1).double())
    )
    assert torch.equal(output[0], apply(layer.experts, [3], HIDDEN))

    trained = {name for name, p in grown.named_parameters() if p.requires_grad}
    assert trained == {"router.logits.1.weight", "experts.1.gate_up_weight", "experts.1.down_weight"}
    grown(HIDDEN).hidden.square().sum().backward()
    assert {name for name, p in grown.named_parameters() if p.grad is not None} == trained
    twice = grow(grown, 1)
    assert twice.router.num_experts == 6 and twice(HIDDEN).hidden.shape == (7, 10)
    assert sum(p.requires_grad for p in twice.parameters()) == 3


def test_bad_transforms():
    linear = nn.Linear(10, 10)
    bad = [
        (lambda: dense_mlp(linear, linear, activation="swiglu"), "activation: 'swiglu' needs a gate"),
        (lambda: dense_mlp(linear, linear, gate=linear, activation="relu"), "activation: 'relu' needs no gate"),
        (lambda: dense_mlp(linear, nn.Linear(10, 10, bias=False), activation="relu"), "bias: expected on both"),
        (lambda: split(Experts(2, 10, 6), 2), "dense: expected one expert .* multiple of 2, got 2 of 6"),
        (lambda: split(Experts(1, 10, 6), 4), "dense: expected one expert .* multiple of 4, got 1 of 6"),
        (lambda: split(Experts(1, 10, 6), 2, method="x"), "method: expected contiguous, random or balanced_kmeans, got 'x'"),
        (lambda: select(Experts(2, 10, 6, weight_layout="ekn"), [0]), "experts: expected layouts enk and concatenated, got ekn"),
        (lambda: share(Experts(1, 10, 6), 0.5), "beta: expected 0 to 1 and two experts or more, got 0.5 and 1"),
        (lambda: grow(MoELayer(10, 6, 4, 2), 4), "layer: expected a linear router and Experts that hold expert 4"),
    ]  # fmt: skip
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()
