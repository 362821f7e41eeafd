"""ExpertParallelMoE over processes against MoELayer in one; FSDP2 and checkpoints on other numbers of ranks."""

from __future__ import annotations

import pytest
import torch

import expert_parallel_layers as layers
from cases import make_rows
from compare import relative_error
from expert_parallel_layers import EXPERTS, HIDDEN, INTERMEDIATE, TOPK, dense_layer, rows_of
from moe_ext.distributed import DispatchOptions, ExpertMap
from moe_ext.nn import ExpertParallelMoE, MoELayer
from virtual_ranks import Board, VirtualExchange

pytestmark = pytest.mark.cpu

SPREAD = {
    "default": (4, {}, {}),
    "a router of one's own": (3, {"router": {"logits": layers.CosineLogits(), "renormalize": True}}, {}),
    "a window of ranks, a gain": (
        3,
        {"router": {"first_rank": 1, "expert_gain": torch.linspace(0.5, 2, EXPERTS, dtype=torch.float64)}},
        {},
    ),
    "slots, chunks": (3, {}, {"dispatch": DispatchOptions(form="slot"), "degree": 3}),
    "static": (4, {}, {"dispatch": DispatchOptions(rows_per_rank=9)}),
    "another degree backward": (3, {}, {"degree": 2, "backward_degree": 3}),
    "nodes, chunks": (4, {}, {"dispatch": DispatchOptions(form="node"), "degree": 2, "ranks_per_node": 2}),
    "nodes, tensor parallel": (
        4,
        {},
        {"dispatch": DispatchOptions(form="node"), "tensor_parallel": 2, "ranks_per_node": 2},
    ),
    "nodes, copies": (
        4,
        {},
        {
            "dispatch": DispatchOptions(form="node"),
            "ranks_per_node": 2,
            "expert_map": ExpertMap([0, 1, 2, 3, 0, 4, 5, 6, 7, 0, 5], (4, 2, 3, 2)),
        },
    ),
    "biases, shared expert": (2, {"experts": {"bias": True}, "shared_intermediate_size": 6}, {}),
    "copies": (3, {}, {"expert_map": ExpertMap([0, 1, 2, 3, 0, 4, 5, 6, 7, 0, 5], (4, 2, 5))}),
    "tensor parallel": (4, {}, {"tensor_parallel": 2}),
    "tensor parallel, interleaved": (
        4,
        {"experts": {"gate_up_layout": "interleaved", "weight_layout": "ekn"}},
        {"tensor_parallel": 2, "expert_map": ExpertMap(range(EXPERTS), (3, 5))},
    ),
    "tensor parallel, not gated": (
        2,
        {"experts": {"activation": "relu_squared"}},
        {"tensor_parallel": 2, "dispatch": DispatchOptions(form="slot")},
    ),
}


@pytest.mark.parametrize("num_ranks, configuration, arguments", SPREAD.values(), ids=SPREAD)
def test_equals_the_layer_in_one_process(num_ranks, configuration, arguments, pool):
    shares = pool.run(num_ranks, layers.run_layer, configuration, arguments)
    dense = dense_layer(**configuration)
    hidden = torch.cat([rows_of(rank, num_ranks, 2) for rank in range(num_ranks)]).requires_grad_()
    output = dense(hidden).hidden
    (output * torch.cat([rows_of(rank, num_ranks, 3) for rank in range(num_ranks)])).sum().backward()
    assert relative_error(torch.cat([share["output"] for share in shares]), output) <= 1e-12
    assert relative_error(torch.cat([share["hidden"] for share in shares]), hidden.grad) <= 1e-12
    assert relative_error(sum(share["router"] for share in shares), layers.router_grads(dense)) <= 1e-12
    assert all(share["dropped"] == 0 for share in shares)
    tensor_parallel = arguments.get("tensor_parallel", 1)
    for rank, share in enumerate(shares):
        # load_experts cuts a gradient as it cuts a weight.
        whole = ExpertParallelMoE(
            HIDDEN, INTERMEDIATE, EXPERTS, TOPK, VirtualExchange(Board(num_ranks), rank),
            expert_map=arguments.get("expert_map"), tensor_parallel=tensor_parallel, **configuration,
        ).double()  # fmt: skip
        whole.load_experts({name: p.grad for name, p in dense.experts.named_parameters()})
        for name, expected in whole.experts.named_parameters():
            assert relative_error(share["experts"][name], expected) <= 1e-12, (rank, name)


@pytest.mark.parametrize("arguments", [{}, {"dispatch": DispatchOptions(form="slot"), "degree": 2}], ids=str)
def test_autocast(arguments, pool):
    """Rows travel in the dtype in which the experts work; parameters and gradients stay in float32."""
    shares = pool.run(3, layers.run_under_autocast, arguments)
    dense = MoELayer(HIDDEN, INTERMEDIATE, EXPERTS, TOPK)
    dense.load_state_dict(dense_layer().state_dict())
    hidden = torch.cat([rows_of(rank, 3, 2) for rank in range(3)]).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = dense(hidden).hidden
    (output.float() * torch.cat([rows_of(rank, 3, 3) for rank in range(3)]).float()).sum().backward()
    ours = torch.cat([share["output"] for share in shares])
    assert ours.dtype == output.dtype and relative_error(ours, output) < 1e-2
    assert relative_error(torch.cat([share["hidden"] for share in shares]), hidden.grad) < 2e-2
    for share in shares:
        assert set(share["seen"]) <= {torch.bfloat16}
        for name, parameter in dense.experts.named_parameters():
            assert share["experts"][name].dtype == torch.float32
            assert relative_error(share["experts"][name], parameter.grad[share["local"]]) < 2e-2, name


