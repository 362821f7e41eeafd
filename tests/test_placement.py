"""Placements that balance load: EPLB, its incremental form, FasterMoE's shadowing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from moe_ext.distributed.placement import ExpertPlacement, balance_experts, rebalance_experts, shadowed_experts
from synthetic_traces import zipf

LOADS = ["random", "zipf", "equal", "one_hot", "zero"]


def make_loads(kind: str, num_layers: int, num_experts: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    if kind == "zipf":
        return np.array([generator.permutation(zipf(num_experts)) for _ in range(num_layers)]).reshape(-1, num_experts)
    if kind == "equal":
        return np.ones((num_layers, num_experts))
    loads = generator.integers(0, 1000, (num_layers, num_experts)).astype(float)
    if kind == "one_hot":
        loads[:] = 0
        loads[:, num_experts // 2] = 7
    return loads * (kind != "zero")


def assert_maps_agree(placement: ExpertPlacement) -> None:
    layers, slots, experts = placement.num_layers, placement.num_slots, placement.num_experts
    assert (placement.logcnt >= 1).all() and (placement.logcnt.sum(1) == slots).all()
    assert placement.log2phy.shape == (layers, experts, placement.logcnt.max(initial=0))
    for layer in range(layers):
        for expert in range(experts):
            count = placement.logcnt[layer, expert]
            where = placement.log2phy[layer, expert]
            assert (where[count:] == -1).all()
            assert where[:count].tolist() == np.flatnonzero(placement.phy2log[layer] == expert).tolist()


def plain_pack(weights: list[float], packs: int) -> list[list[int]]:
    """The items of every pack, in the order in which they came."""
    room, content = len(weights) // packs, [[] for _ in range(packs)]
    if room == 1:
        return [[i] for i in range(packs)]
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        open_packs = [p for p in range(packs) if len(content[p]) < room]
        content[min(open_packs, key=lambda p: sum(weights[i] for i in content[p]))].append(item)
    return content


def plain_balance(loads: np.ndarray, slots: int, groups: int, nodes: int, ranks: int) -> list[int]:
    size, phy2log = len(loads) // groups, []
    for node in plain_pack(loads.reshape(groups, size).sum(1).tolist(), nodes):
        experts = [g * size + i for g in node for i in range(size)]
        replicas = list(range(len(experts)))
        while len(replicas) < slots // nodes:
            replicas.append(
                max(
                    range(len(experts)),
                    key=lambda i: (loads[experts[i]] / replicas.count(i), -replicas.count(i), -i),
                )
            )
        shares = [loads[experts[i]] / replicas.count(i) for i in replicas]
        phy2log += [experts[replicas[s]] for rank in plain_pack(shares, ranks // nodes) for s in rank]
    return phy2log


def test_published_example():
    """The example of the deepseek-ai/EPLB repository."""
    loads = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    placement = balance_experts(loads, 16, num_groups=4, num_nodes=2, num_ranks=8)
    assert placement.phy2log.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert_maps_agree(placement)


SIZES = [  # layers, experts, slots, groups, nodes, ranks
    (2, 8, 8, 1, 1, 4),
    (3, 12, 16, 4, 2, 8),
    (1, 12, 24, 6, 3, 6),
    (2, 7, 15, 1, 1, 5),
    (2, 4, 16, 4, 4, 16),
    (1, 1, 6, 1, 1, 3),
    (0, 4, 8, 1, 1, 2),
    (1, 30, 48, 10, 2, 8),
]


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.parametrize("layers, experts, slots, groups, nodes, ranks", SIZES)
def test_balance_against_plain_loops(kind, layers, experts, slots, groups, nodes, ranks):
    loads = make_loads(kind, layers, experts)
    placement = balance_experts(loads, slots, num_groups=groups, num_nodes=nodes, num_ranks=ranks)
    assert_maps_agree(placement)
    assert placement.num_ranks == ranks and placement.phy2log.shape == (layers, slots)
    for layer in range(layers):
        # Sums in another order may part equal packs differently; integers and one-hot loads are exact.
        if kind != "zipf":
            assert placement.phy2log[layer].tolist() == plain_balance(loads[layer], slots, groups, nodes, ranks)
        group_nodes = {
            (e // (experts // groups), s // (slots // nodes)) for s, e in enumerate(placement.phy2log[layer])
        }
        assert len(group_nodes) == groups, "a group is on one node only"


def test_groups_that_nodes_do_not_divide_are_ignored():
    loads = make_loads("random", 2, 12)
    assert (
        balance_experts(loads, 16, num_groups=3, num_nodes=2, num_ranks=8).phy2log
        == balance_experts(loads, 16, num_ranks=8).phy2log
    ).all()


def test_balancedness_of_zipf():
    """256 experts whose load falls as 1 / rank, on 32 ranks."""
    loads = make_loads("zipf", 4, 256)
    assert (ExpertPlacement.identity(4, 256, 32).balancedness(loads) < 0.185).all()
    # The best possible without replicas: the first expert alone makes 1 / H(256) of the load.
    best = 1 / 32 / zipf(256)[0]
    packed = balance_experts(loads, 256, num_ranks=32).balancedness(loads)
    assert (packed > 0.97 * best).all() and (packed <= best).all()
    assert (balance_experts(loads, 288, num_ranks=32).balancedness(loads) > 0.99).all()


def test_rank_loads_by_hand():
    placement = ExpertPlacement.from_phy2log([[0, 1, 1, 2], [2, 0, 1, 2]], 3, 2)
    loads = [[4, 6, 10], [0, 0, 0]]
    assert placement.rank_loads(loads).tolist() == [[7, 13], [0, 0]]
    assert placement.balancedness(loads).tolist() == [10 / 13, 1]
    old = ExpertPlacement.from_phy2log([[1, 0, 2, 0], [0, 2, 2, 1]], 3, 2)
    assert placement.moves_from(old).tolist() == [1, 0]
    for ours, tensor in zip((placement.phy2log, placement.log2phy, placement.logcnt), placement.tensors(), strict=True):
        assert tensor.dtype == torch.int64 and (tensor.numpy() == ours).all()


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.parametrize("max_moves", [0, 1, 2, 5, 1000])
def test_rebalance_moves_little_and_never_harms(kind, max_moves):
    layers, experts, slots, ranks, nodes = 3, 24, 32, 8, 2
    old = balance_experts(make_loads("random", layers, experts), slots, num_ranks=ranks, num_groups=4, num_nodes=nodes)
    loads = make_loads(kind, layers, experts, seed=1)
    for bound in (1, nodes):
        new = rebalance_experts(loads, old, max_moves=max_moves, num_nodes=bound)
        assert_maps_agree(new)
        assert (new.moves_from(old) <= max_moves).all() and ((new.phy2log != old.phy2log).sum(1) <= max_moves).all()
        assert (new.rank_loads(loads).max(1) <= old.rank_loads(loads).max(1)).all()
        if bound == nodes:
            for layer in range(layers):
                for half in (slice(0, slots // 2), slice(slots // 2, slots)):
                    assert set(new.phy2log[layer, half]) == set(old.phy2log[layer, half])
        if kind == "random" and max_moves == 1000:
            assert (new.balancedness(loads) > old.balancedness(loads)).all()


def test_rebalance_comes_close_to_a_fresh_placement():
    loads, later = make_loads("zipf", 4, 64), make_loads("zipf", 4, 64, seed=1)
    old = balance_experts(loads, 80, num_ranks=16)
    fresh = balance_experts(later, 80, num_ranks=16)
    steps = [old.balancedness(later).min()]
    for max_moves in (4, 16, 64):
        steps.append(rebalance_experts(later, old, max_moves=max_moves).balancedness(later).min())
    assert steps == sorted(steps) and steps[1] > steps[0]
    assert steps[-1] > 0.95 * fresh.balancedness(later).min()
    # A small drift is answered with a few moves, where planning anew moves nearly everything.
    drifted = loads * np.random.default_rng(2).uniform(0.8, 1.25, loads.shape)
    new, anew = rebalance_experts(drifted, old, max_moves=6), balance_experts(drifted, 80, num_ranks=16)
    assert (new.balancedness(drifted) > old.balancedness(drifted)).all()
    assert anew.moves_from(old).min() > 5 * new.moves_from(old).max()


def test_rebalance_finds_the_single_best_step():
    """Rank 0 holds both hot experts; one swap, or one replica of them elsewhere, is the best one or two moves."""
    old = ExpertPlacement.from_phy2log([[0, 1, 2, 3]], 4, 2)
    assert rebalance_experts([[8, 8, 1, 1]], old, max_moves=2).rank_loads([[8, 8, 1, 1]]).tolist() == [[9, 9]]
    assert rebalance_experts([[8, 8, 1, 1]], old, max_moves=1).phy2log.tolist() == old.phy2log.tolist()
    spare = ExpertPlacement.from_phy2log([[0, 1, 2, 2]], 3, 2)
    assert rebalance_experts([[8, 6, 1]], spare, max_moves=1).rank_loads([[8, 6, 1]]).max() == 10


def plain_shadowing(loads, compute, send, send_expert):
    order = sorted(range(len(loads)), key=lambda e: -loads[e])
    chosen, best = [], (3 * compute + 4 * send) * loads[order[0]]
    for k, expert in enumerate(order[:-1], 1):
        latency = (3 * compute + 4 * send) * loads[order[k]] + k * send_expert
        if latency >= best:
            break
        best = latency
        chosen.append(expert)
    return chosen


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.parametrize("send_expert", [0.0, 1e-6, 1e-4, 1.0])
def test_shadowing_against_plain_loop(kind, send_expert):
    loads = make_loads(kind, 5, 13)
    costs = (1e-6, 3e-6, send_expert)
    chosen = shadowed_experts(
        loads, compute_seconds_per_row=costs[0], send_seconds_per_row=costs[1], send_seconds_per_expert=costs[2]
    )
    assert [sorted(np.flatnonzero(row)) for row in chosen] == [sorted(plain_shadowing(row, *costs)) for row in loads]
    if send_expert == 1.0:
        assert not chosen.any()
    if send_expert == 0.0 and kind == "random":
        assert chosen.any()


def test_save_and_load(tmp_path):
    placement = balance_experts(make_loads("random", 2, 6), 8, num_ranks=4)
    placement.save(tmp_path / "placement.json")
    loaded = ExpertPlacement.load(tmp_path / "placement.json")
    for name in ("phy2log", "log2phy", "logcnt"):
        assert (getattr(loaded, name) == getattr(placement, name)).all()
    assert loaded.num_ranks == 4
    (tmp_path / "other.json").write_text(json.dumps([1, 2]))
    with pytest.raises(ValueError, match="lacks num_experts, num_ranks, phy2log"):
        ExpertPlacement.load(tmp_path / "other.json")


ONES = np.ones((2, 12))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: balance_experts(np.ones(12), 16, num_ranks=8), r"loads: expected \[num_layers, num_experts\], got \[12\]"),
        (lambda: balance_experts(-ONES, 16, num_ranks=8), "loads: expected finite numbers that are not negative"),
        (lambda: balance_experts(ONES * np.nan, 16, num_ranks=8), "loads: expected finite"),
        (lambda: balance_experts(np.ones((2, 0)), 16, num_ranks=8), "at least one expert"),
        (lambda: balance_experts(ONES, 8, num_ranks=8), "num_slots: expected at least one for each of 12 experts, got 8"),
        (lambda: balance_experts(ONES, 16, num_ranks=5), "num_ranks: expected a divisor of num_slots 16, got 5"),
        (lambda: balance_experts(ONES, 16, num_ranks=0), "num_ranks: expected a divisor of num_slots 16, got 0"),
        (lambda: balance_experts(ONES, 16, num_ranks=8, num_nodes=3, num_groups=3), "num_nodes: expected a divisor of num_ranks 8, got 3"),
        (lambda: balance_experts(ONES, 16, num_ranks=8, num_groups=5), "num_groups: expected a divisor of num_experts 12, got 5"),
        (lambda: balance_experts(ONES, 16, num_ranks=8, num_nodes=0), "num_nodes, num_groups: expected at least 1"),
        (lambda: ExpertPlacement.from_phy2log([[0, 1, 2, 4]], 4, 2), "phy2log: expected experts below 4, got 4 in layer 0"),
        (lambda: ExpertPlacement.from_phy2log([[0, 1, 2, 2]], 4, 2), "phy2log: expert 3 has no slot in layer 0"),
        (lambda: ExpertPlacement.from_phy2log([[0.0, 1.0]], 2, 2), "phy2log: expected integers, got float64"),
        (lambda: ExpertPlacement.from_phy2log([0, 1], 2, 2), "phy2log: expected .*num_layers, num_slots"),
        (lambda: ExpertPlacement.from_phy2log([[0, 1]], 0, 2), "num_experts: expected at least 1, got 0"),
        (lambda: ExpertPlacement.identity(1, 6, 4), "num_ranks: expected a divisor of num_slots 6, got 4"),
        (lambda: ExpertPlacement.identity(1, 6, 2).rank_loads(ONES), r"loads: expected \[1, 6\], got \[2, 12\]"),
        (lambda: ExpertPlacement.identity(1, 6, 2).moves_from(ExpertPlacement.identity(1, 6, 3)), "old: expected"),
        (lambda: rebalance_experts(ONES, ExpertPlacement.identity(1, 12, 2), max_moves=1), "phy2log: expected 2 layers"),
        (lambda: rebalance_experts(ONES, ExpertPlacement.identity(2, 12, 2), max_moves=-1), "max_moves: expected at least 0"),
        (lambda: rebalance_experts(ONES, ExpertPlacement.identity(2, 12, 2), max_moves=1, num_nodes=3), "num_nodes: expected a divisor"),
        (lambda: rebalance_experts(np.ones((2, 11)), ExpertPlacement.identity(2, 12, 2), max_moves=1), "phy2log: expected experts below 11"),
        (lambda: shadowed_experts(np.ones(3), compute_seconds_per_row=1, send_seconds_per_row=1, send_seconds_per_expert=1), "loads: expected"),
        (lambda: shadowed_experts(ONES, compute_seconds_per_row=1, send_seconds_per_row=-1, send_seconds_per_expert=1), "send_seconds_per_row: expected finite"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
