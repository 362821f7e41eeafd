"""Contiguous tensors that do not start at a multiple of 16 bytes, as slices of a buffer do not: same results."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_ext
import op_calls
from cases import make_rows, make_topk_ids
from compare import FLOOR, element_error
from op_calls import OPS, make_call, run_with_grads

# Where CUDA kernels sum: in another order when they read element by element, or in another kernel altogether.
ROUNDED_OTHERWISE = {
    "expert_choice_gating", "grouped_gemm", "grouped_gemm_wgrad", "low_rank_experts", "moe_mlp", "router_losses",
    "topk_gating", "unpermute",
}  # fmt: skip


def displaced(tensor: Tensor) -> Tensor:
    """The same values in contiguous memory that starts one element late."""
    moved = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
    moved.copy_(tensor.detach())
    assert moved.is_contiguous() and (moved.numel() == 0 or moved.data_ptr() % 16)
    return moved.requires_grad_(tensor.requires_grad)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def assert_the_same_displaced(name: str, run: Callable[..., Any], inputs: tuple[Tensor, ...], floor: float) -> None:
    """Displaced inputs and incoming gradients give the same bits, or, where the sums are others, nearly the same."""
    on_cuda_kernels = inputs[0].is_cuda or "emulated" in os.environ.get("MOE_EXT_LIBRARY", "")
    moved = tuple(map(displaced, inputs))
    if name == "a2a_unpack_rows" and on_cuda_kernels:
        with pytest.raises(RuntimeError, match="rows: expected data aligned to 16 bytes"):
            run(*moved)
        return
    actual, expected = run_with_grads(run, moved, displaced), run_with_grads(run, inputs)
    for index, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
        if on_cuda_kernels and name in ROUNDED_OTHERWISE and got.is_floating_point():
            assert element_error(got, wanted) <= 8 * floor, f"result {index} differs"
        else:
            assert torch.equal(bits(got), bits(wanted)), f"result {index} differs"


@pytest.fixture(params=["odd sizes", "whole vectors"])
def sizes(request, monkeypatch):
    """Whole vectors: rows that the kernels would read 16 bytes at a time."""
    if request.param == "whole vectors":
        wide = {"NUM_EXPERTS": 16, "HIDDEN_SIZE": 64, "INTERMEDIATE_SIZE": 32, "LORA_RANK": 8, "LORA_OUT": 64}
        for name, value in wide.items():
            monkeypatch.setattr(op_calls, name, value)


@pytest.mark.parametrize("num_tokens", [3, 70])  # few and many rows per expert
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_every_op(name, dtype, num_tokens, sizes, device):
    call = make_call(name, num_tokens, device, dtype)
    assert_the_same_displaced(name, call.run, call.inputs, FLOOR[dtype])


@pytest.mark.parametrize("layout", ["enk", "ekn"])
@pytest.mark.parametrize("num_tokens", [3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_that_gather_and_add_a_bias(dtype, num_tokens, layout, sizes, device):
    experts, hidden, inner = op_calls.NUM_EXPERTS, op_calls.HIDDEN_SIZE, op_calls.INTERMEDIATE_SIZE

    def leaf(*shape: int, seed: int) -> Tensor:
        return make_rows(*shape, dtype=dtype, device=device, seed=seed).requires_grad_()

    def weight(outer: int, depth: int, seed: int) -> Tensor:
        return leaf(experts, *((outer, depth) if layout == "enk" else (depth, outer)), seed=seed)

    tokens, topk_weights, *maps, offsets, _, _ = make_call("moe_mlp", num_tokens, device, dtype).inputs
    up, down = weight(2 * inner, hidden, 3), weight(hidden, inner, 4)
    up_bias, down_bias = leaf(experts, 2 * inner, seed=5), leaf(experts, hidden, seed=6)

    def mlp(x, w, to_slot, to_row, o, u, d, ub, db):
        plan = moe_ext.RoutingPlan(o, o[1:], to_slot, to_row)
        return moe_ext.moe_mlp(x, u, d, plan, w, weight_layout=layout, gate_up_bias=ub, down_bias=db)

    def product(x, to_slot, to_row, o, u, b):
        gather = (to_slot, to_row, op_calls.TOPK)
        return moe_ext.grouped_gemm(x, u, o, weight_layout=layout, bias=b, gather=gather, activation="swiglu")

    def weight_gradient(x, to_slot, to_row, o, g):
        return moe_ext.grouped_gemm_wgrad(x, g, o, weight_layout=layout, gather=(to_slot, to_row, op_calls.TOPK))

    gradient = leaf(num_tokens * op_calls.TOPK, 2 * inner, seed=7)
    assert_the_same_displaced(
        "moe_mlp", mlp, (tokens, topk_weights, *maps, offsets, up, down, up_bias, down_bias), FLOOR[dtype]
    )
    assert_the_same_displaced("grouped_gemm", product, (tokens, *maps, offsets, up, up_bias), FLOOR[dtype])
    assert_the_same_displaced("grouped_gemm_wgrad", weight_gradient, (tokens, *maps, offsets, gradient), FLOOR[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_router_with_every_tensor(dtype, sizes, device):
    experts = op_calls.NUM_EXPERTS
    (logits,) = make_call("topk_gating", 40, device, dtype).inputs
    bias, gain = (make_rows(experts, dtype=torch.float32, device=device, seed=n, scale=0.1) for n in (1, 2))
    external = make_rows(40, experts, dtype=torch.float32, device=device, seed=3).requires_grad_()
    mask = torch.ones(40, experts, dtype=torch.bool, device=device)
    mask[::3, 1] = False
    tokens = torch.arange(40, device=device) % 4 != 0
    ids = make_topk_ids(40, experts, 2, "dropped", device)

    def gate(x, b, g, m, t):
        return moe_ext.topk_gating(x, 2, selection_bias=b, expert_gain=g, expert_mask=m, keep_tokens=t)

    def gate_with_external_weights(x, w):
        return moe_ext.topk_gating(x, 2, weight_source="external", external_weights=w)

    def losses(x, i, t, w):
        return moe_ext.router_losses(x, i, token_mask=t, expert_weights=w)

    assert_the_same_displaced("topk_gating", gate, (logits, bias, gain, mask, tokens), FLOOR[dtype])
    assert_the_same_displaced("topk_gating", gate_with_external_weights, (logits, external), FLOOR[dtype])
    assert_the_same_displaced("router_losses", losses, (logits, ids, tokens, gain.abs()), FLOOR[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantised_rows(dtype, sizes, device):
    call = make_call("a2a_pack", 40, device, dtype)

    def packed(x, i, w, to_slot, to_send, counts, offsets, owners):
        plan = moe_ext.A2APlan(counts, offsets, to_slot, to_send, owners, op_calls.TOPK)
        return moe_ext.a2a_pack_rows(x, i, w, plan, payload="fp8")

    assert_the_same_displaced("a2a_pack_rows", packed, call.inputs, FLOOR[dtype])
