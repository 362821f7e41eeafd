"""Dispatch and combine: token rows to the ranks of their experts and back, differentiable.

Two forms. ``dedup``: a token travels once to each rank that holds one of its experts, with its local expert ids and
weights, and comes back once, already summed with the weights. ``slot``: every (token, expert) pair travels alone and
comes back unweighted; the weights are applied here and never travel.

Two modes. Exact: the counts are exchanged first and read by the host, one sync for all chunks. Static, with
``rows_per_rank``: every rank sends that many rows to every rank, padded; counts stay on the device, nothing syncs.

What a rank sends is one row of bytes per token (:func:`moe_ext.a2a_pack_rows`), so that one collective moves it. With
the fp8 payload the forward is quantised and the backward straight through: gradients travel in the dtype of the rows.
The gradient of dispatch is a combine and that of combine a dispatch, with the layout of the forward.

Every rank calls these the same number of times, with whatever number of tokens, none included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_ext.distributed.agreement import check_facts, check_ids, check_splits, debug_requested
from moe_ext.distributed.exchange import Exchange, ExchangeError, Pending, Splits
from moe_ext.ops.all_to_all import a2a_combine, a2a_pack_rows, a2a_plan, a2a_unpack_rows
from moe_ext.ops.permutation import unpermute
from moe_ext.packed_row import Payload
from moe_ext.plan_types import A2APlan

Form = Literal["dedup", "slot"]
Overflow = Literal["raise", "drop"]
_FORMS, _OVERFLOWS, _PAYLOADS = ("dedup", "slot"), ("raise", "drop"), ("native", "fp8")


@dataclass(frozen=True)
class DispatchOptions:
    """How rows travel; the same on all ranks.

    Args:
        form: ``dedup`` or ``slot``.
        rows_per_rank: None for exact sizes; else the rows that a rank sends to each rank, in each chunk.
        overflow: what happens to rows beyond ``rows_per_rank``. ``raise``: an error on every rank (on CUDA a device
            assertion, so that nothing syncs); ``drop``: they are left out, the last tokens first, contribute zeros and
            get zero gradients, and :attr:`Dispatched.dropped_rows` counts them.
        payload: ``native``, or ``fp8`` for e4m3 with 1x128 scales on the way to the experts.
        debug: cross-check arguments, ids and splits of all ranks before the payload moves (syncs); None: if the
            environment has ``MOE_EXT_DEBUG_SPLITS=1``.

    Raises:
        ValueError: an option is none of these; the message names it.
    """

    form: Form = "dedup"
    rows_per_rank: int | None = None
    overflow: Overflow = "raise"
    payload: Payload = "native"
    debug: bool | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("form", self.form, _FORMS), ("overflow", self.overflow, _OVERFLOWS), ("payload", self.payload, _PAYLOADS),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name}: expected {' or '.join(known)}, got {value!r}")
        if self.rows_per_rank is not None and self.rows_per_rank < 1:
            raise ValueError(f"rows_per_rank: expected None or an integer >= 1, got {self.rows_per_rank}")


@dataclass
class Dispatched:
    """One chunk's layout: what combine and the gradients need."""

    exchange: Exchange
    plan: A2APlan
    options: DispatchOptions
    splits: Splits | None
    topk: int
    topk_weights: Tensor | None
    """Of the slot form, to be applied by combine; it keeps its graph."""
    dropped_rows: Tensor
    """Scalar int64 on the device: rows of this rank that did not fit into ``rows_per_rank``."""
    anchor: Tensor
    packed: Tensor | None = None
    pending: Pending | None = None
    pending_grads: tuple[Pending, ...] = field(default=())


class Received(NamedTuple):
    """Rows at the rank of their experts."""

    hidden: Tensor
    """[num_received, hidden_size], ordered by source rank."""
    topk_ids: Tensor
    """[num_received, topk] int32 (slot form: [num_received, 1]): local expert ids, -1 for "not here"."""
    topk_weights: Tensor | None
    """[num_received, topk]; None in the slot form."""
    layout: Dispatched


