"""Do all ranks mean the same exchange? Asked before a payload moves, answered on all of them by naming who differs.

A split mismatch is silent or ends the process with gloo, and hangs with NCCL.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from moe_ext.distributed.exchange import Exchange, ExchangeError, Splits

VARIABLE = "MOE_EXT_DEBUG_SPLITS"


def debug_requested(argument: bool | None) -> bool:
    """Debug mode: the argument, or, if it is None, what the environment says."""
    return os.environ.get(VARIABLE, "0") not in ("", "0") if argument is None else argument


def join(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def compare_facts(names: Iterable[str], table: list[list[int]]) -> None:
    """A row of facts from every rank; raises ExchangeError naming the first fact that differs, and who."""
    for name, values in zip(names, zip(*table, strict=True), strict=True):
        usual, _ = Counter(values).most_common(1)[0]
        different = [rank for rank, value in enumerate(values) if value != usual]
        if different:
            agreeing = [rank for rank, value in enumerate(values) if value == usual]
            told = ", ".join(str(values[rank]) for rank in different)
            raise ExchangeError(f"{name}: {told} on {join(different)}, {usual} on {join(agreeing)}")


def check_facts(exchange: Exchange, facts: dict[str, int], device: torch.device) -> None:
    """Every rank must hold the same ``facts``; raises ExchangeError on all of them, naming those that differ."""
    exchange.barrier()
    mine = torch.tensor(list(facts.values()), dtype=torch.int64, device=device)
    compare_facts(facts, exchange.gather(mine, "the arguments of all ranks").tolist())


def report_overflow(exchange: Exchange, dropped: Tensor, name: str, bound: int) -> None:
    """Raises ExchangeError on all ranks if ``dropped`` rows of any did not fit; on CUDA a device assertion fails."""
    every = exchange.gather(dropped.reshape(1), "the rows that did not fit").flatten()
    words = f"{name}: expected all rows to fit into {bound}; rows that did not"
    if every.is_cuda:
        torch._assert_async((every == 0).all(), words)
    elif bool(every.any()):
        told = ", ".join(f"{count} of rank {rank}" for rank, count in enumerate(every.tolist()) if count)
        raise ExchangeError(f"{words}: {told}")


def check_ids(exchange: Exchange, topk_ids: Tensor, num_experts: int) -> None:
    """Ids other than -1 outside [0, num_experts) on any rank raise ExchangeError on all."""
    bad = ((topk_ids < -1) | (topk_ids >= num_experts)).sum()
    counts = exchange.gather(bad.reshape(1), "the ids of all ranks").flatten().tolist()
    if any(counts):
        told = ", ".join(f"{count} on rank {rank}" for rank, count in enumerate(counts) if count)
        raise ExchangeError(f"topk_ids: expected -1 or ids below {num_experts}, the number of experts; outside: {told}")


def check_splits(exchange: Exchange, splits: list[Splits], device: torch.device) -> None:
    """What rank s will send to d must be what d awaits from s; raises ExchangeError on all ranks, naming pairs."""
    mine = torch.tensor([[s.send, s.recv] for s in splits], dtype=torch.int64, device=device)
    table = exchange.gather(mine, "the splits of all ranks").tolist()
    wrong = [
        f"rank {source} sends {send} rows to rank {destination}, which awaits {recv}"
        for chunk in range(len(splits))
        for source in range(exchange.num_ranks)
        for destination in range(exchange.num_ranks)
        if (send := table[source][chunk][0][destination]) != (recv := table[destination][chunk][1][source])
    ]
    if wrong:
        raise ExchangeError("splits: " + "; ".join(wrong[:8]))
