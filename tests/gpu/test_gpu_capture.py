"""The whole layer as one CUDA graph: no host sync, no allocation that depends on device data, any stream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moe_ext
from cases import ROUTINGS, make_rows, make_topk_ids, make_topk_weights
from compare import relative_error
from moe_ext import reference

NUM_TOKENS, HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, TOPK = 96, 64, 48, 12, 4


def layer(ops, logits: Tensor, hidden: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    weights, ids = ops.topk_gating(logits, TOPK, renormalize=True)
    plan = ops.routing_plan(ids, NUM_EXPERTS)
    return ops.moe_mlp(hidden, gate_up, down, plan, weights, weight_layout="enk")


def make_inputs(dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    return [
        make_rows(NUM_TOKENS, NUM_EXPERTS, dtype=torch.float32, device=device, seed=seed),
        make_rows(NUM_TOKENS, HIDDEN_SIZE, dtype=dtype, device=device, seed=seed + 1),
        make_rows(
            NUM_EXPERTS, 2 * INTERMEDIATE_SIZE, HIDDEN_SIZE, dtype=dtype, device=device, seed=seed + 2, scale=0.1
        ),
        make_rows(NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE, dtype=dtype, device=device, seed=seed + 3, scale=0.1),
    ]


def step(inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    output = layer(moe_ext, *inputs)
    return [output, *torch.autograd.grad(output, inputs, grad)]


@pytest.fixture
def no_sync(device):
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_backward_never_sync(dtype, device, no_sync):
    torch.cuda.set_sync_debug_mode("default")
    inputs = [x.requires_grad_() for x in make_inputs(dtype, device)]
    grad = make_rows(NUM_TOKENS, HIDDEN_SIZE, dtype=dtype, device=device, seed=9)
    torch.cuda.set_sync_debug_mode("error")
    step(inputs, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_replay_with_other_routing(dtype, device):
    inputs = [x.requires_grad_() for x in make_inputs(dtype, device)]
    grad = make_rows(NUM_TOKENS, HIDDEN_SIZE, dtype=dtype, device=device, seed=9)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(inputs, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs, grad)
    for seed in (10, 20, 30):
        fresh = make_inputs(dtype, device, seed)
        with torch.no_grad():
            for x, new in zip(inputs, fresh, strict=True):
                x.copy_(new)
            if seed == 30:
                inputs[0][:] = torch.arange(NUM_EXPERTS, device=device)  # everyone to the same experts
        graph.replay()
        for replayed, eager in zip(captured, step(inputs, grad), strict=True):
            assert torch.equal(replayed, eager)
        exact = layer(reference, *(x.detach().cpu().double() for x in inputs))
        assert relative_error(captured[0], exact) < (1e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_several_streams_at_once(routing, device):
    ids = make_topk_ids(NUM_TOKENS, NUM_EXPERTS, TOPK, routing, device)
    weights = make_topk_weights(NUM_TOKENS, TOPK, device)
    _, hidden, gate_up, down = make_inputs(torch.bfloat16, device)

    def forward() -> Tensor:
        return moe_ext.moe_mlp(
            hidden, gate_up, down, moe_ext.routing_plan(ids, NUM_EXPERTS), weights, weight_layout="enk"
        )

    expected = forward()
    torch.cuda.synchronize()
    streams, outputs = [torch.cuda.Stream() for _ in range(4)], []
    for stream in streams:
        with torch.cuda.stream(stream):
            outputs.append([forward() for _ in range(5)])
    torch.cuda.synchronize()
    assert all(torch.equal(output, expected) for mine in outputs for output in mine)
