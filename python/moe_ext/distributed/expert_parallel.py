"""The whole path of an expert-parallel layer: dispatch, experts, combine, in chunks that overlap."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_ext.distributed.dispatch import start_combine, start_dispatch
from moe_ext.distributed.exchange import Exchange
from moe_ext.distributed.level import PendingReturn, Received
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
) -> ExpertParallelOutput:
    """Dispatch, compute, combine.

    With ``degree`` > 1 tokens are cut into that many chunks. All dispatches are started at once; while the experts work
    on a chunk, the next one arrives and the last one returns (on CUDA on the collective's own stream), in the backward
    as in the forward. Rows do not depend on their chunk: outputs and the gradients of ``hidden`` and ``topk_weights``
    are the same bits for every degree as long as the experts' kernel is the same for every number of rows; the
    gradients of expert weights are sums over chunks.

    Args:
        hidden, topk_ids, topk_weights, exchange, rank_expert_offsets, options: as in
            :func:`moe_ext.distributed.dispatch`; ``rows_per_rank`` counts the rows of one chunk.
        experts: from :class:`Received` to a row for each received row, as :func:`moe_ext.distributed.combine` takes
            them. Called ``degree`` times, with no rows at all if so many came. The result must depend on the rows by
            autograd, even if this rank has no experts.
        degree: how many chunks; the same on all ranks. :func:`moe_ext.distributed.choose_degree` finds
            one.

    Returns:
        :class:`ExpertParallelOutput`.

    Raises:
        ValueError: ``degree`` < 1.
        RuntimeError, ExchangeError: as in dispatch and combine.
    """
    if degree < 1:
        raise ValueError(f"degree: expected an integer >= 1, got {degree}")
    arriving = start_dispatch(hidden, topk_ids, topk_weights, exchange, rank_expert_offsets, options, chunks=degree)
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
    return ExpertParallelOutput(torch.cat(outputs) if degree > 1 else outputs[0], torch.stack(dropped).sum())
