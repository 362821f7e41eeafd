"""``moe_permute`` and ``moe_unpermute`` of Transformer Engine (``transformer_engine.pytorch``), which Megatron calls.

    from moe_ext.integrations.transformer_engine import moe_permute, moe_unpermute
    rows, row_id_map = moe_permute(hidden, topk_ids, map_type="index")
    output = moe_unpermute(run_experts(rows), row_id_map, merging_probs=topk_weights, map_type="index")

Calls and results are theirs, on the CPU too, deterministic, for rows in float32, bfloat16 and float16; not for its fp8
tensors. ``row_id_map`` is for :func:`moe_unpermute` only and its content differs. The map of type "index" is the
cheaper one: of type "mask", plan and sum walk over all experts of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ext.ops.permutation import permute, unpermute
from moe_ext.ops.plan import routing_plan


def moe_permute(
    inp: Tensor, routing_map: Tensor, num_out_tokens: int = -1, max_token_num: int = -1, map_type: str = "mask"
) -> tuple[Tensor, Tensor]:
    """Copy token rows into expert order, rows of one expert in token order.

    Args:
        inp: [num_tokens, hidden_size].
        routing_map: for ``"mask"`` [num_tokens, num_experts] bool or integers, nonzero where the token goes to the
            expert; for ``"index"`` [num_tokens, topk] int32 or int64 expert ids, -1 for none.
        num_out_tokens: rows of the result; what does not fit is dropped from its end. -1 keeps room for all: one row
            for each element of ``routing_map``, rows of no token being zero at the end. Give the number where it is
            known (num_tokens * topk for a mask without drops).
        max_token_num: has no meaning here; Transformer Engine sizes a workspace by it.
        map_type: ``"mask"`` or ``"index"``.

    Returns:
        The rows [num_out_tokens, hidden_size], differentiable in ``inp``, and ``row_id_map`` for
        :func:`moe_unpermute`.

    Raises:
        ValueError: ``map_type`` or ``routing_map`` is not one of those above.
        RuntimeError: from :func:`moe_ext.routing_plan` or :func:`moe_ext.permute`.
    """
    permuted_to_slot, slot_to_permuted = _maps(inp, routing_map, num_out_tokens, map_type)
    rows = permute(inp, permuted_to_slot, slot_to_permuted, routing_map.shape[1])
    return rows, slot_to_permuted.view(routing_map.shape)


def moe_permute_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`moe_permute` by a mask, and the probability of each row beside it.

    Args:
        inp: [num_tokens, hidden_size].
        probs: [num_tokens, num_experts] floating.
        routing_map: [num_tokens, num_experts] bool or integers.
        num_out_tokens: as in :func:`moe_permute`.

    Returns:
        The rows, their probabilities [num_out_tokens] (0 in rows of no token), and ``row_id_map``. Differentiable in
        ``inp`` and ``probs``.

    Raises:
        ValueError: ``probs`` has not the shape of ``routing_map``; or as :func:`moe_permute`.
    """
    if probs.shape != routing_map.shape:
        raise ValueError(f"probs: expected {list(routing_map.shape)} as routing_map, got {list(probs.shape)}")
    permuted_to_slot, slot_to_permuted = _maps(inp, routing_map, num_out_tokens, "mask")
    rows = permute(inp, permuted_to_slot, slot_to_permuted, routing_map.shape[1])
    # Every slot is a row of one number.
    permuted_probs = permute(probs.reshape(-1, 1), permuted_to_slot, slot_to_permuted, 1)
    return rows, permuted_probs.flatten(), slot_to_permuted.view(routing_map.shape)


def moe_unpermute(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None = None,
    restore_shape: torch.Size | tuple[int, ...] | None = None,
    map_type: str = "mask",
    probs: Tensor | None = None,
) -> Tensor:
    """Sum the rows of each token, weighted with its probabilities where they are given.

    Args:
        inp: [num_rows, hidden_size], rows in the order of :func:`moe_permute`.
        row_id_map: from :func:`moe_permute`.
        merging_probs: for ``"mask"`` [num_tokens, num_experts], for ``"index"`` [num_tokens, topk]; taken in float32
            (float64 beside float64 rows).
        restore_shape: (num_tokens, hidden_size), which ``row_id_map`` knows; checked where it is given.
        map_type: as given to :func:`moe_permute`.
        probs: the older name of ``merging_probs``.

    Returns:
        [num_tokens, hidden_size] in the dtype of ``inp``, summed in fp32 in a fixed order. Differentiable in ``inp``
        and ``merging_probs``.

    Raises:
        ValueError: ``map_type``, ``restore_shape`` or the probabilities do not go with the rest.
        RuntimeError: from :func:`moe_ext.unpermute`.
    """
    _check_map_type(map_type)
    if probs is not None:
        if merging_probs is not None:
            raise ValueError("probs: expected None beside merging_probs, which is its newer name")
        merging_probs = probs
    num_tokens, topk = row_id_map.shape
    if restore_shape is not None and tuple(restore_shape) != (num_tokens, inp.shape[1]):
        raise ValueError(f"restore_shape: expected {(num_tokens, inp.shape[1])}, got {tuple(restore_shape)}")
    slot_to_permuted = row_id_map.flatten()
    permuted_to_slot = _inverse(slot_to_permuted, inp.shape[0])
    if merging_probs is not None:
        merging_probs = merging_probs.to(torch.promote_types(inp.dtype, torch.float32))
    return unpermute(inp, permuted_to_slot, slot_to_permuted, topk, merging_probs)


def _maps(inp: Tensor, routing_map: Tensor, num_out_tokens: int, map_type: str) -> tuple[Tensor, Tensor]:
    _check_map_type(map_type)
    if routing_map.dim() != 2 or routing_map.shape[0] != inp.shape[0]:
        raise ValueError(f"routing_map: expected [{inp.shape[0]}, ...] as inp, got {list(routing_map.shape)}")
    if map_type == "mask":
        num_experts = routing_map.shape[1]
        experts = torch.arange(num_experts, dtype=torch.int32, device=routing_map.device)
        plan = routing_plan(torch.where(routing_map != 0, experts, -1), num_experts)
        permuted_to_slot, slot_to_permuted = plan.permuted_to_slot, plan.slot_to_permuted
    else:
        permuted_to_slot, slot_to_permuted = _sort_by_expert(routing_map)
    if num_out_tokens < 0:
        return permuted_to_slot, slot_to_permuted
    kept = permuted_to_slot[:num_out_tokens]
    return kept, torch.where(slot_to_permuted < num_out_tokens, slot_to_permuted, -1)


def _sort_by_expert(topk_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The maps of a plan whose number of experts is not known: only the order of the ids counts, -1 going last."""
    flat = topk_ids.flatten()
    last = torch.iinfo(flat.dtype).max
    order = torch.argsort(torch.where(flat < 0, last, flat), stable=True)
    held = flat[order] >= 0
    permuted_to_slot = torch.where(held, order, -1).int()
    return permuted_to_slot, _inverse(permuted_to_slot, flat.shape[0])


def _inverse(rows: Tensor, size: int) -> Tensor:
    """[size] int32: where each of 0 .. size - 1 stands in ``rows``, -1 for those that do not."""
    places = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    inverse = torch.full((size + 1,), -1, dtype=torch.int32, device=rows.device)
    outside = (rows < 0) | (rows >= size)  # these go to one place behind the end
    inverse.scatter_(0, torch.where(outside, size, rows).long(), places)
    return inverse[:size]


def _check_map_type(map_type: str) -> None:
    if map_type not in ("mask", "index"):
        raise ValueError(f"map_type: expected mask or index, got {map_type!r}")
