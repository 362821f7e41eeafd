"""Training steps that tests/gpu captures as CUDA graphs and runs on several streams; tests/test_capture_steps.py runs
the same steps on the CPU.

A step is a function of its inputs alone, makes its gradients itself, and returns every tensor it computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import moe_ext
from cases import make_rows
from moe_ext import reference
from moe_ext.nn import MoELayer
from moe_ext.packed_row import Payload

HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, TOPK, NUM_RANKS = 64, 48, 12, 4, 3
# A plan of one launch, and one of two (more than 8192 slots).
TOKENS = {"decode": 5, "few": 96, "many": 2100}
LAYERS: dict[str, dict[str, Any]] = {
    "dropless": {},
    "capacity": {"capacity_factor": 0.6},
    "deepseek": {
        "shared_intermediate_size": 20,
        "router": {"score_function": "sigmoid", "selection_bias": True, "num_groups": 4, "topk_groups": 2,
                   "renormalize": True, "scale": 2.5},
    },
    "biased": {"experts": {"bias": True, "activation": "swiglu_clamped", "gate_up_layout": "interleaved"}},
}  # fmt: skip

PAYLOADS: tuple[Payload, Payload] = ("native", "fp8")

Step = Callable[[list[Tensor]], list[Tensor]]


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def make_inputs(num_tokens: int, dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    """hidden, logits and the gradient of the output."""
    return [
        make_rows(num_tokens, HIDDEN_SIZE, dtype=dtype, device=device, seed=seed + 1),
        make_rows(num_tokens, NUM_EXPERTS, dtype=torch.float32, device=device, seed=seed),
        make_rows(num_tokens, HIDDEN_SIZE, dtype=dtype, device=device, seed=seed + 2),
    ]


def one_hot_logits(inputs: list[Tensor]) -> None:
    """Everyone to the same experts, in place: the routing that graphs captured for another one trip over."""
    inputs[1][:] = torch.arange(NUM_EXPERTS, device=inputs[1].device, dtype=inputs[1].dtype)


def make_layer_step(name: str, dtype: torch.dtype, device: str) -> Step:
    """A whole layer with its losses, forward and backward, down to the gradients of every parameter."""
    torch.manual_seed(0)
    layer = MoELayer(HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, TOPK, **LAYERS[name]).to(device, dtype)
    parameters = list(layer.parameters())

    def step(inputs: list[Tensor]) -> list[Tensor]:
        hidden = leaf(inputs[0])
        output = layer(hidden)
        loss = 0.01 * output.balance_loss + 0.001 * output.z_loss
        total = (output.hidden * inputs[2]).sum() + loss.to(dtype)
        gradients = torch.autograd.grad(total, [hidden, *parameters], allow_unused=True)
        assert layer.statistics is not None
        return [*output, *layer.statistics, *(g for g in gradients if g is not None)]

    return step


def make_ops_step(dtype: torch.dtype, device: str) -> Step:
    """Every op of the public interface, forward and backward."""
    gate_up = make_rows(NUM_EXPERTS, 2 * INTERMEDIATE_SIZE, HIDDEN_SIZE, dtype=dtype, device=device, seed=5, scale=0.1)
    down = make_rows(NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE, dtype=dtype, device=device, seed=6, scale=0.1)
    bias = make_rows(NUM_EXPERTS, 2 * INTERMEDIATE_SIZE, dtype=dtype, device=device, seed=7)
    ranks = moe_ext.even_rank_expert_offsets(NUM_EXPERTS, NUM_RANKS, device)

    def step(inputs: list[Tensor]) -> list[Tensor]:
        hidden, logits, up, dn, b = (leaf(x) for x in (inputs[0], inputs[1], gate_up, down, bias))
        weights, ids = moe_ext.topk_gating(logits, TOPK, renormalize=True)
        balance, z, load = moe_ext.router_losses(logits, ids)
        rare_weights, rare_ids, next_logit = moe_ext.topk_gating(
            logits, TOPK, forced_ids=ids[:, 0].flip(0), top_p=0.5, min_ratio=0.1, return_next_logit=True
        )
        per_sequence, _, _ = moe_ext.router_losses(logits, ids, num_sequences=ids.shape[0])
        plan = moe_ext.routing_plan(ids, NUM_EXPERTS, row_alignment=8)
        capped = moe_ext.routing_plan(ids, NUM_EXPERTS, capacity=20, drop_scores=weights.detach())
        maps = (plan.permuted_to_slot, plan.slot_to_permuted)
        rows = moe_ext.permute(hidden, *maps, TOPK)
        pre = moe_ext.grouped_gemm(rows, up, plan.expert_offsets, weight_layout="enk", bias=b)
        middle = moe_ext.expert_activation(pre, "swiglu")
        back = moe_ext.unpermute(moe_ext.grouped_gemm(middle, dn, plan.expert_offsets, weight_layout="enk"), *maps,
                                 TOPK, weights)  # fmt: skip
        fused = moe_ext.moe_mlp(hidden, up, dn, capped, weights, weight_layout="enk")
        dense, chosen = moe_ext.expert_choice_gating(logits, 17)
        sent = moe_ext.a2a_plan(ids, ranks)
        send_hidden, send_ids, send_weights = moe_ext.a2a_pack(hidden, ids, weights, sent)
        local = moe_ext.a2a_unpack(send_hidden, send_ids, NUM_EXPERTS // NUM_RANKS)
        combined = moe_ext.a2a_combine(send_hidden, sent)
        slots = ids.reshape(-1, 1)
        packed = [moe_ext.a2a_pack_rows(hidden, ids, weights, sent, payload=payload) for payload in PAYLOADS]
        packed.append(moe_ext.a2a_pack_rows(hidden, slots, None, moe_ext.a2a_plan(slots, ranks), copies=TOPK))
        received = [
            *moe_ext.a2a_unpack_rows(packed[0], HIDDEN_SIZE, TOPK, dtype, payload=PAYLOADS[0]),
            *moe_ext.a2a_unpack_rows(packed[1], HIDDEN_SIZE, TOPK, dtype, payload=PAYLOADS[1]),
            *moe_ext.a2a_unpack_rows(packed[2], HIDDEN_SIZE, 1, dtype, weighted=False),
        ]
        results = [weights, ids, balance, z, load, *plan, *capped, rows, pre, middle, back, fused, dense, chosen,
                   send_hidden, send_ids, send_weights, local[0], combined, rare_weights, rare_ids, next_logit,
                   per_sequence, *packed, *received]  # fmt: skip
        total = balance + z + (dense * dense).sum() + send_weights.square().sum()
        total = total + rare_weights.square().sum() + next_logit.sum() + per_sequence
        for output in (back, fused, combined):
            total = total + (output * inputs[2]).float().sum()
        return [*results, *torch.autograd.grad(total, [hidden, logits, up, dn, b])]

    return step


def reference_layer(inputs: list[Tensor], gate_up: Tensor, down: Tensor) -> Tensor:
    """Gate, plan and experts by the twins, in float64 on the CPU."""
    hidden, logits, up, dn = (x.detach().cpu().double() for x in (inputs[0], inputs[1], gate_up, down))
    weights, ids = reference.topk_gating(logits, TOPK, renormalize=True)
    plan = reference.routing_plan(ids, NUM_EXPERTS)
    return reference.moe_mlp(hidden, up, dn, plan, weights, weight_layout="enk")


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), f"result {index} of {len(actual)} differs"
