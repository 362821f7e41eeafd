"""Bytes that travel, counted at the collective, against the formulas."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch

from expert_parallel_cases import WorldCase
from moe_ext.distributed import FlatExchange, combine, dispatch

pytestmark = pytest.mark.cpu


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
