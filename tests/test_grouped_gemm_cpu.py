"""How the CPU cuts grouped products, into tiles, blocks and threads, and where their outputs lie."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

import pytest
import torch

import moe_ext
from cases import DTYPES, make_rows
from compare import relative_error
from test_grouped_gemm import LAYOUTS, Case


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    "shape", [(700, 96, 600, 3, 2), (150, 600, 2200, 4, 2), (85, 600, 200, 1, 1), (12, 300, 2048, 16, 2)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_for_any_number_of_threads(layout, shape, dtype):
    """Large products, wide ones of few rows, one that has fewer tiles than there could be, and few rows for whose sake
    one thread sweeps whole lines and two half of them."""
    case = Case(shape, "zipf", dtype=dtype, layout=layout, gather=True, bias=True)
    case.check()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            output = case.forward(moe_ext)(*case.args)
            grads = [
                moe_ext.grouped_gemm_wgrad(case.input, case.grad, case.offsets, **case.settings, out_dtype=out_dtype)
                for out_dtype in (None, None if dtype == torch.float64 else torch.float32)
            ]
            results.append([output, *grads, moe_ext.grouped_bias_grad(case.grad, case.offsets)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# On the CPU such rows are multiplied in place, in several blocks of the inner dimension (of which the last is shorter).
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "swiglu"])
def test_long_rows(activation, dtype):
    case = Case((70, 9003, 70, 2, 1), "dropped", dtype=dtype, gather=True, bias=True, activation=activation)
    case.check()
    run, threads = case.forward(moe_ext), torch.get_num_threads()
    expected = run(*case.args)
    torch.set_num_threads(1)
    try:
        assert torch.equal(expected, run(*case.args))
    finally:
        torch.set_num_threads(threads)


def small_integers(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Makes tensors of given shapes; sums of their products are exact: rounded once, every bit is known."""
    generator = torch.Generator().manual_seed(7)
    return lambda *shape: torch.randint(-2, 3, shape, generator=generator).to(dtype)


def check_exactly(counts: torch.Tensor, num_columns: int, in_features: int, layout: str, dtype: torch.dtype) -> None:
    """Experts that hold ``counts`` rows: the product of integers is right to the last bit."""
    integers = small_integers(dtype)
    offsets = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
    rows, weight = integers(int(offsets[-1]), in_features), integers(len(counts), num_columns, in_features)
    groups = rows.double().split(counts.tolist())
    expected = torch.cat([group @ matrix.double().T for group, matrix in zip(groups, weight, strict=True)]).to(dtype)
    if layout == "ekn":
        weight = weight.transpose(1, 2).contiguous()
    assert torch.equal(moe_ext.grouped_gemm(rows, weight, offsets, weight_layout=layout), expected)


