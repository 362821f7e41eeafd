"""Expert caches against plain loops and exhaustive search; regrouped tokens need fewer experts."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from moe_ext.distributed.offload_simulation import needed_experts, regroup_tokens, simulate_expert_cache
from moe_ext.nn import MoELayer
from synthetic_traces import planted_trace


def make_needed(kind: str, batches: int = 7, layers: int = 3, experts: int = 5) -> np.ndarray:
    if kind == "none":
        return np.zeros((batches, layers, experts), bool)
    if kind == "all":
        return np.ones((batches, layers, experts), bool)
    return np.random.default_rng(len(kind)).random((batches, layers, experts)) < (0.3 if kind == "sparse" else 0.7)


KINDS, CAPACITIES = ["sparse", "dense", "none", "all"], [1, 2, 5, 9, 15, 100]


def accesses(needed: np.ndarray) -> list[tuple[int, int]]:
    return [(layer, expert) for _, layer, expert in np.argwhere(needed).tolist()]


def plain_hits(needed: np.ndarray, capacity: int, policy: str) -> int:
    order, inside, hits = accesses(needed), [], 0
    for now, key in enumerate(order):
        hits += key in inside
        if key not in inside and len(inside) == capacity:
            if policy == "belady":
                future = order[now + 1 :]
                inside.remove(max(inside, key=lambda k: future.index(k) if k in future else len(order)))
            else:
                inside.pop(0)
        if key in inside:
            inside.remove(key)
        inside.append(key)
    return hits


def most_hits(needed: np.ndarray, capacity: int) -> int:
    """Over every choice of what makes room."""
    order = accesses(needed)

    @cache
    def best(now: int, inside: frozenset) -> int:
        if now == len(order):
            return 0
        key = order[now]
        if key in inside:
            return 1 + best(now + 1, inside)
        if len(inside) < capacity:
            return best(now + 1, inside | {key})
        return max(best(now + 1, inside - {out} | {key}) for out in inside)

    return best(0, frozenset())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("policy", ["lru", "belady"])
def test_against_plain_loops(kind, capacity, policy):
    needed = make_needed(kind)
    counts = simulate_expert_cache(needed, capacity, policy)
    assert counts.hits == plain_hits(needed, capacity, policy)
    assert counts.hits + counts.misses == needed.sum() and counts.prefetched == 0


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_belady_is_the_best_there_is(capacity):
    needed = make_needed("dense", batches=4, layers=2, experts=3)
    assert simulate_expert_cache(needed, capacity, "belady").hits == most_hits(needed, capacity)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_bounds_of_a_prediction(kind, capacity):
    """Without prefetching it only chooses what goes, so Belady bounds it; a full link brings everything in time."""
    needed = make_needed(kind)
    wrong = np.random.default_rng(1).random(needed.shape) < 0.5
    most = simulate_expert_cache(needed, capacity, "belady").hits
    for predicted in (needed, wrong, np.zeros_like(needed), ~needed):
        for prefetch in (0, 2, 100):
            counts = simulate_expert_cache(
                needed, capacity, "predicted", predicted=predicted, prefetch_per_layer=prefetch
            )
            assert counts.hits + counts.misses == needed.sum()
            assert prefetch or (counts.hits <= most and counts.prefetched == 0)
    # A layer's experts fit: a right prediction and a link of any speed leave no misses.
    full = simulate_expert_cache(needed, capacity, "predicted", predicted=needed, prefetch_per_layer=100)
    if capacity >= needed.sum(2).max():
        assert full.misses == 0 and full.hit_rate == 1


@pytest.mark.parametrize("capacity", [48, 96, 160])
def test_a_predictor_beats_lru_at_equal_bytes(capacity):
    trace = planted_trace(8, 512, 32, 2, num_topics=4, exponent=0.5, loyalty=0.95)
    needed = needed_experts(trace.topk_ids, 32, 8)
    # One bit in twenty is wrong.
    predicted = needed ^ (np.random.default_rng(0).random(needed.shape) < 0.05)
    lru = simulate_expert_cache(needed, capacity, "lru").hit_rate
    rates = [
        simulate_expert_cache(needed, capacity, "predicted", predicted=p, prefetch_per_layer=4).hit_rate
        for p in (predicted, needed)
    ]
    assert lru + 0.1 < rates[0] <= rates[1]


def test_prefetch_by_hand():
    """One slot, layers need expert 0 then 1: each is fetched while the layer before runs."""
    needed = np.zeros((2, 2, 2), bool)
    needed[:, 0, 0] = needed[:, 1, 1] = True
    counts = simulate_expert_cache(needed, 1, "predicted", predicted=needed, prefetch_per_layer=1)
    assert (counts.hits, counts.misses, counts.prefetched) == (4, 0, 4)
    # A wrong prediction is fetched in vain, and does not push out what is wanted sooner.
    wrong = needed.copy()
    wrong[0, 1] = [True, False]
    counts = simulate_expert_cache(needed, 1, "predicted", predicted=wrong, prefetch_per_layer=2)
    assert (counts.hits, counts.misses, counts.prefetched) == (3, 1, 4)


@pytest.mark.parametrize("tokens, batch_size", [(7, 3), (6, 3), (0, 2), (2, 9)])
def test_needed_experts(tokens, batch_size):
    ids = np.random.default_rng(0).integers(-1, 6, (3, tokens, 2))
    needed = needed_experts(ids, 5, batch_size)
    batches = [ids[:, i : i + batch_size] for i in range(0, tokens, batch_size)]
    assert needed.shape == (len(batches), 3, 5)
    for bits, batch in zip(needed, batches, strict=True):
        for layer in range(3):
            assert set(np.flatnonzero(bits[layer])) == {e for e in batch[layer].ravel().tolist() if 0 <= e < 5}


@pytest.mark.parametrize("seed", range(4))
def test_regrouping_needs_fewer_experts(seed):
    trace = planted_trace(6, 64, 32, 2, num_topics=2, loyalty=1.0, seed=seed)
    order = regroup_tokens(trace.topk_ids, 32)
    assert sorted(order.tolist()) == list(range(64))
    before, after = (needed_experts(ids, 32, 32).sum() for ids in (trace.topk_ids, trace.topk_ids[:, order]))
    assert after < 0.8 * before
    assert (regroup_tokens(trace.topk_ids, 32) == order).all()


@pytest.mark.parametrize("shape", [(2, 0, 1), (2, 1, 1), (2, 2, 1), (3, 9, 2), (1, 40, 4)])
def test_regrouping_is_never_worse(shape):
    ids = np.random.default_rng(0).integers(-1, 13, shape)
    order = regroup_tokens(ids, 12)
    half = max(-(-shape[1] // 2), 1)
    assert sorted(order.tolist()) == list(range(shape[1]))
    assert needed_experts(ids[:, order], 12, half).sum() <= needed_experts(ids, 12, half).sum()


def test_regrouped_outputs_go_back():
    """Two batches in the new order, put back, are the layer of all tokens."""
    torch.manual_seed(0)
    layer, hidden = MoELayer(16, 8, 8, 2).double(), torch.randn(20, 16, dtype=torch.float64)
    expected = layer(hidden).hidden
    order = torch.from_numpy(regroup_tokens(layer.statistics.topk_ids[None].numpy(), 8))
    outputs = torch.cat([layer(hidden[part]).hidden for part in order.split(10)])
    restored = torch.empty_like(outputs)
    restored[order] = outputs
    assert not torch.equal(order, torch.arange(20))
    torch.testing.assert_close(restored, expected, rtol=1e-12, atol=1e-12)


NEEDED = np.ones((1, 2, 3), bool)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: simulate_expert_cache(NEEDED[0], 1, "lru"), r"needed: expected .*, got \[2, 3\]"),
        (lambda: simulate_expert_cache(NEEDED, 0, "lru"), "capacity: expected at least 1, got 0"),
        (lambda: simulate_expert_cache(NEEDED, 1, "fifo"), "policy: expected lru, belady or predicted, got fifo"),
        (lambda: simulate_expert_cache(NEEDED, 1, "predicted"), "predicted: expected with policy predicted"),
        (lambda: simulate_expert_cache(NEEDED, 1, "lru", predicted=NEEDED), "predicted: expected with policy predicted"),
        (lambda: simulate_expert_cache(NEEDED, 1, "predicted", predicted=NEEDED[:, :1]), r"predicted: expected \[1, 2, 3\] as needed, got \[1, 1, 3\]"),
        (lambda: simulate_expert_cache(NEEDED, 1, "lru", prefetch_per_layer=1), "prefetch_per_layer: expected 0"),
        (lambda: simulate_expert_cache(NEEDED, 1, "predicted", predicted=NEEDED, prefetch_per_layer=-1), "prefetch_per_layer: expected at least 0"),
        (lambda: needed_experts(np.zeros((1, 2, 1), int), 3, 0), "batch_size: expected at least 1"),
        (lambda: needed_experts(np.zeros((2, 1), int), 3, 1), "topk_ids: expected integers"),
        (lambda: regroup_tokens(np.zeros((1, 2, 1)), 3), "topk_ids: expected integers .*, got float64"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
