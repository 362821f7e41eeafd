"""torch.compile, torch.export and AOTInductor: one graph for every number of tokens, and the numbers of eager."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cases import make_rows
from compare import relative_error
from moe_ext.nn import MoELayer
from op_calls import OPS, make_call, run_with_grads

LAYERS = {
    "dropless": {"shared_intermediate_size": 20, "router": {"selection_bias": True, "renormalize": True}},
    "capacity": {"capacity_factor": 0.75},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_layer(name: str, device: str) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(16, 12, 8, 2, **LAYERS[name]).to(device)


def layer_step(layer, hidden):
    output = layer(hidden)
    loss = output.hidden.square().sum() + 0.1 * output.balance_loss + 0.01 * output.z_loss
    return [*output, *torch.autograd.grad(loss, [hidden, *layer.parameters()])]


@pytest.mark.parametrize("name", OPS)
def test_op_in_one_dynamic_graph(name, device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = None
    for num_tokens in (24, 7, 65):
        call = make_call(name, num_tokens, device)
        compiled = compiled or torch.compile(call.run, fullgraph=True, backend=counter)
        for x in call.inputs[: call.num_dynamic]:
            torch._dynamo.mark_dynamic(x, 0)
        expected = run_with_grads(call.run, call.inputs)
        results = run_with_grads(compiled, call.inputs)
        assert len(results) == len(expected)
        for got, wanted in zip(results, expected, strict=True):
            assert torch.equal(got, wanted)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name, backend", [("dropless", "inductor"), ("capacity", "aot_eager")])
def test_layer_in_one_dynamic_graph(name, backend, device):
    layer = make_layer(name, device)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for num_tokens in (24, 7, 65):
        hidden = make_rows(num_tokens, 16, dtype=torch.float32, device=device).requires_grad_()
        torch._dynamo.mark_dynamic(hidden, 0)
        expected = layer_step(layer, hidden)
        results = layer_step(compiled, hidden)
        assert torch.equal(compiled.statistics.topk_ids, layer.statistics.topk_ids)
        for got, wanted in zip(results, expected, strict=True):
            assert relative_error(got, wanted) < 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", LAYERS)
def test_exported_layer_runs_other_numbers_of_tokens(name, device):
    layer = make_layer(name, device)
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    program = torch.export.export(layer, (torch.zeros(8, 16, device=device),), dynamic_shapes=({0: tokens},))
    for num_tokens in (1, 33):
        hidden = make_rows(num_tokens, 16, dtype=torch.float32, device=device)
        output = program.module()(hidden)
        assert type(output).__name__ == "MoEOutput"
        for got, wanted in zip(output, layer(hidden), strict=True):
            assert relative_error(got, wanted) < 1e-6


def test_package_runs_other_numbers_of_tokens(device, tmp_path):
    """Compiled ahead of time, written to a file, loaded from it."""
    layer = make_layer("capacity", device)
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    program = torch.export.export(layer, (torch.zeros(8, 16, device=device),), dynamic_shapes=({0: tokens},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for num_tokens in (1, 8, 33):
        hidden = make_rows(num_tokens, 16, dtype=torch.float32, device=device)
        for got, wanted in zip(loaded(hidden), layer(hidden), strict=True):
            assert relative_error(got, wanted) < 1e-5