def _padded_plan(plan: A2APlan, rows_per_rank: int) -> tuple[A2APlan, Tensor]:
    """The same plan with ``rows_per_rank`` rows for each rank, and how many rows did not fit."""
    num_ranks, device = plan.send_counts.shape[0], plan.send_counts.device
    starts = plan.send_offsets
    rows = torch.arange(num_ranks * rows_per_rank, device=device)
    rank, place = rows // rows_per_rank, rows % rows_per_rank
    dropped = (plan.send_counts - rows_per_rank).clamp(min=0).sum()
    if plan.send_to_slot.shape[0] == 0:
        send_to_slot = torch.full_like(rows, -1, dtype=torch.int32)
        slot_to_send = plan.slot_to_send
    else:
        dense = (starts[rank] + place).clamp(max=plan.send_to_slot.shape[0] - 1)
        send_to_slot = torch.where(place < plan.send_counts[rank], plan.send_to_slot[dense], -1)
        row = plan.slot_to_send
        owner = (torch.bucketize(row, starts, right=True) - 1).clamp(0, num_ranks - 1)
        at = row - starts[owner]
        slot_to_send = torch.where((row >= 0) & (at < rows_per_rank), owner * rows_per_rank + at, -1).int()
    offsets = torch.arange(num_ranks + 1, dtype=torch.int32, device=device) * rows_per_rank
    padded = plan._replace(
        send_counts=plan.send_counts.clamp(max=rows_per_rank), send_offsets=offsets,
        send_to_slot=send_to_slot.contiguous(), slot_to_send=slot_to_send,
    )  # fmt: skip
    return padded, dropped


def _report_overflow(exchange: Exchange, dropped: Sequence[Tensor], rows_per_rank: int) -> None:
    every = exchange.gather(torch.stack(list(dropped)).sum().reshape(1), "the rows that did not fit").flatten()
    words = f"rows_per_rank: expected all rows for a rank to fit into {rows_per_rank}; rows that did not"
    if every.is_cuda:
        torch._assert_async((every == 0).all(), words)
    elif bool(every.any()):
        told = ", ".join(f"{count} of rank {rank}" for rank, count in enumerate(every.tolist()) if count)
        raise ExchangeError(f"{words}: {told}")


