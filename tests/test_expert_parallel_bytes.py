"""Bytes that travel, counted at the collective, against the formulas: a row of its size for every hop."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch

from expert_parallel_cases import WorldCase, make_exchange
from moe_ext.distributed import Exchange, FlatExchange, HierarchicalExchange, expert_parallel

pytestmark = pytest.mark.cpu

PAYLOAD_DTYPES = (torch.uint8, torch.bfloat16, torch.float32)  # counts are integers


class Counting(FlatExchange):
    """Bytes handed to the collective for other ranks, by the dtype that travels."""

    def __init__(self, group: Any) -> None:
        super().__init__(group)
        self.bytes: Counter[torch.dtype] = Counter()

    def _all_to_all(self, received: Any, rows: Any, recv: Any, send: Any) -> Any:
        send = send or [len(rows) // self.num_ranks] * self.num_ranks
        row = rows.element_size() * rows[:1].numel() if len(rows) else 0
        self.bytes[rows.dtype] += (sum(send) - send[self.rank]) * row
        return super()._all_to_all(received, rows, recv, send)

    def taken(self) -> list[int]:
        """Bytes of packed rows, of bfloat16 rows and of weights since the last time."""
        counted = [self.bytes[dtype] for dtype in PAYLOAD_DTYPES]
        self.bytes.clear()
        return counted


def run_counting(group: Any, case: WorldCase) -> dict[str, list[list[int]]]:
    """For every level: what went out in the forward, and in the backward."""
    exchange: Exchange = make_exchange(group, case)
    if isinstance(exchange, HierarchicalExchange):
        levels = {"intra": Counting(exchange.intra.group), "inter": Counting(exchange.inter.group)}
        exchange = HierarchicalExchange(*levels.values())
    else:
        levels = {"flat": Counting(group)}
        exchange = levels["flat"]
    whole, first = case.tensors(), [0, *accumulate(case.tokens)]
    mine = slice(first[exchange.rank], first[exchange.rank + 1])
    hidden, weights = (whole[name][mine].clone().requires_grad_() for name in ("hidden", "weights"))
    output, _ = expert_parallel(
        hidden, whole["ids"][mine], weights, lambda received: received.hidden * 2, exchange,
        case.map.rank_expert_offsets, case.options(), degree=case.degree,
    )  # fmt: skip
    forward = {name: level.taken() for name, level in levels.items()}
    output.float().sum().backward()
    return {name: [forward[name], level.taken()] for name, level in levels.items()}


def hops_of(case: WorldCase) -> Counter[tuple[str, int, int]]:
    """Rows that travel from one rank to another, (level, sender, receiver), in plain loops over tokens."""
    owners = (torch.bucketize(case.tensors()["ids"], case.map.rank_expert_offsets, right=True) - 1).tolist()
    source_of = [rank for rank, tokens in enumerate(case.tokens) for _ in range(tokens)]
    m, hops = case.ranks_per_node, []
    for source, ranks in zip(source_of, owners, strict=True):
        if case.form == "node":  # to the rank of the same place in each node, from there to each rank
            gateways = {rank // m * m + source % m for rank in ranks}
            hops += [("inter", source, gateway) for gateway in gateways]
            hops += [("intra", rank // m * m + source % m, rank) for rank in set(ranks)]
            continue
        for rank in set(ranks) if case.form == "dedup" else ranks:
            if m is None:
                hops.append(("flat", source, rank))
            else:  # first to the place of the destination, in this node
                relay = source // m * m + rank % m
                hops += [("intra", source, relay), ("inter", relay, rank)]
    return Counter(hop for hop in hops if hop[1] != hop[2])


def row_bytes(case: WorldCase) -> int:
    hidden = case.hidden_size * 2 if case.payload == "native" else case.hidden_size + 4 * -(-case.hidden_size // 128)
    return -(-(hidden + (4 if case.form == "slot" else 8 * case.topk)) // 16) * 16


@pytest.mark.parametrize("payload, degree", [("native", 1), ("native", 3), ("fp8", 1)])
@pytest.mark.parametrize(
    "form, ranks_per_node", [("dedup", None), ("slot", None), ("dedup", 2), ("slot", 2), ("node", 2), ("node", 1)]
)
def test_bytes_that_travel(form, ranks_per_node, payload, degree, pool):
    """Out: packed rows. Back, and as gradients both ways: plain rows; the gradients of weights where these travelled."""
    case = WorldCase((40, 0, 33, 21), (3, 5, 2, 6), 4, form, payload=payload, dtype=torch.bfloat16, hidden_size=256,
                     ranks_per_node=ranks_per_node, degree=degree)  # fmt: skip
    hops, plain = hops_of(case), 256 * 2
    weights = 0 if form == "slot" else 4 * case.topk
    for rank, counted in enumerate(pool.run(4, run_counting, case)):
        for level, (forward, backward) in counted.items():
            out = sum(rows for (name, sender, _), rows in hops.items() if (name, sender) == (level, rank))
            back = sum(rows for (name, _, receiver), rows in hops.items() if (name, receiver) == (level, rank))
            assert forward == [out * row_bytes(case), back * plain, 0], (rank, level)
            assert backward == [0, (out + back) * plain, back * weights], (rank, level)


@pytest.mark.parametrize("form, ranks_per_node", [("dedup", None), ("slot", None), ("dedup", 2), ("node", 2)])
def test_bytes_of_static_sizes_do_not_depend_on_the_routing(form, ranks_per_node, pool):
    case = WorldCase((8, 0, 3, 5), (3, 5, 2, 6), 2, form, rows_per_rank=16, dtype=torch.bfloat16, hidden_size=64,
                     ranks_per_node=ranks_per_node, rows_per_node=8 if form == "node" else None)  # fmt: skip
    weights = 0 if form == "slot" else 4 * case.topk
    for routing in ("uniform", "one_hot"):
        for counted in pool.run(4, run_counting, replace(case, routing=routing)):
            for level, (forward, backward) in counted.items():
                # A block for each other rank of the level; without deduplication by node it holds both nodes' rows.
                blocks = {
                    "flat": 3 * 16,
                    "intra": 16 * (1 if form == "node" else 2),
                    "inter": 8 if form == "node" else 2 * 16,
                }
                rows = blocks[level]
                assert forward == [rows * row_bytes(case), rows * 128, 0], level
                assert backward == [0, 2 * rows * 128, rows * weights], level


def test_a_node_saves_what_the_formula_says():
    """Rows that cross, per token: D(R) over ranks, D(N) over nodes, R and N as their number (uniform routing)."""
    from bench.dispatch_bytes import expected_ranks

    case = WorldCase((2000,) * 8, (8,) * 8, 8, "node", ranks_per_node=4)
    inter = sum(rows for (level, *_), rows in hops_of(case).items() if level == "inter")
    flat = replace(case, form="dedup", ranks_per_node=None)
    crossing = sum(rows for (_, a, b), rows in hops_of(flat).items() if a // 4 != b // 4)
    assert inter / 16000 == pytest.approx(expected_ranks(64, 2, 8) / 2, rel=0.01)
    assert crossing / 16000 == pytest.approx(expected_ranks(64, 8, 8) / 2, rel=0.01)
