"""Several host threads on one device: the first CUDA call of one may be any op, and they launch kernels side by side."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import moe_ext
from cases import make_rows, make_topk_ids, make_topk_weights

HIDDEN_SIZE, INTERMEDIATE_SIZE, TOPK = 256, 128, 2


def make_op(name: str, num_tokens: int, num_experts: int, device: str) -> Callable[[], list[Tensor]]:
    """On inputs that are ready."""
    plan = moe_ext.routing_plan(make_topk_ids(num_tokens, num_experts, TOPK, "uniform", device), num_experts)
    rows = num_tokens if name == "moe_mlp" else plan.permuted_to_slot.numel()
    shapes = (
        (rows, HIDDEN_SIZE),
        (num_experts, 2 * INTERMEDIATE_SIZE, HIDDEN_SIZE),
        (num_experts, HIDDEN_SIZE, INTERMEDIATE_SIZE),
    )
    x, up, down = (make_rows(*shape, dtype=torch.bfloat16, device=device).requires_grad_() for shape in shapes)
    weights = make_topk_weights(num_tokens, TOPK, device)
    product = moe_ext.grouped_gemm(x, up, plan.expert_offsets, weight_layout="enk") if name == "grad" else None
    grad = None if product is None else torch.ones_like(product)

    def forward() -> list[Tensor]:
        return [moe_ext.grouped_gemm(x, up, plan.expert_offsets, weight_layout="enk").detach()]

    def backward() -> list[Tensor]:
        return list(torch.autograd.grad(product, (x, up), grad, retain_graph=True))

    def layer() -> list[Tensor]:
        out = moe_ext.moe_mlp(x, up, down, plan, weights, weight_layout="enk", activation="swiglu")
        return [out.detach(), *torch.autograd.grad(out, (x, up, down), torch.ones_like(out))]

    return {"forward": forward, "grad": backward, "moe_mlp": layer}[name]


def in_new_thread(op: Callable[[], list[Tensor]], device: str) -> list[Tensor]:
    def call() -> list[Tensor]:
        results = op()
        if device == "cuda":
            torch.cuda.synchronize()
        return results

    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(call).result()


@pytest.mark.parametrize("tile", [None, "128x128"])
@pytest.mark.parametrize("name", ["forward", "grad", "moe_mlp"])
def test_first_call_of_a_thread(name, tile, device, monkeypatch):
    """Encoding a tensor map needs a context, which a thread has only once something has bound one."""
    if tile:
        monkeypatch.setenv("MOE_EXT_SM90_TILE", tile)
    op = make_op(name, 600, 4, device)
    for got, expected in zip(in_new_thread(op, device), op(), strict=True):
        assert torch.equal(got, expected)


def test_few_rows_of_different_sizes_side_by_side(device):
    """The limit of a kernel's shared memory is the device's, what a launch takes depends on the number of experts."""
    ops = [make_op("forward", 4, num_experts, device) for num_experts in (4, 700)]
    expected = [op() for op in ops]
    repeats = 200 if device == "cuda" else 2

    def repeat(op: Callable[[], list[Tensor]]) -> list[Tensor]:
        for _ in range(repeats):
            results = op()
        return results

    with ThreadPoolExecutor(max_workers=2) as pool:
        for got, want in zip(pool.map(repeat, ops), expected, strict=True):
            assert torch.equal(got[0], want[0])
