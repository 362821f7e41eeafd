"""Moving rows between token order and expert order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ext import _library  # noqa: F401  (the schemas must be loaded first)
from moe_ext.ops.autograd import call, register_autograd

_ops = torch.ops.moe_ext

NOT_DIFFERENTIABLE = ("moe_ext::unpermute_backward",)


def permute(input: Tensor, permuted_to_slot: Tensor, slot_to_permuted: Tensor, topk: int) -> Tensor:
    """Copy token rows into expert order.

    Args:
        input: [num_tokens, hidden_size], float32, bfloat16 or float16 (float64 on the CPU).
        permuted_to_slot: [num_rows] int32, from :func:`moe_ext.routing_plan`: the flat slot ``t * topk + j`` held by
            each row, -1 for padding and tail rows.
        slot_to_permuted: [num_tokens * topk] int32, from :func:`moe_ext.routing_plan`: the row of each slot, -1 if
            the slot was dropped.
        topk: slots per token.

    Returns:
        [num_rows, hidden_size]: row m is ``input[permuted_to_slot[m] // topk]``, or zeros where the map holds -1.
        Differentiable in ``input``; the backward is :func:`unpermute` without weights.

    Raises:
        RuntimeError: an argument has the wrong dtype, number of axes, size or device; the message names it.
    """
    permuted: Tensor = call(_ops.permute, input, permuted_to_slot, slot_to_permuted, topk)
    return permuted


def unpermute(
    input: Tensor,
    permuted_to_slot: Tensor,
    slot_to_permuted: Tensor,
    topk: int,
    topk_weights: Tensor | None = None,
) -> Tensor:
    """Sum each token's expert rows, weighted, in fp32.

    Args:
        input: [num_rows, hidden_size], float32, bfloat16 or float16 (float64 on the CPU).
        permuted_to_slot: [num_rows] int32, as in :func:`permute`.
        slot_to_permuted: [num_tokens * topk] int32, as in :func:`permute`.
        topk: slots per token.
        topk_weights: [num_tokens, topk] float32 (float64 for float64 rows), or None for a plain sum.

    Returns:
        [num_tokens, hidden_size] in the dtype of ``input``: accumulated in fp32 in slot order, rounded once. A token
        whose slots were all dropped gets zeros. Differentiable in ``input`` and ``topk_weights``; a dropped slot's
        weight gets gradient zero.

    Raises:
        RuntimeError: an argument has the wrong dtype, number of axes, size or device; the message names it.
    """
    summed: Tensor = call(_ops.unpermute, input, permuted_to_slot, slot_to_permuted, topk_weights, topk)
    return summed


@torch.library.register_fake("moe_ext::permute")
def _permute_fake(input: Tensor, permuted_to_slot: Tensor, slot_to_permuted: Tensor, topk: int) -> Tensor:
    return input.new_empty(permuted_to_slot.shape[0], input.shape[1])


@torch.library.register_fake("moe_ext::unpermute")
def _unpermute_fake(
    input: Tensor, permuted_to_slot: Tensor, slot_to_permuted: Tensor, topk_weights: Tensor | None, topk: int
) -> Tensor:
    return input.new_empty(slot_to_permuted.shape[0] // topk, input.shape[1])


@torch.library.register_fake("moe_ext::unpermute_backward")
def _unpermute_backward_fake(
    grad_output: Tensor, input: Tensor, permuted_to_slot: Tensor, slot_to_permuted: Tensor, topk_weights: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input, memory_format=torch.contiguous_format), torch.empty_like(
        topk_weights, memory_format=torch.contiguous_format
    )


def _permute_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, permuted_to_slot, slot_to_permuted, ctx.topk = inputs
    ctx.save_for_backward(permuted_to_slot, slot_to_permuted)


def _permute_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    permuted_to_slot, slot_to_permuted = ctx.saved_tensors
    return unpermute(grad, permuted_to_slot, slot_to_permuted, ctx.topk), None, None, None


def _unpermute_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, permuted_to_slot, slot_to_permuted, topk_weights, ctx.topk = inputs
    # The rows themselves are needed only for the gradient of the weights.
    ctx.weighted = topk_weights is not None
    ctx.save_for_backward(permuted_to_slot, slot_to_permuted, topk_weights, input if ctx.weighted else None)


def _unpermute_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor | None, None]:
    permuted_to_slot, slot_to_permuted, topk_weights, input = ctx.saved_tensors
    if not ctx.weighted:
        return permute(grad, permuted_to_slot, slot_to_permuted, ctx.topk), None, None, None, None
    grad_input, grad_weights = _ops.unpermute_backward(grad, input, permuted_to_slot, slot_to_permuted, topk_weights)
    return grad_input, None, None, grad_weights, None


register_autograd("moe_ext::permute", _permute_backward, setup_context=_permute_setup)
register_autograd("moe_ext::unpermute", _unpermute_backward, setup_context=_unpermute_setup)