def start_dispatch(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    exchange: Exchange,
    rank_expert_offsets: Tensor,
    options: DispatchOptions | None = None,
    *,
    chunks: int = 1,
) -> list[PendingDispatch]:
    """:func:`dispatch`, tokens cut into ``chunks`` consecutive parts whose exchanges are all under way on return."""
    options = options or DispatchOptions()
    debug = debug_requested(options.debug)
    if debug:
        _check_arguments(hidden, topk_ids, exchange, rank_expert_offsets, options, chunks)
    parts = list(
        zip(hidden.tensor_split(chunks), topk_ids.tensor_split(chunks), topk_weights.tensor_split(chunks), strict=True)
    )
    slotwise = options.form == "slot"
    sent_ids = [ids.reshape(-1, 1) if slotwise else ids for _, ids, _ in parts]
    plans = [a2a_plan(ids, rank_expert_offsets) for ids in sent_ids]
    splits: list[Splits | None] = [None] * chunks
    dropped = [hidden.new_zeros((), dtype=torch.int64)] * chunks
    counts = None
    if options.rows_per_rank is None:
        counts = exchange.exchange_counts(torch.stack([plan.send_counts for plan in plans], 1))
    else:
        padded = [_padded_plan(plan, options.rows_per_rank) for plan in plans]
        plans, dropped = [plan for plan, _ in padded], [rows for _, rows in padded]
        if options.overflow == "raise":
            _report_overflow(exchange, dropped, options.rows_per_rank)
    packed = [
        a2a_pack_rows(
            rows.detach(), ids, None if slotwise else weights.detach(), plan, payload=options.payload,
            copies=topk_ids.shape[1] if slotwise else 1,
        )
        for (rows, _, weights), ids, plan in zip(parts, sent_ids, plans, strict=True)
    ]  # fmt: skip
    if counts is not None:
        exact = exchange.splits(counts.tolist())  # the one sync
        if debug:
            check_splits(exchange, exact, hidden.device)
        splits = list(exact)
        plans = [p._replace(send_to_slot=p.send_to_slot[: sum(s.send)]) for p, s in zip(plans, exact, strict=True)]
        packed = [rows[: sum(s.send)] for rows, s in zip(packed, exact, strict=True)]
    # Rows must keep their place in the graph on every rank, or the backward's collectives would not pair up.
    anchor = torch.zeros(0, device=hidden.device, requires_grad=torch.is_grad_enabled())
    started = []
    for (rows, _, weights), ids, plan, split, over, data in zip(
        parts, sent_ids, plans, splits, dropped, packed, strict=True
    ):
        layout = Dispatched(
            exchange, plan, options, split, topk_ids.shape[1], weights if slotwise else None, over, anchor, data
        )
        token = _StartDispatch.apply(rows, None if slotwise else weights, ids, anchor, layout)
        started.append(PendingDispatch(token, rows.shape[1], rows.dtype, layout))
    return started


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
        RuntimeError: an argument has the wrong dtype, number of axes, size or device; the message names it.
        ExchangeError: a rank is gone, rows overflow, or (debug mode) the ranks disagree; the message says who and what.
    """
    return start_dispatch(hidden, topk_ids, topk_weights, exchange, rank_expert_offsets, options)[0].finish()


class PendingDispatch(NamedTuple):
    """A dispatch under way."""

    token: Tensor
    hidden_size: int
    dtype: torch.dtype
    layout: Dispatched

    def finish(self) -> Received:
        """Waits (on CUDA: the current stream does) and takes the rows apart."""
        hidden, ids, weights = _FinishDispatch.apply(self.token, self.hidden_size, self.dtype, self.layout)
        return Received(hidden, ids, None if self.layout.options.form == "slot" else weights, self.layout)


class PendingCombine(NamedTuple):
    """A combine under way."""

    token: Tensor
    layout: Dispatched

    def finish(self) -> Tensor:
        """Waits (on CUDA: the current stream does) and sums the rows of each token."""
        layout = self.layout
        rows = _FinishCombine.apply(self.token, layout)
        if layout.options.form == "dedup":
            return a2a_combine(rows, layout.plan)
        plan = layout.plan
        return unpermute(rows, plan.send_to_slot, plan.slot_to_send, layout.topk, layout.topk_weights)


def start_combine(rows: Tensor, layout: Dispatched) -> PendingCombine:
    """:func:`combine`, under way on return."""
    return PendingCombine(_StartCombine.apply(rows, layout.anchor, layout), layout)


def combine(rows: Tensor, layout: Dispatched) -> Tensor:
    """Send rows back and sum them for each token.

    Args:
        rows: [num_received, hidden_size], one for each row of :class:`Received`, in the same order: in the dedup form
            the weighted sum over this rank's experts, in the slot form what the one expert made.
        layout: of the dispatch.

    Returns:
        [num_tokens, hidden_size], accumulated in fp32, rounded once. Differentiable in ``rows`` and, in the slot form,
        in the weights given to dispatch.

    Raises:
        RuntimeError: ``rows`` has another number of rows than were received; the message names it.
        ExchangeError: a rank is gone; the message says what was awaited.
    """
    return start_combine(rows, layout).finish()


def _check_arguments(
    hidden: Tensor, topk_ids: Tensor, exchange: Exchange, offsets: Tensor, options: DispatchOptions, chunks: int
) -> None:
    bounds = offsets.tolist()
    facts = {
        "hidden_size": hidden.shape[1],
        "bytes of an element of hidden": hidden.element_size(),
        "topk": topk_ids.shape[1],
        "form (0 dedup, 1 slot)": _FORMS.index(options.form),
        "payload (0 native, 1 fp8)": _PAYLOADS.index(options.payload),
        "rows_per_rank (0 exact)": options.rows_per_rank or 0,
        "overflow (0 raise, 1 drop)": _OVERFLOWS.index(options.overflow),
        "chunks": chunks,
        "gradients wanted": int(torch.is_grad_enabled()),
        "the length of rank_expert_offsets": len(bounds),
    }
    check_facts(exchange, facts, hidden.device)
    check_facts(exchange, {f"rank_expert_offsets[{i}]": bound for i, bound in enumerate(bounds)}, hidden.device)
    check_ids(exchange, topk_ids, bounds[-1])


class _StartDispatch(torch.autograd.Function):
    """Starts the exchange; the empty token keeps the graph whole, for bytes carry no gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, topk_weights: Tensor | None, ids: Tensor, anchor: Tensor, layout: Dispatched
    ) -> Tensor:
        assert layout.packed is not None
        layout.pending = layout.exchange.start(layout.packed, layout.splits, what="the rows of a dispatch")
        layout.packed = None
        ctx.layout, ctx.ids, ctx.weighted = layout, ids, topk_weights is not None
        return anchor.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        layout, plan = ctx.layout, ctx.layout.plan
        grads = [pending.wait() for pending in layout.pending_grads]
        layout.pending_grads = ()
        if ctx.weighted:
            grad_hidden, grad_weights = torch.ops.moe_ext.a2a_pack_backward(
                grads[0], grads[1], ctx.ids, plan.rank_expert_offsets, plan.send_offsets, plan.send_to_slot,
                plan.slot_to_send,
            )  # fmt: skip
            return grad_hidden, grad_weights, None, None, None
        return unpermute(grads[0], plan.send_to_slot, plan.slot_to_send, layout.topk), None, None, None, None


