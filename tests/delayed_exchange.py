"""Several ranks that are all this one process: what the tests of expert parallelism on one device send through."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ext.distributed import Exchange
from moe_ext.distributed.exchange import Pending, Splits


class DelayedExchange(Exchange):
    """Blocks come back as they went: what goes to rank r is received as from rank r, by the same experts.

    On CUDA late, on a stream of its own, and like NCCL's it only keeps what the caller keeps: buffers that are read
    before the wait, or freed before it, show.

    Args:
        num_ranks: as which this process poses; it is rank 0.
        cycles: of the clock by which every exchange is late.
    """

    def __init__(self, num_ranks: int, cycles: int = 0) -> None:
        self.rank, self.num_ranks, self.cycles = 0, num_ranks, cycles
        self._stream: torch.cuda.Stream | None = None

    def start(self, rows: Tensor, splits: Splits | None, *, reverse: bool = False, what: str = "rows") -> Pending:
        rows = rows.contiguous()
        received = torch.empty_like(rows)
        if not rows.is_cuda:
            received.copy_(rows)
            return Pending(lambda: received)
        if self._stream is None:
            self._stream = torch.cuda.Stream(rows.device)
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(rows.device))
        with torch.cuda.stream(stream):
            torch.cuda._sleep(self.cycles)
            received.copy_(rows)

        def finish() -> Tensor:
            torch.cuda.current_stream(rows.device).wait_stream(stream)
            return received

        return Pending(finish, rows)
