"""The call shapes of others, on moe_ext's ops: torch's grouped_mm, grouped_gemm's gmm, Transformer Engine's permute."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cases import ROUTINGS, make_rows, make_topk_ids, make_topk_weights, non_contiguous
from compare import assert_deterministic, assert_matches_reference, relative_error
from moe_ext.integrations.grouped_mm import grouped_mm
from moe_ext.integrations.megablocks import gmm
from moe_ext.integrations.transformer_engine import moe_permute, moe_permute_with_probs, moe_unpermute

SIZES = {"uneven": [3, 0, 16, 5], "one": [0, 17, 0, 0], "none": [0, 0, 0, 0]}


def make_operands(axes: str, sizes: list[int], dtype, device, transposed: bool):
    """mat_a, mat_b and offs; the first axis of a group is cut at ``sizes``. Sizes suit the kernels of torch, which want strides of 16 bytes."""
    rows, groups = sum(sizes), len(sizes)
    offs = torch.tensor(sizes, device=device).cumsum(0, dtype=torch.int32)
    a = make_rows(rows, 32, dtype=dtype, device=device, seed=1)
    weight = make_rows(groups, 48, 32, dtype=dtype, device=device, seed=2).transpose(1, 2)
    weight = weight if transposed else weight.contiguous()
    if axes == "2x3":
        return a, weight, offs
    if axes == "3x2":
        return weight.transpose(1, 2), a.transpose(0, 1), offs
    return a.transpose(0, 1), make_rows(rows, 48, dtype=dtype, device=device, seed=3), offs


def by_hand(mat_a, mat_b, offs):
    """Every group with torch.mm."""
    pieces, start = [], 0
    for group, end in enumerate(offs.tolist()):
        a = mat_a[group] if mat_a.dim() == 3 else mat_a[start:end] if mat_b.dim() == 3 else mat_a[:, start:end]
        b = mat_b[group] if mat_b.dim() == 3 else mat_b[:, start:end] if mat_a.dim() == 3 else mat_b[start:end]
        pieces.append(a @ b)
        start = end
    if mat_a.dim() == mat_b.dim():
        return torch.stack(pieces)
    return torch.cat(pieces, 0 if mat_b.dim() == 3 else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("axes", ["2x3", "3x2", "2x2"])
def test_grouped_mm(axes, sizes, transposed, dtype, device):
    mat_a, mat_b, offs = make_operands(axes, SIZES[sizes], dtype, device, transposed)
    grad = make_rows(*by_hand(mat_a, mat_b, offs).shape, dtype=dtype, device=device, seed=4)

    def ours(a, b, ends):
        return grouped_mm(a, b, offs=ends)

    assert_matches_reference(ours, by_hand, (mat_a, mat_b, offs), [grad])
    assert_deterministic(ours, (mat_a, mat_b, offs), [grad])


@pytest.mark.parametrize("axes", ["2x3", "3x2", "2x2"])
def test_grouped_mm_equals_torch(axes, device):
    mat_a, mat_b, offs = make_operands(axes, SIZES["uneven"], torch.bfloat16, device, transposed=True)
    results = []
    for function in (grouped_mm, F.grouped_mm):
        leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in (mat_a, mat_b)]
        output = function(*leaves, offs=offs)
        grad = make_rows(*output.shape, dtype=torch.bfloat16, device=device, seed=4)
        results.append([output, *torch.autograd.grad(output, leaves, grad)])
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == wanted.dtype and relative_error(got, wanted) < 4e-3


def test_grouped_mm_rows_past_the_last_offset_are_zero(device):
    mat_a, mat_b, _ = make_operands("2x3", SIZES["uneven"], torch.float32, device, transposed=False)
    offs = torch.tensor([2, 2, 5, 9], dtype=torch.int32, device=device)
    output = grouped_mm(mat_a, mat_b, offs=offs)
    assert (output[9:] == 0).all() and relative_error(output[:9], by_hand(mat_a[:9], mat_b, offs)) < 1e-5


def test_grouped_mm_accumulates_weight_gradients_in_float32(device):
    mat_a, mat_b, offs = make_operands("2x2", SIZES["uneven"], torch.bfloat16, device, transposed=False)
    output = grouped_mm(mat_a, mat_b, offs=offs, out_dtype=torch.float32)
    assert output.dtype == torch.float32
    assert relative_error(output, by_hand(mat_a.double(), mat_b.double(), offs)) < 1e-5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"offs": None}, r"offs: expected torch.int32 \[num_groups\], got None"),
        ({"offs": torch.zeros(4, dtype=torch.int64)}, "offs: expected torch.int32 .* got torch.int64"),
        ({"offs": torch.zeros(3, dtype=torch.int32)}, "offs: expected 4 ends"),
        ({"bias": torch.zeros(4, 48)}, "bias: expected None"),
        ({"out_dtype": torch.float16}, "out_dtype: expected one of"),
        ({"mat_a": torch.zeros(4, 2, 32)}, "mat_a, mat_b: expected 2 and 3"),
    ],
)
def test_grouped_mm_bad_arguments(change, message):
    mat_a, mat_b, offs = make_operands("2x3", SIZES["uneven"], torch.float32, "cpu", transposed=False)
    arguments = {"mat_a": mat_a, "mat_b": mat_b, "offs": offs, **change}
    with pytest.raises(ValueError, match=message):
        grouped_mm(arguments.pop("mat_a"), arguments.pop("mat_b"), **arguments)


@pytest.mark.parametrize("sizes_on", ["cpu", "device"])
@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_gmm(sizes, trans_b, sizes_on, device):
    rows = sum(SIZES[sizes])
    batch_sizes = torch.tensor(SIZES[sizes], device=device if sizes_on == "device" else "cpu")
    a = non_contiguous(make_rows(rows, 13, dtype=torch.float32, device=device))
    b = make_rows(4, *((11, 13) if trans_b else (13, 11)), dtype=torch.float32, device=device, seed=2)
    grad = make_rows(rows, 11, dtype=torch.float32, device=device, seed=3)

    def reference(x, w):
        return torch.cat([p @ (m.T if trans_b else m) for p, m in zip(x.split(SIZES[sizes]), w, strict=True)])

    assert_matches_reference(lambda x, w: gmm(x, w, batch_sizes, trans_b), reference, (a, b), [grad])


def test_gmm_bad_sizes():
    a, b = torch.zeros(4, 8), torch.zeros(2, 8, 8)
    for wrong in (torch.ones(2), torch.ones(3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"batch_sizes: expected torch.int64 or torch.int32 \[2\], got"):
            gmm(a, b, wrong)


def mask_of(ids, num_experts):
    """[num_tokens, num_experts] bool."""
    return (ids[..., None] == torch.arange(num_experts, device=ids.device)).any(1)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_permute_by_mask(num_tokens, routing, device):
    """Against the selection of rows that Megatron writes without the fused kernels."""
    mask = mask_of(make_topk_ids(num_tokens, 6, 2, routing, device), 6)
    count = int(mask.sum())
    probs = torch.where(mask, make_topk_weights(num_tokens, 6, device), 0.0)
    inp = make_rows(num_tokens, 9, dtype=torch.float32, device=device)

    def reference(x, p):
        tokens = torch.arange(num_tokens, device=device).expand(6, -1).masked_select(mask.T)
        rows, scales = x[tokens], p.T.masked_select(mask.T)
        return rows, scales, torch.zeros_like(x).index_add(0, tokens, rows * 2 * scales[:, None])

    def ours(x, p):
        rows, scales, row_id_map = moe_permute_with_probs(x, p, mask, count)
        assert torch.equal(rows, moe_permute(x, mask.int(), count)[0])
        return rows, scales, moe_unpermute(rows * 2, row_id_map, merging_probs=p, restore_shape=x.shape)

    grads = [
        make_rows(count, 9, dtype=torch.float32, device=device, seed=3),
        make_rows(count, dtype=torch.float32, device=device, seed=4),
        make_rows(num_tokens, 9, dtype=torch.float32, device=device, seed=5),
    ]
    assert_matches_reference(ours, reference, (inp, probs), grads)
    assert_deterministic(ours, (inp, probs), grads)
    all_rows, _ = moe_permute(inp, mask)
    assert all_rows.shape == (6 * num_tokens, 9) and (all_rows[count:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_permute_by_index(routing, dtype, device):
    ids = make_topk_ids(40, 6, 2, routing, device)
    ids = torch.where(ids >= 6, -1, ids)
    weights = make_topk_weights(40, 2, device)
    inp = make_rows(40, 9, dtype=dtype, device=device)
    flat = ids.flatten().cpu()
    order = torch.argsort(flat, stable=True)
    order = order[flat[order] >= 0].to(device)
    rows, row_id_map = moe_permute(inp, ids, map_type="index")
    assert torch.equal(rows[: len(order)], inp[order // 2]) and (rows[len(order) :] == 0).all()
    cut, _ = moe_permute(inp, ids, num_out_tokens=7, map_type="index")
    assert torch.equal(cut, rows[:7])

    def reference(x, w):
        scaled = x[order // 2].to(w.dtype) * w.flatten()[order][:, None]
        return torch.zeros_like(x, dtype=w.dtype).index_add(0, order // 2, scaled).to(x.dtype)

    def ours(x, w):
        moved, row_ids = moe_permute(x, ids.long(), map_type="index")
        assert torch.equal(row_ids, row_id_map)
        return moe_unpermute(moved, row_ids, w, map_type="index")

    grad = make_rows(40, 9, dtype=dtype, device=device, seed=3)
    assert_matches_reference(ours, reference, (inp, weights), [grad])
    plain = moe_unpermute(rows, row_id_map, map_type="index")
    assert relative_error(plain, inp.float() * (ids >= 0).sum(1, keepdim=True)) < 1e-2


def test_rows_cut_off_take_no_part(device):
    ids = make_topk_ids(12, 4, 2, "uniform", device)
    inp = make_rows(12, 8, dtype=torch.float32, device=device).requires_grad_()
    rows, row_id_map = moe_permute(inp, ids, num_out_tokens=5, map_type="index")
    output = moe_unpermute(rows, row_id_map, map_type="index")
    kept = (row_id_map >= 0).sum(1)
    assert kept.sum() == 5 and torch.equal(output, inp * kept[:, None])
    (grad,) = torch.autograd.grad(output.sum(), inp)
    assert torch.equal(grad, kept[:, None].expand_as(inp).float())


def test_permute_bad_arguments():
    inp, mask = torch.zeros(4, 8), torch.ones(4, 3, dtype=torch.int32)
    rows, row_id_map = moe_permute(inp, mask)
    for call, message in (
        (lambda: moe_permute(inp, mask, map_type="x"), "map_type: expected mask or index, got 'x'"),
        (lambda: moe_permute(inp, mask[:3]), r"routing_map: expected \[4, \.\.\.\] as inp, got \[3, 3\]"),
        (lambda: moe_permute_with_probs(inp, torch.ones(4, 2), mask), r"probs: expected \[4, 3\]"),
        (lambda: moe_unpermute(rows, row_id_map, restore_shape=(5, 8)), "restore_shape: expected"),
        (lambda: moe_unpermute(rows, row_id_map, torch.ones(4, 3), probs=torch.ones(4, 3)), "probs: expected None"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
