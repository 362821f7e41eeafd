"""Memory that the op libraries allocate is poisoned while the tests run, so that an unwritten output shows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import moe_ext
from host_library import compile_library

pytestmark = pytest.mark.cpu

# An op of the tests alone, over what every op allocates its outputs by.
PROGRAM = r"""
#include <torch/csrc/stable/library.h>

#include "common/huge_pages.h"
#include "common/tensors.h"

using moe_ext::Tensor;

static Tensor made(const Tensor& like, int64_t size, bool may_be_large) {
  return may_be_large ? moe_ext::new_empty_large(like, {size}) : moe_ext::make_tensor(like, {size});
}

STABLE_TORCH_LIBRARY(moe_ext_poison_test, m) { m.def("made(Tensor like, int size, bool may_be_large) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(moe_ext_poison_test, CPU, m) { m.impl("made", TORCH_BOX(&made)); }
"""
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch_folder = Path(torch.__file__).resolve().parent
    compile_library(
        PROGRAM, Path(__file__).resolve().parent.parent / "csrc", tmp_path_factory.mktemp("poison"),
        "-std=c++20", "-O1", f"-isystem{torch_folder / 'include'}", "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-L{torch_folder / 'lib'}", "-ltorch_cpu",
    )  # fmt: skip
    return torch.ops.moe_ext_poison_test.made


@pytest.mark.parametrize("dtype", [*FLOATING, torch.int32, torch.int64, torch.uint8], ids=str)
def test_small_tensors(dtype, made):
    like = torch.zeros(1, dtype=dtype)
    for size in (0, 1, 1001):
        torch.full((size,), 3, dtype=dtype)  # freed: what the allocator hands out next
        tensor = made(like, size, False)
        assert tensor.shape == (size,) and tensor.dtype == dtype
        assert (tensor.isnan() if dtype in FLOATING else tensor == torch.iinfo(dtype).max).all()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_large_tensors_fresh_and_kept(dtype, made):
    like, size = torch.zeros(1, dtype=dtype), (5 << 20) // dtype.itemsize + 3
    for _ in range(3):
        tensor = made(like, size, True)
        assert tensor.isnan().all()
        tensor.zero_()
        del tensor


def test_the_library_of_this_run_looks_for_the_variable():
    library = Path(os.environ.get("MOE_EXT_LIBRARY", moe_ext._library.PACKAGE / "libmoe_ext.so"))
    assert os.environ["MOE_EXT_POISON"] == "1"
    assert b"MOE_EXT_POISON" in library.read_bytes(), f"{library} is older than these sources"
