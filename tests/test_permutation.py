"""permute and unpermute against their reference twins."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

import moe_ext
from cases import DTYPES, ROUTINGS, SHAPES, make_rows, make_topk_ids, make_topk_weights, non_contiguous
from compare import assert_deterministic, assert_matches_reference
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


@pytest.mark.parametrize("hidden_size", [8, 13])
def test_a_dropped_slot_weighs_nothing_whatever_the_gradient(hidden_size, device):
    """Zero, not the NaN of a product of zero and infinity, as a loss scaler brings it."""
    shape = (33, hidden_size, 0, 7, 2)
    maps = make_plan(shape, "dropped", device)
    rows = make_rows(maps[0].numel(), hidden_size, dtype=torch.float32, device=device)
    weights = make_topk_weights(33, 2, device).requires_grad_()
    output = moe_ext.unpermute(rows, *maps, 2, weights)
    (grad,) = torch.autograd.grad(output, weights, torch.full_like(output, torch.inf))
    dropped = maps[1].view(33, 2) < 0
    assert dropped.any() and not grad[dropped].any() and not grad[~dropped].isfinite().any()


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


def test_opcheck(device):
    maps = make_plan((6, 8, 0, 4, 2), "dropped", device, row_alignment=2)
    hidden = make_rows(6, 8, dtype=torch.float32, device=device)
    rows = make_rows(maps[0].numel(), 8, dtype=torch.float32, device=device)
    weights = make_topk_weights(6, 2, device)
    ops = torch.ops.moe_ext
    for x in (hidden, hidden.clone().requires_grad_()):
        torch.library.opcheck(ops.permute.default, (x, *maps, 2))
    for x in (rows, rows.clone().requires_grad_()):
        torch.library.opcheck(ops.unpermute.default, (x, *maps, weights, 2))
        torch.library.opcheck(ops.unpermute.default, (x, *maps, None, 2))
    torch.library.opcheck(ops.unpermute_backward.default, (hidden, rows, *maps, weights))


def maps_on(device: str) -> tuple[Tensor, Tensor]:
    return make_plan((4, 8, 0, 3, 2), "uniform", device)


def hidden_on(device: str, num_tokens: int = 4) -> Tensor:
    return make_rows(num_tokens, 8, dtype=torch.float32, device=device)


BAD_CALLS = [
    ("permute integers", lambda d: moe_ext.permute(hidden_on(d).int(), *maps_on(d), 2), r"input: expected float32, bfloat16, float16 or float64 \[num_tokens, hidden_size\], got int32 \[4, 8\]"),
    ("permute 3-d", lambda d: moe_ext.permute(hidden_on(d)[None], *maps_on(d), 2), r"input: expected .* got float32 \[1, 4, 8\]"),
    ("permute too few tokens", lambda d: moe_ext.permute(hidden_on(d, 3), *maps_on(d), 2), r"input: expected size 4 \(num_tokens, .*got float32 \[3, 8\]"),
    ("permute topk 0", lambda d: moe_ext.permute(hidden_on(d), *maps_on(d), 0), r"topk: expected an integer >= 1, got 0"),
    ("permute topk 3", lambda d: moe_ext.permute(hidden_on(d), *maps_on(d), 3), r"slot_to_permuted: expected a length that is a multiple of topk = 3, got 8"),
    ("permute int64 maps", lambda d: moe_ext.permute(hidden_on(d), *(m.long() for m in maps_on(d)), 2), r"permuted_to_slot: expected int32 \[num_rows\], got int64 \[8\]"),
    ("unpermute too few rows", lambda d: moe_ext.unpermute(hidden_on(d, 7), *maps_on(d), 2), r"input: expected size 8 \(num_rows, "),
    ("unpermute bf16 weights", lambda d: moe_ext.unpermute(hidden_on(d, 8), *maps_on(d), 2, torch.ones(4, 2, device=d).bfloat16()), r"topk_weights: expected float32 \[num_tokens, topk\], got bfloat16 \[4, 2\]"),
    ("unpermute weights of another topk", lambda d: moe_ext.unpermute(hidden_on(d, 8), *maps_on(d), 2, torch.ones(4, 3, device=d)), r"topk_weights: expected size 2 \(topk\)"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", [pytest.param(*rest, id=name) for name, *rest in BAD_CALLS])
def test_bad_calls(call, message, device):
    with pytest.raises(RuntimeError, match=message):
        call(device)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_outputs(dtype):
    """Past the caches rows are streamed, into memory kept from earlier calls, whose old contents must not show."""
    num_tokens, hidden_size, num_experts, topk = 3000, 3104, 7, 2  # 18 MB at two bytes an element
    ids = make_topk_ids(num_tokens, num_experts, topk, "dropped")
    plan = moe_ext.routing_plan(ids, num_experts, row_alignment=8)
    maps = (plan.permuted_to_slot, plan.slot_to_permuted)
    hidden = make_rows(num_tokens, hidden_size, dtype=dtype)
    weights = make_topk_weights(num_tokens, topk, "cpu").requires_grad_()
    rows = make_rows(maps[0].numel(), hidden_size, dtype=dtype, seed=1).requires_grad_()
    grad = make_rows(num_tokens, hidden_size, dtype=dtype, seed=2)

    def outputs(op) -> tuple[Tensor, ...]:
        combined = op.unpermute(rows, *maps, topk, weights)
        return op.permute(hidden, *maps, topk), combined, *torch.autograd.grad(combined, (rows, weights), grad)

    for expected, found in zip(outputs(reference), outputs(moe_ext), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-3)
    first = outputs(moe_ext)
    kept = [x.clone() for x in first]
    second = outputs(moe_ext)
    assert not {x.data_ptr() for x in first} & {x.data_ptr() for x in second}
    for x in (*first, *second):
        x.detach().fill_(float("nan"))
    del first, second
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        again = outputs(moe_ext)
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))
        for x in again:
            x.detach().fill_(float("nan"))


@pytest.mark.cpu
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere large outputs are torch's own")
def test_large_outputs_reuse_memory():
    hidden, slots = torch.randn(1024, 4096), torch.arange(1024, dtype=torch.int32)
    before = moe_ext.permute(hidden, slots, slots, 1)
    pointer = before.data_ptr()
    assert pointer % 2**21 == 0
    del before
    assert moe_ext.permute(hidden, slots, slots, 1).data_ptr() == pointer
