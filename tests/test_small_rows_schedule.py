"""The schedule of the small-rows kernel, compiled for the CPU."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import numpy as np
import pytest

from host_library import compile_library
from test_tile_scheduler import group_sizes

SOURCE = Path(__file__).resolve().parent.parent / "csrc/grouped_gemm/small_rows"
PROGRAM = """
#include "item_schedule.h"
using namespace moe_ext;
using namespace moe_ext::small_rows;
extern "C" int chunks(int begin, int end, int chunk_rows) { return row_chunks({begin, end}, chunk_rows); }
extern "C" long long bound(long long max_rows, long long num_experts, long long chunk_rows, long long column_tiles) {
  return item_bound(max_rows, num_experts, chunk_rows, column_tiles);
}
extern "C" void find(const int* starts, const int* offsets, int num_experts, long long max_rows, int chunk_rows,
                     long long column_tiles, long long item, long long* out) {
  const Item found = find_item(starts, offsets, num_experts, max_rows, chunk_rows, column_tiles, item);
  out[0] = found.expert, out[1] = found.rows.begin, out[2] = found.rows.end, out[3] = found.column_tile;
}
extern "C" int steps(int steps, int warp, int warps) { return steps_of_warp(steps, warp, warps); }
extern "C" int column(int enk, int width, int q, int group) { return tile_column(enk, width, q, group); }
extern "C" int holder(int enk, int width, int column) {
  const ThreadColumn found = holder_of_column(enk, width, column);
  return found.q * kGroupLanes + found.group;
}
"""
TILE_COLUMNS, GROUP_LANES = 64, 8


@pytest.fixture(scope="module")
def schedule(tmp_path_factory):
    loaded = compile_library(PROGRAM, SOURCE, tmp_path_factory.mktemp("schedule"))
    loaded.bound.restype = ctypes.c_longlong
    loaded.bound.argtypes = [ctypes.c_longlong] * 4
    loaded.find.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong, ctypes.c_int,
                            ctypes.c_longlong, ctypes.c_longlong, ctypes.c_void_p]  # fmt: skip
    return loaded


@pytest.mark.parametrize("kind", ["random", "empty", "one_hot", "half_empty", "exact"])
@pytest.mark.parametrize("num_experts", [1, 3, 64, 1000])
@pytest.mark.parametrize("chunk_rows", [8, 32])
@pytest.mark.parametrize("warps, steps", [(4, 24), (4, 65), (8, 7)])
def test_every_part_of_every_product_once(kind, num_experts, chunk_rows, warps, steps, schedule):
    """(row, column tile, step along k), over blocks that stride over the items and warps that stride over the steps."""
    column_tiles, blocks = 3, 7
    sizes = group_sizes(kind, num_experts, np.random.default_rng(0)) // 20
    offsets = np.concatenate([[0], sizes.cumsum()]).astype(np.int32)
    max_rows = int(offsets[-1]) + 5
    counts = [schedule.chunks(int(a), int(b), chunk_rows) for a, b in itertools.pairwise(offsets)]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    items = int(starts[-1]) * column_tiles
    assert items <= schedule.bound(max_rows, num_experts, chunk_rows, column_tiles)

    visits = np.zeros((max_rows, column_tiles, steps), dtype=np.int64)
    out = np.zeros(4, dtype=np.int64)
    for item in (i for block in range(blocks) for i in range(block, items, blocks)):
        schedule.find(starts.ctypes.data, offsets.ctypes.data, num_experts, max_rows, chunk_rows, column_tiles, item,
                      out.ctypes.data)  # fmt: skip
        expert, begin, end, tile = out.tolist()
        assert offsets[expert] <= begin < end <= offsets[expert + 1] and end - begin <= chunk_rows
        for warp in range(warps):
            own = warp + warps * np.arange(schedule.steps(steps, warp, warps))
            visits[begin:end, tile, own] += 1
    assert (visits[: offsets[-1]] == 1).all() and (visits[offsets[-1] :] == 0).all()


def test_chunks_of_one_column_tile_are_neighbours(schedule):
    """They read the same weights: blocks that run at the same time find them in L2."""
    offsets, starts = np.array([0, 70, 80], dtype=np.int32), np.array([0, 3, 4], dtype=np.int32)
    out, found = np.zeros(4, dtype=np.int64), []
    for item in range(8):
        schedule.find(starts.ctypes.data, offsets.ctypes.data, 2, 80, 32, 2, item, out.ctypes.data)
        found.append(tuple(out.tolist()))
    assert found == [
        *((0, begin, end, tile) for tile in (0, 1) for begin, end in ((0, 32), (32, 64), (64, 70))),
        (1, 70, 80, 0), (1, 70, 80, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("enk, width", [(1, 8), (1, 4), (0, 8), (0, 4)])
def test_every_column_of_a_tile_has_one_holder(enk, width, schedule):
    columns = [schedule.column(enk, width, q, group) for q in range(8) for group in range(GROUP_LANES)]
    assert sorted(columns) == list(range(TILE_COLUMNS))
    assert [schedule.holder(enk, width, column) for column in columns] == list(range(TILE_COLUMNS))
    if not enk:  # a vector holds neighbouring columns
        for q in range(0, 8, width):
            for group in range(GROUP_LANES):
                first = schedule.column(0, width, q, group)
                assert [schedule.column(0, width, q + i, group) for i in range(width)] == [*range(first, first + width)]
