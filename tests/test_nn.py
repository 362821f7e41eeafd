"""The modules: the same numbers on the ops as on the reference, shapes, state, statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import moe_ext
from cases import make_rows
from compare import relative_error
from moe_ext.nn import Experts, MoELayer, TopKRouter

CONFIGURATIONS = [
    {},
    {"shared_intermediate_size": 20, "shared_gate": True},
    {"capacity_factor": 0.75},
    {"router": {"score_function": "sigmoid", "selection_bias": True, "num_groups": 4, "topk_groups": 2, "renormalize": True, "scale": 2.5}},
    {"experts": {"activation": "swiglu_clamped", "gate_up_layout": "interleaved", "weight_layout": "ekn", "bias": True}, "router": {"score_order": "select_then_score"}},
    {"experts": {"activation": "relu_squared"}},
]  # fmt: skip


def make_layer(backend="kernels", dtype=torch.float64, **configuration) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(16, 12, 8, 2, backend=backend, **configuration).to(dtype)
    if layer.router.selection_bias is not None:
        layer.router.selection_bias.copy_(torch.linspace(-0.2, 0.2, 8))
    return layer


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_equals_the_reference_ops(configuration):
    hidden = make_rows(3, 7, 16, dtype=torch.float64).requires_grad_()
    results = []
    for backend in ("kernels", "reference"):
        layer = make_layer(backend, **configuration)
        output = layer(hidden)
        assert output.hidden.shape == hidden.shape
        loss = (output.hidden * make_rows(3, 7, 16, dtype=torch.float64, seed=3)).sum()
        loss = loss + 0.1 * output.balance_loss + 0.01 * output.z_loss
        grads = torch.autograd.grad(loss, [hidden, *layer.parameters()])
        results.append([*output[:3], output.routing.topk_weights, output.routing.logits, *grads])
        assert layer.statistics is not None and layer.statistics.topk_ids.shape == (21, 2)
    for ours, exact in zip(*results, strict=True):
        assert relative_error(ours, exact) < 1e-12


def test_experts_formula():
    """Against the eager loop of a Mixtral block, written out."""
    experts = Experts(4, 16, 12).double()
    hidden = make_rows(9, 16, dtype=torch.float64)
    weights, ids = moe_ext.topk_gating(make_rows(9, 4, dtype=torch.float64, seed=3), 2, renormalize=True)
    expected = torch.zeros_like(hidden)
    for t, j in torch.cartesian_prod(torch.arange(9), torch.arange(2)).tolist():
        gate, up = F.linear(hidden[t], experts.gate_up_weight[ids[t, j]]).chunk(2)
        expected[t] += weights[t, j] * F.linear(F.silu(gate) * up, experts.down_weight[ids[t, j]])
    output = experts(hidden, moe_ext.routing_plan(ids, 4), weights)
    assert relative_error(output, expected) < 1e-12


def test_shared_expert_is_added():
    layer = make_layer(shared_intermediate_size=20, shared_gate=True)
    without = copy.deepcopy(layer)
    without.shared = None
    hidden = make_rows(5, 16, dtype=torch.float64)
    gate, up = (hidden @ layer.shared.gate_up.weight.T).chunk(2, dim=-1)
    shared = (F.silu(gate) * up) @ layer.shared.down.weight.T * torch.sigmoid(hidden @ layer.shared.gate.weight.T)
    assert relative_error(layer(hidden).hidden - without(hidden).hidden, shared) < 1e-12


def test_capacity_drops_are_counted():
    layer = make_layer(capacity_factor=0.5)
    hidden = make_rows(64, 16, dtype=torch.float64)
    layer(hidden)
    asked = layer.statistics.tokens_per_expert
    assert layer.capacity(64) == 8 and asked.sum() == 128
    assert layer.statistics.dropped_slots == (asked - 8).clamp(min=0).sum() > 0


def test_state_dict_round_trip():
    layer = make_layer(shared_intermediate_size=4, router={"selection_bias": True})
    torch.manual_seed(1)
    other = MoELayer(16, 12, 8, 2, shared_intermediate_size=4, router={"selection_bias": True}).double()
    assert "router.selection_bias" in layer.state_dict()
    other.load_state_dict(layer.state_dict())
    hidden = make_rows(6, 16, dtype=torch.float64)
    assert torch.equal(layer(hidden).hidden, other(hidden).hidden)


def test_no_tokens():
    layer = make_layer()
    hidden = torch.zeros(0, 16, dtype=torch.float64, requires_grad=True)
    output = layer(hidden)
    (output.hidden.sum() + output.balance_loss + output.z_loss).backward()
    assert output.hidden.shape == (0, 16) and output.balance_loss == 0
    assert all((p.grad == 0).all() for p in layer.parameters())


def test_router_works_in_float32_on_bfloat16_rows():
    router = TopKRouter(16, 8, 2).bfloat16()
    weights, _, logits = router(make_rows(5, 16, dtype=torch.bfloat16))
    assert weights.dtype == logits.dtype == torch.float32
    assert "num_experts=8" in repr(router)


def test_autocast():
    """Experts in bf16, the router in fp32: the same ids as without, gradients in the dtype of the parameters."""
    layer = make_layer(dtype=torch.float32, experts={"bias": True})
    hidden = make_rows(65, 16, dtype=torch.float32)
    exact = layer(hidden)
    ids = layer.statistics.topk_ids
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(hidden)
        product = moe_ext.grouped_gemm(
            hidden,
            layer.experts.gate_up_weight,
            torch.tensor([0, 9, 9, 30, 40, 41, 50, 60, 65]).int(),
            weight_layout="enk",
        )
    assert product.dtype == output.hidden.dtype == torch.bfloat16 and output.balance_loss.dtype == torch.float32
    assert torch.equal(layer.statistics.topk_ids, ids)
    assert 1e-4 < relative_error(output.hidden, exact.hidden) < 2e-2
    grads = torch.autograd.grad(output.hidden.float().square().sum(), list(layer.parameters()))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
