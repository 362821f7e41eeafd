"""One level of a dispatch: rows to the ranks of one exchange and back, differentiable.

The gradient of a dispatch is a combine and that of a combine a dispatch, with the layout of the forward. Bytes carry no
gradient, so that an empty token stands for them in the graph while they are under way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_ext.distributed.exchange import Exchange, Pending, Splits
from moe_ext.ops.all_to_all import a2a_combine, a2a_pack_rows, a2a_unpack_rows
from moe_ext.ops.permutation import unpermute
from moe_ext.packed_row import Payload
from moe_ext.plan_types import A2APlan


@dataclass
class Layout:
    """What one chunk's combine and gradients need, of one level."""

    exchange: Exchange
    plan: A2APlan
    payload: Payload
    splits: Splits | None
    """None: ``bound`` rows for each rank."""
    bound: int | None
    topk: int
    weighted: bool
    """Weights travel with the rows, which come back summed; else ``slot_weights`` are applied by combine."""
    slot_weights: Tensor | None
    """They keep their graph."""
    dropped_rows: Tensor
    """Scalar int64 on the device: rows of this rank that did not fit into ``bound``."""
    anchor: Tensor
    packed: Tensor | None = None
    pending: Pending | None = None
    pending_grads: tuple[Pending, ...] = ()

    @property
    def num_received(self) -> int:
        return self.exchange.num_ranks * (self.bound or 0) if self.splits is None else sum(self.splits.recv)


@dataclass
class NodeLayout:
    """Both levels of form ``node``: between nodes, and inside them."""

    between: Layout
    inside: Layout

    @property
    def dropped_rows(self) -> Tensor:
        return self.between.dropped_rows + self.inside.dropped_rows


class Received(NamedTuple):
    """Rows at the rank of their experts."""

    hidden: Tensor
    """[num_received, hidden_size], ordered by source rank; form ``node``: by the rank they were fanned out from."""
    topk_ids: Tensor
    """[num_received, topk] int32 (slot form: [num_received, 1]): local expert ids, -1 for "not here"."""
    topk_weights: Tensor | None
    """[num_received, topk]; None in the slot form."""
    layout: Layout | NodeLayout


class PendingRows(NamedTuple):
    """A dispatch under way."""

    token: Tensor
    hidden_size: int
    dtype: torch.dtype
    layout: Layout

    def advance(self) -> None:
        """Nothing to do between start and finish."""

    def finish(self) -> Received:
        """Waits (on CUDA: the current stream does) and takes the rows apart."""
        hidden, ids, weights = _FinishDispatch.apply(self.token, self.hidden_size, self.dtype, self.layout)
        return Received(hidden, ids, weights if self.layout.weighted else None, self.layout)


class PendingReturn(NamedTuple):
    """A combine under way."""

    token: Tensor
    layout: Layout

    def advance(self) -> None:
        """Nothing to do between start and finish."""

    def finish(self) -> Tensor:
        """Waits (on CUDA: the current stream does) and sums the rows of each token."""
        layout, plan = self.layout, self.layout.plan
        rows = _FinishCombine.apply(self.token, layout)
        if layout.weighted:
            return a2a_combine(rows, plan)
        return unpermute(rows, plan.send_to_slot, plan.slot_to_send, layout.topk, layout.slot_weights)


def padded_plan(plan: A2APlan, bound: int) -> tuple[A2APlan, Tensor]:
    """The same plan with ``bound`` rows for each rank, and how many rows did not fit."""
    num_ranks, device = plan.send_counts.shape[0], plan.send_counts.device
    starts = plan.send_offsets
    rows = torch.arange(num_ranks * bound, device=device)
    rank, place = rows // bound, rows % bound
    dropped = (plan.send_counts - bound).clamp(min=0).sum()
    if plan.send_to_slot.shape[0] == 0:
        send_to_slot = torch.full_like(rows, -1, dtype=torch.int32)
        slot_to_send = plan.slot_to_send
    else:
        dense = (starts[rank] + place).clamp(max=plan.send_to_slot.shape[0] - 1)
        send_to_slot = torch.where(place < plan.send_counts[rank], plan.send_to_slot[dense], -1)
        row = plan.slot_to_send
        owner = (torch.bucketize(row, starts, right=True) - 1).clamp(0, num_ranks - 1)
        at = row - starts[owner]
        slot_to_send = torch.where((row >= 0) & (at < bound), owner * bound + at, -1).int()
    offsets = torch.arange(num_ranks + 1, dtype=torch.int32, device=device) * bound
    padded = plan._replace(
        send_counts=plan.send_counts.clamp(max=bound), send_offsets=offsets, send_to_slot=send_to_slot.contiguous(),
        slot_to_send=slot_to_send,
    )  # fmt: skip
    return padded, dropped


