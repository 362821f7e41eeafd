"""MoETuner's integer programs against brute force, and its placements on tokens that they were not made from."""

from __future__ import annotations

import sys
from itertools import combinations, permutations

import numpy as np
import pytest

from moe_ext.distributed.placement import (
    Cluster,
    ExpertPlacement,
    Link,
    assign_clusters,
    balanced_clusters,
    cluster_transitions,
    moetuner_placement,
    simulate_step,
    transition_cost,
)
from synthetic_traces import planted_trace

pytest.importorskip("scipy")


def partitions(experts: list[int], size: int):
    """Every way to part the experts into clusters of a size."""
    if not experts:
        yield []
        return
    first, rest = experts[0], experts[1:]
    for others in combinations(rest, size - 1):
        for parts in partitions([e for e in rest if e not in others], size):
            yield [(first, *others), *parts]


def least_imbalance(load: np.ndarray, num_clusters: int) -> float:
    size = len(load) // num_clusters
    totals = (np.array([load[list(c)].sum() for c in parts]) for parts in partitions(list(range(len(load))), size))
    return min(float(np.abs(t - t.mean()).sum()) for t in totals)


def imbalance(clusters: np.ndarray, load: np.ndarray, num_clusters: int) -> float:
    totals = np.array([load[clusters == c].sum() for c in range(num_clusters)])
    return float(np.abs(totals - totals.mean()).sum())


def chain_cost(ranks: np.ndarray, between: np.ndarray, costs: np.ndarray) -> float:
    return sum(
        max(
            between[layer, a, b] * costs[ranks[layer, a], ranks[layer + 1, b]]
            for a in range(ranks.shape[1])
            for b in range(ranks.shape[1])
        )
        for layer in range(len(between))
    )


def least_chain_cost(between: np.ndarray, costs: np.ndarray) -> float:
    """Over all permutations of all layers; a layer's best depends on the one before only."""
    orders = np.array(list(permutations(range(len(costs)))))
    best = np.zeros(len(orders))
    for pairs in between:
        step = (pairs * costs[orders[:, None, :, None], orders[None, :, None, :]]).max((2, 3))
        best = (best[:, None] + step).min(0)
    return float(best.min())


def node_costs(num_ranks: int, ranks_per_node: int) -> np.ndarray:
    node = np.arange(num_ranks) // ranks_per_node
    return np.where(node[:, None] == node[None, :], 1.0, 8.0) * (1 - np.eye(num_ranks))


