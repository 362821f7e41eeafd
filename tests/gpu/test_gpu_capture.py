"""Whole training steps as CUDA graphs: no host sync, no allocation that depends on device data, any stream, any device.

The steps are those of tests/capture_steps.py, which tests/test_capture_steps.py runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import moe_ext
from capture_steps import (
    HIDDEN_SIZE,
    INTERMEDIATE_SIZE,
    LAYERS,
    NUM_EXPERTS,
    TOKENS,
    TOPK,
    Step,
    assert_same,
    make_inputs,
    make_layer_step,
    make_ops_step,
    one_hot_logits,
    reference_layer,
)
from cases import ROUTINGS, make_rows, make_topk_ids, make_topk_weights
from compare import relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@contextmanager
def sync_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_step(name: str, dtype: torch.dtype, device: str) -> Step:
    return make_ops_step(dtype, device) if name == "ops" else make_layer_step(name, dtype, device)


def capture(step: Step, inputs: list[Tensor], stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """The step as a graph captured on `stream`, and the tensors that a replay fills in."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream), sync_is_an_error():
        results = step(inputs)
    return graph, results


def refill(inputs: list[Tensor], fresh: list[Tensor]) -> None:
    for x, new in zip(inputs, fresh, strict=True):
        x.copy_(new)


def assert_replays_equal_eager(step: Step, num_tokens: int, dtype: torch.dtype, device: str) -> None:
    """Forward and backward in one graph; every replay equals the eager step on the same inputs, bit for bit."""
    inputs = make_inputs(num_tokens, dtype, device)
    graph, captured = capture(step, inputs, torch.cuda.Stream())
    for seed in (10, 20, 30):
        refill(inputs, make_inputs(num_tokens, dtype, device, seed))
        if seed == 30:
            one_hot_logits(inputs)
            inputs[0][:] = inputs[0][:1].clone()  # the layers route by hidden: the same way for every token
        for result in captured:
            result.zero_()
        graph.replay()
        replayed = [x.clone() for x in captured]
        assert_same(replayed, step(inputs))


def test_sync_debug_mode_sees_a_sync(device):
    """The proof of the next test is worth something."""
    with pytest.raises(RuntimeError, match="synchroniz"), sync_is_an_error():
        torch.ones(1, device=device).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", [*LAYERS, "ops"])
def test_no_step_syncs(name, tokens, dtype, device):
    step = make_step(name, dtype, device)
    inputs = make_inputs(TOKENS[tokens], dtype, device)
    expected = step(inputs)
    with sync_is_an_error():
        results = step(inputs)
    assert_same(results, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", [*LAYERS, "ops"])
def test_replay_with_other_routing(name, tokens, dtype, device):
    assert_replays_equal_eager(make_step(name, dtype, device), TOKENS[tokens], dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_equals_the_reference(dtype, device):
    gate_up = make_rows(NUM_EXPERTS, 2 * INTERMEDIATE_SIZE, HIDDEN_SIZE, dtype=dtype, device=device, seed=5, scale=0.1)
    down = make_rows(NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE, dtype=dtype, device=device, seed=6, scale=0.1)

    def step(inputs: list[Tensor]) -> list[Tensor]:
        weights, ids = moe_ext.topk_gating(inputs[1], TOPK, renormalize=True)
        plan = moe_ext.routing_plan(ids, NUM_EXPERTS)
        return [moe_ext.moe_mlp(inputs[0], gate_up, down, plan, weights, weight_layout="enk")]

    inputs = make_inputs(TOKENS["few"], dtype, device)
    graph, (captured,) = capture(step, inputs, torch.cuda.Stream())
    for seed in (10, 20):
        refill(inputs, make_inputs(TOKENS["few"], dtype, device, seed))
        if seed == 20:
            one_hot_logits(inputs)
        graph.replay()
        exact = reference_layer(inputs, gate_up, down)
        assert relative_error(captured, exact) < (1e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", ["dropless", "ops"])
def test_several_streams_at_once(name, tokens, device):
    """Each stream its own inputs; no kernel waits for a block of another, none keeps state between calls."""
    step = make_step(name, torch.bfloat16, device)
    inputs = [make_inputs(TOKENS[tokens], torch.bfloat16, device, seed) for seed in (0, 10, 20, 30)]
    expected = [step(mine) for mine in inputs]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in inputs], []
    for _ in range(5):
        for stream, mine in zip(streams, inputs, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results.append(step(mine))
    torch.cuda.synchronize()
    for index, result in enumerate(results):
        assert_same(result, expected[index % len(inputs)])


def test_graphs_on_several_streams_at_once(device):
    step = make_ops_step(torch.bfloat16, device)
    inputs = [make_inputs(TOKENS["many"], torch.bfloat16, device, seed) for seed in (0, 10, 20)]
    expected = [step(mine) for mine in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    graphs = [capture(step, mine, stream) for mine, stream in zip(inputs, streams, strict=True)]
    torch.cuda.synchronize()
    for _ in range(5):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, captured), wanted in zip(graphs, expected, strict=True):
        assert_same(captured, wanted)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_on_a_side_stream(routing, device):
    ids = make_topk_ids(TOKENS["many"], NUM_EXPERTS, TOPK, routing, device)
    weights = make_topk_weights(TOKENS["many"], TOPK, device)
    hidden = make_rows(TOKENS["many"], HIDDEN_SIZE, dtype=torch.bfloat16, device=device)

    def round_trip() -> Tensor:
        plan = moe_ext.routing_plan(ids, NUM_EXPERTS)
        maps = (plan.permuted_to_slot, plan.slot_to_permuted)
        return moe_ext.unpermute(moe_ext.permute(hidden, *maps, TOPK), *maps, TOPK, weights)

    expected = round_trip()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = round_trip()
    stream.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("name", ["dropless", "ops"])
def test_second_device(name, device):
    """Tensors decide where an op runs, not the current device; results do not depend on it."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, here: {torch.cuda.device_count()}")
    first = make_step(name, torch.bfloat16, "cuda:0")(make_inputs(TOKENS["many"], torch.bfloat16, "cuda:0"))
    with torch.cuda.device(0):
        second = make_step(name, torch.bfloat16, "cuda:1")(make_inputs(TOKENS["many"], torch.bfloat16, "cuda:1"))
        assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in second)
    if torch.cuda.get_device_properties(0).name == torch.cuda.get_device_properties(1).name:
        assert_same([x.cpu() for x in second], [x.cpu() for x in first])
