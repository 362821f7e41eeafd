"""The mistakes that are likeliest on a first day: each error names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import moe_ext
from cases import make_topk_ids
from moe_ext.nn import Experts, MoELayer

TOKENS, EXPERTS, TOPK, HIDDEN, INTERMEDIATE = 6, 4, 2, 8, 12


def call_mlp(device: str, **changes: object) -> Tensor:
    """A good call of moe_mlp, but for ``changes``."""
    arguments: dict[str, object] = {
        "input": torch.zeros(TOKENS, HIDDEN, device=device),
        "gate_up_weight": torch.zeros(EXPERTS, 2 * INTERMEDIATE, HIDDEN, device=device),
        "down_weight": torch.zeros(EXPERTS, HIDDEN, INTERMEDIATE, device=device),
        "plan": moe_ext.routing_plan(make_topk_ids(TOKENS, EXPERTS, TOPK, "uniform", device), EXPERTS),
        "topk_weights": torch.zeros(TOKENS, TOPK, device=device),
        "weight_layout": "enk",
    }
    return moe_ext.moe_mlp(**(arguments | changes))


def call_layer(device: str, hidden: Tensor) -> Tensor:
    return MoELayer(HIDDEN, INTERMEDIATE, EXPERTS, TOPK).to(device)(hidden.to(device)).hidden


def logits(device: str, *sizes: int) -> Tensor:
    return torch.zeros(*sizes, device=device)


MISTAKES: list[tuple[str, Callable[[str], object], str]] = [
    ("wrong dtype", lambda d: call_mlp(d, input=torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16, device=d)), r"gate_up_weight: expected bfloat16 \[num_experts, .*\], got float32 \[4, 24, 8\]"),
    ("integer rows", lambda d: call_layer(d, torch.zeros(3, HIDDEN, dtype=torch.int64)), r"hidden: expected floating rows \[num_tokens, hidden_size = 8\], got int64 \[3, 8\]"),
    ("wrong layout", lambda d: call_mlp(d, weight_layout="nk"), "weight_layout: expected enk or ekn, got nk"),
    ("wrong layout of a module", lambda d: Experts(4, 8, 12, weight_layout="nk"), "weight_layout: expected enk or ekn, got 'nk'"),
    ("transposed", lambda d: call_mlp(d, down_weight=torch.zeros(EXPERTS, INTERMEDIATE, HIDDEN, device=d)), r"down_weight: expected size 8 \(hidden_size, as in input, for layout enk\) in dimension 1, got float32 \[4, 12, 8\]"),
    ("transposed gate_up", lambda d: call_mlp(d, weight_layout="ekn"), r"gate_up_weight: expected size 8 \(hidden_size, as in input, for layout ekn\) in dimension 1, got float32 \[4, 24, 8\]"),
    ("int16 ids", lambda d: moe_ext.routing_plan(make_topk_ids(6, 4, 2, "uniform", d).short(), 4), r"topk_ids: expected int32 or int64 \[num_tokens, topk\], got (Short|int16) \[6, 2\]"),
    ("weights for ids", lambda d: moe_ext.routing_plan(logits(d, 6, 2), 4), r"topk_ids: expected int32 or int64 .*, got float32 \[6, 2\]"),
    ("one axis", lambda d: moe_ext.topk_gating(logits(d, 4), 2), r"logits: expected .* \[num_tokens, num_experts\], got float32 \[4\]"),
    ("three axes", lambda d: call_mlp(d, input=logits(d, 2, 3, HIDDEN)), r"plan: expected .* 2 tokens|input: expected .* \[num_tokens, hidden_size\], got float32 \[2, 3, 8\]"),
    ("topk above experts", lambda d: moe_ext.topk_gating(logits(d, 6, 4), 5), "topk: expected at most num_experts = 4, got 5"),
    ("topk above experts of a layer", lambda d: MoELayer(8, 12, 4, 5), "topk: expected 1 to num_experts = 4, got 5"),
    ("plan of other tokens", lambda d: call_mlp(d, input=logits(d, 3, HIDDEN), topk_weights=logits(d, 3, TOPK)), "plan: expected a plan of 3 tokens with topk 2, as input and topk_weights, got one of 12 slots"),
    ("plan of other experts", lambda d: call_mlp(d, plan=moe_ext.routing_plan(make_topk_ids(6, 4, 2, "uniform", d), 5)), r"gate_up_weight: expected size 5 \(num_experts, the length of expert_offsets - 1\) in dimension 0, got float32 \[4, 24, 8\]"),
    ("ids for a plan", lambda d: call_mlp(d, plan=make_topk_ids(6, 4, 2, "uniform", d)), "plan: expected a RoutingPlan, as moe_ext.routing_plan returns, got Tensor"),
    ("weights for a plan", lambda d: Experts(4, 8, 12).to(d)(logits(d, 6, 8), logits(d, 6, 2)), "plan: expected a RoutingPlan, .* got Tensor"),
    ("counts for offsets", lambda d: moe_ext.grouped_gemm(logits(d, 6, 8), logits(d, 4, 3, 8), torch.zeros(4, dtype=torch.int32, device=d), weight_layout="enk"), r"weight: expected size 3 \(num_experts, the length of expert_offsets - 1\)"),
    ("int64 offsets", lambda d: moe_ext.grouped_gemm(logits(d, 6, 8), logits(d, 4, 3, 8), torch.zeros(5, dtype=torch.int64, device=d), weight_layout="enk"), r"expert_offsets: expected int32 \[num_experts \+ 1\], got int64 \[5\]"),
    ("another hidden size", lambda d: call_layer(d, torch.zeros(2, 3, 9)), r"hidden: expected floating rows \[num_tokens, hidden_size = 8\], got float32 \[6, 9\]"),
    ("unknown activation", lambda d: Experts(4, 8, 12, activation="swish"), "activation: expected one of silu, .*, got 'swish'"),
    ("negative capacity", lambda d: MoELayer(8, 12, 4, 2, capacity_factor=-1.0), r"capacity_factor: expected a number > 0, or None for dropless, got -1\.0"),
    ("a list", lambda d: moe_ext.topk_gating([[0.0]], 1), r"Expected a value of type 'Tensor' for argument 'logits' but instead found type 'list'"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", [pytest.param(*rest, id=name) for name, *rest in MISTAKES])
def test_mistake(call, message, device):
    call_mlp(device)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        call(device)


@pytest.mark.parametrize("name", ["gate_up_weight", "down_weight", "topk_weights"])
def test_host_tensor_among_device_tensors(name, device):
    if device == "cpu":
        pytest.skip("needs a second device: runs in tests/gpu")
    sizes = {
        "gate_up_weight": (EXPERTS, 2 * INTERMEDIATE, HIDDEN),
        "down_weight": (EXPERTS, HIDDEN, INTERMEDIATE),
        "topk_weights": (TOKENS, TOPK),
    }
    with pytest.raises(
        RuntimeError, match=f"{name}: expected a tensor on {device}:0, the device of input, got one on cpu"
    ):
        call_mlp(device, **{name: torch.zeros(sizes[name])})


def test_what_is_no_mistake(device):
    """float16 on the CPU, any strides, any leading axes of a layer."""
    half = {name: torch.zeros(4, *sizes, dtype=torch.float16, device=device) for name, sizes in
            (("gate_up_weight", (24, 8)), ("down_weight", (8, 12)))}  # fmt: skip
    rows = torch.zeros(HIDDEN, TOKENS, dtype=torch.float16, device=device).t()
    assert call_mlp(device, input=rows, **half).dtype == torch.float16
    assert call_layer(device, torch.zeros(HIDDEN)).shape == (HIDDEN,)
    assert call_layer(device, torch.zeros(2, 1, 3, HIDDEN)).shape == (2, 1, 3, HIDDEN)
