"""The slots and rows that blocks, warps and lanes of the CUDA routing plan own, compiled for the CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from host_library import compile_library

SOURCE = Path(__file__).resolve().parent.parent / "csrc/plan"
# The whole plan as the kernels make it, block by block, from the functions that they share with it; visits counts the
# writes to every slot and row.
PROGRAM = """
#include <vector>
#include "plan_partition.h"
using namespace moe_ext;
extern "C" long long blocks(long long slots, long long experts) { return plan_blocks(slots, experts); }
extern "C" int warps(long long experts) { return counting_warps(experts); }
extern "C" int threads(long long experts) { return threads_per_expert(experts); }
extern "C" void range(long long slots, long long blocks, long long block, int warps, int warp, long long* out) {
  const SlotRange range = warp_slots(slots, blocks, block, warps, warp);
  out[0] = range.begin, out[1] = range.end;
}
extern "C" void tail(long long first, long long rows, long long blocks, long long block, long long* out) {
  const SlotRange range = tail_rows(first, rows, blocks, block);
  out[0] = range.begin, out[1] = range.end;
}
extern "C" void plan(const long long* ids, long long slots, long long experts, long long capacity, long long alignment,
                     long long rows, int* slot_of_row, int* row_of_slot, int* row_visits, int* slot_visits) {
  const long long num_blocks = plan_blocks(slots, experts);
  const int warps = counting_warps(experts);
  std::vector<long long> counts(experts * num_blocks * warps), totals(experts), offsets(experts + 1);
  const auto here = [&](long long slot) { return ids[slot] >= 0 && ids[slot] < experts; };
  for (long long b = 0; b < num_blocks; ++b) {
    for (int w = 0; w < warps; ++w) {
      const SlotRange range = warp_slots(slots, num_blocks, b, warps, w);
      for (long long s = range.begin; s < range.end; ++s) {
        if (here(s)) ++counts[(b * warps + w) * experts + ids[s]], ++totals[ids[s]];
      }
    }
  }
  for (long long e = 0; e < experts; ++e) {
    const ExpertRows sizes = expert_rows(totals[e], capacity, alignment);
    offsets[e + 1] = offsets[e] + sizes.padded;
    for (long long b = 0; b < num_blocks; ++b) {
      if (padding_block(e, num_blocks) != b) continue;
      for (long long r = offsets[e] + sizes.kept; r < offsets[e + 1]; ++r) slot_of_row[r] = -1, ++row_visits[r];
    }
  }
  for (long long b = 0; b < num_blocks; ++b) {
    const SlotRange empty = tail_rows(offsets[experts], rows, num_blocks, b);
    for (long long r = empty.begin; r < empty.end; ++r) slot_of_row[r] = -1, ++row_visits[r];
    for (int w = 0; w < warps; ++w) {
      std::vector<long long> ranks(experts);
      for (long long before = 0; before < b * warps + w; ++before) {
        for (long long e = 0; e < experts; ++e) ranks[e] += counts[before * experts + e];
      }
      const SlotRange range = warp_slots(slots, num_blocks, b, warps, w);
      for (long long s = range.begin; s < range.end; ++s) {
        ++slot_visits[s];
        row_of_slot[s] = -1;
        if (!here(s)) continue;
        const long long rank = ranks[ids[s]]++;
        if (rank >= capacity) continue;
        row_of_slot[s] = static_cast<int>(offsets[ids[s]] + rank);
        slot_of_row[row_of_slot[s]] = static_cast<int>(s), ++row_visits[row_of_slot[s]];
      }
    }
  }
}
"""
LANES, WARPS, THREADS, SHARED_WORDS = 32, 16, 512, 12000


@pytest.fixture(scope="module")
def partition(tmp_path_factory):
    loaded = compile_library(PROGRAM, SOURCE, tmp_path_factory.mktemp("partition"))
    long, pointer = ctypes.c_longlong, ctypes.c_void_p
    loaded.blocks.restype = long
    loaded.blocks.argtypes = [long] * 2
    loaded.warps.argtypes = loaded.threads.argtypes = [long]
    loaded.range.argtypes = [long, long, long, ctypes.c_int, ctypes.c_int, pointer]
    loaded.tail.argtypes = [long, long, long, long, pointer]
    loaded.plan.argtypes = [pointer, *[long] * 5, *[pointer] * 4]
    return loaded


def make_ids(kind: str, num_slots: int, num_experts: int) -> np.ndarray:
    generator = np.random.default_rng(num_slots)
    if kind == "one_hot":
        return np.full(num_slots, num_experts // 2)
    if kind == "nowhere":
        return np.where(np.arange(num_slots) % 2 == 0, -1, num_experts)
    if kind == "out_of_range":
        return generator.integers(-3, num_experts + 3, num_slots)
    if kind == "far_out_of_range":
        return np.where(np.arange(num_slots) % 3 == 0, 2**40, generator.integers(0, num_experts, num_slots))
    return generator.integers(0, num_experts, num_slots)


@pytest.mark.parametrize("kind", ["random", "one_hot", "nowhere", "out_of_range", "far_out_of_range"])
@pytest.mark.parametrize("num_slots", [0, 1, 31, 500, 8192, 8193, 40000])
@pytest.mark.parametrize("num_experts", [1, 7, 128, 700])
@pytest.mark.parametrize("capacity, alignment", [(None, 1), (None, 128), (0, 16), (9, 1), (9, 24)])
def test_every_slot_and_row_once(kind, num_slots, num_experts, capacity, alignment, partition):
    ids = make_ids(kind, num_slots, num_experts).astype(np.int64)
    capacity = num_slots if capacity is None else min(capacity, num_slots)
    filled = min(num_slots, num_experts * capacity)
    num_rows = filled + min(num_experts, filled) * (alignment - 1)
    slot_of_row, row_of_slot = (np.full(size + 1, -7, dtype=np.int32) for size in (num_rows, num_slots))
    row_visits, slot_visits = (np.zeros(size + 1, dtype=np.int32) for size in (num_rows, num_slots))
    partition.plan(ids.ctypes.data, num_slots, num_experts, capacity, alignment, num_rows,
                   *(x.ctypes.data for x in (slot_of_row, row_of_slot, row_visits, slot_visits)))  # fmt: skip
    assert (row_visits[:-1] == 1).all() and (slot_visits[:-1] == 1).all()
    assert row_visits[-1] == 0 and slot_visits[-1] == 0
    # Against the definition: stable, in slot order, the first `capacity` of every expert, padded.
    expected, start = np.full(num_rows, -1), 0
    for expert in range(num_experts):
        kept = np.flatnonzero(ids == expert)[:capacity]
        expected[start : start + len(kept)] = kept
        start += -(-len(kept) // alignment) * alignment
    assert (slot_of_row[:-1] == expected).all()
    rows = np.flatnonzero(expected >= 0)
    inverse = np.full(num_slots, -1)
    inverse[expected[rows]] = rows
    assert (row_of_slot[:-1] == inverse).all()


@pytest.mark.parametrize("num_slots", [2**31 - 1, 2**31 - 33, 2**30 + 1])
@pytest.mark.parametrize("num_experts", [1, 100, 6000])
def test_sizes_near_the_end_of_int32(num_slots, num_experts, partition):
    """The warps' ranges follow each other without gap or overlap, from 0 to the last slot; so do the tails."""
    blocks, warps, out = partition.blocks(num_slots, num_experts), partition.warps(num_experts), np.zeros(2, np.int64)
    end = 0
    for block in range(blocks):
        for warp in range(warps):
            partition.range(num_slots, blocks, block, warps, warp, out.ctypes.data)
            assert out[0] == end and out[1] >= end and (out[0] % LANES == 0 or out[0] == num_slots)
            end = out[1]
    assert end == num_slots
    end = first = num_slots - 1000
    for block in range(blocks):
        partition.tail(first, num_slots, blocks, block, out.ctypes.data)
        assert out[0] == end and out[1] >= end
        end = out[1]
    assert end == num_slots


@pytest.mark.parametrize("num_experts", [1, 2, 3, 8, 60, 128, 256, 257, 512, 513, 1024, 6000])
def test_counters_fit(num_experts, partition):
    """In shared memory, and the threads that share an expert are lanes of one warp."""
    warps, threads = partition.warps(num_experts), partition.threads(num_experts)
    assert 1 <= warps <= WARPS and (warps + 1) * num_experts <= SHARED_WORDS
    assert threads in (1, 2, 4, 8, 16, 32) and (threads == 1 or threads * num_experts <= THREADS)
    assert partition.blocks(2**31 - 1, num_experts) * num_experts <= max(32 * 1024, num_experts)


@pytest.mark.parametrize("first_row", [0, 90, 100, 10**9, 2**31 - 1])
def test_tail_never_leaves_the_rows(first_row, partition):
    """Whatever the sums of counts say."""
    out = np.zeros(2, dtype=np.int64)
    for block in range(7):
        partition.tail(first_row, 100, 7, block, out.ctypes.data)
        assert min(first_row, 100) <= out[0] <= out[1] <= 100
