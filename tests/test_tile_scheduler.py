"""The tile scheduler and the tile choice that the CUDA launchers use, compiled for the CPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).resolve().parent.parent / "csrc/grouped_gemm"
PROGRAM = """
#include "tile_choice.h"
#include "tile_scheduler.h"
extern "C" long long bound(long long max_rows, long long num_experts, long long block_rows) {
  return moe_ext::row_tile_bound(max_rows, num_experts, block_rows);
}
extern "C" void find(const int* offsets, long long num_experts, long long max_rows, long long block_rows, long long tile,
                     long long* out) {
  const auto found = moe_ext::find_row_tile(offsets, num_experts, max_rows, block_rows, tile);
  out[0] = found.expert, out[1] = found.rows.begin, out[2] = found.rows.end;
}
extern "C" int choose(long long groups, long long rows, long long columns, long long multiprocessors) {
  return static_cast<int>(moe_ext::choose_sm90_tile(groups, rows, columns, multiprocessors));
}
"""
COOPERATIVE, PINGPONG = 0, 1


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("scheduler")
    (folder / "scheduler.cpp").write_text(PROGRAM)
    library = folder / "scheduler.so"
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{SOURCE}", "scheduler.cpp", "-o", str(library)]
    subprocess.run(command, cwd=folder, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.bound.restype = ctypes.c_longlong
    loaded.bound.argtypes = [ctypes.c_longlong] * 3
    loaded.find.argtypes = [ctypes.c_void_p, *[ctypes.c_longlong] * 4, ctypes.c_void_p]
    loaded.choose.argtypes = [ctypes.c_longlong] * 4
    return loaded


def group_sizes(kind: str, num_experts: int, generator: np.random.Generator) -> np.ndarray:
    if kind == "random":
        return generator.integers(0, 400, num_experts)
    if kind == "empty":
        return np.zeros(num_experts, dtype=np.int64)
    if kind == "one_hot":
        return np.where(np.arange(num_experts) == num_experts // 2, 5000, 0)
    if kind == "half_empty":
        return np.where(np.arange(num_experts) % 2 == 0, generator.integers(1, 300, num_experts), 0)
    return np.full(num_experts, 128)  # exact tiles


@pytest.mark.parametrize("kind", ["random", "empty", "one_hot", "half_empty", "exact"])
@pytest.mark.parametrize("num_experts", [1, 3, 64, 1000])
@pytest.mark.parametrize("block_rows", [1, 64, 128])
@pytest.mark.parametrize("slack", [0, 77])
def test_every_row_in_one_tile(kind, num_experts, block_rows, slack, scheduler):
    sizes = group_sizes(kind, num_experts, np.random.default_rng(0))
    offsets = np.concatenate([[0], sizes.cumsum()]).astype(np.int32)
    max_rows = int(offsets[-1]) + slack
    visits = np.zeros(max_rows + 1, dtype=np.int64)
    out = np.zeros(3, dtype=np.int64)
    for tile in range(scheduler.bound(max_rows, num_experts, block_rows)):
        scheduler.find(offsets.ctypes.data, num_experts, max_rows, block_rows, tile, out.ctypes.data)
        expert, begin, end = out.tolist()
        if begin == end:
            continue
        assert offsets[expert] <= begin < end <= offsets[expert + 1] and end - begin <= block_rows
        assert (begin - offsets[expert]) % block_rows == 0
        visits[begin:end] += 1
    assert (visits[: offsets[-1]] == 1).all() and (visits[offsets[-1] :] == 0).all()


def test_rows_near_the_end_of_int32(scheduler):
    """2^31 - 1 rows: products of rows and width pass 2^31, row numbers do not."""
    offsets = np.array([0, 2**30, 2**31 - 200, 2**31 - 1], dtype=np.int32)
    max_rows, block_rows, out = 2**31 - 1, 128, np.zeros(3, dtype=np.int64)
    bound = scheduler.bound(max_rows, 3, block_rows)
    covered, tile = [], 0
    for tile in [0, 1, 2**23 - 1, 2**23, 2**23 + 1, *range(bound - 8, bound)]:
        scheduler.find(offsets.ctypes.data, 3, max_rows, block_rows, tile, out.ctypes.data)
        if out[1] < out[2]:
            assert offsets[out[0]] <= out[1] < out[2] <= offsets[out[0] + 1]
            covered.append(tuple(out.tolist()))
    assert len(set(covered)) == len(covered) and covered[-1][2] == 2**31 - 1


@pytest.mark.parametrize("offsets", [[0, -5, 90, 20, 3000], [50, 10, 10, 7, 0], [2**31 - 1, -(2**31), 5, 2**31 - 1, 1]])
def test_malformed_offsets_stay_in_range(offsets, scheduler):
    data, out = np.array(offsets, dtype=np.int32), np.zeros(3, dtype=np.int64)
    for tile in range(scheduler.bound(100, 4, 16)):
        scheduler.find(data.ctypes.data, 4, 100, 16, tile, out.ctypes.data)
        assert 0 <= out[0] < 4 and 0 <= out[1] <= out[2] <= 100


def test_tile_choice(scheduler):
    assert scheduler.choose(8, 4096, 7168, 132) == COOPERATIVE  # large groups fill the machine with large tiles
    assert scheduler.choose(128, 4, 1536, 132) == PINGPONG  # a few rows per expert: small tiles waste less
