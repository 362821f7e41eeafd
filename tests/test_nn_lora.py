"""Low-rank experts against their formulas, written out expert by expert in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moe_ext
from cases import ROUTINGS, make_rows, make_topk_ids, make_topk_weights
from compare import relative_error
from moe_ext.nn import LoRAExperts, LoRAMLPExperts

T, H, WIDTH, E, RANK, K = 23, 12, 20, 5, 3, 2


def make_experts(rank: int = RANK, **settings) -> LoRAExperts:
    torch.manual_seed(0)
    experts = LoRAExperts(E, H, WIDTH, rank, alpha=6.0, **settings).double()
    nn.init.normal_(experts.lora_b)
    return experts


def make_mlp(activation: str = "swiglu", **settings) -> LoRAMLPExperts:
    torch.manual_seed(0)
    columns = WIDTH * (1 if activation == "relu" else 2)
    gate_up, down = (make_rows(*sizes, dtype=torch.float64, seed=7) for sizes in ((columns, H), (H, WIDTH)))
    experts = LoRAMLPExperts(gate_up, down, E, RANK, alpha=6.0, activation=activation, **settings)
    for name, parameter in experts.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter)
    return experts


def make_inputs(routing: str, num_tokens: int = T) -> tuple[Tensor, Tensor, Tensor]:
    hidden = make_rows(num_tokens, H, dtype=torch.float64).requires_grad_()
    weights = make_topk_weights(num_tokens, K, dtype=torch.float64).requires_grad_()
    return hidden, weights, make_topk_ids(num_tokens, E, K, routing)


def mixture(one_expert, hidden: Tensor, weights: Tensor, ids: Tensor, outputs: int) -> Tensor:
    """sum_j w[t, j] * E_ids[t, j](x[t]), every expert on every token."""
    of_expert = torch.stack([one_expert(e, hidden) for e in range(E)])
    held = (ids >= 0) & (ids < E)
    rows = of_expert[torch.where(held, ids, 0).long(), torch.arange(hidden.shape[0])[:, None]]
    return (torch.where(held, weights, 0.0)[..., None] * rows).sum(1)


def one_adapter(experts: LoRAExperts):
    return lambda e, x: experts.scaling * (x @ experts.lora_a[e].T) @ experts.lora_b[e]


def one_mlp(experts: LoRAMLPExperts):
    def run(e: int, x: Tensor) -> Tensor:
        base = F.linear(x, experts.gate_up_weight)
        if experts.gate is None:
            activated = torch.relu(base + one_adapter(experts.up)(e, x))
        else:
            gate, up = base.chunk(2, dim=-1)
            activated = F.silu(gate + one_adapter(experts.gate)(e, x)) * (up + one_adapter(experts.up)(e, x))
        return F.linear(activated, experts.down_weight) + one_adapter(experts.down)(e, activated)

    return run


def assert_same(output: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    grad = make_rows(*output.shape, dtype=output.dtype, seed=5)
    found = [output, *torch.autograd.grad(output, leaves, grad)]
    exact = [expected, *torch.autograd.grad(expected, leaves, grad)]
    for ours, theirs in zip(found, exact, strict=True):
        assert relative_error(ours, theirs) < 1e-12


def trained(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("rank", [RANK, 30])  # token by token, and as grouped products
@pytest.mark.parametrize("routing", ROUTINGS)
def test_adapters(routing, rank, backend):
    experts = make_experts(rank, backend=backend)
    hidden, weights, ids = make_inputs(routing)
    output = experts(hidden, moe_ext.routing_plan(ids, E), weights)
    expected = mixture(one_adapter(experts), hidden, weights, ids, WIDTH)
    assert_same(output, expected, [hidden, weights, *experts.parameters()])


@pytest.mark.parametrize("rank", [RANK, 30])
def test_adapters_without_weights_and_over_capacity(rank):
    """What a plan leaves out adds nothing; its slots' weights get gradient zero."""
    experts = make_experts(rank)
    hidden, weights, ids = make_inputs("zipf")
    plan = moe_ext.routing_plan(ids, E, capacity=4, row_alignment=8)
    kept = torch.where(plan.slot_to_permuted.view(ids.shape) >= 0, ids, -1)
    assert 0 < (kept < 0).sum() < kept.numel() and torch.equal(plan.topk_ids(T, weights), kept.int())
    for given in (weights, None):
        gates = torch.ones_like(weights) if given is None else weights
        expected = mixture(one_adapter(experts), hidden, gates, kept, WIDTH)
        leaves = [hidden, *experts.parameters(), *([] if given is None else [weights])]
        assert_same(experts(hidden, plan, given), expected, leaves)


