"""permute and unpermute against their reference twins."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, ROUTINGS, SHAPES, make_rows, make_topk_ids, make_topk_weights, non_contiguous
from compare import assert_deterministic, assert_matches_reference
from torch import Tensor

import moe_ext
from moe_ext import reference


def make_plan(shape: tuple[int, ...], routing: str, device: str, row_alignment: int = 1) -> tuple[Tensor, Tensor]:
    num_tokens, _, _, num_experts, topk = shape
    ids = make_topk_ids(num_tokens, num_experts, topk, routing)
    plan = reference.routing_plan(ids, num_experts, row_alignment=row_alignment)
    return plan.permuted_to_slot.to(device), plan.slot_to_permuted.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("row_alignment", [1, 16])
def test_permute(shape, routing, dtype, row_alignment, device):
    num_tokens, hidden_size, _, _, topk = shape
    maps = make_plan(shape, routing, device, row_alignment)
    hidden = make_rows(num_tokens, hidden_size, dtype=dtype, device=device)
    grad = make_rows(maps[0].numel(), hidden_size, dtype=dtype, device=device, seed=3)
    for rows in (hidden, non_contiguous(hidden)):
        assert_matches_reference(moe_ext.permute, reference.permute, (rows, *maps, topk), [grad])
    assert_deterministic(moe_ext.permute, (hidden, *maps, topk), [grad])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_unpermute(shape, routing, dtype, weighted, device):
    num_tokens, hidden_size, _, _, topk = shape
    maps = make_plan(shape, routing, device, row_alignment=4)
    rows = make_rows(maps[0].numel(), hidden_size, dtype=dtype, device=device)
    weights = make_topk_weights(num_tokens, topk, device) if weighted else None
    grad = make_rows(num_tokens, hidden_size, dtype=dtype, device=device, seed=3)
    for source in (rows, non_contiguous(rows)):
        assert_matches_reference(moe_ext.unpermute, reference.unpermute, (source, *maps, topk, weights), [grad])
    assert_deterministic(moe_ext.unpermute, (rows, *maps, topk, weights), [grad])


@pytest.mark.parametrize("hidden_size", [8, 1024, 1032, 4099])
def test_wide_rows(hidden_size, device):
    """Rows longer than one segment of the CUDA kernels, and odd ones."""
    shape = (19, hidden_size, 0, 6, 2)
    maps = make_plan(shape, "uniform", device)
    hidden = make_rows(19, hidden_size, dtype=torch.bfloat16, device=device)
    weights = make_topk_weights(19, 2, device)

    def round_trip(op):
        return lambda x, w: op.unpermute(op.permute(x, *maps, 2), *maps, 2, w)

    assert_matches_reference(round_trip(moe_ext), round_trip(reference), (hidden, weights), [hidden.flip(0)])


@pytest.mark.cpu
@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradcheck(routing):
    shape = (6, 5, 0, 4, 2)
    maps = make_plan(shape, routing, "cpu", row_alignment=2)
    hidden = make_rows(6, 5, dtype=torch.float64).requires_grad_()
    rows = make_rows(maps[0].numel(), 5, dtype=torch.float64, seed=4).requires_grad_()
    weights = make_topk_weights(6, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: moe_ext.permute(x, *maps, 2), (hidden,))
    assert torch.autograd.gradcheck(lambda x, w: moe_ext.unpermute(x, *maps, 2, w), (rows, weights))
    assert torch.autograd.gradcheck(lambda x: moe_ext.unpermute(x, *maps, 2), (rows,))


def test_hostile_maps(device):
    """Entries outside their range count as -1: nothing is read or written out of bounds."""
    hidden = make_rows(2, 8, dtype=torch.float32, device=device)
    slots = torch.tensor([0, 99, -7, 3], dtype=torch.int32, device=device)
    rows = torch.tensor([0, -5, 400, 3], dtype=torch.int32, device=device)
    permuted = moe_ext.permute(hidden, slots, rows, 2)
    assert torch.equal(permuted, torch.stack([hidden[0], hidden[0] * 0, hidden[0] * 0, hidden[1]]))
    assert torch.equal(moe_ext.unpermute(permuted, slots, rows, 2), hidden)
