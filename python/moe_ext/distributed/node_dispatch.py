"""Form ``node``: a token crosses to each node once, to the rank of its own place there, which fans it out.

Two dispatches, one after the other: between the ranks of the same place in all nodes, with nodes in place of ranks, and
inside the node. The way back is the same: the rank that fanned a row out sums what the node's ranks made of it, and one
row returns to the token (DeepEP's internode kernels).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ext.distributed.agreement import report_overflow
from moe_ext.distributed.exchange import Exchange, HierarchicalExchange, Splits
from moe_ext.distributed.level import (
    Layout,
    NodeLayout,
    PendingReturn,
    PendingRows,
    Received,
    exact_plan,
    make_anchor,
    pack,
    padded_plan,
    start_return,
    start_rows,
)
from moe_ext.distributed.options import DispatchOptions
from moe_ext.ops.all_to_all import a2a_plan


def levels_of(exchange: Exchange) -> HierarchicalExchange:
    """The exchange, if it has two levels; raises ValueError if not."""
    if not isinstance(exchange, HierarchicalExchange):
        raise ValueError(f"exchange: expected a HierarchicalExchange with form='node', got {type(exchange).__name__}")
    return exchange


def count_columns(node_counts: Tensor, rank_counts: Tensor, ranks_per_node: int) -> Tensor:
    """What every rank must know before a row moves: [num_ranks, chunks * (1 + ranks_per_node)] int32.

    Row d holds, for each chunk, the rows that cross to d's node, and those of them that go on to each of its ranks.

    Args:
        node_counts: [num_nodes, chunks].
        rank_counts: [num_ranks, chunks].
    """
    num_nodes, chunks = node_counts.shape
    onward = rank_counts.view(num_nodes, ranks_per_node, chunks).transpose(1, 2)
    columns = node_counts.new_empty(num_nodes, ranks_per_node, chunks, 1 + ranks_per_node)
    columns[..., 0] = node_counts[:, None]
    columns[..., 1:] = onward[:, None]
    return columns.flatten(2).flatten(0, 1)


def read_splits(
    table: list[list[int]], exchange: HierarchicalExchange, chunks: int
) -> tuple[list[Splits], list[Splits]]:
    """The splits of every chunk, between nodes and inside; ``table`` is what came of exchanging the columns."""
    m, n, local, width = exchange.local_ranks, exchange.num_nodes, exchange.intra.rank, 1 + exchange.local_ranks
    sent, received = table[: m * n], table[m * n : 2 * m * n]
    through_here = received[local::m]
    between, inside = [], []
    for first in range(0, chunks * width, width):
        between.append(Splits([row[first] for row in sent[::m]], [row[first] for row in through_here], []))
        inside.append(
            Splits(
                [sum(row[first + 1 + rank] for row in through_here) for rank in range(m)],
                [sum(row[first + 1 + local] for row in received[rank::m]) for rank in range(m)],
                [],
            )
        )
    return between, inside


class PendingNodeRows:
    """A dispatch under way, in two levels."""

    def __init__(
        self,
        between: PendingRows,
        exchange: HierarchicalExchange,
        options: DispatchOptions,
        rank_expert_offsets: Tensor,
        splits: Splits | None,
    ) -> None:
        self._between, self._exchange, self._options, self._splits = between, exchange, options, splits
        first = exchange.inter.rank * exchange.local_ranks
        mine = rank_expert_offsets[first : first + exchange.local_ranks + 1]
        self._offsets = mine - mine[0]
        self._inside: PendingRows | None = None

    def advance(self) -> None:
        """Waits for the first level and starts the second, unless that was done."""
        if self._inside is not None:
            return
        hidden, ids, weights, _ = self._between.finish()
        assert weights is not None
        plan, bound, payload = a2a_plan(ids, self._offsets), self._options.rows_per_rank, self._options.payload
        dropped = hidden.new_zeros((), dtype=torch.int64)
        if self._splits is not None:
            plan = exact_plan(plan, self._splits)
        else:
            assert bound is not None
            plan, dropped = padded_plan(plan, bound)
            if self._options.overflow == "raise":
                report_overflow(self._exchange, dropped, "rows_per_rank", bound)
        layout = Layout(
            self._exchange.intra, plan, payload, self._splits, bound, ids.shape[1], True, None, dropped,
            make_anchor(hidden.device), pack(hidden, ids, weights, plan, payload, 1),
        )  # fmt: skip
        self._inside = start_rows(hidden, ids, weights, layout)

    def finish(self) -> Received:
        """Waits (on CUDA: the current stream does) and takes the rows apart."""
        self.advance()
        assert self._inside is not None
        return self._inside.finish()._replace(layout=NodeLayout(self._between.layout, self._inside.layout))


class PendingNodeReturn:
    """A combine under way, in two levels."""

    def __init__(self, rows: Tensor, layout: NodeLayout) -> None:
        self._inside, self._layout = start_return(rows, layout.inside), layout
        self._between: PendingReturn | None = None

    def advance(self) -> None:
        """Waits for the first level, sums inside the node, and starts the second, unless that was done."""
        if self._between is None:
            self._between = start_return(self._inside.finish(), self._layout.between)

    def finish(self) -> Tensor:
        """Waits (on CUDA: the current stream does) and sums the rows of each token."""
        self.advance()
        assert self._between is not None
        return self._between.finish()
