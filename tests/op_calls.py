"""One call of every public op with tensors and a number of tokens, for the tests of what torch does around ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import moe_ext
from cases import make_rows, make_topk_ids, make_topk_weights

NUM_EXPERTS, TOPK, HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_RANKS = 6, 2, 16, 12, 3
LORA_RANK, LORA_OUT = 3, 10


class OpCall(NamedTuple):
    """``run(*inputs)`` returns tensors; axis 0 of the first ``num_dynamic`` inputs grows with the tokens."""

    run: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    num_dynamic: int


def make_call(name: str, num_tokens: int, device: str, dtype: torch.dtype = torch.float32) -> OpCall:
    """A call of ``moe_ext.<name>`` for this many tokens; floating inputs require gradients where the op has any."""

    def rows(*sizes: int, seed: int) -> Tensor:
        return make_rows(*sizes, dtype=dtype, device=device, seed=seed).requires_grad_()

    ids = make_topk_ids(num_tokens, NUM_EXPERTS, TOPK, "uniform", device)
    weights = make_topk_weights(num_tokens, TOPK, device, dtype=torch.promote_types(dtype, torch.float32))
    weights.requires_grad_()
    plan = moe_ext.routing_plan(ids, NUM_EXPERTS)
    maps = (plan.permuted_to_slot, plan.slot_to_permuted)
    hidden = rows(num_tokens, HIDDEN_SIZE, seed=1)
    logits = rows(num_tokens, NUM_EXPERTS, seed=2)
    expert_rows = rows(num_tokens * TOPK, HIDDEN_SIZE, seed=3)
    up = rows(NUM_EXPERTS, 2 * INTERMEDIATE_SIZE, HIDDEN_SIZE, seed=4)
    down = rows(NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE, seed=5)
    wide = rows(num_tokens * TOPK, 2 * INTERMEDIATE_SIZE, seed=6)
    ranks = moe_ext.even_rank_expert_offsets(NUM_EXPERTS, NUM_RANKS, device)
    a2a = moe_ext.a2a_plan(ids, ranks)
    send_maps = (a2a.send_to_slot, a2a.slot_to_send)

    def packed(x: Tensor, i: Tensor, w: Tensor, to_slot: Tensor, to_send: Tensor, *fixed: Tensor) -> tuple[Tensor, ...]:
        counts, offsets, owners = fixed
        return moe_ext.a2a_pack(x, i, w, moe_ext.A2APlan(counts, offsets, to_slot, to_send, owners, TOPK))

    def packed_rows(x: Tensor, i: Tensor, w: Tensor, to_slot: Tensor, to_send: Tensor, *fixed: Tensor) -> Tensor:
        counts, offsets, owners = fixed
        return moe_ext.a2a_pack_rows(x, i, w, moe_ext.A2APlan(counts, offsets, to_slot, to_send, owners, TOPK))

    def mlp(x: Tensor, w: Tensor, to_slot: Tensor, to_row: Tensor, offsets: Tensor, u: Tensor, d: Tensor) -> Tensor:
        made = moe_ext.RoutingPlan(offsets, offsets[1:], to_slot, to_row)
        return moe_ext.moe_mlp(x, u, d, made, w, weight_layout="enk")

    def unpacked(x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        received, made = moe_ext.a2a_unpack(x, i, NUM_EXPERTS)
        return received, *made

    calls = {
        "a2a_combine": OpCall(
            lambda x, *m: moe_ext.a2a_combine(x, a2a._replace(send_to_slot=m[0], slot_to_send=m[1])),
            (rows(num_tokens * TOPK, HIDDEN_SIZE, seed=3), *send_maps),
            3,
        ),
        "a2a_pack": OpCall(
            packed, (hidden, ids, weights, *send_maps, a2a.send_counts, a2a.send_offsets, a2a.rank_expert_offsets), 5
        ),
        "a2a_pack_rows": OpCall(
            packed_rows,
            (hidden, ids, weights, *send_maps, a2a.send_counts, a2a.send_offsets, a2a.rank_expert_offsets),
            5,
        ),
        "a2a_plan": OpCall(lambda i, o: tuple(moe_ext.a2a_plan(i, o)[:4]), (ids, ranks), 1),
        "a2a_unpack": OpCall(unpacked, (hidden, ids), 2),
        "a2a_unpack_rows": OpCall(
            lambda x: moe_ext.a2a_unpack_rows(x, HIDDEN_SIZE, TOPK, dtype),
            (moe_ext.a2a_pack_rows(hidden.detach(), ids, weights.detach(), a2a),),
            1,
        ),
        "expert_activation": OpCall(lambda x: moe_ext.expert_activation(x, "swiglu"), (wide,), 1),
        "expert_choice_gating": OpCall(lambda x: moe_ext.expert_choice_gating(x, x.shape[0] // 2), (logits,), 1),
        "grouped_bias_grad": OpCall(moe_ext.grouped_bias_grad, (wide, plan.expert_offsets), 1),
        "grouped_gemm": OpCall(
            lambda x, o, w: moe_ext.grouped_gemm(x, w, o, weight_layout="enk", activation="swiglu"),
            (expert_rows, plan.expert_offsets, up),
            1,
        ),
        "grouped_gemm_wgrad": OpCall(
            lambda x, g, o: moe_ext.grouped_gemm_wgrad(x, g, o, weight_layout="enk"),
            (expert_rows, wide, plan.expert_offsets),
            2,
        ),
        "low_rank_experts": OpCall(
            lambda x, i, w, a, b: moe_ext.low_rank_experts(x, a, b, i, w),
            (
                hidden,
                ids,
                weights,
                rows(NUM_EXPERTS, LORA_RANK, HIDDEN_SIZE, seed=7),
                rows(NUM_EXPERTS, LORA_RANK, LORA_OUT, seed=8),
            ),
            3,
        ),
        "moe_mlp": OpCall(mlp, (hidden, weights, *maps, plan.expert_offsets, up, down), 4),
        "permute": OpCall(lambda x, *m: moe_ext.permute(x, *m, TOPK), (hidden, *maps), 3),
        "router_losses": OpCall(moe_ext.router_losses, (logits, ids), 2),
        "routing_plan": OpCall(
            lambda i, w: tuple(moe_ext.routing_plan(i, NUM_EXPERTS, capacity=i.shape[0] // 2, drop_scores=w)),
            (ids, weights),
            2,
        ),
        "topk_gating": OpCall(lambda x: moe_ext.topk_gating(x, TOPK, renormalize=True), (logits,), 1),
        "unpermute": OpCall(lambda x, w, *m: moe_ext.unpermute(x, *m, TOPK, w), (expert_rows, weights, *maps), 4),
    }
    return calls[name]


OPS = [
    "a2a_combine", "a2a_pack", "a2a_pack_rows", "a2a_plan", "a2a_unpack", "a2a_unpack_rows", "expert_activation",
    "expert_choice_gating", "grouped_bias_grad", "grouped_gemm", "grouped_gemm_wgrad", "low_rank_experts", "moe_mlp",
    "permute", "router_losses", "routing_plan", "topk_gating", "unpermute",
]  # fmt: skip


def run_with_grads(
    run: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    place: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> list[Tensor]:
    """Outputs, then the gradient of every input that has one, under incoming gradients that differ in every place.

    ``place`` says where in memory an incoming gradient lies.
    """
    outputs = run(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    reached = [x for x in outputs if x.requires_grad]
    leaves = [x for x in inputs if x.requires_grad]
    if not reached:
        return list(outputs)
    incoming = [
        place(torch.linspace(-1, 2, max(x.numel(), 1), device=x.device, dtype=x.dtype)[: x.numel()].view(x.shape))
        for x in reached
    ]
    grads = torch.autograd.grad(reached, leaves, incoming, allow_unused=True)
    return [*outputs, *(g for g in grads if g is not None)]
