"""Dispatch and combine: token rows to the ranks of their experts and back, differentiable.

Three forms. ``dedup``: a token travels once to each rank that holds one of its experts, with its local expert ids and
weights, and comes back once, already summed with the weights. ``node``: the same in two levels, so that it crosses to
each node once. ``slot``: every (token, expert) pair travels alone and comes back unweighted; the weights are applied
here and never travel.

Two modes. Exact: the counts are exchanged first and read by the host, one sync for all chunks; with them travels what
the ranks must agree on, so that one that does not is named on all. Static, with ``rows_per_rank``: every rank sends
that many rows to every rank, padded; counts stay on the device, nothing syncs.

What a rank sends is one row of bytes per token (:func:`moe_ext.a2a_pack_rows`), so that one collective moves it. With
the fp8 payload the forward is quantised and the backward straight through: gradients travel in the dtype of the rows.

Every rank calls these the same number of times, with whatever number of tokens, none included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_ext.distributed.agreement import (
    check_facts,
    check_ids,
    check_splits,
    compare_facts,
    debug_requested,
    report_overflow,
)
from moe_ext.distributed.exchange import Exchange, Splits
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
from moe_ext.distributed.node_dispatch import PendingNodeReturn, PendingNodeRows, count_columns, levels_of, read_splits
from moe_ext.distributed.options import FORMS, OVERFLOWS, PAYLOADS, DispatchOptions
from moe_ext.ops.all_to_all import a2a_plan

_COLUMNS = 32
"""Counts travel in a multiple of this, so that ranks with other numbers of chunks still understand each other."""


def start_dispatch(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    exchange: Exchange,
    rank_expert_offsets: Tensor,
    options: DispatchOptions | None = None,
    *,
    chunks: int = 1,
) -> Sequence[PendingRows | PendingNodeRows]:
    """:func:`dispatch`, tokens cut into ``chunks`` consecutive parts whose exchanges are all under way on return.

    In form ``node`` what is under way is the level between nodes; a part's ``advance`` starts the other.
    """
    options = options or DispatchOptions()
    levels = levels_of(exchange) if options.form == "node" else None
    facts = _facts(hidden, topk_ids, options, chunks)
    debug = debug_requested(options.debug)
    if debug:
        _check_arguments(facts, topk_ids, exchange, rank_expert_offsets, options)
    weighted, topk = options.form != "slot", topk_ids.shape[1]
    rows = hidden.tensor_split(chunks)
    ids = [part if weighted else part.reshape(-1, 1) for part in topk_ids.tensor_split(chunks)]
    weights = topk_weights.tensor_split(chunks)
    # Between nodes these stand where ranks do.
    link, bound, bound_name = exchange, options.rows_per_rank, "rows_per_rank"
    owners = rank_expert_offsets
    if levels is not None:
        link, bound, bound_name = levels.inter, options.rows_per_node, "rows_per_node"
        owners = rank_expert_offsets[:: levels.local_ranks].contiguous()
    plans = [a2a_plan(part, owners) for part in ids]
    dropped = [hidden.new_zeros((), dtype=torch.int64)] * chunks
    counts = None
    if bound is None:
        columns = torch.stack([plan.send_counts for plan in plans], 1)
        if levels is not None:
            onward = torch.stack([a2a_plan(part, rank_expert_offsets).send_counts for part in ids], 1)
            columns = count_columns(columns, onward, levels.local_ranks)
        counts = exchange.exchange_counts(_with_facts(columns, facts))
    else:
        padded = [padded_plan(plan, bound) for plan in plans]
        plans, dropped = [plan for plan, _ in padded], [over for _, over in padded]
        if options.overflow == "raise":
            report_overflow(exchange, torch.stack(dropped).sum(), bound_name, bound)
    packed = [
        pack(part, part_ids, part_weights if weighted else None, plan, options.payload, topk)
        for part, part_ids, part_weights, plan in zip(rows, ids, weights, plans, strict=True)
    ]
    splits: Sequence[Splits | None] = [None] * chunks
    splits_inside: Sequence[Splits | None] = splits
    if counts is not None:
        table = counts.tolist()  # the one sync
        compare_facts(facts, [row[-len(facts) :] for row in table[exchange.num_ranks : 2 * exchange.num_ranks]])
        if levels is None:
            exact = exchange.splits([row[:chunks] for row in table])
        else:
            exact, inside = read_splits(table, levels, chunks)
            if debug:
                check_splits(levels.intra, inside, hidden.device)
            splits_inside = inside
        if debug:
            check_splits(link, exact, hidden.device)
        plans = [exact_plan(plan, split) for plan, split in zip(plans, exact, strict=True)]
        packed = [data[: sum(split.send)] for data, split in zip(packed, exact, strict=True)]
        splits = exact
    started: list[PendingRows] = []
    for i, plan in enumerate(plans):
        layout = Layout(
            link, plan, options.payload, splits[i], bound, topk, weighted, None if weighted else weights[i],
            dropped[i], make_anchor(hidden.device), packed[i],
        )  # fmt: skip
        started.append(start_rows(rows[i], ids[i], weights[i] if weighted else None, layout))
    if levels is None:
        return started
    return [
        PendingNodeRows(part, levels, options, rank_expert_offsets, inside)
        for part, inside in zip(started, splits_inside, strict=True)
    ]


def dispatch(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    exchange: Exchange,
    rank_expert_offsets: Tensor,
    options: DispatchOptions | None = None,
) -> Received:
    """Send every token to the ranks of its experts.

    Args:
        hidden: [num_tokens, hidden_size] float32, bfloat16 or float16 (float64 on the CPU); the number of tokens may
            differ between ranks and be zero.
        topk_ids: [num_tokens, topk] int32 or int64, physical expert ids (:meth:`ExpertMap.physical_ids`); an id that no
            rank owns is sent nowhere, contributes nothing and gets a zero gradient.
        topk_weights: [num_tokens, topk] float32 (float64 for float64 rows).
        exchange: between which ranks.
        rank_expert_offsets: [num_ranks + 1] int32, as in :func:`moe_ext.a2a_plan`; the same on all ranks.
        options: see :class:`DispatchOptions`; the default is the dedup form in exact sizes.

    Returns:
        :class:`Received`, differentiable in ``hidden`` and ``topk_weights``, once. All ranks or none run the backward.

    Raises:
        ValueError: form ``node`` over an exchange of one level.
        RuntimeError: an argument has the wrong dtype, number of axes, size or device; the message names it.
        ExchangeError: a rank is gone, rows overflow, or the ranks disagree (in exact mode on sizes, form and payload;
            in debug mode on everything); the message says who and what.
    """
    return start_dispatch(hidden, topk_ids, topk_weights, exchange, rank_expert_offsets, options)[0].finish()


def start_combine(rows: Tensor, layout: Layout | NodeLayout) -> PendingReturn | PendingNodeReturn:
    """:func:`combine`, under way on return; in form ``node`` inside the node, ``advance`` starts the level between."""
    return PendingNodeReturn(rows, layout) if isinstance(layout, NodeLayout) else start_return(rows, layout)


def combine(rows: Tensor, layout: Layout | NodeLayout) -> Tensor:
    """Send rows back and sum them for each token.

    Args:
        rows: [num_received, hidden_size], one for each row of :class:`Received`, in the same order: in the dedup and
            node forms the weighted sum over this rank's experts, in the slot form what the one expert made.
        layout: of the dispatch.

    Returns:
        [num_tokens, hidden_size], accumulated in fp32, rounded once (form ``node``: once in each level). Differentiable
        in ``rows`` and, in the slot form, in the weights given to dispatch.

    Raises:
        RuntimeError: ``rows`` has another number of rows than were received; the message names it.
        ExchangeError: a rank is gone; the message says what was awaited.
    """
    return start_combine(rows, layout).finish()


def _facts(hidden: Tensor, topk_ids: Tensor, options: DispatchOptions, chunks: int) -> dict[str, int]:
    """What all ranks must mean alike for their collectives to pair up."""
    return {
        "hidden_size": hidden.shape[1],
        "bytes of an element of hidden": hidden.element_size(),
        "topk": topk_ids.shape[1],
        "form (0 dedup, 1 slot, 2 node)": FORMS.index(options.form),
        "payload (0 native, 1 fp8)": PAYLOADS.index(options.payload),
        "chunks": chunks,
    }


def _with_facts(columns: Tensor, facts: dict[str, int]) -> Tensor:
    """The columns, zeros up to a multiple of ``_COLUMNS``, and the facts last."""
    num_ranks, width = columns.shape
    zeros = -(width + len(facts)) % _COLUMNS
    last = torch.tensor([0] * zeros + list(facts.values()), dtype=columns.dtype, device=columns.device)
    return torch.cat([columns, last.expand(num_ranks, -1)], 1)


def _check_arguments(
    facts: dict[str, int], topk_ids: Tensor, exchange: Exchange, offsets: Tensor, options: DispatchOptions
) -> None:
    bounds = offsets.tolist()
    more = {
        "rows_per_rank (0 exact)": options.rows_per_rank or 0,
        "rows_per_node (0 exact)": options.rows_per_node or 0,
        "overflow (0 raise, 1 drop)": OVERFLOWS.index(options.overflow),
        "gradients wanted": int(torch.is_grad_enabled()),
        "the length of rank_expert_offsets": len(bounds),
    }
    check_facts(exchange, facts | more, offsets.device)
    check_facts(exchange, {f"rank_expert_offsets[{i}]": bound for i, bound in enumerate(bounds)}, offsets.device)
    check_ids(exchange, topk_ids, bounds[-1])
