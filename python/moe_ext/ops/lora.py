"""Low-rank adapters as experts, chosen per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ext import _library  # noqa: F401  (the schemas must be loaded first)
from moe_ext.ops.autocast import cast_for_product
from moe_ext.ops.autograd import call, register_autograd
from moe_ext.ops.plan import routing_plan

_ops = torch.ops.moe_ext

NOT_DIFFERENTIABLE = ("moe_ext::low_rank_experts_backward",)


def low_rank_experts(input: Tensor, lora_a: Tensor, lora_b: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """Sum low-rank experts: ``sum_j w[t, j] * lora_b[e].T @ lora_a[e] @ input[t]``, ``e = topk_ids[t, j]``.

    At rank 1 an expert is one rank of an adapter, ``B diag(g) A x`` with a sparse g: rank-wise experts (SMoRA, arXiv
    2501.15103). Only the chosen rows of the weights are multiplied, and nothing of size [num_tokens * topk, features]
    is made. For few ranks per expert: :class:`moe_ext.nn.LoRAExperts` takes it on the CPU for those where it is faster
    than grouped products. Under ``torch.autocast`` input and weights are cast to autocast's dtype, and so is the
    result.

    Args:
        input: [num_tokens, in_features], float32, bfloat16 or float16 (float64 on the CPU).
        lora_a: [num_experts, rank, in_features] in the dtype of ``input``: LoRA's A of every expert.
        lora_b: [num_experts, rank, out_features] in the dtype of ``input``: LoRA's B of every expert, transposed.
        topk_ids: [num_tokens, topk] int32 or int64. An id outside ``[0, num_experts)`` adds nothing. Ids of one token
            need not be distinct.
        topk_weights: [num_tokens, topk] float32 (float64 for float64 input). ``topk * rank`` is 8192 at most.

    Returns:
        [num_tokens, out_features] in the dtype of ``input``, accumulated in fp32 and rounded once; zeros for a token
        without experts. Differentiable once in every floating argument; the weight of an id outside
        ``[0, num_experts)`` gets gradient zero. The backward sorts the slots with :func:`moe_ext.routing_plan`.
        Arguments that need no gradient cost it no product and no memory.

    Raises:
        RuntimeError: an argument has the wrong dtype, number of axes, size or device; the message names it.
    """
    input, lora_a, lora_b = (cast_for_product(x) for x in (input, lora_a, lora_b))
    output: Tensor = call(_ops.low_rank_experts, input, lora_a, lora_b, topk_ids, topk_weights)[0]
    return output


@torch.library.register_fake("moe_ext::low_rank_experts")
def _low_rank_experts_fake(
    input: Tensor, lora_a: Tensor, lora_b: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> tuple[Tensor, Tensor]:
    components = topk_ids.shape[1] * lora_a.shape[1]
    return input.new_empty(input.shape[0], lora_b.shape[2]), topk_weights.new_empty(input.shape[0], components)


@torch.library.register_fake("moe_ext::low_rank_experts_backward")
def _low_rank_experts_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    projection: Tensor,
    expert_offsets: Tensor,
    permuted_to_slot: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    likes = (input, lora_a, lora_b, topk_weights)
    return tuple(
        like.new_empty(like.shape[0] if wanted else 0, *like.shape[1:])
        for like, wanted in zip(likes, output_mask, strict=True)
    )


def _low_rank_experts_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _low_rank_experts_backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    input, lora_a, lora_b, topk_ids, topk_weights, projection = ctx.saved_tensors
    plan = routing_plan(topk_ids, lora_a.shape[0])
    needed = [ctx.needs_input_grad[place] for place in (0, 1, 2, 4)]
    grads = _ops.low_rank_experts_backward(
        grad,
        input,
        lora_a,
        lora_b,
        topk_ids,
        topk_weights,
        projection,
        plan.expert_offsets,
        plan.permuted_to_slot,
        needed,
    )
    grad_input, grad_down, grad_up, grad_weights = (g if n else None for g, n in zip(grads, needed, strict=True))
    return grad_input, grad_down, grad_up, None, grad_weights


register_autograd("moe_ext::low_rank_experts", _low_rank_experts_backward, setup_context=_low_rank_experts_setup)