class _FinishDispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, token: Tensor, hidden_size: int, dtype: torch.dtype, layout: Dispatched
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert layout.pending is not None
        rows, layout.pending = layout.pending.wait(), None
        ctx.layout, ctx.weighted = layout, layout.options.form == "dedup"
        ctx.hidden_size = hidden_size
        hidden, ids, weights = a2a_unpack_rows(
            rows, hidden_size, layout.topk if ctx.weighted else 1, dtype, payload=layout.options.payload,
            weighted=ctx.weighted,
        )  # fmt: skip
        ctx.mark_non_differentiable(ids)
        return hidden, ids, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor, _: Any, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
        grads = [(grad_hidden, "the gradients of the rows of a dispatch")]
        if ctx.weighted:
            grads.append((grad_weights, "the gradients of the weights of a dispatch"))
        layout = ctx.layout
        layout.pending_grads = tuple(
            layout.exchange.start(grad, layout.splits, reverse=True, what=what) for grad, what in grads
        )
        return layout.anchor.new_empty(0), None, None, None


class _StartCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, anchor: Tensor, layout: Dispatched) -> Tensor:
        expected = (
            layout.exchange.num_ranks * (layout.options.rows_per_rank or 0)
            if layout.splits is None
            else sum(layout.splits.recv)
        )
        if rows.dim() != 2 or rows.shape[0] != expected:
            raise RuntimeError(
                f"rows: expected [{expected}, hidden_size], a row for each that was received, got {list(rows.shape)}"
            )
        layout.pending = layout.exchange.start(rows, layout.splits, reverse=True, what="the rows of a combine")
        ctx.layout = layout
        return anchor.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        (pending,) = ctx.layout.pending_grads
        ctx.layout.pending_grads = ()
        return pending.wait(), None, None


class _FinishCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, layout: Dispatched) -> Tensor:
        assert layout.pending is not None
        rows, layout.pending = layout.pending.wait(), None
        ctx.layout = layout
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout = ctx.layout
        layout.pending_grads = (layout.exchange.start(grad, layout.splits, what="the gradients of a combine"),)
        return layout.anchor.new_empty(0), None
