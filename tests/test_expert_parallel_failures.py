"""Ranks that disagree, miscount or go away: a clear error on all that are left, within the timeout; real processes."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from expert_parallel_cases import Share, WorldCase, make_exchange, make_two_levels, run_share
from moe_ext.distributed import FlatExchange, HierarchicalExchange, dispatch, expert_parallel
from moe_ext.distributed.exchange import Splits
from rank_pool import RankPool

pytestmark = pytest.mark.cpu


class Miscounting(FlatExchange):
    """Rank 1 awaits one row too many from rank 0."""

    def splits(self, counts: list[list[int]]) -> list[Splits]:
        splits = super().splits(counts)
        if self.rank == 1:
            splits[0].recv[0] += 1
        return splits


def run_miscounting(group: Any, case: WorldCase) -> Share:
    return run_share(Miscounting(group), case)


def run_different(group: Any, cases: list[WorldCase]) -> Share:
    exchange = make_exchange(group, cases[0])
    return run_share(exchange, cases[exchange.rank])


def run_with_bad_ids(group: Any, case: WorldCase) -> Share:
    """Rank 2 asks for an expert that nobody holds."""
    exchange = FlatExchange(group)
    ids = torch.zeros(2, case.topk, dtype=torch.int32)
    if exchange.rank == 2:
        ids[1, 0] = 99
    rows, weights = torch.zeros(2, 4), torch.zeros(2, case.topk)
    dispatch(rows, ids, weights, exchange, case.map.rank_expert_offsets, case.options())


DEBUGGED = WorldCase((5, 3, 9), (3, 4, 4), 2, debug=True)


def outcomes_of(pool: RankPool, function: Any, *arguments: Any) -> list[tuple[bool, Any]]:
    pool.start(3, function, *arguments)
    return pool.outcomes([0, 1, 2])


def assert_all_fail(pool: RankPool, words: str, function: Any, *arguments: Any) -> None:
    for rank, (fine, answer) in enumerate(outcomes_of(pool, function, *arguments)):
        assert not fine and answer[0].startswith("ExchangeError") and words in answer[0], f"rank {rank}: {answer}"


DISAGREEING = [
    ({"degree": 2}, "chunks: 2 on rank 1, 1 on ranks 0, 2"),
    ({"form": "slot"}, "form (0 dedup, 1 slot, 2 node): 1 on rank 1, 0 on ranks 0, 2"),
    ({"topk": 3}, "topk: 3 on rank 1, 2 on ranks 0, 2"),
    ({"hidden_size": 16}, "hidden_size: 16 on rank 1, 12 on ranks 0, 2"),
    ({"dtype": torch.float32}, "bytes of an element of hidden: 4 on rank 1, 8 on ranks 0, 2"),
]
DISAGREEING_MORE = [  # what only debug mode asks
    ({"rows_per_rank": 9}, "rows_per_rank (0 exact): 9 on rank 1, 0 on ranks 0, 2"),
    ({"experts_per_rank": (4, 3, 4)}, "rank_expert_offsets[1]: 4 on rank 1, 3 on ranks 0, 2"),
]


@pytest.mark.parametrize("change, words", DISAGREEING + DISAGREEING_MORE, ids=str)
def test_a_rank_that_disagrees_is_named_on_all(change, words, pool):
    assert_all_fail(pool, words, run_different, [DEBUGGED, replace(DEBUGGED, **change), DEBUGGED])


@pytest.mark.parametrize("form, ranks_per_node", [("dedup", None), ("dedup", 3), ("node", 1), ("node", 3)])
@pytest.mark.parametrize("change, words", DISAGREEING, ids=str)
def test_what_travels_with_the_counts_names_it_without_debug_mode(change, words, form, ranks_per_node, pool):
    case = replace(DEBUGGED, debug=False, form=form, ranks_per_node=ranks_per_node)
    if form == "node":
        words = words.replace(", 0 on", ", 2 on")
    assert_all_fail(pool, words, run_different, [case, replace(case, **change), case])


def test_wrong_splits_are_found_before_rows_move(pool):
    assert_all_fail(pool, "to rank 1, which awaits", run_miscounting, DEBUGGED)


def test_ids_that_nobody_holds(pool):
    words = "topk_ids: expected -1 or ids below 11, the number of experts; outside: 1 on rank 2"
    assert_all_fail(pool, words, run_with_bad_ids, DEBUGGED)


def lose_rank_one(group: Any, case: WorldCase, killed: bool) -> Share | None:
    exchange = make_exchange(group, case)
    if exchange.rank == 1:
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return None
    return run_share(exchange, case)


def lose_rank_one_after_the_forward(group: Any, case: WorldCase) -> None:
    exchange, whole = make_exchange(group, case), case.tensors()
    hidden = whole["hidden"][:5].requires_grad_()
    output = expert_parallel(
        hidden, whole["ids"][:5], whole["weights"][:5], lambda received: received.hidden * 2, exchange,
        case.map.rank_expert_offsets, case.options(),
    ).hidden  # fmt: skip
    dist.barrier(group)
    if exchange.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    output.sum().backward()


TIMEOUT = 4  # of processes that may be lost


@pytest.mark.parametrize("debug, killed", [(False, True), (True, True), (True, False)])
def test_a_lost_rank_raises_on_the_others(debug, killed, tmp_path):
    """Killed, or busy elsewhere: the latter only rank 0 can name."""
    with RankPool(3, tmp_path, timeout=TIMEOUT) as pool:
        pool.start(3, lose_rank_one, replace(DEBUGGED, debug=debug), killed)
        start = time.monotonic()
        for rank, (fine, answer) in zip((0, 2), pool.outcomes([0, 2], patience=5 * TIMEOUT), strict=True):
            awaited = "all ranks" if debug else "the number of rows that every rank sends"
            assert not fine and f"ExchangeError: rank {rank} of 3 awaited {awaited}: " in answer[0]
            assert killed or rank or "Ranks 1 failed to pass monitoredBarrier" in answer[0]
        assert time.monotonic() - start < 2 * TIMEOUT + 5


TWO_LEVELS = WorldCase((5, 5, 5, 5), (3, 2, 4, 2), 2, "node", ranks_per_node=2)


@pytest.mark.parametrize("function, arguments", [(lose_rank_one, (False,)), (lose_rank_one_after_the_forward, ())])
def test_a_lost_rank_raises_in_two_levels(function, arguments, tmp_path):
    """Busy elsewhere in the forward, or killed before the backward: the groups of both levels have the timeout."""
    with RankPool(4, tmp_path, timeout=TIMEOUT) as pool:
        pool.run(4, make_two_levels, [(4, 2)])
        pool.start(4, function, TWO_LEVELS, *arguments)
        start = time.monotonic()
        for rank, (fine, answer) in zip((0, 2, 3), pool.outcomes([0, 2, 3], patience=5 * TIMEOUT), strict=True):
            assert not fine and answer[0].startswith("ExchangeError: rank "), f"rank {rank}: {answer}"
            assert (" awaited the number of rows" if arguments else " awaited the gradients of") in answer[0]
        assert time.monotonic() - start < 2 * TIMEOUT + 5


def over_groups(group: Any, subsets: list[list[int]]) -> tuple[int, int, list[int]] | None:
    """Two exchanges beside each other, made in one go."""
    exchange = HierarchicalExchange.over(1, subsets)
    if exchange is None:
        return None
    assert exchange.intra.timeout() == exchange.inter.timeout() == FlatExchange().timeout()
    return exchange.rank, exchange.num_ranks, exchange.gather(torch.tensor(dist.get_rank())).tolist()


def test_two_levels_over_subsets(pool):
    assert pool.run(4, over_groups, [[3, 0], [1]]) == [(0, 2, [0, 3]), (0, 1, [1]), None, (1, 2, [0, 3])]


def bad_sizes(group: Any, ranks_per_node: int, subsets: list[list[int]] | None) -> str:
    with pytest.raises(ValueError) as error:
        HierarchicalExchange.over(ranks_per_node, subsets)
    return str(error.value)


def test_bad_levels(pool):
    assert pool.run(4, bad_sizes, 3, None) == ["ranks_per_node: expected a divisor of 4 ranks, got 3"] * 4
    words = "subsets: expected no rank in two of them, got [[0, 1], [1, 2]]"
    assert pool.run(4, bad_sizes, 1, [[0, 1], [2, 1]]) == [words] * 4
    words = "exchange: expected a HierarchicalExchange with form='node', got FlatExchange"
    for fine, answer in outcomes_of(pool, run_different, [replace(DEBUGGED, form="node")] * 3):
        assert not fine and answer[0] == f"ValueError: {words}"
