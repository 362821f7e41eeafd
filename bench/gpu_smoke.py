"""Every op once, forward and backward, on small odd shapes: what compute-sanitizer runs under."""

from __future__ import annotations

import torch

import moe_ext


def run_layer(dtype: torch.dtype, num_tokens: int, hidden_size: int, intermediate_size: int) -> None:
    """Gate, losses, plan, permutation, products, MLP and all-to-all packing."""
    num_experts, topk = 7, 3
    torch.manual_seed(0)

    def rows(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device="cuda").to(dtype).requires_grad_()

    logits = torch.randn(num_tokens, num_experts, device="cuda", requires_grad=True)
    hidden = rows(num_tokens, hidden_size)
    gate_up, down = (
        rows(num_experts, 2 * intermediate_size, hidden_size),
        rows(num_experts, hidden_size, intermediate_size),
    )
    gate_up_bias, down_bias = rows(num_experts, 2 * intermediate_size), rows(num_experts, hidden_size)

    weights, ids = moe_ext.topk_gating(logits, topk, renormalize=True)
    balance, z, _ = moe_ext.router_losses(logits, ids)
    chosen, _ = moe_ext.expert_choice_gating(logits, 2)
    plan = moe_ext.routing_plan(
        ids, num_experts, capacity=max(1, num_tokens // 2), drop_scores=weights, row_alignment=4
    )
    output = moe_ext.moe_mlp(
        hidden, gate_up, down, plan, weights, weight_layout="enk", gate_up_bias=gate_up_bias, down_bias=down_bias
    )
    maps = (plan.permuted_to_slot, plan.slot_to_permuted)
    permuted = moe_ext.permute(hidden, *maps, topk)
    product = moe_ext.grouped_gemm(permuted, gate_up, plan.expert_offsets, weight_layout="enk", bias=gate_up_bias)
    activated = moe_ext.expert_activation(product)
    back = moe_ext.grouped_gemm(activated, down, plan.expert_offsets, weight_layout="enk")
    combined = moe_ext.unpermute(back, *maps, topk, weights)

    a2a = moe_ext.a2a_plan(ids, moe_ext.even_rank_expert_offsets(num_experts, 2, "cuda"))
    sent, sent_ids, sent_weights = moe_ext.a2a_pack(hidden, ids, weights, a2a)
    unpacked, _ = moe_ext.a2a_unpack(sent, sent_ids, 4)
    returned = moe_ext.a2a_combine(sent, a2a)
    for payload in ("native", "fp8"):
        packed = moe_ext.a2a_pack_rows(hidden, ids, weights, a2a, payload=payload)
        moe_ext.a2a_unpack_rows(packed, hidden_size, topk, dtype, payload=payload)
    parts = (output, combined, unpacked, returned, sent_weights, chosen, balance, z)
    sum(part.float().sum() for part in parts).backward()
    torch.cuda.synchronize()


def run_gates(num_tokens: int, num_experts: int, dtype: torch.dtype) -> None:
    """Gates, losses and a plan, on rows of every length that the kernels tell apart."""
    topk = min(6, num_experts)
    logits = torch.randn(num_tokens, num_experts, device="cuda").to(dtype).requires_grad_()
    weights, ids = moe_ext.topk_gating(logits, topk, renormalize=True)
    chosen, _ = moe_ext.expert_choice_gating(logits, 3)
    balance, z, _ = moe_ext.router_losses(logits, ids)
    moe_ext.routing_plan(ids, num_experts, row_alignment=16)
    (weights.square().sum() + chosen.sum() + balance + z).backward()
    torch.cuda.synchronize()


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        run_layer(dtype, 37, 24, 40)  # aligned: tensor cores for 16 bits
        run_layer(dtype, 5, 17, 13)  # unaligned: the portable kernels
        run_layer(dtype, 9, 136, 72)  # few rows per expert: the decoding kernel, with tails along both axes
        run_layer(dtype, 1, 8, 8)
    for num_experts in (8, 30, 31, 64, 128, 256, 384, 501, 1024, 1100):
        run_gates(37, num_experts, torch.bfloat16)
    run_gates(3000, 16, torch.float32)  # a plan of several blocks
    print("every op ran")


if __name__ == "__main__":
    main()
