"""The simulator against plain loops, closed forms and sums by hand."""

from __future__ import annotations

from dataclasses import replace
from math import comb

import numpy as np
import pytest

from moe_ext import _host
from moe_ext.distributed.placement import Cluster, ExpertPlacement, Link, balance_experts, simulate_step
from moe_ext.distributed.traces import RoutingTrace
from synthetic_traces import planted_trace

FAST, SLOW = Link(1e-6, 4e11), Link(5e-6, 5e10)
KINDS = ("per_slot", "per_rank", "per_node")


def cluster_of(num_ranks: int, ranks_per_node: int) -> Cluster:
    return Cluster(num_ranks, ranks_per_node, FAST, SLOW, seconds_per_row=2e-7, seconds_per_expert=1e-5)


def plain_traffic(ids, placement, ranks, per_node, nearest, follow):
    """rows, active [L,R] and copies [L,3,2,2,R], token by token."""
    layers, tokens, _ = ids.shape
    slots_per_rank = placement.num_slots // ranks
    rows, copies = np.zeros((layers, ranks), int), np.zeros((layers, 3, 2, 2, ranks), int)
    used = [set() for _ in range(layers)]
    home = [t * ranks // tokens for t in range(tokens)]

    def send(layer, kind, a, b):
        if a != b:
            link = int(a // per_node != b // per_node)
            copies[layer, kind, link, 0, a] += 1
            copies[layer, kind, link, 1, b] += 1

    for layer in range(layers):
        for t in range(tokens):
            chosen = []
            for e in ids[layer, t]:
                if not 0 <= e < placement.num_experts:
                    continue
                slots = [int(s) for s in placement.log2phy[layer, e] if s >= 0]
                if nearest:
                    own = [s for s in slots if s // slots_per_rank == home[t]][:1]
                    near = [s for s in slots if s // slots_per_rank // per_node == home[t] // per_node]
                    slots = own or near or slots
                chosen.append(slots[t % len(slots)])
            used[layer].update(chosen)
            to = [s // slots_per_rank for s in chosen]
            for rank in to:
                rows[layer, rank] += 1
                send(layer, 0, home[t], rank)
            for rank in set(to):
                send(layer, 1, home[t], rank)
            entries = {rank // per_node * per_node + home[t] % per_node for rank in to}
            for entry in entries:
                send(layer, 2, home[t], entry)
            for rank in set(to):
                send(layer, 2, rank // per_node * per_node + home[t] % per_node, rank)
            if follow and to:
                home[t] = to[0]
    active = np.array([np.bincount([s // slots_per_rank for s in u], minlength=ranks) for u in used])
    return rows, active, copies


@pytest.mark.parametrize("ranks, per_node", [(1, 1), (4, 2), (6, 1), (8, 4), (8, 8)])
@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("follow", [False, True])
def test_counts_against_plain_loops(ranks, per_node, nearest, follow):
    ids = np.random.default_rng(ranks).integers(-1, 13, (3, 37, 3)).astype(np.int32)
    loads = RoutingTrace.from_topk_ids(ids, 12).counts.astype(float) ** 2
    placement = balance_experts(loads, 24, num_ranks=ranks)
    got = _host.count_traffic(ids, placement.phy2log, 12, ranks, per_node, nearest, follow)
    for ours, plain in zip(got, plain_traffic(ids, placement, ranks, per_node, nearest, follow), strict=True):
        assert (ours == plain).all()


@pytest.mark.parametrize("shape", [(2, 0, 2), (0, 5, 2), (2, 3, 0)])
def test_empty_traces(shape):
    trace = RoutingTrace.from_topk_ids(np.zeros(shape, np.int32), 4)
    step = simulate_step(trace, ExpertPlacement.identity(shape[0], 4, 2), cluster_of(2, 1), hidden_size=8)
    assert step.rows.sum() == 0 and step.inter_node_bytes.sum() == 0 and step.compute_seconds.sum() == 0
    assert np.isfinite(step.step_seconds) and step.summary()["balancedness"] == 1


def distinct(parts: int, experts: int, topk: int) -> float:
    """Expected parts (ranks or nodes) that a token with uniform routing needs."""
    return parts * (1 - comb(experts - experts // parts, topk) / comb(experts, topk))


@pytest.mark.parametrize("ranks, per_node", [(8, 8), (16, 8), (64, 8), (1024, 8)])
def test_bytes_against_the_closed_form(ranks, per_node):
    """Uniform routing: a token needs D ranks and a fraction (R - 1) / R of those are remote."""
    experts, topk, tokens, hidden = max(256, ranks), 8, 8192, 64
    generator = np.random.default_rng(0)
    ids = np.argpartition(generator.random((tokens, experts), dtype=np.float32), topk)[None, :, :topk]
    trace = RoutingTrace.from_topk_ids(ids, experts, transitions=False)
    placement, nodes = ExpertPlacement.identity(1, experts, ranks), ranks // per_node
    if ranks == 8:
        assert distinct(ranks, 256, 8) == pytest.approx(5.295, abs=5e-4)
    for kind in KINDS:
        step = simulate_step(trace, placement, cluster_of(ranks, per_node), hidden_size=hidden, all_to_all=kind)
        needed = {
            "per_slot": topk,
            "per_rank": distinct(ranks, experts, topk),
            "per_node": distinct(nodes, experts, topk),
        }
        outside, anywhere = needed[kind] * (nodes - 1) / nodes, needed[kind] * (ranks - 1) / ranks
        metadata = 0 if kind == "per_slot" else 8 * topk
        row = 4 * hidden + metadata
        assert step.rows.sum() == tokens * topk
        assert step.inter_node_bytes.sum() == pytest.approx(outside * tokens * row, rel=0.02)
        if kind == "per_node":
            continue  # hands on inside each node what came in
        assert (step.inter_node_bytes + step.intra_node_bytes).sum() == pytest.approx(anywhere * tokens * row, rel=0.02)


def test_times_by_hand():
    """Two nodes of two ranks, one expert each; four tokens that all go to expert 3, and one of them to expert 0 too."""
    trace = RoutingTrace.from_topk_ids(np.array([[[3, 0], [3, -1], [3, -1], [3, -1]]]), 4)
    cluster = Cluster(4, 2, Link(10.0, 4.0), Link(100.0, 2.0), seconds_per_row=7.0, seconds_per_expert=1000.0)
    arguments = dict(hidden_size=3, dispatch_bytes_per_element=1, combine_bytes_per_element=2)
    step = simulate_step(trace, ExpertPlacement.identity(1, 4, 4), cluster, all_to_all="per_slot", **arguments)
    assert step.rows.tolist() == [[1, 0, 0, 4]] and step.active_experts.tolist() == [[1, 0, 0, 1]]
    # Tokens 0 and 1 cross to node 1, token 2 comes from its neighbour: 3 bytes there, 6 back.
    assert step.inter_node_bytes.tolist() == [[3, 3, 0, 12]] and step.intra_node_bytes.tolist() == [[0, 0, 3, 6]]
    assert step.compute_seconds.tolist() == [4 * 7 + 1000]
    assert step.all_to_all_seconds.tolist() == [2 * 2 * 100 + 2 * 9 / 2]
    assert step.step_seconds == 1028 + 409 and step.summary()["simulated_step_seconds"] == 1437
    assert step.balancedness.tolist() == [5 / 4 / 4]
    # To a node once: both tokens enter it at their own place, token 0 is handed on inside; ids and weights, 16 bytes.
    step = simulate_step(trace, ExpertPlacement.identity(1, 4, 4), cluster, all_to_all="per_node", **arguments)
    assert step.inter_node_bytes.tolist() == [[19, 19, 6, 6]] and step.intra_node_bytes.tolist() == [[0, 0, 2 * 19, 12]]
    assert step.all_to_all_seconds.tolist() == [2 * 1 * 100 + 25 / 2 + 2 * 10 + 2 * 25 / 4]


def test_balance_shows_on_other_tokens():
    """A plan from one half of the tokens makes the other half's slowest rank faster."""
    trace = planted_trace(2, 4000, 64, 4, num_topics=8, exponent=1.0)
    profile, held_out = trace.split()
    cluster = cluster_of(16, 8)
    before = simulate_step(held_out, ExpertPlacement.identity(2, 64, 16), cluster, hidden_size=128)
    after = simulate_step(held_out, balance_experts(profile.counts, 80, num_ranks=16), cluster, hidden_size=128)
    assert after.balancedness.min() > 0.9 and before.balancedness.max() < 0.7
    assert after.compute_seconds.sum() < before.compute_seconds.sum() and after.rows.sum() == before.rows.sum()


def test_nearest_replicas_save_bytes():
    trace = planted_trace(2, 2000, 16, 2, exponent=1.0)
    placement = balance_experts(trace.counts, 32, num_ranks=8)
    spread, nearest = (
        simulate_step(trace, placement, cluster_of(8, 4), hidden_size=64, replica_choice=choice)
        for choice in ("spread", "nearest")
    )
    assert nearest.inter_node_bytes.sum() < spread.inter_node_bytes.sum()
    assert nearest.rows.sum() == spread.rows.sum()


TRACE, IDENTITY = planted_trace(1, 8, 4, 2, num_topics=2), ExpertPlacement.identity(1, 4, 2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: cluster_of(6, 4), "ranks_per_node: expected a divisor of num_ranks 6, got 4"),
        (lambda: replace(cluster_of(2, 1), inter=Link(0, 0)), "inter: expected latency >= 0 and bandwidth > 0"),
        (lambda: replace(cluster_of(2, 1), seconds_per_row=-1), "seconds_per_row, seconds_per_expert: expected"),
        (lambda: simulate_step(TRACE, IDENTITY, cluster_of(4, 2), hidden_size=8), "placement: expected 4 ranks .*, got 2"),
        (lambda: simulate_step(TRACE, IDENTITY, cluster_of(2, 1), hidden_size=8, all_to_all="x"), "all_to_all: expected one of"),
        (lambda: simulate_step(TRACE, IDENTITY, cluster_of(2, 1), hidden_size=8, replica_choice="x"), "replica_choice: expected"),
        (lambda: simulate_step(TRACE, ExpertPlacement.identity(1, 6, 2), cluster_of(2, 1), hidden_size=8), "placement: expected 4 experts, got 6"),
        (lambda: simulate_step(TRACE, ExpertPlacement.identity(2, 4, 2), cluster_of(2, 1), hidden_size=8), "phy2log: expected 1 layers"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