def test_few_ranks_run_token_by_token():
    """Sorted rows are for many ranks only: by type, and by the ranks of all experts together."""
    hidden, weights, ids = make_inputs("uniform")
    plan = moe_ext.routing_plan(ids, E)
    for rank, dtype, grouped in ((8, torch.bfloat16, 0), (9, torch.bfloat16, 2), (16, torch.float32, 0), (17, torch.float32, 2), (26, torch.float64, 2)):  # fmt: skip
        experts = make_experts(rank).to(dtype)
        with torch.profiler.profile() as profile:
            experts(hidden.to(dtype), plan, weights.to(torch.promote_types(dtype, torch.float32)))
        names = [event.name for event in profile.events()]
        assert names.count("moe_ext::grouped_gemm") == grouped, (rank, dtype)
        assert names.count("moe_ext::low_rank_experts") == (0 if grouped else 1)


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_mlp(routing, activation):
    experts = make_mlp(activation)
    hidden, weights, ids = make_inputs(routing)
    output = experts(hidden, moe_ext.routing_plan(ids, E), weights)
    expected = mixture(one_mlp(experts), hidden, weights, ids, H)
    assert_same(output, expected, [hidden, weights, *trained(experts)])


def test_base_runs_once_per_token_and_stays_frozen():
    """Rows that the products with the base's weights multiply: T, not T * K, in either direction."""
    experts = make_mlp()
    hidden, weights, ids = make_inputs("uniform")
    with torch.profiler.profile(record_shapes=True) as profile:
        experts(hidden, moe_ext.routing_plan(ids, E), weights).sum().backward()
    products = [e.input_shapes for e in profile.events() if e.name == "aten::mm"]
    assert len(products) == 4 and all(shapes[0][0] == T for shapes in products)
    assert experts.gate_up_weight.grad is None and experts.down_weight.grad is None
    assert sum(p.numel() for p in trained(experts)) == 3 * E * RANK * (H + WIDTH)


def test_soft():
    """The wide products equal every expert on every token; so do they on a dense plan."""
    experts = make_experts()
    hidden, _, _ = make_inputs("uniform")
    gates = make_rows(T, E, dtype=torch.float64, seed=6).requires_grad_()
    expected = sum(gates[:, e, None] * one_adapter(experts)(e, hidden) for e in range(E))
    assert_same(experts.soft(hidden, gates), expected, [hidden, gates, *experts.parameters()])
    ids = torch.arange(E, dtype=torch.int32).expand(T, E).contiguous()
    assert relative_error(experts(hidden, moe_ext.routing_plan(ids, E), gates), expected) < 1e-12


def test_start_at_the_base():
    """Untrained adapters change nothing: the MLP experts give the base, whatever the routing, if weights sum to 1."""
    hidden, weights, ids = make_inputs("zipf")
    plan = moe_ext.routing_plan(ids, E)
    assert (LoRAExperts(E, H, WIDTH, RANK).double()(hidden, plan, weights) == 0).all()
    made = make_mlp()
    fresh = LoRAMLPExperts(made.gate_up_weight, made.down_weight, E, RANK)
    gate, up = F.linear(hidden, made.gate_up_weight).chunk(2, dim=-1)
    assert relative_error(fresh(hidden, plan, weights), F.linear(F.silu(gate) * up, made.down_weight)) < 1e-12


def test_no_tokens_and_low_precision():
    hidden, weights, ids = make_inputs("uniform", 0)
    assert make_mlp()(hidden, moe_ext.routing_plan(ids, E), weights).shape == (0, H)
    hidden, weights, ids = make_inputs("uniform")
    plan = moe_ext.routing_plan(ids, E)
    exact = make_mlp()(hidden, plan, weights)
    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        narrow = make_mlp().to(dtype)(hidden.to(dtype), plan, weights.float())
        assert narrow.dtype == dtype and relative_error(narrow, exact) < allowed


def test_wrong_weights_are_named():
    with pytest.raises(ValueError, match=r"gate_up_weight: expected \[40, 12\] for swiglu .* got \[20, 12\]"):
        LoRAMLPExperts(torch.zeros(20, 12), torch.zeros(12, 20), E, RANK)
