"""low_rank_experts against its reference twin."""

from __future__ import annotations

import pytest
import torch

import moe_ext
from cases import DTYPES, ROUTINGS, make_rows, make_topk_ids, make_topk_weights, non_contiguous
from compare import assert_deterministic, assert_matches_reference
from moe_ext import reference

# (num_tokens, in_features, out_features, num_experts, rank, topk)
SHAPES = [
    (0, 16, 8, 4, 1, 2),
    (1, 8, 16, 1, 1, 1),
    (33, 17, 13, 7, 1, 5),
    (70, 64, 40, 48, 1, 8),
    (19, 24, 32, 5, 6, 2),
    (9, 1040, 552, 3, 4, 2),
    (150, 530, 280, 3, 5, 2),  # tokens enough for copies of the weights on the CPU
]


def make_args(shape, routing, dtype, device, *, ids_dtype=torch.int32):
    num_tokens, in_features, out_features, num_experts, rank, topk = shape
    hidden = make_rows(num_tokens, in_features, dtype=dtype, device=device)
    down = make_rows(num_experts, rank, in_features, dtype=dtype, device=device, seed=3, scale=in_features**-0.5)
    up = make_rows(num_experts, rank, out_features, dtype=dtype, device=device, seed=4)
    ids = make_topk_ids(num_tokens, num_experts, topk, routing, device, dtype=ids_dtype)
    weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weights = make_topk_weights(num_tokens, topk, device, dtype=weights_dtype)
    grad = make_rows(num_tokens, out_features, dtype=dtype, device=device, seed=5)
    return (hidden, down, up, ids, weights), [grad]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_low_rank_experts(shape, routing, dtype, device):
    args, grad = make_args(shape, routing, dtype, device)
    assert_matches_reference(moe_ext.low_rank_experts, reference.low_rank_experts, args, grad)
    assert_deterministic(moe_ext.low_rank_experts, args, grad)


def test_strides_and_int64_ids(device):
    args, grad = make_args((21, 24, 40, 6, 2, 3), "dropped", torch.float32, device, ids_dtype=torch.int64)
    args = tuple(non_contiguous(x) for x in args)
    assert_matches_reference(moe_ext.low_rank_experts, reference.low_rank_experts, args, [non_contiguous(grad[0])])


@pytest.mark.cpu
@pytest.mark.parametrize("routing", ["uniform", "dropped"])
def test_gradcheck(routing):
    (hidden, down, up, ids, weights), _ = make_args((5, 6, 4, 3, 2, 2), routing, torch.float64, "cpu")
    args = [x.requires_grad_() for x in (hidden, down, up, weights)]
    assert torch.autograd.gradcheck(lambda x, a, b, w: moe_ext.low_rank_experts(x, a, b, ids, w), args)


@pytest.mark.cpu
def test_threads_do_not_change_results():
    args, grad = make_args((300, 40, 1100, 9, 3, 2), "zipf", torch.float32, "cpu")
    leaves = [x.requires_grad_() for x in (args[0], args[1], args[2], args[4])]
    threads, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        output = moe_ext.low_rank_experts(*args)
        results.append([output, *torch.autograd.grad(output, leaves, grad)])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mask", range(1, 16))
def test_only_what_needs_a_gradient_gets_one(mask, device):
    """What the mask leaves out comes back without rows, and changes no bit of the rest."""
    args, grad = make_args((41, 24, 40, 4, 3, 2), "dropped", torch.float32, device)
    places = [place for bit, place in enumerate((0, 1, 2, 4)) if mask >> bit & 1]
    leaves = [args[place].requires_grad_() for place in places]
    found = torch.autograd.grad(moe_ext.low_rank_experts(*args), leaves, grad)
    expected = torch.autograd.grad(reference.low_rank_experts(*args), leaves, grad)
    torch.testing.assert_close(found, expected)

    args = tuple(x.detach() for x in args)
    _, projection = torch.ops.moe_ext.low_rank_experts(*args)
    plan = moe_ext.routing_plan(args[3], 4)
    rest = (grad[0], *args, projection, plan.expert_offsets, plan.permuted_to_slot)
    everything = torch.ops.moe_ext.low_rank_experts_backward(*rest, [True] * 4)
    some = torch.ops.moe_ext.low_rank_experts_backward(*rest, [bool(mask >> bit & 1) for bit in range(4)])
    for bit, (part, whole) in enumerate(zip(some, everything, strict=True)):
        assert torch.equal(part, whole) if mask >> bit & 1 else part.shape == (0, *whole.shape[1:])


def test_frozen_weights_cost_no_product(device):
    """Of a gradient of router weights alone: no gradient of the size of the weights or of the input is made."""
    args, grad = make_args((64, 512, 512, 8, 4, 2), "uniform", torch.float32, device)
    output = moe_ext.low_rank_experts(*args[:4], args[4].requires_grad_())
    with torch.profiler.profile(record_shapes=True, profile_memory=True) as profile:
        torch.autograd.grad(output, args[4], grad)
    (op,) = [e for e in profile.events() if e.name == "moe_ext::low_rank_experts_backward"]
    memory = op.cpu_memory_usage if device == "cpu" else op.device_memory_usage
    assert memory < args[0].numel() * 4


