"""The tile scheduler and the tile choice that the CUDA launchers use, compiled for the CPU."""

from __future__ import annotations

import ctypes
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from host_library import compile_emulated

SOURCE = Path(__file__).resolve().parent.parent / "csrc/grouped_gemm"
PROGRAM = """
#include "sm90/grouped_row_tiles.h"
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
extern "C" long long walk(const int* offsets, long long num_experts, long long max_rows, long long block_rows,
                          long long column_tiles, long long first, long long step, long long* out, long long capacity) {
  long long found = 0;
  moe_emulator::run_grid(1, 32, 0, [&] {
    moe_ext::sm90::GroupedRowTiles tiles(offsets, num_experts, max_rows, block_rows, column_tiles, first, step);
    moe_ext::sm90::GroupedRowTiles::Tile tile;
    long long count = 0;
    for (; count < capacity && tiles.next(&tile); ++count) {
      const long long values[4] = {tile.expert, tile.row, tile.end, tile.column};
      long long* place = out + 4 * count;
      // Every lane must find the same.
      if (threadIdx.x == 0) std::memcpy(place, values, sizeof(values));
      __syncwarp();
      if (std::memcmp(place, values, sizeof(values)) != 0) moe_emulator::fail("lanes differ");
    }
    if (threadIdx.x == 0) found = count;
  });
  return found;
}
extern "C" void banded(long long index, long long row_tiles, long long column_tiles, long long* out) {
  const auto position = moe_ext::sm90::banded_position(index, row_tiles, column_tiles);
  out[0] = position.row, out[1] = position.column;
}
extern "C" const char* tile_name(int index) { return moe_ext::kSm90Tiles[index].name; }
extern "C" int choose(long long groups, long long rows, long long columns, long long multiprocessors) {
  return static_cast<int>(moe_ext::choose_sm90_tile(groups, rows, columns, multiprocessors));
}
"""


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    loaded = compile_emulated(PROGRAM, SOURCE, tmp_path_factory.mktemp("scheduler"))
    loaded.bound.restype = ctypes.c_longlong
    loaded.bound.argtypes = [ctypes.c_longlong] * 3
    loaded.find.argtypes = [ctypes.c_void_p, *[ctypes.c_longlong] * 4, ctypes.c_void_p]
    loaded.walk.restype = ctypes.c_longlong
    loaded.walk.argtypes = [ctypes.c_void_p, *[ctypes.c_longlong] * 6, ctypes.c_void_p, ctypes.c_longlong]
    loaded.banded.argtypes = [*[ctypes.c_longlong] * 3, ctypes.c_void_p]
    loaded.choose.argtypes = [ctypes.c_longlong] * 4
    loaded.tile_name.restype = ctypes.c_char_p
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


def walk(scheduler, offsets, max_rows, block_rows, column_tiles, first, step, capacity=100_000) -> np.ndarray:
    """(expert, first row, end of the group, column tile) of every tile of one block of the persistent kernels."""
    out = np.zeros((capacity, 4), dtype=np.int64)
    data = np.asarray(offsets, dtype=np.int32)
    count = scheduler.walk(
        data.ctypes.data, len(data) - 1, max_rows, block_rows, column_tiles, first, step, out.ctypes.data, capacity
    )
    return out[:count]


@pytest.mark.parametrize("kind", ["random", "empty", "one_hot", "half_empty", "exact"])
@pytest.mark.parametrize("num_experts", [1, 3, 300])
@pytest.mark.parametrize("block_rows", [64, 128])
@pytest.mark.parametrize("blocks", [1, 7, 132])
def test_every_tile_in_one_block(kind, num_experts, block_rows, blocks, scheduler):
    """Each output tile exactly once, and blocks differ by at most one tile, whatever the groups."""
    sizes, column_tiles = group_sizes(kind, num_experts, np.random.default_rng(1)), 5
    offsets = np.concatenate([[0], sizes.cumsum()]) + 3  # rows of no expert in front
    max_rows = int(offsets[-1]) + 11
    per_block = [walk(scheduler, offsets, max_rows, block_rows, column_tiles, b, blocks) for b in range(blocks)]
    found = sorted(map(tuple, np.concatenate(per_block).tolist()))
    expected = sorted(
        (e, row, int(offsets[e + 1]), column)
        for e in range(num_experts)
        for row in range(int(offsets[e]), int(offsets[e + 1]), block_rows)
        for column in range(column_tiles)
    )
    assert found == expected
    counts = [len(tiles) for tiles in per_block]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("row_tiles, column_tiles", [(1, 1), (1, 40), (8, 3), (21, 7), (64, 1)])
