"""All-to-all of rows between ranks: flat over a process group, or in two levels, over nodes and inside them.

Everything here is ``torch.distributed.all_to_all_single``: NCCL on GPUs, gloo on CPUs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from typing import Any, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor


class ExchangeError(RuntimeError):
    """A collective failed, or ranks do not agree on one. The message says what was awaited, and by whom."""


class Splits(NamedTuple):
    """Rows that go to and come from every rank, on the host. Two levels also know what passes through."""

    send: list[int]
    recv: list[int]
    relay: list[int]
    """Two levels: rows from local rank l for node n at ``l * num_nodes + n``; empty for one level."""


class Pending:
    """An exchange under way; ``wait`` returns what was received, and orders the current stream after it."""

    def __init__(self, finish: Callable[[], Tensor], sent: Tensor | None = None) -> None:
        self._finish = finish
        self._sent = sent  # the backend may still be reading it

    def wait(self) -> Tensor:
        return self._finish()


@contextmanager
def awaiting(what: str, rank: int, num_ranks: int) -> Iterator[None]:
    """Says what a failed collective was for; the backend's own words follow."""
    try:
        yield
    except ExchangeError:
        raise
    except RuntimeError as error:
        raise ExchangeError(f"rank {rank} of {num_ranks} awaited {what}: {error}") from error


class Exchange(ABC):
    """Who exchanges rows with whom. ``rank`` is this process's place among ``num_ranks``."""

    rank: int
    num_ranks: int

    @abstractmethod
    def start(self, rows: Tensor, splits: Splits | None, *, reverse: bool = False, what: str = "rows") -> Pending:
        """Send rows to every rank, ordered by destination; receive them ordered by source.

        Args:
            rows: [num_rows, ...], any dtype that the backend moves (fp8 as a view of uint8).
            splits: from :meth:`splits`; None: as many rows for each rank, the same on all ranks.
            reverse: send back what an exchange of these splits received.
            what: named in the error, if it fails.
        """

    def exchange_counts(self, send_counts: Tensor) -> Tensor:
        """[num_ranks, columns] integers, a row for each rank -> a tensor on the same device.

        Its first ``num_ranks`` rows are what was given, the next what every rank sent to this one; what follows is for
        :meth:`splits` alone.
        """
        received = self.start(send_counts, None, what="the number of rows that every rank sends").wait()
        return torch.cat([send_counts, received])

    def splits(self, counts: list[list[int]]) -> list[Splits]:
        """The splits of every column, from what :meth:`exchange_counts` returned, as a list."""
        n = self.num_ranks
        return [
            Splits(list(column[:n]), list(column[n : 2 * n]), list(column[2 * n :]))
            for column in zip(*counts, strict=True)
        ]

    def gather(self, row: Tensor, what: str = "what all ranks hold") -> Tensor:
        """The row of every rank, ``[num_ranks, *row.shape]``."""
        return self.start(row[None].repeat(self.num_ranks, *[1] * row.dim()), None, what=what).wait()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each."""
        return self.gather(tensor, "a sum over all ranks").sum(0)

    def barrier(self) -> None:  # noqa: B027 (a rank that is gone shows in the first exchange too)
        """Returns when all ranks are here, else raises within the timeout; gloo names them on rank 0."""


class FlatExchange(Exchange):
    """One ``all_to_all_single`` over ``group`` (None: all processes)."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise RuntimeError("torch.distributed is not initialised: call torch.distributed.init_process_group first")
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.num_ranks = dist.get_rank(self.group), dist.get_world_size(self.group)

    def start(self, rows: Tensor, splits: Splits | None, *, reverse: bool = False, what: str = "rows") -> Pending:
        rows = rows.contiguous()
        if splits is None:
            send = recv = None
            received = torch.empty_like(rows)
        else:
            send, recv = (splits.recv, splits.send) if reverse else (splits.send, splits.recv)
            received = rows.new_empty(sum(recv), *rows.shape[1:])
        with awaiting(what, self.rank, self.num_ranks):
            work = self._all_to_all(received, rows, recv, send)

        def finish() -> Tensor:
            with awaiting(what, self.rank, self.num_ranks):
                work.wait()
            return received

        return Pending(finish, rows)

    def _all_to_all(self, received: Tensor, rows: Tensor, recv: list[int] | None, send: list[int] | None) -> Any:
        """The collective itself; tests count its bytes here."""
        return dist.all_to_all_single(received, rows, recv, send, group=self.group, async_op=True)

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        with awaiting("a sum over all ranks", self.rank, self.num_ranks):
            dist.all_reduce(total, group=self.group)
        return total

    def barrier(self) -> None:
        if dist.get_backend(self.group) != dist.Backend.GLOO:
            return
        with awaiting("all ranks", self.rank, self.num_ranks):
            dist.monitored_barrier(self.group, timeout=self.timeout(), wait_all_ranks=True)

    def timeout(self) -> timedelta:
        """That of the process group."""
        group = self.group
        assert group is not None
        timeout: timedelta = group._get_backend(group._device_types[0]).options._timeout
        return timeout


