"""More than 2^31 elements in one tensor, where 32-bit index arithmetic would wrap.

Ops that work row by row must give the last rows, and those around element 2^31, what they give for these rows alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import moe_ext
from compare import relative_error
from moe_ext import reference

BOUNDARY = 2**31
NEEDED_BYTES = 32 * 2**30  # expert choice: logits of 2 bytes, scores, weights and ids of 4 for each element
WIDTH, TOPK, NUM_EXPERTS = 4096, 8, 64
DTYPE = torch.bfloat16


@pytest.fixture
def elements(device) -> int:
    if device == "cpu":
        return 2**16  # a dry run
    if (free := free_bytes()) < NEEDED_BYTES:
        pytest.skip(f"needs {NEEDED_BYTES >> 30} GiB of free GPU memory, {free >> 30} GiB are free")
    return BOUNDARY


def free_bytes() -> int:
    """What the driver has left, once the earlier tests' tensors and the allocator's own blocks are given back to it."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def fresh(*sizes: int, device: str, dtype: torch.dtype = DTYPE, scale: float = 1.0) -> Tensor:
    return torch.randn(*sizes, device=device, dtype=dtype).mul_(scale)


def parts(rows: int, width: int, elements: int) -> list[slice]:
    """The last rows, and those around the boundary."""
    middle = elements // width
    return [slice(rows - 32, rows), slice(middle - 4, middle + 4)]


def assert_rows_alone_give_the_same(op: Callable[..., list[Tensor]], args: list[Tensor], width: int, elements: int):
    assert args[0].shape[0] * width > elements
    whole = op(*args)
    for part in parts(args[0].shape[0], width, elements):
        for got, alone in zip(whole, op(*(x[part].clone() for x in args)), strict=True):
            assert torch.equal(got[part], alone)


