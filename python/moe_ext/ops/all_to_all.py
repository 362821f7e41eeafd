"""What stands around ``torch.distributed.all_to_all_single`` in an expert-parallel layer.

The sending rank: :func:`a2a_plan`, :func:`a2a_pack`, all-to-all of rows, ids and weights. The receiving rank:
:func:`a2a_unpack`, experts, :func:`moe_ext.unpermute` with the received weights, all-to-all back. The sending rank
again: :func:`a2a_combine`. A token travels once per rank, not once per expert, and comes back once per rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ext import _library  # noqa: F401  (the schemas must be loaded first)
from moe_ext.ops.autograd import call, register_autograd
from moe_ext.ops.permutation import permute, unpermute
from moe_ext.packed_row import PackedRow, Payload
from moe_ext.plan_types import A2APlan, RoutingPlan

_ops = torch.ops.moe_ext

# Bytes have no gradient: moe_ext.distributed.dispatch, which moves them, has the formula.
NOT_DIFFERENTIABLE = (
    "moe_ext::a2a_plan", "moe_ext::a2a_pack_backward", "moe_ext::a2a_pack_rows", "moe_ext::a2a_unpack_rows",
)  # fmt: skip


def even_rank_expert_offsets(num_experts: int, num_ranks: int, device: torch.device | str | None = None) -> Tensor:
    """[num_ranks + 1] int32: consecutive experts, as even as can be, the first ranks taking one more."""
    share, more = divmod(num_experts, num_ranks)
    sizes = [share + (rank < more) for rank in range(num_ranks)]
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32).to(device)


def a2a_plan(topk_ids: Tensor, rank_expert_offsets: Tensor) -> A2APlan:
    """Plan which rows go to which rank, on the device, without a host sync.

    Args:
        topk_ids: [num_tokens, topk] int32 or int64, global expert ids; an id that no rank owns sends nothing.
        rank_expert_offsets: [num_ranks + 1] int32 on the same device, not decreasing: rank r owns experts
            ``rank_expert_offsets[r] : rank_expert_offsets[r + 1]``. Ranks may own unequal numbers of experts, or none.

    Returns:
        An :class:`A2APlan`. The number of its send rows S = num_tokens * min(topk, num_ranks) is a static bound; rows
        past ``send_offsets[num_ranks]`` are the tail. Nothing in it is differentiable.

    Raises:
        RuntimeError: an argument has the wrong dtype, number of axes, size or device; the message names it.
    """
    counts, offsets, send_to_slot, slot_to_send = _ops.a2a_plan(topk_ids, rank_expert_offsets)
    slots_per_token = min(topk_ids.shape[1], rank_expert_offsets.shape[0] - 1)
    return A2APlan(counts, offsets, send_to_slot, slot_to_send, rank_expert_offsets, slots_per_token)


def a2a_pack(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, plan: A2APlan) -> tuple[Tensor, Tensor, Tensor]:
    """Gather the rows that go out, with the experts and weights each rank needs.

    Args:
        hidden: [num_tokens, hidden_size] float32, bfloat16 or float16 (float64 on the CPU).
        topk_ids: [num_tokens, topk] int32 or int64, those that ``plan`` was made from.
        topk_weights: [num_tokens, topk] float32 (float64 for float64 rows).
        plan: from :func:`a2a_plan`.

    Returns:
        ``send_hidden`` [S, hidden_size]; ``send_ids`` [S, topk] int32, the token's experts counted from the first of
        the destination rank, -1 where the slot is another rank's; ``send_weights`` [S, topk], 0 there. The tail holds
        zeros, -1 and 0. Differentiable in ``hidden`` (summed in fp32) and ``topk_weights``.

    Raises:
        RuntimeError: an argument has the wrong dtype, number of axes, size or device; the message names it.
    """
    send_hidden, send_ids, send_weights = call(
        _ops.a2a_pack,
        hidden, topk_ids, topk_weights, plan.rank_expert_offsets, plan.send_offsets, plan.send_to_slot,
        plan.slot_to_send,
    )  # fmt: skip
    return send_hidden, send_ids, send_weights


def a2a_unpack(
    recv_hidden: Tensor, recv_ids: Tensor, num_local_experts: int, *, row_alignment: int = 1
) -> tuple[Tensor, RoutingPlan]:
    """Bring received rows into expert order: routing plan and permutation in one op.

    Args:
        recv_hidden: [num_received, hidden_size], rows of all ranks, one rank after the other.
        recv_ids: [num_received, topk] int32 or int64, local expert ids, -1 for "not here".
        num_local_experts: experts of this rank, at least 1.
        row_alignment: as in :func:`moe_ext.routing_plan`.

    Returns:
        The rows in expert order [num_rows, hidden_size], and the plan with ``topk`` columns that made them. Inside an
        expert, rows keep the order in which they came. Differentiable in ``recv_hidden``.

    Raises:
        RuntimeError: an argument has the wrong dtype, number of axes, size or device; the message names it.
    """
    rows, *plan = call(_ops.a2a_unpack, recv_hidden, recv_ids, num_local_experts, row_alignment)
    return rows, RoutingPlan(*plan)


def a2a_combine(recv_rows: Tensor, plan: A2APlan) -> Tensor:
    """Sum the rows that came back for each token.

    Args:
        recv_rows: [S, hidden_size] in send order; rows of the tail are not read.
        plan: from :func:`a2a_plan`.

    Returns:
        [num_tokens, hidden_size], accumulated in fp32 in rank order, rounded once. Differentiable in ``recv_rows``.

    Raises:
        RuntimeError: an argument has the wrong dtype, number of axes, size or device; the message names it.
    """
    combined: Tensor = call(_ops.a2a_combine, recv_rows, plan.send_to_slot, plan.slot_to_send, plan.slots_per_token)
    return combined


def a2a_pack_rows(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    plan: A2APlan,
    *,
    payload: Payload = "native",
    copies: int = 1,
) -> Tensor:
    """:func:`a2a_pack` with everything of a row in one row of bytes, so that one collective moves it (as DeepEP does).

    Args:
        hidden: [num_tokens / copies, hidden_size] float32, bfloat16 or float16 (float64 on the CPU).
        topk_ids: [num_tokens, topk] int32 or int64, those that ``plan`` was made from.
        topk_weights: [num_tokens, topk] float32 (float64 for float64 rows); None: no weights travel.
        plan: from :func:`a2a_plan`.
        payload: ``"native"``, or ``"fp8"``: e4m3 with an fp32 scale for every 128 elements, largest magnitude / 448
            (DeepSeek-V3). A block with a NaN or an infinity comes out as NaN.
        copies: consecutive rows of ``topk_ids`` that share a row of ``hidden``. With ids viewed as
            [num_tokens * topk, 1] and ``copies=topk`` every slot travels alone.

    Returns:
        [S, row_bytes] uint8, laid out as :class:`moe_ext.packed_row.PackedRow` says; row_bytes is a multiple of 16. The
        tail holds zero rows with ids -1. Not differentiable; :func:`moe_ext.distributed.dispatch` is.

    Raises:
        RuntimeError: an argument has the wrong dtype, number of axes, size, device or name; the message names it.
    """
    packed: Tensor = _ops.a2a_pack_rows(
        hidden, topk_ids, topk_weights, plan.rank_expert_offsets, plan.send_offsets, plan.send_to_slot,
        plan.slot_to_send, payload, copies,
    )  # fmt: skip
    return packed


def a2a_unpack_rows(
    rows: Tensor, hidden_size: int, topk: int, dtype: torch.dtype, *, payload: Payload = "native", weighted: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Take apart rows that :func:`a2a_pack_rows` made.

    Args:
        rows: [num_received, row_bytes] uint8; on CUDA aligned to 16 bytes.
        hidden_size, topk, dtype, payload, weighted: those of the rows; ``weighted``: they carry weights.

    Returns:
        hidden [num_received, hidden_size] in ``dtype``, ids [num_received, topk] int32, weights [num_received, topk]
        (float32, float64 for float64 rows; [0, topk] if not ``weighted``). Not differentiable.

    Raises:
        RuntimeError: an argument has the wrong dtype, number of axes, size or name; the message names it.
    """
    hidden, ids, weights = _ops.a2a_unpack_rows(rows, hidden_size, topk, dtype, payload, weighted)
    return hidden, ids, weights


