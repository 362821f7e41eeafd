"""The whole path of an expert-parallel layer: dispatch, experts, combine, in chunks that overlap."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_ext.distributed.dispatch import start_combine, start_dispatch
from moe_ext.distributed.exchange import Exchange
from moe_ext.distributed.level import PendingReturn, Received, make_anchor
from moe_ext.distributed.node_dispatch import PendingNodeReturn
from moe_ext.distributed.options import DispatchOptions


class ExpertParallelOutput(NamedTuple):
    """What :func:`expert_parallel` returns."""

    hidden: Tensor
    """[num_tokens, hidden_size]."""
    dropped_rows: Tensor
    """Scalar int64 on the device: rows of this rank beyond ``rows_per_rank``; zero in exact mode."""


def expert_parallel(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    experts: Callable[[Received], Tensor],
    exchange: Exchange,
    rank_expert_offsets: Tensor,
    options: DispatchOptions | None = None,
    *,
    degree: int = 1,
    backward_degree: int | None = None,
) -> ExpertParallelOutput:
    """Dispatch, compute, combine.

    With ``degree`` > 1 tokens are cut into that many chunks. All dispatches are started at once; while the experts work
    on a chunk, the next one arrives and the last one returns (on CUDA on the collective's own stream), in the backward
    as in the forward, whose layout and activations it uses. Rows do not depend on their chunk: outputs and the
    gradients of ``hidden`` and ``topk_weights`` are the same bits for every degree as long as the experts' kernel is
    the same for every number of rows; the gradients of expert weights are sums over chunks.

    Another degree for the backward needs other activations: with ``backward_degree`` the forward keeps its inputs
    alone, and the backward runs it again in that many chunks.

    Args:
        hidden, topk_ids, topk_weights, exchange, rank_expert_offsets, options: as in
            :func:`moe_ext.distributed.dispatch`; ``rows_per_rank`` counts the rows of one chunk.
        experts: from :class:`Received` to a row for each received row, as :func:`moe_ext.distributed.combine` takes
            them. Called ``degree`` times, with no rows at all if so many came. The result must depend on the rows by
            autograd, even if this rank has no experts.
        degree: how many chunks; the same on all ranks. :func:`moe_ext.distributed.choose_degree` finds
            one.
        backward_degree: how many in the backward, which then begins with the forward once more: less memory for more
            time. Gradients by ``backward()`` (as :func:`torch.utils.checkpoint.checkpoint` with ``use_reentrant=True``,
            which this is), not by ``torch.autograd.grad``. None: the forward's.

    Returns:
        :class:`ExpertParallelOutput`.

    Raises:
        ValueError: a degree < 1, or ``backward_degree`` with ``overflow="drop"``, where each degree would drop others.
        RuntimeError, ExchangeError: as in dispatch and combine.
    """
    if degree < 1:
        raise ValueError(f"degree: expected an integer >= 1, got {degree}")
    if backward_degree is not None:
        if backward_degree < 1:
            raise ValueError(f"backward_degree: expected None or an integer >= 1, got {backward_degree}")
        if options is not None and options.rows_per_rank is not None and options.overflow == "drop":
            raise ValueError(
                "backward_degree: expected None with overflow='drop', where the degree decides what is dropped"
            )

    def run(hidden: Tensor, topk_weights: Tensor, _: Tensor | None = None) -> tuple[Tensor, Tensor]:
        chunks = backward_degree if backward_degree is not None and torch.is_grad_enabled() else degree
        arriving = start_dispatch(hidden, topk_ids, topk_weights, exchange, rank_expert_offsets, options, chunks=chunks)
        returning: list[PendingReturn | PendingNodeReturn] = []
        dropped = []
        for index, chunk in enumerate(arriving):
            # In two levels: the next chunk comes into the node, and the last one leaves it, while this one is computed.
            for ahead in arriving[index : index + 2]:
                ahead.advance()
            received = chunk.finish()
            dropped.append(received.layout.dropped_rows)
            returning.append(start_combine(experts(received), received.layout))
            if index:
                returning[index - 1].advance()
        outputs = [chunk.finish() for chunk in returning]
        return torch.cat(outputs) if chunks > 1 else outputs[0], torch.stack(dropped).sum()

    if backward_degree is None or not torch.is_grad_enabled():
        return ExpertParallelOutput(*run(hidden, topk_weights))
    # Without gradient in the first run, with it in the second; the anchor makes that one happen on every rank. A
    # capturing stream does not tell its random state.
    capturing = hidden.is_cuda and torch.cuda.is_current_stream_capturing()
    output, dropped = checkpoint(
        run, hidden, topk_weights, make_anchor(hidden.device), use_reentrant=True, preserve_rng_state=not capturing
    )
    return ExpertParallelOutput(output, dropped)