def test_gating(device, elements):
    num_experts = 512
    logits = fresh(elements // num_experts + 64, num_experts, device=device)
    grad = fresh(logits.shape[0], TOPK, device=device, dtype=torch.float32)

    def gate(x: Tensor, g: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        weights, ids = moe_ext.topk_gating(x, TOPK, renormalize=True)
        return [weights.detach(), ids, *torch.autograd.grad(weights, x, g)]

    assert_rows_alone_give_the_same(gate, [logits, grad], num_experts, elements)


def test_router_losses(device, elements):
    num_experts = 512
    logits = fresh(elements // num_experts + 64, num_experts, device=device).requires_grad_()
    num_tokens = logits.shape[0]
    ids = torch.arange(num_tokens, device=device, dtype=torch.int32)[:, None] % num_experts
    _, z_loss, load = moe_ext.router_losses(logits, ids)
    (grad,) = torch.autograd.grad(z_loss, logits)
    with torch.no_grad():
        total = sum(part.float().logsumexp(1).square().double().sum() for part in logits.split(2**16))
        assert relative_error(z_loss, total / num_tokens) < 1e-4
        for part in parts(num_tokens, num_experts, elements):
            rows = logits[part].double()
            expected = 2 / num_tokens * rows.logsumexp(1, keepdim=True) * rows.softmax(1)
            assert relative_error(grad[part] * 2.0**20, expected * 2.0**20) < 1e-2
    assert load.sum() == num_tokens


def test_expert_choice(device, elements):
    num_experts, capacity = 512, 100
    logits = fresh(elements // num_experts + 64, num_experts, device=device)
    weights, ids = moe_ext.expert_choice_gating(logits, capacity)
    for expert in (0, num_experts - 1):
        chosen = ids[:, expert] == expert
        assert chosen.sum() == capacity
        scores = torch.cat([part.float().softmax(1)[:, expert] for part in logits.split(2**16)])
        assert scores[chosen].min() >= scores[~chosen].max() * (1 - 1e-5)
        assert relative_error(weights[chosen, expert], scores[chosen]) < 1e-5 and not weights[~chosen, expert].any()


def test_activation(device, elements):
    pre = fresh(elements // WIDTH + 64, WIDTH, device=device)
    grad = fresh(pre.shape[0], WIDTH // 2, device=device)

    def activate(x: Tensor, g: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        output = moe_ext.expert_activation(x)
        return [output.detach(), *torch.autograd.grad(output, x, g)]

    assert_rows_alone_give_the_same(activate, [pre, grad], WIDTH, elements)


def test_low_rank_experts(device, elements):
    hidden, grad = (fresh(elements // WIDTH + 64, WIDTH, device=device) for _ in range(2))
    ids = torch.arange(hidden.shape[0], device=device, dtype=torch.int32)[:, None] % 4
    weights = torch.rand(hidden.shape[0], 1, device=device)
    lora_a, lora_b = (fresh(4, 1, WIDTH, device=device, scale=0.02).requires_grad_() for _ in range(2))

    def run(x: Tensor, g: Tensor, chosen: Tensor, w: Tensor) -> list[Tensor]:
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        output = moe_ext.low_rank_experts(x, lora_a, lora_b, chosen, w)
        return [output.detach(), *torch.autograd.grad(output, [x, w], g)]

    assert_rows_alone_give_the_same(run, [hidden, grad, ids, weights], WIDTH, elements)


def routed(device: str, elements: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, ids and weights of so many tokens that their permuted rows pass the boundary."""
    num_tokens = elements // WIDTH // TOPK + 64
    logits = fresh(num_tokens, NUM_EXPERTS, device=device, dtype=torch.float32)
    weights, ids = moe_ext.topk_gating(logits, TOPK, renormalize=True)
    return fresh(num_tokens, WIDTH, device=device), ids, weights


def test_permutation(device, elements):
    hidden, ids, weights = routed(device, elements)
    plan = moe_ext.routing_plan(ids, NUM_EXPERTS)
    maps = (plan.permuted_to_slot, plan.slot_to_permuted)
    rows = moe_ext.permute(hidden, *maps, TOPK)
    assert rows.numel() > elements
    for part, slots in zip(rows.split(2**14), plan.permuted_to_slot.split(2**14), strict=True):
        assert torch.equal(part, hidden[slots // TOPK])

    # Every row of a token is the token: weights that sum to one give it back, and its dot product with the gradient.
    leaf, weight_leaf = rows.requires_grad_(), weights.requires_grad_()
    output = moe_ext.unpermute(leaf, *maps, TOPK, weight_leaf)
    assert relative_error(output[-4096:], hidden[-4096:]) < 5e-3
    grad = fresh(*hidden.shape, device=device)
    grad_rows, grad_weights = torch.autograd.grad(output, [leaf, weight_leaf], grad)
    last = slice(max(0, grad_rows.shape[0] - 4096), None)
    slots = plan.permuted_to_slot[last].long()
    expected = grad[slots // TOPK] * weights.detach().flatten()[slots, None]
    assert relative_error(grad_rows[last], expected) < 5e-3
    dots = (grad[-512:].double() * hidden[-512:].double()).sum(1, keepdim=True).expand(-1, TOPK)
    assert relative_error(grad_weights[-512:], dots) < 1e-4


@pytest.mark.parametrize("payload", ["native", "fp8"])
def test_packed_rows(payload, device, elements):
    hidden, ids, weights = routed(device, elements)
    plan = moe_ext.a2a_plan(ids, moe_ext.even_rank_expert_offsets(NUM_EXPERTS, TOPK, device))
    packed = moe_ext.a2a_pack_rows(hidden, ids, weights, plan, payload=payload)
    unpacked = moe_ext.a2a_unpack_rows(packed, WIDTH, TOPK, DTYPE, payload=payload)[0]
    assert unpacked.numel() > elements
    for part, slots in zip(unpacked.split(2**14), plan.send_to_slot.split(2**14), strict=True):
        held = (slots >= 0)[:, None]
        expected = torch.where(held, hidden[slots.clamp(min=0) // plan.slots_per_token], 0)
        if payload == "native":
            assert torch.equal(part, expected)
        else:
            assert relative_error(part, expected) < 4e-2


def test_products_and_layer(device, elements):
    """The pre-activation passes the boundary; a token's output and gradient hang on nothing but the token."""
    hidden_size = 64
    _, ids, weights = routed(device, elements)
    hidden = fresh(ids.shape[0], hidden_size, device=device)
    grad = fresh(*hidden.shape, device=device)
    gate_up = fresh(NUM_EXPERTS, WIDTH, hidden_size, device=device, scale=0.1)
    down = fresh(NUM_EXPERTS, hidden_size, WIDTH // 2, device=device, scale=0.02)
    plan = moe_ext.routing_plan(ids, NUM_EXPERTS)

    rows = moe_ext.permute(hidden, plan.permuted_to_slot, plan.slot_to_permuted, TOPK)
    product = moe_ext.grouped_gemm(rows, gate_up, plan.expert_offsets, weight_layout="enk")
    assert product.numel() > elements
    assert relative_error(product[-4:], rows[-4:].double() @ gate_up[-1].double().T) < 1e-2
    del product

    def run(module, x: Tensor, up: Tensor, dn: Tensor, chosen: Tensor, w: Tensor, g: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, w)]
        layer_plan = module.routing_plan(chosen, NUM_EXPERTS)
        output = module.moe_mlp(leaves[0], up, dn, layer_plan, leaves[1], weight_layout="enk")
        return [output.detach(), *torch.autograd.grad(output, leaves, g)]

    whole = run(moe_ext, hidden, gate_up, down, ids, weights, grad)
    wide = [t.double() for t in (gate_up, down)]
    for part in parts(hidden.shape[0], WIDTH * TOPK, elements):
        alone = run(reference, hidden[part].double(), *wide, ids[part], weights[part].double(), grad[part].double())
        for got, exact in zip(whole, alone, strict=True):
            assert relative_error(got[part], exact) < 2e-2