def test_bottleneck(pool):
    """BigMac: only rows of the narrow width travel."""
    shares = pool.run(2, layers.run_bottleneck)
    states = [share["state"] for share in shares]
    hidden = torch.cat([rows_of(rank, 2, 2) for rank in range(2)]).requires_grad_()
    narrow = MoELayer(4, INTERMEDIATE, EXPERTS, TOPK, backend="reference").double()
    for name, parameter in narrow.experts.named_parameters():
        parameter.data = torch.cat([state[f"experts.{name}"] for state in states])
    wide = dense_layer()
    wide.router.logits.weight.data = states[0]["router.logits.weight"]
    weights, ids, _ = wide.router(hidden)
    plan = narrow.ops.routing_plan(ids, EXPERTS)
    output = narrow.experts(hidden @ states[0]["descend.weight"].T, plan, weights) @ states[0]["ascend.weight"].T
    (output * torch.cat([rows_of(rank, 2, 3) for rank in range(2)])).sum().backward()
    assert relative_error(torch.cat([share["output"] for share in shares]), output) <= 1e-12
    assert relative_error(torch.cat([share["hidden"] for share in shares]), hidden.grad) <= 1e-12


def test_fsdp2_checkpoint_of_four_ranks_on_two(pool, tmp_path):
    saved = pool.run(4, layers.train_and_save, str(tmp_path))
    loaded = pool.run(2, layers.load_and_run, str(tmp_path))
    for output in (*saved[1:], *loaded):
        assert relative_error(output, saved[0]) <= 1e-12


def test_experts_saved_one_by_one_load_into_any_map(pool, tmp_path):
    pool.run(4, layers.save_experts, str(tmp_path))
    dense = dict(dense_layer().experts.named_parameters())
    for share in pool.run(2, layers.load_experts, str(tmp_path)):
        for name, whole in dense.items():
            assert torch.equal(share[name], whole[share["local"]])


def make(num_ranks: int = 4, **arguments):
    return ExpertParallelMoE(HIDDEN, INTERMEDIATE, EXPERTS, TOPK, VirtualExchange(Board(num_ranks), 0), **arguments)


BAD_LAYERS = [
    (
        {"dispatch": DispatchOptions(form="node")},
        "exchange: expected a HierarchicalExchange with form='node', got Virt",
    ),
    ({"tensor_parallel": 3}, "tensor_parallel: expected a divisor of 4 ranks, got 3"),
    ({"num_ranks": 8, "tensor_parallel": 8}, "intermediate_size: expected a multiple of tensor_parallel, 8, got 12"),
    ({"tensor_parallel": 2, "experts": {"bias": True}}, "experts: expected bias=False"),
    ({"expert_map": ExpertMap(range(7), (4, 1, 1, 1))}, "expert_map: expected 8 experts on 4 ranks, got 7 on 4"),
]


@pytest.mark.parametrize("arguments, words", BAD_LAYERS, ids=str)
def test_bad_layers(arguments, words):
    with pytest.raises(ValueError, match=words):
        make(**arguments)


def test_bad_maps_and_options():
    with pytest.raises(ValueError, match=r"physical_to_logical: expected every logical expert at least once, \[1\]"):
        ExpertMap([0, 2], (1, 1))
    with pytest.raises(ValueError, match="experts_per_rank: expected sizes >= 0 that sum to 2"):
        ExpertMap([0, 1], (1, 2))
    with pytest.raises(ValueError, match="form: expected dedup or slot or node, got 'rows'"):
        DispatchOptions(form="rows")
    with pytest.raises(ValueError, match="rows_per_rank: expected None or an integer >= 1, got 0"):
        DispatchOptions(rows_per_rank=0)
    for options in ({"rows_per_node": 4}, {"form": "node", "rows_per_rank": 4}, {"form": "node", "rows_per_node": 4}):
        with pytest.raises(
            ValueError, match="rows_per_node: expected with form='node' and rows_per_rank, and only then"
        ):
            DispatchOptions(**options)
    hidden = make_rows(2, HIDDEN, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^degree: expected an integer >= 1, got 0"):
        make(num_ranks=1, degree=0).double()(hidden)
    with pytest.raises(ValueError, match="backward_degree: expected None or an integer >= 1, got 0"):
        make(num_ranks=1, backward_degree=0).double()(hidden)
    dropping = DispatchOptions(rows_per_rank=1, overflow="drop")
    with pytest.raises(ValueError, match="backward_degree: expected None with overflow='drop'"):
        make(num_ranks=1, backward_degree=2, dispatch=dropping).double()(hidden)