@pytest.mark.parametrize("num_experts, num_clusters", [(8, 4), (8, 2), (9, 3), (4, 4), (6, 1)])
def test_first_program_equals_brute_force(num_experts, num_clusters):
    counts = np.random.default_rng(num_experts).integers(0, 1000, (3, num_experts))
    counts[1] = 0
    counts[1, 2] = 5
    clusters = balanced_clusters(counts, num_clusters, relative_gap=0)
    for found, load in zip(clusters, counts, strict=True):
        assert (np.bincount(found, minlength=num_clusters) == num_experts // num_clusters).all()
        best = least_imbalance(load.astype(float), num_clusters)
        assert imbalance(found, load, num_clusters) == pytest.approx(best, abs=1e-5 * load.sum())


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize(
    "num_layers, num_ranks, ranks_per_node", [(3, 2, 1), (3, 4, 2), (3, 4, 1), (5, 3, 1), (1, 4, 1)]
)
def test_second_program_equals_brute_force(num_layers, num_ranks, ranks_per_node, joint):
    generator = np.random.default_rng(num_ranks)
    between = generator.integers(0, 100, (num_layers - 1, num_ranks, num_ranks)).astype(float)
    costs = node_costs(num_ranks, ranks_per_node)
    ranks = assign_clusters(between, costs, relative_gap=0, joint=joint)
    assert ranks.shape == (num_layers, num_ranks)
    assert (np.sort(ranks, axis=1) == np.arange(num_ranks)).all()
    cost, best = chain_cost(ranks, between, costs), least_chain_cost(between, costs)
    # Layer by layer is the optimum where all ranks are equally far apart.
    if joint or ranks_per_node == 1:
        assert cost == pytest.approx(best)
    assert cost <= chain_cost(np.tile(np.arange(num_ranks), (num_layers, 1)), between, costs)


def test_second_program_with_costs_of_every_kind():
    """Bandwidths that differ in both directions, and a rank that talks to itself for free or not."""
    generator = np.random.default_rng(5)
    between, costs = generator.random((2, 3, 3)), generator.random((3, 3))
    ranks = assign_clusters(between, costs, relative_gap=0)
    assert chain_cost(ranks, between, costs) == pytest.approx(least_chain_cost(between, costs))
    assert (assign_clusters(np.zeros((2, 3, 3)), costs) == np.arange(3)).all()


def test_whole_placement_at_the_papers_small_case():
    """8 experts, 3 layers, 2 ranks: both objectives are the least that there is."""
    trace = planted_trace(3, 400, 8, 1, num_topics=2, loyalty=0.95, exponent=0.5)
    placement = moetuner_placement(trace.counts, trace.transitions, 2, relative_gap=0)
    ranks = placement.log2phy[:, :, 0] // 4
    for layer in range(3):
        best = least_imbalance(trace.counts[layer].astype(float), 2)
        assert imbalance(ranks[layer], trace.counts[layer], 2) == pytest.approx(best, abs=1e-3)
    between = cluster_transitions(ranks, trace.transitions, 2)
    by_hand = np.zeros((2, 2, 2))
    for layer in range(2):
        for e in range(8):
            for f in range(8):
                by_hand[layer, ranks[layer, e], ranks[layer + 1, f]] += trace.transitions[layer, e, f]
    assert (between == by_hand).all()
    costs = 1 - np.eye(2)
    assert transition_cost(trace.transitions, placement) == pytest.approx(least_chain_cost(between, costs))
    assert transition_cost(trace.transitions, placement) == pytest.approx(
        chain_cost(np.tile(np.arange(2), (3, 1)), by_hand, costs)
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_not_worse_than_identity_on_held_out_tokens(seed, exponent):
    trace = planted_trace(3, 4000, 16, 1, num_topics=4, loyalty=0.9, exponent=exponent, seed=seed)
    profile, held_out = trace.split()
    costs = node_costs(4, 2)
    placement = moetuner_placement(profile.counts, profile.transitions, 4, seconds_per_byte=costs, time_limit=1)
    identity = ExpertPlacement.identity(3, 16, 4)
    # Where all experts are equally popular there is nothing to find: the held-out loads differ by chance only.
    chance = 1.0 if exponent else 1.1
    cluster = Cluster(4, 2, Link(1e-6, 4e11), Link(5e-6, 5e10), seconds_per_row=1e-6)
    planned, in_order = (
        simulate_step(held_out, p, cluster, hidden_size=4096, tokens_follow=True) for p in (placement, identity)
    )
    assert planned.rows.max(1).sum() <= chance * in_order.rows.max(1).sum()
    assert planned.step_seconds <= chance * in_order.step_seconds
    planned, in_order = (transition_cost(held_out.transitions, p, costs) for p in (placement, identity))
    assert planned < in_order


def test_transitions_keep_tokens_on_their_rank():
    """Clusters whose tokens trade places from layer 1 to layer 2 trade ranks there."""
    between = np.array([[[900.0, 10.0], [10.0, 900.0]], [[10.0, 900.0], [900.0, 10.0]]])
    assert (assign_clusters(between, relative_gap=0) == [[0, 1], [0, 1], [1, 0]]).all()


def test_no_time_still_gives_a_placement():
    """When the solver finds nothing in time: no worse than packing and than the given order."""
    counts = np.random.default_rng(0).integers(0, 1000, (1, 64))
    clusters = balanced_clusters(counts, 8, relative_gap=0, time_limit=1e-6)
    in_order = np.arange(64) // 8
    assert imbalance(clusters[0], counts[0], 8) <= imbalance(in_order, counts[0], 8)
    assert (np.bincount(clusters[0]) == 8).all()
    between, costs = np.random.default_rng(0).random((1, 4, 4)), node_costs(4, 2)
    assert (np.sort(assign_clusters(between, costs, time_limit=1e-6), axis=1) == np.arange(4)).all()


def test_without_scipy(monkeypatch):
    for name in [n for n in sys.modules if n == "scipy" or n.startswith("scipy.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"pip install 'moe_ext\[placement\]'"):
        balanced_clusters(np.ones((1, 4)), 2)


COUNTS, PAIRS = np.ones((2, 4)), np.ones((1, 4, 4))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: balanced_clusters(COUNTS, 3), r"counts: expected .* a multiple of 3 clusters, got \[2, 4\]"),
        (lambda: balanced_clusters(-COUNTS, 2), "counts: expected finite numbers that are not negative"),
        (lambda: balanced_clusters(COUNTS, 2, relative_gap=-1), "relative_gap, time_limit: expected"),
        (lambda: balanced_clusters(COUNTS, 2, time_limit=0), "relative_gap, time_limit: expected"),
        (lambda: moetuner_placement(COUNTS, PAIRS[:, :3], 2), r"transitions: expected \[1, 4, 4\], got \[1, 3, 4\]"),
        (lambda: assign_clusters(np.ones((1, 2, 3))), "transitions: expected"),
        (lambda: assign_clusters(-PAIRS), "transitions: expected finite"),
        (lambda: assign_clusters(PAIRS, np.ones((3, 3))), r"seconds_per_byte: expected .*\[4, 4\], got \[3, 3\]"),
        (lambda: assign_clusters(PAIRS, -np.ones((4, 4))), "seconds_per_byte: expected"),
        (lambda: transition_cost(PAIRS, ExpertPlacement.from_phy2log([[0, 1, 2, 3, 3, 3]] * 2, 4, 2)), "placement: expected 4 slots"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