# Numbers of rows differ in which way they are multiplied, in how many at once, in the depth of a block, in who fetches
# what ahead. 75 columns are a group of those that are read in place, and a part of one; 1101 elements leave half a pair.
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("in_features", [40, 1101])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_small_number_of_rows(layout, in_features, dtype):
    check_exactly(torch.arange(99), 75, in_features, layout, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_few_rows_of_more_than_a_block(layout, dtype):
    """Longer than what of a row stays in L2."""
    check_exactly(torch.arange(1, 5), 11, 240_003, layout, dtype)


# 141 columns are four panels and a part of one; the last block of the inner dimension is whole vectors or not; odd numbers
# of rows leave half a pair in the weight gradient, and rows that are dropped, lines that are not there. Five blocks of
# 51 rows of float64, or 102 of float32, fill the room for left rows that stay.
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("in_features", [96, 1088, 1101])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_panels_one_after_the_other(layout, in_features, dtype):
    """Each panel is packed while the one before it is multiplied."""
    counts, integers = [33, 0, 51, 61, 102, 130], small_integers(dtype)
    offsets, num_rows = torch.tensor([0, *counts]).cumsum(0).int(), sum(counts)
    tokens, grad = integers(num_rows, in_features), integers(num_rows, 141)
    weight = integers(len(counts), 141, in_features)
    slots = torch.randperm(num_rows, generator=torch.Generator().manual_seed(8))
    held = torch.arange(num_rows) % 11 != 7
    rows = torch.where(held[:, None], tokens[slots], 0).double()
    slot_to_row = torch.full((num_rows,), -1).scatter(0, slots[held], torch.arange(num_rows)[held]).int()
    slots = torch.where(held, slots, num_rows).int()
    products = [a @ b.double().T for a, b in zip(rows.split(counts), weight, strict=True)]
    wgrads = torch.stack([b.double().T @ a for a, b in zip(rows.split(counts), grad.split(counts), strict=True)])
    if layout == "ekn":
        weight, wgrads = weight.transpose(1, 2).contiguous(), wgrads.transpose(1, 2)
    settings = {"weight_layout": layout, "gather": (slots, slot_to_row, 1)}
    assert torch.equal(moe_ext.grouped_gemm(tokens, weight, offsets, **settings), torch.cat(products).to(dtype))
    assert torch.equal(moe_ext.grouped_gemm_wgrad(tokens, grad, offsets, **settings), wgrads.to(dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("in_features", [2048, 2064])
def test_written_past_the_caches(in_features, dtype):
    """Outputs larger than the caches have the bits of smaller ones, whether or not their rows are whole cache lines."""
    offsets = torch.tensor([0, 5, 8], dtype=torch.int32)
    x, grad = (torch.randn(8, n, dtype=torch.float64).to(dtype) for n in (in_features, 2048))
    whole = moe_ext.grouped_gemm_wgrad(x, grad, offsets, weight_layout="enk")
    for first in range(0, 2048, 256):
        part = moe_ext.grouped_gemm_wgrad(x, grad[:, first : first + 256], offsets, weight_layout="enk")
        assert torch.equal(whole[:, first : first + 256], part)


def test_large_gradients_reuse_memory():
    """A large output gets the pages of one that was freed: nothing of that one may show through."""
    rows, offsets = make_rows(12, 1792, dtype=torch.float32), torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    first = moe_ext.grouped_gemm_wgrad(rows, rows, offsets, weight_layout="enk")
    address, expected = first.data_ptr(), first[0].clone()
    assert relative_error(expected, rows[:5].double().t() @ rows[:5].double()) < 1e-6
    del first
    offsets = torch.tensor([0, 0, 12, 12], dtype=torch.int32)
    second = moe_ext.grouped_gemm_wgrad(rows, rows, offsets, weight_layout="enk")
    assert second.data_ptr() == address
    assert (second[[0, 2]] == 0).all()
    assert relative_error(second[1], rows.double().t() @ rows.double()) < 1e-6
    third = moe_ext.grouped_gemm_wgrad(rows, rows, offsets, weight_layout="enk")  # the second is still held
    assert third.data_ptr() != address and torch.equal(third, second)


def before_a_wall(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that ends where memory ends: a page that may not be touched begins behind its last byte."""
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * page
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(wall), page, 0) == 0
    placed = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages * page - size)
    return placed.view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("in_features", [40, 515])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_read_past_the_end(layout, in_features, dtype):
    """A read past the last row or weight ends the process."""
    integers = small_integers(dtype)
    for num_rows in (1, 3, 6, 13, 22, 30, 41, 59, 70, 90, 120):
        rows, weight = before_a_wall(integers(num_rows, in_features)), integers(1, 75, in_features)
        expected = (rows.double() @ weight[0].double().T).to(dtype)
        weight = before_a_wall(weight if layout == "enk" else weight.transpose(1, 2).contiguous())
        offsets = before_a_wall(torch.tensor([0, num_rows], dtype=torch.int32))
        assert torch.equal(moe_ext.grouped_gemm(rows, weight, offsets, weight_layout=layout), expected)
