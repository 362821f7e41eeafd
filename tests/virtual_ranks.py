"""Many ranks in one process: a thread for each, and an exchange that transposes in memory instead of a collective."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from moe_ext.distributed import Exchange
from moe_ext.distributed.exchange import Pending, Splits


class Board:
    """Where the ranks of one group leave what they send, and wait for each other."""

    def __init__(self, num_ranks: int) -> None:
        self.cells: list[Any] = [None] * num_ranks
        self.barrier = threading.Barrier(num_ranks, timeout=60)


class VirtualExchange(Exchange):
    def __init__(self, board: Board, rank: int) -> None:
        self.board, self.rank, self.num_ranks = board, rank, len(board.cells)

    def start(self, rows: Tensor, splits: Splits | None, *, reverse: bool = False, what: str = "rows") -> Pending:
        if splits is None:
            blocks = rows.chunk(self.num_ranks) if rows.numel() else [rows[:0]] * self.num_ranks
        else:
            blocks = rows.split(splits.recv if reverse else splits.send)
        self.board.cells[self.rank] = blocks
        self.board.barrier.wait()
        received = torch.cat([self.board.cells[source][self.rank] for source in range(self.num_ranks)])
        self.board.barrier.wait()
        return Pending(lambda: received)


def run_virtual_ranks(num_ranks: int, function: Callable[[int], Any]) -> list[Any]:
    """``function(rank)`` in a thread each."""
    with ThreadPoolExecutor(num_ranks) as executor:
        return [future.result() for future in [executor.submit(function, rank) for rank in range(num_ranks)]]