def exact_plan(plan: A2APlan, splits: Splits) -> A2APlan:
    """The same plan without its tail."""
    return plan._replace(send_to_slot=plan.send_to_slot[: sum(splits.send)])


def pack(hidden: Tensor, ids: Tensor, weights: Tensor | None, plan: A2APlan, payload: Payload, topk: int) -> Tensor:
    """Rows of bytes as they travel; without ``weights`` every slot alone."""
    return a2a_pack_rows(
        hidden.detach(), ids, None if weights is None else weights.detach(), plan, payload=payload,
        copies=topk if weights is None else 1,
    )  # fmt: skip


def start_rows(hidden: Tensor, ids: Tensor, weights: Tensor | None, layout: Layout) -> PendingRows:
    """Sends ``layout.packed``, which was packed from these rows, ids and (if they travel) weights."""
    token = _StartDispatch.apply(hidden, weights, ids, layout.anchor, layout)
    return PendingRows(token, hidden.shape[1], hidden.dtype, layout)


def start_return(rows: Tensor, layout: Layout) -> PendingReturn:
    """Sends rows back to where the rows of this layout came from."""
    return PendingReturn(_StartCombine.apply(rows, layout.anchor, layout), layout)


def make_anchor(device: torch.device) -> Tensor:
    """Rows must keep their place in the graph on every rank, or the backward's collectives would not pair up."""
    return torch.zeros(0, device=device, requires_grad=torch.is_grad_enabled())


class _StartDispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, topk_weights: Tensor | None, ids: Tensor, anchor: Tensor, layout: Layout
    ) -> Tensor:
        assert layout.packed is not None
        layout.pending = layout.exchange.start(layout.packed, layout.splits, what="the rows of a dispatch")
        layout.packed = None
        ctx.layout, ctx.ids = layout, ids
        return anchor.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        layout, plan = ctx.layout, ctx.layout.plan
        grads = [pending.wait() for pending in layout.pending_grads]
        layout.pending_grads = ()
        if layout.weighted:
            grad_hidden, grad_weights = torch.ops.moe_ext.a2a_pack_backward(
                grads[0], grads[1], ctx.ids, plan.rank_expert_offsets, plan.send_offsets, plan.send_to_slot,
                plan.slot_to_send,
            )  # fmt: skip
            return grad_hidden, grad_weights, None, None, None
        return unpermute(grads[0], plan.send_to_slot, plan.slot_to_send, layout.topk), None, None, None, None


class _FinishDispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, token: Tensor, hidden_size: int, dtype: torch.dtype, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert layout.pending is not None
        rows, layout.pending = layout.pending.wait(), None
        ctx.layout = layout
        hidden, ids, weights = a2a_unpack_rows(
            rows, hidden_size, layout.topk if layout.weighted else 1, dtype, payload=layout.payload,
            weighted=layout.weighted,
        )  # fmt: skip
        ctx.mark_non_differentiable(ids)
        return hidden, ids, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor, _: Any, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
        layout = ctx.layout
        grads = [(grad_hidden, "the gradients of the rows of a dispatch")]
        if layout.weighted:
            grads.append((grad_weights, "the gradients of the weights of a dispatch"))
        layout.pending_grads = tuple(
            layout.exchange.start(grad, layout.splits, reverse=True, what=what) for grad, what in grads
        )
        return layout.anchor.new_empty(0), None, None, None


class _StartCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, anchor: Tensor, layout: Layout) -> Tensor:
        if rows.dim() != 2 or rows.shape[0] != layout.num_received:
            raise RuntimeError(
                f"rows: expected [{layout.num_received}, hidden_size], a row for each that was received, got "
                f"{list(rows.shape)}"
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
    def forward(ctx: Any, token: Tensor, layout: Layout) -> Tensor:
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
