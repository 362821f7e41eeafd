"""Expert parallelism with real processes over gloo, and with virtual ranks, against the layer in one process."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch

from compare import relative_error
from expert_parallel_cases import HIDDEN, Share, WorldCase, joined, run_case, run_dense, run_share
from moe_ext.distributed import FlatExchange, HierarchicalExchange, combine, dispatch
from moe_ext.distributed.exchange import Splits
from rank_pool import RankPool
from virtual_ranks import Board, VirtualExchange, run_virtual_ranks

pytestmark = pytest.mark.cpu


def assert_equals_dense(shares: list[Share], case: WorldCase, tolerance: float = 1e-12) -> None:
    ours, dense = joined(shares, case), run_dense(case)
    assert relative_error(ours.output, dense.output) <= tolerance
    for name, grad in dense.grads.items():
        assert relative_error(ours.grads[name], grad) <= tolerance, name


def assert_same_bits(some: list[Share], others: list[Share], names: tuple[str, ...] | None = None) -> None:
    for a, b in zip(some, others, strict=True):
        assert torch.equal(a.output, b.output)
        for name in names or a.grads:
            assert torch.equal(a.grads[name], b.grads[name]), name


CASES = {
    "even": WorldCase((9, 7), (4, 4), 2),
    "uneven experts, a rank without tokens": WorldCase((5, 0, 11), (5, 2, 4), 3, routing="zipf"),
    "a rank without experts": WorldCase((6, 8, 3, 5), (5, 0, 4, 2), 8, form="dedup"),
    "a rank without experts, slots": WorldCase((6, 8, 3, 5), (5, 0, 4, 2), 8, form="slot"),
    "a rank without either": WorldCase((6, 0, 9), (3, 0, 2), 2, degree=2),
    "all tokens to one rank": WorldCase((12, 5), (1, 7), 1, routing="one_hot"),
    "no tokens at all": WorldCase((0, 0, 0), (2, 3, 1), 2, degree=2),
    "slots": WorldCase((9, 4, 6), (3, 4, 4), 4, form="slot", routing="dropped"),
    "chunks of fewer than one token": WorldCase((3, 10), (6, 5), 5, degree=8),
    "chunks, slots": WorldCase((13, 10), (6, 5), 5, form="slot", degree=3, routing="zipf"),
    "static": WorldCase((9, 4, 6), (3, 4, 4), 4, rows_per_rank=9, routing="zipf"),
    "static, slots, chunks": WorldCase((9, 0, 6), (3, 4, 4), 4, form="slot", rows_per_rank=12, degree=3),
    "static, no experts": WorldCase((5, 2), (0, 6), 2, rows_per_rank=5, routing="dropped"),
    "copies": WorldCase((11, 6, 8), (4, 3, 4), 3, physical_to_logical=(0, 1, 2, 3, 4, 5, 6, 0, 0, 7, 3)),
    "copies, slots, two levels": WorldCase((7, 6, 8, 5), (2, 3, 2, 2), 2, form="slot", ranks_per_node=2,
                                           physical_to_logical=(0, 1, 2, 0, 3, 4, 5, 0, 5)),
    "two levels": WorldCase((7, 0, 8, 5), (3, 3, 2, 3), 4, ranks_per_node=2, degree=2),
    "two levels, one node": WorldCase((7, 4, 0, 2), (3, 3, 1, 2), 2, ranks_per_node=4),
    "two levels, one rank to a node": WorldCase((7, 4, 1, 3), (3, 3, 1, 0), 2, ranks_per_node=1),
    "two levels, static": WorldCase((7, 2, 8, 5), (3, 3, 2, 3), 4, ranks_per_node=2, rows_per_rank=8),
    "debug mode": WorldCase((7, 2, 8, 5), (3, 3, 2, 3), 4, ranks_per_node=2, debug=True, degree=2),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_one_process(case, pool):
    assert_equals_dense(pool.run(case.num_ranks, run_case, case), case)


def random_case(seed: int) -> WorldCase:
    draw = random.Random(seed)
    num_ranks = draw.choice([2, 3, 4])
    sizes = [draw.randint(0, 5) for _ in range(num_ranks)]
    sizes[draw.randrange(num_ranks)] += 2
    num_experts = sum(sizes)
    tokens = tuple(draw.choice([0, 1, draw.randint(2, 20)]) for _ in range(num_ranks))
    copies = None
    if draw.random() < 0.4:
        distinct = max(1, num_experts - draw.randint(1, 3))
        physical = [*range(distinct), *(draw.randrange(distinct) for _ in range(num_experts - distinct))]
        draw.shuffle(physical)
        copies, num_experts = tuple(physical), distinct
    topk = draw.randint(1, min(8, num_experts))
    form = draw.choice(["dedup", "slot"])
    most = max(tokens) * (topk if form == "slot" else 1)
    return WorldCase(
        tokens, tuple(sizes), topk, form,
        rows_per_rank=draw.choice([None, max(1, most)]),
        degree=draw.choice([1, 1, 2, 5]),
        routing=draw.choice(["uniform", "zipf", "one_hot", "dropped"]),
        physical_to_logical=copies,
        ranks_per_node=draw.choice([None, 2]) if num_ranks == 4 else None,
        seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(24))
def test_fuzz(seed, pool):
    case = random_case(seed)
    assert_equals_dense(pool.run(case.num_ranks, run_case, case), case)


def drop_late_tokens(case: WorldCase, ids: torch.Tensor) -> torch.Tensor:
    """Ids with -1 for what does not fit, written token by token: dedup, one chunk."""
    ids, first = ids.clone(), 0
    bounds = case.map.rank_expert_offsets.tolist()
    for tokens in case.tokens:
        for low, high in pairwise(bounds):
            taken = 0
            for token in range(first, first + tokens):
                goes = [j for j, expert in enumerate(ids[token].tolist()) if low <= expert < high]
                taken += bool(goes)
                if taken > case.rows_per_rank:
                    ids[token, goes] = -1
        first += tokens
    return ids


def test_overflow_drops_and_counts(pool):
    case = WorldCase((14, 3, 9), (3, 4, 4), 4, rows_per_rank=5, overflow="drop")
    ids = case.tensors()["ids"]
    kept = drop_late_tokens(case, ids)
    shares = pool.run(3, run_case, case)
    ours, dense = joined(shares, case), run_dense(case, kept)
    assert relative_error(ours.output, dense.output) <= 1e-12
    for name, grad in dense.grads.items():
        assert relative_error(ours.grads[name], grad) <= 1e-12, name
    rank_of = torch.bucketize(ids, case.map.rank_expert_offsets, right=True) - 1
    lost = {
        (t, r) for t in range(len(ids)) for r, k in zip(rank_of[t].tolist(), kept[t].tolist(), strict=True) if k < 0
    }
    assert ours.dropped_rows == len(lost) > 0 and shares[1].dropped_rows == 0


def test_overflow_raises_on_every_rank(pool):
    case = WorldCase((14, 3, 9), (3, 4, 4), 4, rows_per_rank=5)
    pool.start(3, run_case, case)
    for fine, answer in pool.outcomes([0, 1, 2]):
        assert not fine and "rows_per_rank: expected all rows for a rank to fit into 5" in answer[0]
        assert " of rank 0, " in answer[0] and "of rank 2" in answer[0] and "rank 1" not in answer[0]


@pytest.mark.parametrize("form", ["dedup", "slot"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_way_has_the_same_bits(form, dtype, pool):
    """Flat and two levels, exact and static, gloo and virtual ranks, run after run."""
    case = WorldCase((13, 6, 21, 10), (3, 3, 2, 3), 4, form, routing="zipf", dtype=dtype)
    flat = pool.run(4, run_case, case)
    assert_same_bits(pool.run(4, run_case, case), flat)
    assert_same_bits(pool.run(4, run_case, replace(case, ranks_per_node=2)), flat)
    assert_same_bits(pool.run(4, run_case, replace(case, rows_per_rank=84)), flat)
    board = Board(4)
    assert_same_bits(run_virtual_ranks(4, lambda rank: run_share(VirtualExchange(board, rank), case)), flat)


@pytest.mark.parametrize("form", ["dedup", "slot"])
@pytest.mark.parametrize("ranks_per_node", [None, 2])
def test_chunks_move_the_same_bits(form, ranks_per_node, pool):
    """Outputs and the gradients of rows and weights, for every degree. Those of expert weights are sums over chunks, and
    a product may depend on its number of rows, so the experts here are elementwise."""
    case = WorldCase(
        (13, 6, 21, 10), (3, 3, 2, 3), 4, form, routing="zipf", elementwise=True, ranks_per_node=ranks_per_node
    )
    whole = pool.run(4, run_case, case)
    for degree in range(2, 9):
        chunked = pool.run(4, run_case, replace(case, degree=degree))
        assert_same_bits(chunked, whole, ("hidden", "weights"))


@pytest.mark.parametrize("num_ranks, ranks_per_node", [(8, 4), (16, 4), (64, 8)])
@pytest.mark.parametrize("form", ["dedup", "slot"])
def test_many_virtual_ranks(num_ranks, ranks_per_node, form):
    draw = random.Random(num_ranks)
    case = WorldCase(
        tuple(draw.randint(0, 6) for _ in range(num_ranks)),
        tuple(draw.randint(0, 3) for _ in range(num_ranks)),
        8,
        form,
    )
    board = Board(num_ranks)
    flat = run_virtual_ranks(num_ranks, lambda rank: run_share(VirtualExchange(board, rank), case))
    assert_equals_dense(flat, case)
    nodes = [Board(ranks_per_node) for _ in range(num_ranks // ranks_per_node)]
    columns = [Board(num_ranks // ranks_per_node) for _ in range(ranks_per_node)]

    def two_levels(rank: int) -> Share:
        node, local = divmod(rank, ranks_per_node)
        exchange = HierarchicalExchange(VirtualExchange(nodes[node], local), VirtualExchange(columns[local], node))
        return run_share(exchange, case)

    assert_same_bits(run_virtual_ranks(num_ranks, two_levels), flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_payload(dtype, pool):
    """The forward on rows that went through e4m3, gradients straight through."""
    case = WorldCase((9, 7), (4, 4), 3, payload="fp8", dtype=dtype, hidden_size=200)
    shares = pool.run(2, run_case, case)
    native = joined(pool.run(2, run_case, replace(case, payload="native")), case)
    ours = joined(shares, case)
    assert 1e-3 < relative_error(ours.output, native.output) < 6e-2
    for name, grad in native.grads.items():
        assert relative_error(ours.grads[name], grad) < 8e-2, name
    assert_same_bits(pool.run(2, run_case, case), shares)


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
    exchange = FlatExchange(group)
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


def assert_all_fail(pool: RankPool, words: str, function: Any, *arguments: Any) -> None:
    pool.start(3, function, *arguments)
    for rank, (fine, answer) in enumerate(pool.outcomes([0, 1, 2])):
        assert not fine and answer[0].startswith("ExchangeError") and words in answer[0], f"rank {rank}: {answer}"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"degree": 2}, "chunks: 2 on rank 1, 1 on ranks 0, 2"),
        ({"form": "slot"}, "form (0 dedup, 1 slot): 1 on rank 1, 0 on ranks 0, 2"),
        ({"topk": 3}, "topk: 3 on rank 1, 2 on ranks 0, 2"),
        ({"hidden_size": 16}, "hidden_size: 16 on rank 1, 12 on ranks 0, 2"),
        ({"dtype": torch.float32}, "bytes of an element of hidden: 4 on rank 1, 8 on ranks 0, 2"),
        ({"rows_per_rank": 9}, "rows_per_rank (0 exact): 9 on rank 1, 0 on ranks 0, 2"),
        ({"experts_per_rank": (4, 3, 4)}, "rank_expert_offsets[1]: 4 on rank 1, 3 on ranks 0, 2"),
    ],
    ids=str,
)
def test_a_rank_that_disagrees_is_named_on_all(change, words, pool):
    assert_all_fail(pool, words, run_different, [DEBUGGED, replace(DEBUGGED, **change), DEBUGGED])


def test_wrong_splits_are_found_before_rows_move(pool):
    assert_all_fail(pool, "to rank 1, which awaits", run_miscounting, DEBUGGED)


def test_ids_that_nobody_holds(pool):
    words = "topk_ids: expected -1 or ids below 11, the number of experts; outside: 1 on rank 2"
    assert_all_fail(pool, words, run_with_bad_ids, DEBUGGED)


def lose_rank_one(group: Any, case: WorldCase, killed: bool) -> Share | None:
    exchange = FlatExchange(group)
    if exchange.rank == 1:
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return None
    return run_share(exchange, case)


@pytest.mark.parametrize("debug, killed", [(False, True), (True, True), (True, False)])
def test_a_lost_rank_raises_on_the_others(debug, killed, tmp_path):
    """Killed, or busy elsewhere: the latter only rank 0 can name."""
    timeout = 4
    pool = RankPool(3, tmp_path, timeout=timeout)
    try:
        pool.start(3, lose_rank_one, replace(DEBUGGED, debug=debug), killed)
        start = time.monotonic()
        for rank, (fine, answer) in zip((0, 2), pool.outcomes([0, 2], patience=5 * timeout), strict=True):
            awaited = "all ranks" if debug else "the number of rows that every rank sends"
            assert not fine and f"ExchangeError: rank {rank} of 3 awaited {awaited}: " in answer[0]
            assert killed or rank or "Ranks 1 failed to pass monitoredBarrier" in answer[0]
        assert time.monotonic() - start < 2 * timeout + 5
    finally:
        pool.close()


class Counting(FlatExchange):
    """Bytes handed to the collective for other ranks, by the dtype that travels."""

    def __init__(self, group: Any) -> None:
        super().__init__(group)
        self.bytes: dict[torch.dtype, int] = {}

    def _all_to_all(self, received: Any, rows: Any, recv: Any, send: Any) -> Any:
        if send is not None:
            rows_out = sum(send) - send[self.rank]
            row = rows.element_size() * rows[:1].numel() if len(rows) else 0
            self.bytes[rows.dtype] = self.bytes.get(rows.dtype, 0) + rows_out * row
        return super()._all_to_all(received, rows, recv, send)


def run_counting(group: Any, case: WorldCase) -> dict[torch.dtype, int]:
    exchange, whole = Counting(group), case.tensors()
    first = [0, *accumulate(case.tokens)]
    mine = slice(first[exchange.rank], first[exchange.rank + 1])
    with torch.no_grad():
        received = dispatch(
            whole["hidden"][mine], whole["ids"][mine], whole["weights"][mine], exchange,
            case.map.rank_expert_offsets, case.options(),
        )  # fmt: skip
        combine(received.hidden, received.layout)
    return exchange.bytes


@pytest.mark.parametrize("form", ["dedup", "slot"])
@pytest.mark.parametrize("payload", ["native", "fp8"])
def test_bytes_that_travel(form, payload, pool):
    """Counted at the collective: a row of hidden, ids, weights and scales for each (token, rank) or (token, expert)."""
    case = WorldCase((40, 0, 33, 21), (3, 5, 2, 6), 4, form, payload=payload, dtype=torch.bfloat16, hidden_size=256)
    counted = pool.run(4, run_counting, case)
    ids, first = case.tensors()["ids"], 0
    owners = torch.bucketize(ids, case.map.rank_expert_offsets, right=True) - 1
    for rank, tokens in enumerate(case.tokens):
        goes = owners[first : first + tokens].tolist()
        first += tokens
        rows = sum(sum(r != rank for r in (set(ranks) if form == "dedup" else ranks)) for ranks in goes)
        back = [r for ranks in owners.tolist() for r in (set(ranks) if form == "dedup" else ranks)].count(rank) - sum(
            (rank in ranks if form == "dedup" else ranks.count(rank)) for ranks in goes
        )
        hidden = 256 * 2 if payload == "native" else 256 + 2 * 4
        row_bytes = hidden + (4 * 8 if form == "dedup" else 4)
        row_bytes = -(-row_bytes // 16) * 16
        assert counted[rank].get(torch.uint8, 0) == rows * row_bytes
        assert counted[rank].get(torch.bfloat16, 0) == back * 256 * 2


def run_frozen(group: Any, case: WorldCase) -> torch.Tensor | None:
    """Only rank 0's rows want a gradient; the others must take part in its backward all the same."""
    exchange, whole = FlatExchange(group), case.tensors()
    hidden = whole["hidden"][:3].clone().requires_grad_(exchange.rank == 0)
    received = dispatch(
        hidden, whole["ids"][:3], whole["weights"][:3], exchange, case.map.rank_expert_offsets, case.options()
    )
    combine(received.hidden * 2, received.layout).sum().backward()
    return hidden.grad


@pytest.mark.parametrize("form", ["dedup", "slot"])
def test_ranks_that_want_no_gradient_take_part_in_the_backward(form, pool):
    case = WorldCase((3, 3), (4, 0), 1, form)
    grad, none = pool.run(2, run_frozen, case)
    weight = case.tensors()["weights"][:3] if form == "slot" else torch.ones(3, 1, dtype=torch.float64)
    assert none is None and relative_error(grad, 2 * weight.expand(3, HIDDEN)) <= 1e-15


def test_tokens_take_copies_in_turn():
    experts = WorldCase((8,), (4,), 1, physical_to_logical=(0, 1, 0, 0)).map
    ids = torch.tensor([[0], [0], [0], [0], [1], [-1], [7]])
    assert experts.physical_ids(ids).flatten().tolist() == [0, 2, 3, 0, 1, -1, -1]
    assert experts.physical_ids(ids, first_token=1).flatten().tolist() == [2, 3, 0, 2, 1, -1, -1]
    assert list(accumulate(experts.experts_per_rank)) == experts.rank_expert_offsets.tolist()[1:]