def regroup_blocks(rows: Tensor, sizes: list[int], outer: int, inner: int) -> Tensor:
    """Blocks of rows lie as [outer, inner], ``sizes[o * inner + i]`` rows each -> as [inner, outer]."""
    blocks = torch.split(rows, sizes)
    return torch.cat([blocks[o * inner + i] for i in range(inner) for o in range(outer)])


class HierarchicalExchange(Exchange):
    """Two levels: first inside the node, so that what goes to another node leaves in larger messages (Tutel's 2DH).

    Only permutes, so it equals a flat exchange over ranks ``node * ranks_per_node + local_rank`` bitwise. With
    ``DispatchOptions(form="node")`` the levels are two dispatches, so that a token crosses to a node once.

    Args:
        intra: between the ranks of a node.
        inter: between the ranks of the same place in all nodes.
    """

    def __init__(self, intra: Exchange, inter: Exchange) -> None:
        self.intra, self.inter = intra, inter
        self.local_ranks, self.num_nodes = intra.num_ranks, inter.num_ranks
        self.rank = inter.rank * intra.num_ranks + intra.rank
        self.num_ranks = intra.num_ranks * inter.num_ranks
        self._stream: torch.cuda.Stream | None = None

    @overload
    @staticmethod
    def over(ranks_per_node: int) -> HierarchicalExchange: ...
    @overload
    @staticmethod
    def over(ranks_per_node: int, subsets: Sequence[Sequence[int]]) -> HierarchicalExchange | None: ...
    @staticmethod
    def over(ranks_per_node: int, subsets: Sequence[Sequence[int]] | None = None) -> HierarchicalExchange | None:
        """Makes the groups of both levels, with the timeout of all processes' group, nodes being consecutive ranks.

        Every process calls it, with the same arguments, as it calls ``torch.distributed.new_group``.

        Args:
            ranks_per_node: of each node.
            subsets: disjoint sets of ranks, one exchange over each; None: one over all.

        Returns:
            The exchange over the subset that this process is in; None if it is in none.

        Raises:
            ValueError: ``ranks_per_node`` does not divide the number of ranks, or a rank is in two subsets.
        """
        whole = FlatExchange()
        every = [sorted(subset) for subset in subsets or [range(whole.num_ranks)]]
        if len(set(chain(*every))) < sum(map(len, every)):
            raise ValueError(f"subsets: expected no rank in two of them, got {every}")
        exchange = None
        for ranks in every:
            if ranks_per_node < 1 or len(ranks) % ranks_per_node:
                raise ValueError(f"ranks_per_node: expected a divisor of {len(ranks)} ranks, got {ranks_per_node}")
            nodes = [ranks[i : i + ranks_per_node] for i in range(0, len(ranks), ranks_per_node)]
            columns = [list(column) for column in zip(*nodes, strict=True)]
            mine = [
                FlatExchange(group)
                for members in (*nodes, *columns)
                if isinstance(group := dist.new_group(members, timeout=whole.timeout()), dist.ProcessGroup)
            ]
            if mine:
                exchange = HierarchicalExchange(*mine)
        return exchange

    def start(self, rows: Tensor, splits: Splits | None, *, reverse: bool = False, what: str = "rows") -> Pending:
        run = self._reverse if reverse and splits is not None else self._forward
        if not rows.is_cuda:
            first, then = run(rows, splits, what)
            return Pending(lambda: then(first.wait()))
        # The second level waits for the first on a stream of its own, so that the caller's stream goes on.
        if self._stream is None:
            self._stream = torch.cuda.Stream(rows.device)  # type: ignore[no-untyped-call]
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(rows.device))
        with torch.cuda.stream(stream):
            first, then = run(rows, splits, what)
            received = then(first.wait())
        rows.record_stream(stream)

        def finish() -> Tensor:
            current = torch.cuda.current_stream(rows.device)
            current.wait_stream(stream)
            received.record_stream(current)
            return received

        return Pending(finish)

    def _forward(self, rows: Tensor, splits: Splits | None, what: str) -> tuple[Pending, Callable[[Tensor], Tensor]]:
        m, n = self.local_ranks, self.num_nodes
        if splits is None:
            block = (rows.shape[0] // (m * n), *rows.shape[1:])
            blocks = rows.view(n, m, *block).transpose(0, 1).reshape(rows.shape)
            first = self.intra.start(blocks, None, what=f"{what}, inside the node")

            def spread(relayed: Tensor) -> Tensor:
                outgoing = relayed.view(m, n, *block).transpose(0, 1).reshape(rows.shape)
                return self.inter.start(outgoing, None, what=f"{what}, between nodes").wait()

            return first, spread
        inside, between = self._levels(splits)
        first = self.intra.start(regroup_blocks(rows, splits.send, n, m), inside, what=f"{what}, inside the node")

        def finish(relayed: Tensor) -> Tensor:
            outgoing = regroup_blocks(relayed, splits.relay, m, n)
            return self.inter.start(outgoing, between, what=f"{what}, between nodes").wait()

        return first, finish

    def _reverse(self, rows: Tensor, splits: Splits | None, what: str) -> tuple[Pending, Callable[[Tensor], Tensor]]:
        """Each step of :meth:`_forward` backwards; what came through this rank is known here."""
        assert splits is not None
        m, n = self.local_ranks, self.num_nodes
        inside, between = self._levels(splits)
        first = self.inter.start(rows, between, reverse=True, what=f"{what}, between nodes")
        transposed_relay = [splits.relay[local * n + node] for node in range(n) for local in range(m)]
        transposed_send = [splits.send[node * m + local] for local in range(m) for node in range(n)]

        def finish(relayed: Tensor) -> Tensor:
            incoming = regroup_blocks(relayed, transposed_relay, n, m)
            back = self.intra.start(incoming, inside, reverse=True, what=f"{what}, inside the node").wait()
            return regroup_blocks(back, transposed_send, m, n)

        return first, finish

    def _levels(self, splits: Splits) -> tuple[Splits, Splits]:
        m, n = self.local_ranks, self.num_nodes
        send, recv, relay = splits
        inside = Splits([sum(send[i::m]) for i in range(m)], [sum(relay[i * n : i * n + n]) for i in range(m)], [])
        between = Splits([sum(relay[i::n]) for i in range(n)], [sum(recv[i * m : i * m + m]) for i in range(n)], [])
        return inside, between

    def exchange_counts(self, send_counts: Tensor) -> Tensor:
        m, n, columns = self.local_ranks, self.num_nodes, send_counts.shape[1]
        what = "the number of rows that every rank sends"
        outgoing = send_counts.view(n, m, columns).transpose(0, 1).reshape(m * n, columns)
        relay = self.intra.start(outgoing, None, what=what).wait()
        onward = relay.view(m, n, columns).transpose(0, 1).reshape(n * m, columns)
        received = self.inter.start(onward, None, what=what).wait()
        return torch.cat([send_counts, received, relay])

    def barrier(self) -> None:
        self.intra.barrier()
        self.inter.barrier()