def test_bands_share_a_column(row_tiles, column_tiles, scheduler):
    out, found = np.zeros(2, dtype=np.int64), []
    for index in range(row_tiles * column_tiles):
        scheduler.banded(index, row_tiles, column_tiles, out.ctypes.data)
        found.append(tuple(out.tolist()))
    assert sorted(found) == [(r, c) for r in range(row_tiles) for c in range(column_tiles)]
    if row_tiles >= 8:
        assert found[:8] == [(r, 0) for r in range(8)]


def test_tiles_past_int32(scheduler):
    """2^31 - 1 rows of 2^20 column tiles: tile numbers and elements far past 2^31."""
    offsets, max_rows, block_rows, column_tiles = [0, 2**30, 2**31 - 200, 2**31 - 1], 2**31 - 1, 128, 2**20
    tiles_of = [-(-(b - a) // block_rows) * column_tiles for a, b in itertools.pairwise(offsets)]
    last = walk(scheduler, offsets, max_rows, block_rows, column_tiles, sum(tiles_of) - 1, 132)
    assert last.tolist() == [[2, 2**31 - 200 + 128, 2**31 - 1, column_tiles - 1]]
    first = walk(scheduler, offsets, max_rows, block_rows, column_tiles, tiles_of[0], sum(tiles_of))
    assert first.tolist() == [[1, 2**30, 2**31 - 200, 0]]
    assert len(walk(scheduler, offsets, max_rows, block_rows, column_tiles, sum(tiles_of), 1)) == 0


@pytest.mark.parametrize("offsets", [[0, -5, 90, 20, 3000], [50, 10, 10, 7, 0], [2**31 - 1, -(2**31), 5, 2**31 - 1, 1]])
def test_walk_over_malformed_offsets(offsets, scheduler):
    tiles = walk(scheduler, offsets, 100, 16, 3, 0, 1)
    assert len(tiles) <= 4 * 7 * 3
    assert ((tiles[:, 1] >= 0) & (tiles[:, 1] < tiles[:, 2]) & (tiles[:, 2] <= 100)).all()


def test_tile_choice(scheduler, monkeypatch):
    def choose(*shape: int) -> str:
        return scheduler.tile_name(scheduler.choose(*shape)).decode()

    monkeypatch.delenv("MOE_EXT_SM90_TILE", raising=False)
    assert choose(8, 4096, 7168, 132) == "128x256"  # large groups fill the machine with large tiles
    assert choose(128, 40, 1536, 132) == "64x256"  # a few rows per expert: small tiles waste less
    for name in ("128x128", "cutlass_128x256"):
        monkeypatch.setenv("MOE_EXT_SM90_TILE", name)
        assert choose(8, 4096, 7168, 132) == name
    monkeypatch.setenv("MOE_EXT_SM90_TILE", "unknown")
    assert choose(8, 4096, 7168, 132) == "128x256"


def test_tiles_are_those_that_cmake_compiles():
    from moe_ext import _host

    listed = (SOURCE.parent.parent / "cmake/GroupedGemmKernels.cmake").read_text()
    compiled = re.search(r"foreach\(row IN ITEMS ([\dx, ]+)\)", listed)
    tiles = [t for t in _host.sm90_tiles() if not t["name"].startswith("cutlass")]
    keys = ("name", "rows", "columns", "stages", "cluster")
    assert compiled and compiled[1].split() == [",".join(str(t[key]) for key in keys) for t in tiles]
    for tile in tiles:
        cluster = f"x{tile['cluster']}" if tile["cluster"] > 1 else ""
        assert tile["name"] == f"{tile['rows']}x{tile['columns']}{cluster}"