def test_hostile_plan(device):
    """Offsets and slots outside their range touch nothing out of bounds."""
    (hidden, down, up, ids, weights), grad = make_args((4, 8, 8, 3, 2, 2), "uniform", torch.float32, device)
    _, projection = torch.ops.moe_ext.low_rank_experts(hidden, down, up, ids, weights)
    offsets = torch.tensor([-5, 3, 2, 999], dtype=torch.int32, device=device)
    slots = torch.tensor([0, 77, -9, 7], dtype=torch.int32, device=device)
    args = (grad[0], hidden, down, up, ids, weights, projection, offsets, slots)
    _, grad_down, _, _ = torch.ops.moe_ext.low_rank_experts_backward(*args, [True] * 4)
    assert grad_down.isfinite().all() and (grad_down[1] == 0).all()


def test_opcheck(device):
    ops = torch.ops.moe_ext
    args, grad = make_args((6, 8, 12, 4, 2, 2), "dropped", torch.float32, device)
    for x in (args[0], args[0].clone().requires_grad_()):
        torch.library.opcheck(ops.low_rank_experts.default, (x, *args[1:]))
    _, projection = ops.low_rank_experts(*args)
    plan = moe_ext.routing_plan(args[3], 4)
    backward_args = (grad[0], *args, projection, plan.expert_offsets, plan.permuted_to_slot)
    for mask in ([True] * 4, [False, True, False, True]):
        torch.library.opcheck(ops.low_rank_experts_backward.default, (*backward_args, mask))
    with pytest.raises(RuntimeError, match="output_mask: expected 4 entries, one for each gradient, got 1"):
        ops.low_rank_experts_backward(*backward_args, [True])


def test_autocast(device):
    args, _ = make_args((6, 8, 12, 4, 2, 2), "uniform", torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        output = moe_ext.low_rank_experts(*args)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), moe_ext.low_rank_experts(*args), rtol=3e-2, atol=3e-2)


def replaced(place, change):
    def call(device):
        args = list(make_args((6, 8, 12, 4, 2, 2), "uniform", torch.float32, device)[0])
        args[place] = change(args[place])
        return moe_ext.low_rank_experts(*args)

    return call


BAD_CALLS = [
    ("integer input", replaced(0, lambda x: x.int()), r"input: expected float32, bfloat16, float16 or float64 \[num_tokens, in_features\], got int32 \[6, 8\]"),
    ("2-d down", replaced(1, lambda x: x[:, 0]), r"lora_a: expected float32 \[num_experts, rank, in_features\], got float32 \[4, 8\]"),
    ("narrow down", replaced(1, lambda x: x[..., :5]), r"lora_a: expected size 8 \(in_features, as in input\) in dimension 2"),
    ("up of another dtype", replaced(2, lambda x: x.bfloat16()), r"lora_b: expected float32 .* got bfloat16"),
    ("up of another rank", replaced(2, lambda x: x[:, :1]), r"lora_b: expected size 2 \(rank, as in lora_a\)"),
    ("up of fewer experts", replaced(2, lambda x: x[:3]), r"lora_b: expected size 4 \(num_experts"),
    ("float ids", replaced(3, lambda x: x.float()), r"topk_ids: expected int32 or int64 \[num_tokens, topk\]"),
    ("too few ids", replaced(3, lambda x: x[:5]), r"topk_ids: expected size 6 \(num_tokens"),
    ("bf16 weights", replaced(4, lambda x: x.bfloat16()), r"topk_weights: expected float32 \[num_tokens, topk\], got bfloat16"),
    ("weights of another topk", replaced(4, lambda x: x[:, :1]), r"topk_weights: expected size 2 \(topk"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", [pytest.param(*rest, id=name) for name, *rest in BAD_CALLS])
def test_bad_calls(call, message, device):
    with pytest.raises(RuntimeError, match=message):
        call(device)


def test_most_components(device):
    args, grad = make_args((1, 4, 4, 2, 4096, 2), "uniform", torch.float32, device)
    assert_matches_reference(moe_ext.low_rank_experts, reference.low_rank_experts, args, grad)


def test_too_many_rows(device):
    (hidden, down, _, ids, weights), _ = make_args((1, 2, 2, 1, 1, 1), "uniform", torch.float32, device)
    rows = down.new_empty(2**19, 4096, 0)
    with pytest.raises(RuntimeError, match=r"lora_a, number of rows: expected at most 2\^31 - 1, got 2147483648"):
        moe_ext.low_rank_experts(hidden[:, :0], rows, rows, ids, weights)


def test_too_many_components(device):
    args, _ = make_args((1, 2, 2, 2, 4200, 2), "uniform", torch.float32, device)
    with pytest.raises(RuntimeError, match=r"topk \* rank: expected at most 8192, got 8400"):
        moe_ext.low_rank_experts(*args)
