"""Expert parallelism with real processes over gloo, and with virtual ranks, against the layer in one process."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from compare import relative_error
from expert_parallel_cases import HIDDEN, Share, WorldCase, joined, run_case, run_dense, run_share
from moe_ext.distributed import FlatExchange, HierarchicalExchange, expert_parallel
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


def virtual_nodes(case: WorldCase) -> list[Share]:
    """The case in two levels, every rank a thread."""
    m, n = case.ranks_per_node, case.num_ranks // case.ranks_per_node
    nodes, columns = [Board(m) for _ in range(n)], [Board(n) for _ in range(m)]

    def run(rank: int) -> Share:
        node, local = divmod(rank, m)
        exchange = HierarchicalExchange(VirtualExchange(nodes[node], local), VirtualExchange(columns[local], node))
        return run_share(exchange, case)

    return run_virtual_ranks(case.num_ranks, run)


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
    "two levels, two of the four ranks": WorldCase((7, 4), (3, 4), 3, ranks_per_node=1),
    "debug mode": WorldCase((7, 2, 8, 5), (3, 3, 2, 3), 4, ranks_per_node=2, debug=True, degree=2),
    "nodes": WorldCase((9, 0, 13, 6), (4, 3, 5, 4), 8, "node", ranks_per_node=2, routing="zipf"),
    "nodes, a rank without experts, chunks": WorldCase((6, 8, 3, 5), (5, 0, 4, 2), 8, "node", ranks_per_node=2,
                                                       degree=4),
    "nodes, copies": WorldCase((7, 6, 8, 5), (2, 3, 2, 2), 3, "node", ranks_per_node=2,
                               physical_to_logical=(0, 1, 2, 0, 3, 4, 5, 0, 5)),
    "nodes, one node": WorldCase((7, 4, 2), (3, 3, 1), 4, "node", ranks_per_node=3, degree=2),
    "nodes, one rank to a node": WorldCase((7, 4, 2), (3, 3, 1), 4, "node", ranks_per_node=1, degree=2),
    "nodes, static": WorldCase((7, 2, 8, 5), (3, 3, 2, 3), 4, "node", ranks_per_node=2, rows_per_rank=16,
                               rows_per_node=8),
    "nodes, static, chunks, dropped slots": WorldCase((7, 2, 8, 5), (3, 3, 2, 3), 4, "node", ranks_per_node=2,
                                                      rows_per_rank=6, rows_per_node=3, degree=3, routing="dropped"),
    "nodes, no tokens at all": WorldCase((0, 0, 0, 0), (3, 3, 2, 3), 2, "node", ranks_per_node=2, degree=2),
    "nodes, another degree backward": WorldCase((7, 2, 0, 5), (3, 3, 2, 3), 4, "node", ranks_per_node=2, degree=2,
                                                backward_degree=3),
    "nodes, debug mode": WorldCase((7, 2, 8, 5), (3, 3, 2, 3), 4, "node", ranks_per_node=2, debug=True, degree=2),
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
    form = ["dedup", "slot", "node"][seed % 3]
    ranks_per_node = draw.choice([n for n in (1, 2, 3, 4) if num_ranks % n == 0])
    bound = draw.choice([None, max(1, max(tokens) * (topk if form == "slot" else 1))])
    return WorldCase(
        tokens, tuple(sizes), topk, form,
        rows_per_rank=bound and bound * (num_ranks if form == "node" else 1),
        rows_per_node=bound if form == "node" else None,
        degree=1 + seed // 3 % 8,
        routing=draw.choice(["uniform", "zipf", "one_hot", "dropped"]),
        physical_to_logical=copies,
        ranks_per_node=ranks_per_node if form == "node" else draw.choice([None, ranks_per_node]),
        strided=draw.random() < 0.3,
        seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(48))
def test_fuzz(seed, pool):
    """Each form with each degree from 1 to 8, twice."""
    case = random_case(seed)
    assert_equals_dense(pool.run(case.num_ranks, run_case, case), case)


def owner_of(case: WorldCase, ids: Tensor) -> Tensor:
    """The rank of every slot."""
    return torch.bucketize(ids, case.map.rank_expert_offsets, right=True) - 1


def keep_first(ids: Tensor, owners: Tensor, rows: list[tuple[int, list[int]]], owner: int, bound: int) -> int:
    """Ids of ``owner`` become -1 in all but the first ``bound`` of the rows (token, slots) that have one; how many did."""
    taken = 0
    for token, slots in rows:
        goes = [j for j in slots if owners[token, j] == owner and ids[token, j] >= 0]
        taken += bool(goes)
        if taken > bound:
            ids[token, goes] = -1
    return max(0, taken - bound)


def drop_late_rows(case: WorldCase) -> tuple[Tensor, list[int]]:
    """Ids with -1 for what does not fit, written row by row, and how many rows each rank left out."""
    ids = case.tensors()["ids"].clone()
    owners, ranks, slots = owner_of(case, ids), range(case.num_ranks), list(range(case.topk))
    m = case.ranks_per_node
    chunks = [part.tolist() for tokens in torch.arange(len(ids)).split(case.tokens)
              for part in tokens.tensor_split(case.degree)]  # fmt: skip
    left_out = [0] * case.num_ranks
    for index, chunk in enumerate(chunks):
        source = index // case.degree
        rows = [(t, [j]) for t in chunk for j in slots] if case.form == "slot" else [(t, slots) for t in chunk]
        if case.form == "node":
            for node in range(case.num_ranks // m):
                left_out[source] += keep_first(ids, owners // m, rows, node, case.rows_per_node)
        else:
            for rank in ranks:
                left_out[source] += keep_first(ids, owners, rows, rank, case.rows_per_rank)
    if case.form == "node":  # then from the rank of the same place in each node
        for rank in ranks:
            for c in range(case.degree):
                rows = [(t, slots) for s in ranks if s % m == rank % m for t in chunks[s * case.degree + c]]
                for local in range(rank // m * m, rank // m * m + m):
                    left_out[rank] += keep_first(ids, owners, rows, local, case.rows_per_rank)
    return ids, left_out


OVERFLOWING = {
    "dedup": WorldCase((14, 3, 9), (3, 4, 4), 4, rows_per_rank=5),
    "dedup, chunks": WorldCase((14, 3, 9), (3, 4, 4), 4, rows_per_rank=2, degree=3),
    "slots": WorldCase((14, 3, 9), (3, 4, 4), 4, "slot", rows_per_rank=9),
    "two levels": WorldCase((14, 3, 9, 2), (3, 4, 4, 1), 4, rows_per_rank=5, ranks_per_node=2),
    "nodes": WorldCase((14, 3, 9, 2), (3, 2, 4, 4), 4, "node", rows_per_rank=100, rows_per_node=5, ranks_per_node=2),
    "nodes, inside": WorldCase((14, 3, 9, 2), (3, 2, 4, 4), 4, "node", rows_per_rank=12, rows_per_node=14,
                               ranks_per_node=2),
    "nodes, chunks": WorldCase((14, 3, 9, 2), (3, 2, 4, 4), 4, "node", rows_per_rank=3, rows_per_node=3,
                               ranks_per_node=2, degree=3),
}  # fmt: skip


@pytest.mark.parametrize("case", OVERFLOWING.values(), ids=OVERFLOWING)
def test_overflow_drops_and_counts(case, pool):
    case = replace(case, overflow="drop")
    kept, left_out = drop_late_rows(case)
    shares = pool.run(case.num_ranks, run_case, case)
    ours, dense = joined(shares, case), run_dense(case, kept)
    assert relative_error(ours.output, dense.output) <= 1e-12
    for name, grad in dense.grads.items():
        assert relative_error(ours.grads[name], grad) <= 1e-12, name
    assert [share.dropped_rows for share in shares] == left_out and sum(left_out) > 0


@pytest.mark.parametrize("case", OVERFLOWING.values(), ids=OVERFLOWING)
def test_overflow_raises_on_every_rank(case, pool):
    left_out = drop_late_rows(case)[1]
    pool.start(case.num_ranks, run_case, case)
    for fine, answer in pool.outcomes(list(range(case.num_ranks))):
        assert not fine and answer[0].startswith("ExchangeError: rows_per_"), answer
        assert ": expected all rows to fit into " in answer[0]
        if case.degree == 1:
            told = ", ".join(f"{count} of rank {rank}" for rank, count in enumerate(left_out) if count)
            assert answer[0].endswith(f"rows that did not: {told}")
    case = CASES["two levels"]
    assert_equals_dense(pool.run(case.num_ranks, run_case, case), case)  # the ranks are still in step


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nodes_are_the_same_bits_where_no_three_rows_are_summed(dtype, pool):
    """Sums of at most two rows have one order. With more, flat is ((a + b) + c) + d and by nodes (a + b) + (c + d)."""
    case = WorldCase((13, 6, 21, 10), (3, 3, 2, 3), 2, "node", routing="zipf", dtype=dtype, ranks_per_node=2,
                     elementwise=True)  # fmt: skip
    nodes = pool.run(4, run_case, case)
    assert_same_bits(pool.run(4, run_case, case), nodes)
    assert_same_bits(pool.run(4, run_case, replace(case, rows_per_rank=100, rows_per_node=21)), nodes,
                     ("hidden", "weights"))  # fmt: skip
    assert_same_bits(virtual_nodes(case), nodes)
    assert_same_bits(pool.run(4, run_case, replace(case, form="dedup")), nodes, ("hidden", "weights"))


@pytest.mark.parametrize("dtype, hidden_size", [(torch.bfloat16, 200), (torch.float16, 130)])
def test_nodes_quantise_to_the_same_bits(dtype, hidden_size, pool):
    """Rows are quantised once more inside the node: 16-bit rows come out of it as they went in."""
    case = WorldCase((9, 7, 0, 12), (2, 3, 2, 3), 2, "node", payload="fp8", dtype=dtype, hidden_size=hidden_size,
                     ranks_per_node=2, elementwise=True)  # fmt: skip
    flat = pool.run(4, run_case, replace(case, form="dedup"))
    assert_same_bits(pool.run(4, run_case, case), flat, ("hidden", "weights"))


@pytest.mark.parametrize("form, ranks_per_node", [("dedup", None), ("slot", None), ("dedup", 2), ("node", 2)])
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


class Recording(FlatExchange):
    """What was exchanged, in order."""

    def __init__(self, group: Any) -> None:
        super().__init__(group)
        self.seen: list[str] = []

    def start(self, rows: Tensor, splits: Any, **more: Any) -> Any:
        self.seen.append(more["what"])
        return super().start(rows, splits, **more)


def run_recording(group: Any, case: WorldCase) -> tuple[Share, list[str]]:
    exchange = Recording(group)
    return run_share(exchange, case), exchange.seen


@pytest.mark.parametrize("form", ["dedup", "slot"])
@pytest.mark.parametrize("degree, backward_degree", [(1, 4), (4, 1), (3, 2)])
@pytest.mark.parametrize("rows_per_rank", [None, 40])
def test_the_backward_in_other_chunks(rows_per_rank, degree, backward_degree, form, pool):
    """The forward again, then its gradients, both in ``backward_degree`` chunks."""
    case = WorldCase((9, 0, 6), (3, 0, 4), 4, form, rows_per_rank, degree=degree, backward_degree=backward_degree)
    shares, seen = zip(*pool.run(3, run_recording, case), strict=True)
    assert_equals_dense(list(shares), case)
    for exchanged in seen:
        dispatches = [i for i, what in enumerate(exchanged) if what == "the rows of a dispatch"]
        assert len(dispatches) == degree + backward_degree
        assert exchanged.count("the gradients of a combine") == backward_degree
        assert exchanged.index("the rows of a combine") in range(dispatches[0], dispatches[-1])
    elementwise = replace(case, elementwise=True)
    assert_same_bits(pool.run(3, run_case, elementwise), pool.run(3, run_case, replace(elementwise, backward_degree=None)),
                     ("hidden", "weights"))  # fmt: skip


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
    two_levels = replace(case, ranks_per_node=ranks_per_node)
    assert_same_bits(virtual_nodes(two_levels), flat)
    if form == "dedup":
        assert_equals_dense(virtual_nodes(replace(two_levels, form="node", degree=2)), case)


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


def run_frozen(group: Any, case: WorldCase) -> torch.Tensor | None:
    """Only rank 0's rows want a gradient; the others must take part in its backward all the same."""
    exchange, whole = FlatExchange(group), case.tensors()
    hidden = whole["hidden"][:3].clone().requires_grad_(exchange.rank == 0)
    output, _ = expert_parallel(
        hidden, whole["ids"][:3], whole["weights"][:3], lambda received: received.hidden * 2, exchange,
        case.map.rank_expert_offsets, case.options(), backward_degree=case.backward_degree,
    )  # fmt: skip
    output.sum().backward()
    return hidden.grad


@pytest.mark.parametrize("form", ["dedup", "slot"])
@pytest.mark.parametrize("backward_degree", [None, 2])
def test_ranks_that_want_no_gradient_take_part_in_the_backward(backward_degree, form, pool):
    case = WorldCase((3, 3), (4, 0), 1, form, backward_degree=backward_degree)
    grad, none = pool.run(2, run_frozen, case)
    weight = case.tensors()["weights"][:3] if form == "slot" else torch.ones(3, 1, dtype=torch.float64)
    assert none is None and relative_error(grad, 2 * weight.expand(3, HIDDEN)) <= 1e-15


def test_tokens_take_copies_in_turn():
    experts = WorldCase((8,), (4,), 1, physical_to_logical=(0, 1, 0, 0)).map
    ids = torch.tensor([[0], [0], [0], [0], [1], [-1], [7]])
    assert experts.physical_ids(ids).flatten().tolist() == [0, 2, 3, 0, 1, -1, -1]
    assert experts.physical_ids(ids, first_token=1).flatten().tolist() == [2, 3, 0, 2, 1, -1, -1]
    assert list(accumulate(experts.experts_per_rank)) == experts.rank_expert_offsets.tolist()[1:]