@torch.library.register_fake("moe_ext::a2a_plan")
def _a2a_plan_fake(topk_ids: Tensor, rank_expert_offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_ranks = rank_expert_offsets.shape[0] - 1
    num_rows = topk_ids.shape[0] * min(topk_ids.shape[1], num_ranks)

    def make(size: int) -> Tensor:
        return topk_ids.new_empty(size, dtype=torch.int32)

    return make(num_ranks), make(num_ranks + 1), make(num_rows), make(num_rows)


@torch.library.register_fake("moe_ext::a2a_pack")
def _a2a_pack_fake(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, rank_expert_offsets: Tensor, send_offsets: Tensor,
    send_to_slot: Tensor, slot_to_send: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    num_rows, topk = send_to_slot.shape[0], topk_ids.shape[1]
    return (
        hidden.new_empty(num_rows, hidden.shape[1]),
        topk_ids.new_empty(num_rows, topk, dtype=torch.int32),
        topk_weights.new_empty(num_rows, topk),
    )


@torch.library.register_fake("moe_ext::a2a_pack_backward")
def _a2a_pack_backward_fake(
    grad_send_hidden: Tensor, grad_send_weights: Tensor, topk_ids: Tensor, rank_expert_offsets: Tensor,
    send_offsets: Tensor, send_to_slot: Tensor, slot_to_send: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return grad_send_hidden.new_empty(topk_ids.shape[0], grad_send_hidden.shape[1]), grad_send_weights.new_empty(
        topk_ids.shape
    )


@torch.library.register_fake("moe_ext::a2a_unpack")
def _a2a_unpack_fake(
    recv_hidden: Tensor, recv_ids: Tensor, num_local_experts: int, row_alignment: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_received, topk = recv_ids.shape
    num_rows = RoutingPlan.row_bound(num_received, topk, num_local_experts, None, row_alignment)

    def make(size: int) -> Tensor:
        return recv_ids.new_empty(size, dtype=torch.int32)

    rows = recv_hidden.new_empty(num_rows, recv_hidden.shape[1])
    return rows, make(num_local_experts + 1), make(num_local_experts), make(num_rows), make(num_received * topk)


@torch.library.register_fake("moe_ext::a2a_combine")
def _a2a_combine_fake(recv_rows: Tensor, send_to_slot: Tensor, slot_to_send: Tensor, slots_per_token: int) -> Tensor:
    return recv_rows.new_empty(slot_to_send.shape[0] // slots_per_token, recv_rows.shape[1])


@torch.library.register_fake("moe_ext::a2a_pack_rows")
def _a2a_pack_rows_fake(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor | None, rank_expert_offsets: Tensor, send_offsets: Tensor,
    send_to_slot: Tensor, slot_to_send: Tensor, payload: str, copies: int,
) -> Tensor:  # fmt: skip
    layout = PackedRow.of(hidden.shape[1], topk_ids.shape[1], hidden.dtype, payload, topk_weights is not None)
    return hidden.new_empty(send_to_slot.shape[0], layout.row_bytes, dtype=torch.uint8)


@torch.library.register_fake("moe_ext::a2a_unpack_rows")
def _a2a_unpack_rows_fake(
    rows: Tensor, hidden_size: int, topk: int, dtype: torch.dtype, payload: str, weighted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = rows.shape[0]
    return (
        rows.new_empty(num_rows, hidden_size, dtype=dtype),
        rows.new_empty(num_rows, topk, dtype=torch.int32),
        rows.new_empty(
            num_rows if weighted else 0, topk, dtype=torch.float64 if dtype == torch.float64 else torch.float32
        ),
    )


def _a2a_pack_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, topk_ids, _, *maps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(topk_ids, *maps)


def _a2a_pack_backward(ctx: Any, grad_hidden: Tensor, _: None, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
    grads = _ops.a2a_pack_backward(grad_hidden, grad_weights, *ctx.saved_tensors)
    return grads[0], None, grads[1], None, None, None, None


def _a2a_unpack_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.topk = inputs[1].shape[1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[3], output[4])


def _a2a_unpack_backward(ctx: Any, grad_rows: Tensor, *_: None) -> tuple[Tensor, None, None, None]:
    permuted_to_slot, slot_to_permuted = ctx.saved_tensors
    return unpermute(grad_rows, permuted_to_slot, slot_to_permuted, ctx.topk), None, None, None


def _a2a_combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, send_to_slot, slot_to_send, ctx.slots_per_token = inputs
    ctx.save_for_backward(send_to_slot, slot_to_send)


def _a2a_combine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    send_to_slot, slot_to_send = ctx.saved_tensors
    return permute(grad, send_to_slot, slot_to_send, ctx.slots_per_token), None, None, None


register_autograd("moe_ext::a2a_pack", _a2a_pack_backward, setup_context=_a2a_pack_setup)
register_autograd("moe_ext::a2a_unpack", _a2a_unpack_backward, setup_context=_a2a_unpack_setup)
register_autograd("moe_ext::a2a_combine", _a2a_combine_backward, setup_context=_a2a_combine_setup)
