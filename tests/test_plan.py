"""routing_plan against its reference twin, and against what a plan promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moe_ext
from cases import ROUTINGS, SHAPES, make_rows, make_topk_ids, make_topk_weights
from moe_ext import RoutingPlan, reference

# Enough slots for several chunks and blocks; experts not a power of two; more experts than slots.
LARGE = [(6000, 7, 8), (4096, 384, 8), (3, 1024, 4), (70000, 3, 1), (513, 64, 6)]
LIMITS = [
    {},
    {"row_alignment": 128},
    {"capacity": 3},
    {"capacity": 0},
    {"capacity": 5, "row_alignment": 4},
    {"capacity": 10**9},
]


def assert_same_plan(actual: RoutingPlan, expected: RoutingPlan) -> None:
    for name, got, wanted in zip(RoutingPlan._fields, actual, expected, strict=True):
        assert got.dtype == torch.int32, name
        assert torch.equal(got.cpu(), wanted.cpu()), name


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("by_score", [False, True])
def test_matches_reference(shape, routing, limits, by_score, device):
    num_tokens, _, _, num_experts, topk = shape
    if by_score and "capacity" not in limits:
        pytest.skip("drop_scores go with capacity")
    ids = make_topk_ids(num_tokens, num_experts, topk, routing, device)
    # Coarse scores, so that ties occur.
    scores = (make_topk_weights(num_tokens, topk, device) * 4).round() / 4 if by_score else None
    plan = moe_ext.routing_plan(ids, num_experts, drop_scores=scores, **limits)
    assert_same_plan(plan, reference.routing_plan(ids, num_experts, drop_scores=scores, **limits))


@pytest.mark.parametrize("num_tokens, num_experts, topk", LARGE)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("limits", [{}, {"row_alignment": 16}, {"capacity": 40}], ids=str)
def test_large(num_tokens, num_experts, topk, routing, limits, device):
    ids = make_topk_ids(num_tokens, num_experts, topk, routing, device, dtype=torch.int64)
    assert_same_plan(
        moe_ext.routing_plan(ids, num_experts, **limits), reference.routing_plan(ids, num_experts, **limits)
    )
    if "capacity" in limits:
        scores = make_rows(num_tokens, topk, dtype=torch.float32, device=device)
        assert_same_plan(
            moe_ext.routing_plan(ids, num_experts, drop_scores=scores, **limits),
            reference.routing_plan(ids, num_experts, drop_scores=scores, **limits),
        )


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("row_alignment", [1, 8])
def test_promises(routing, row_alignment, device):
    """Without the twin: a bijection between kept slots and real rows, sorted by expert, stable, aligned."""
    num_tokens, num_experts, topk = 700, 11, 3
    ids = make_topk_ids(num_tokens, num_experts, topk, routing)
    plan = moe_ext.routing_plan(ids.to(device), num_experts, row_alignment=row_alignment)
    offsets, counts, slots, rows = (field.cpu().long() for field in plan)
    flat = ids.flatten().long()
    here = (flat >= 0) & (flat < num_experts)
    assert torch.equal(counts, torch.bincount(flat[here], minlength=num_experts))
    assert (offsets % row_alignment == 0).all() and offsets[0] == 0
    assert torch.equal((rows >= 0), here)
    assert torch.equal(slots[rows[here]], torch.nonzero(here).flatten())
    assert (slots >= 0).sum() == here.sum()
    for expert in range(num_experts):
        mine = slots[offsets[expert] : offsets[expert] + counts[expert]]
        assert (flat[mine] == expert).all() and (mine.diff() > 0).all()


def test_nan_scores_are_dropped_first(device):
    ids = torch.zeros(4, 1, dtype=torch.int32, device=device)
    scores = torch.tensor([[float("nan")], [-1.0], [float("-inf")], [0.0]], device=device)
    plan = moe_ext.routing_plan(ids, 1, capacity=3, drop_scores=scores)
    assert plan.slot_to_permuted.tolist() == [-1, 0, 1, 2]


def test_strided_ids(device):
    ids = make_topk_ids(50, 6, 4, "uniform", device)
    assert_same_plan(moe_ext.routing_plan(ids[::2, 1:3], 6), reference.routing_plan(ids[::2, 1:3], 6))


def test_opcheck(device):
    ids = make_topk_ids(9, 4, 2, "dropped", device)
    scores = make_topk_weights(9, 2, device)
    torch.library.opcheck(torch.ops.moe_ext.routing_plan.default, (ids, 4, None, None, 1))
    torch.library.opcheck(torch.ops.moe_ext.routing_plan.default, (ids, 4, 2, scores, 8))


def ids_on(device: str) -> Tensor:
    return make_topk_ids(5, 4, 2, "uniform", device)


BAD_CALLS = [
    ("float ids", lambda d: moe_ext.routing_plan(ids_on(d).float(), 4), r"topk_ids: expected int32 or int64 \[num_tokens, topk\], got float32 \[5, 2\]"),
    ("flat ids", lambda d: moe_ext.routing_plan(ids_on(d).flatten(), 4), r"topk_ids: expected .* got int32 \[10\]"),
    ("no columns", lambda d: moe_ext.routing_plan(ids_on(d)[:, :0], 4), r"topk_ids: expected at least one column"),
    ("no experts", lambda d: moe_ext.routing_plan(ids_on(d), 0), r"num_experts: expected an integer >= 1, got 0"),
    ("negative experts", lambda d: moe_ext.routing_plan(ids_on(d), -3), r"num_experts: expected .* got -3"),
    ("negative capacity", lambda d: moe_ext.routing_plan(ids_on(d), 4, capacity=-1), r"capacity: expected an integer >= 0, got -1"),
    ("alignment 0", lambda d: moe_ext.routing_plan(ids_on(d), 4, row_alignment=0), r"row_alignment: expected an integer >= 1"),
    ("scores without capacity", lambda d: moe_ext.routing_plan(ids_on(d), 4, drop_scores=torch.ones(5, 2, device=d)), r"drop_scores: expected only together with capacity"),
    ("scores of another shape", lambda d: moe_ext.routing_plan(ids_on(d), 4, capacity=1, drop_scores=torch.ones(5, 3, device=d)), r"drop_scores: expected size 2 \(topk, as in topk_ids\)"),
    ("too many rows", lambda d: moe_ext.routing_plan(ids_on(d), 4, row_alignment=2**31 - 1), r"rows of the plan: expected at most 2\^31 - 1"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", [pytest.param(*rest, id=name) for name, *rest in BAD_CALLS])
def test_bad_calls(call, message, device):
    with pytest.raises(RuntimeError, match=message):
        call(device)
