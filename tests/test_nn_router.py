"""Routers: any map to logits, options checked, precision, and one of a user's own in a few lines."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import moe_ext
from cases import make_rows
from compare import relative_error
from moe_ext.nn import ExpertChoiceRouter, Experts, MoE, TopKRouter


# A router of one's own: any module from rows to logits. Gating, losses, plan and torch.compile come with it.
class CosineLogits(nn.Module):
    def __init__(self, hidden_size: int, num_experts: int, temperature: float = 0.07) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(num_experts, hidden_size))
        self.temperature = nn.Parameter(torch.tensor(temperature))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.normalize(hidden, dim=-1) @ F.normalize(self.keys, dim=-1).T / self.temperature


def make_cosine_layer(backend="kernels") -> MoE:
    torch.manual_seed(0)
    router = TopKRouter(16, 8, 2, logits=CosineLogits(16, 8), renormalize=True, backend=backend)
    return MoE(router, Experts(8, 16, 12, backend=backend), backend=backend)


# Until here.


def run(layer, hidden) -> list[torch.Tensor]:
    output = layer(hidden)
    loss = output.hidden.square().sum() + output.balance_loss + output.z_loss
    return [*output[:3], *torch.autograd.grad(loss, list(layer.parameters()))]


def test_router_of_ones_own():
    hidden = make_rows(3, 11, 16, dtype=torch.float64)
    layer, exact = make_cosine_layer().double(), make_cosine_layer("reference").double()
    for ours, reference in zip(run(layer, hidden), run(exact, hidden), strict=True):
        assert relative_error(ours, reference) < 1e-12
    assert all(p.grad is None or p.grad.abs().sum() > 0 for p in layer.router.parameters())


def test_router_of_ones_own_compiles():
    layer = make_cosine_layer()
    hidden = make_rows(3, 11, 16, dtype=torch.float32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(run(compiled, hidden), run(layer, hidden), strict=True):
        assert relative_error(ours, eager) < 1e-6


def test_logits_run_in_float32_on_bfloat16_rows():
    """Under autocast too: the same logits as those of the widened module."""
    router = TopKRouter(16, 8, 2, logits=CosineLogits(16, 8)).bfloat16()
    hidden = make_rows(5, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        weights, _, logits = router(hidden)
    assert weights.dtype == logits.dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 for p in router.parameters())
    weights.sum().backward()
    assert router.logits.keys.grad.dtype == torch.bfloat16
    assert torch.equal(logits, router.float().logits(hidden.float()))


def test_context_and_options_of_one_call():
    """What a call hands over reaches the map to logits, and stands before the router's own options."""

    class Conditioned(nn.Linear):
        def forward(self, hidden, added, factor):
            return super().forward(hidden) * factor + added

    router = TopKRouter(16, 8, 2, logits=Conditioned(16, 8), renormalize=True, scale=2.0)
    hidden, added = make_rows(5, 16, dtype=torch.float32), make_rows(5, 8, dtype=torch.float64)
    mask = torch.arange(8) < 4
    weights, ids, logits = router(hidden, added, 3, expert_mask=mask, scale=4.0)
    assert torch.equal(logits, F.linear(hidden, router.logits.weight, router.logits.bias) * 3 + added.float())
    expected = moe_ext.topk_gating(logits, 2, expert_mask=mask, renormalize=True, scale=4.0)
    assert torch.equal(weights, expected[0]) and torch.equal(ids, expected[1])


def test_tensor_options_are_buffers():
    router = TopKRouter(16, 8, 2, expert_mask=torch.arange(8) < 3)
    assert "gating.expert_mask" in router.state_dict() and router.to("meta").gating.expert_mask.device.type == "meta"
    assert TopKRouter(16, 8, 2, expert_mask=torch.arange(8) < 3)(make_rows(5, 16, dtype=torch.float32))[1].max() < 3


def test_expert_choice():
    """Every expert takes exactly ceil(T * topk / E) tokens, and capacity drops none of them."""
    router = ExpertChoiceRouter(16, 8, 2, score_function="sigmoid")
    layer = MoE(router, Experts(8, 16, 12), capacity_factor=1.0).double()
    hidden = make_rows(13, 16, dtype=torch.float64)
    output = layer(hidden)
    assert (layer.statistics.tokens_per_expert == 4).all() and layer.capacity(13) == 4
    kept = (output.routing.topk_ids >= 0).sum()
    assert kept == 32 and layer.statistics.dropped_slots == 13 * 8 - 32
    scores = torch.sigmoid(hidden @ router.logits.weight.T)
    best = scores.topk(4, dim=0)
    assert (
        relative_error(output.routing.topk_weights, torch.zeros_like(scores).scatter(0, best.indices, best.values))
        < 1e-12
    )


def test_bad_routers():
    with pytest.raises(TypeError, match="renormalise: expected an option of topk_gating, one of"):
        TopKRouter(16, 8, 2, renormalise=True)
    with pytest.raises(TypeError, match="selection_bias: expected an option"):
        TopKRouter(16, 8, 2)(make_rows(5, 16, dtype=torch.float32), selection_bias=torch.zeros(8))
    with pytest.raises(ValueError, match=r"logits: expected a module that returns .* = \[5, 8\], got \[5, 4\]"):
        TopKRouter(16, 8, 2, logits=nn.Linear(16, 4))(make_rows(5, 16, dtype=torch.float32))
