"""The emulator of tests/emulation ends a kernel that breaks a rule of the hardware: one small kernel for each rule."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from host_library import find_compiler

EMULATION = Path(__file__).resolve().parent / "emulation"
PROGRAM = r"""
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>

#include "grouped_gemm/sm90/tensor_map.h"
#include "hopper_emulator.h"

using namespace moe_ext::sm90;
using moe_emulator::linear_thread;

constexpr int kBytes = 64 * 1024;
char* shared() { return static_cast<char*>(moe_emulator::dynamic_shared()); }
Barrier* barrier() { return reinterpret_cast<Barrier*>(shared() + kBytes - 64); }
bool first() { return linear_thread() == 0; }
alignas(16) char memory[1 << 20];

void block(int threads, const std::function<void()>& kernel) { moe_emulator::run_grid(1, threads, kBytes, kernel); }
void pair(const std::function<void()>& kernel) { moe_emulator::run_grid(2, 32, kBytes, kernel, 2); }
void init(bool fence = true) {
  if (first()) {
    barrier_init(barrier(), 1);
    if (fence) barrier_init_fence();
  }
  __syncthreads();
}
TensorMap encode(TensorMapSpec spec) {
  TensorMap map;
  if (const char* error = encode_tensor_map(&map, spec)) moe_emulator::fail(error);
  return map;
}
TensorMapSpec matrix() { return {memory, MapType::kBFloat16, 2, {128, 64}, {1, 128}, {64, 64}}; }
// Shared memory holds zeros, written as a kernel must.
void fill() {
  for (int i = linear_thread() * 16; i < kBytes / 2; i += 128 * 16) store_shared_16(shared() + i, Chunk{});
  fence_proxy_async();
  __syncthreads();
}
void multiply(const std::function<uint64_t(uint64_t)>& change, Major major) {
  block(128, [&] {
    float sums[64];
    fill();
    const uint64_t right = make_descriptor(shared_address(shared()), Major::kK);
    wgmma_fence();
    wgmma_issue(sums, 128, right, change(make_descriptor(shared_address(shared()), major)), true, major == Major::kK,
                false, [](const void*) { return 0.f; });
    wgmma_commit();
    wgmma_wait_for(0);
  });
}
void load(const TensorMap& map, char* target) {
  block(32, [&] {
    init();
    if (first()) {
      barrier_arrive_expect(barrier(), 8192);
      tma_load(map, barrier(), target, 0, 0);
      barrier_wait(barrier(), 0);
    }
  });
}
// Each block loads half of 16 KiB into both, once the other's barrier is ready.
void load_to_pair(const TensorMap& map, int64_t bytes) {
  pair([&] {
    init();
    cluster_sync();
    const unsigned rank = moe_emulator::cluster_rank();
    if (first()) {
      barrier_arrive_expect(barrier(), bytes);
      tma_load_to_cluster(map, barrier(), shared() + 8192 * rank, 3, 64 * rank, 0);
      barrier_wait(barrier(), 0);
      if (std::memcmp(shared(), shared() + 8192, 8192) != 0) moe_emulator::fail("halves of zeros differ");
    }
    cluster_sync();
  });
}

int main(int, char** arguments) {
  const std::map<std::string, std::function<void()>> kernels = {
      {"right", [] {
         multiply([](uint64_t d) { return d; }, Major::kK);
         multiply([](uint64_t d) { return d; }, Major::kMN);
         load(encode(matrix()), shared());
         load_to_pair(encode(matrix()), 16384);
       }},
      {"pair bytes", [] { load_to_pair(encode(matrix()), 24576); }},
      {"pair fence", [] {
         pair([] {
           if (moe_emulator::cluster_rank() == 0) init();
           if (moe_emulator::cluster_rank() == 0 && first()) barrier_arrive_at(barrier(), 1);
           cluster_sync();
         });
       }},
      {"pair ended", [] {
         pair([] {
           init();
           cluster_sync();
           if (moe_emulator::cluster_rank() == 1 || !first()) return;
           moe_emulator::wait_until([] { return moe_emulator::block_ended(1); });
           barrier_arrive_at(barrier(), 1);
         });
       }},
      {"pair rank", [] { block(32, [] { init(); if (first()) barrier_arrive_at(barrier(), 1); }); }},
      {"pair grid", [] { moe_emulator::run_grid(3, 32, kBytes, [] {}, 2); }},
      {"fence", [] { block(32, [] { init(false); if (first()) barrier_arrive(barrier()); }); }},
      {"phase", [] {
         block(32, [] {
           init();
           if (!first()) return;
           barrier_arrive(barrier());
           barrier_wait(barrier(), 0);
           for (int i = 0; i < 3; ++i) barrier_arrive(barrier());
           barrier_wait(barrier(), 1);
         });
       }},
      {"parity", [] { block(32, [] { init(); barrier_wait(barrier(), 2); }); }},
      {"expect", [] { block(32, [] { init(); if (first()) barrier_arrive_expect(barrier(), 1 << 20); }); }},
      {"missing bytes", [] {
         const TensorMap map = encode(matrix());
         block(32, [&] {
           init();
           if (first()) {
             barrier_arrive_expect(barrier(), 4096);
             tma_load(map, barrier(), shared(), 0, 0);
             barrier_wait(barrier(), 0);
           }
         });
       }},
      {"outside", [] { block(32, [] { store_shared(shared() + kBytes, 0.f, 0.f); }); }},
      {"tma outside", [] { load(encode(matrix()), shared() + kBytes - 1024); }},
      {"tma aligned", [] { load(encode(matrix()), shared() + 512); }},
      {"tma unfenced", [] {
         const TensorMap map = encode(matrix());
         block(32, [&] {
           init();
           if (!first()) return;
           store_shared(shared(), 0.f, 0.f);
           barrier_arrive_expect(barrier(), 8192);
           tma_load(map, barrier(), shared(), 0, 0);
         });
       }},
      {"map not encoded", [] { load(TensorMap{}, shared()); }},
      {"map stride", [] { auto spec = matrix(); spec.strides[1] = 132; encode(spec); }},
      {"map overlap", [] { auto spec = matrix(); spec.strides[1] = 64; encode(spec); }},
      {"map box", [] { auto spec = matrix(); spec.box[1] = 257; encode(spec); }},
      {"map row", [] { auto spec = matrix(); spec.box[0] = 32; encode(spec); }},
      {"map data", [] { auto spec = matrix(); spec.data = memory + 2; encode(spec); }},
      {"reserved", [] { multiply([](uint64_t d) { return d | uint64_t{1} << 46; }, Major::kK); }},
      {"swizzle", [] { multiply([](uint64_t d) { return d & ~(uint64_t{3} << 62); }, Major::kK); }},
      {"base offset", [] { multiply([](uint64_t d) { return d | uint64_t{1} << 49; }, Major::kK); }},
      {"stride", [] { multiply([](uint64_t d) { return d & ~(uint64_t{0x3fff} << 32) | uint64_t{32} << 32; }, Major::kK); }},
      {"leading", [] { multiply([](uint64_t d) { return d & ~(uint64_t{0x3fff} << 16) | uint64_t{1} << 16; }, Major::kMN); }},
      {"start", [] { multiply([](uint64_t d) { return d + 8; }, Major::kK); }},
      {"operand outside", [] { multiply([](uint64_t d) { return d + kBytes / 16 - 512; }, Major::kK); }},
      {"registers", [] { block(384, [] { take_registers<240>(); }); }},
      {"raise", [] { block(384, [] { take_registers<56>(); }); }},
      {"multiple of 8", [] { block(384, [] { give_registers<60>(); }); }},
      {"named barrier", [] { block(32, [] { named_barrier(0, 32); }); }},
      {"whole warps", [] { block(32, [] { named_barrier(1, 16); }); }},
      {"global", [] { block(32, [] { store_global_16(memory + 8, Chunk{}); }); }},
      {"not asked", [] { moe_emulator::require_shared(memory, 50 * 1024); }},
      {"asked once", [] {
         for (int i = 0; i < 2; ++i) {
           if (i == 0) moe_emulator::allow_shared(memory, 50 * 1024);
           moe_emulator::require_shared(memory, 50 * 1024);
         }
       }},
  };
  kernels.at(arguments[1])();
  std::printf("ended\n");
}
"""
MESSAGES = {
    "fence": "before barrier_init_fence",
    "phase": "did not see every phase",
    "parity": "is 0 or 1",
    "expect": "more bytes than it can count",
    "missing bytes": "deadlock",
    "pair bytes": "deadlock",
    "pair fence": "before it was initialised",
    "pair ended": "after it has ended",
    "pair rank": "the cluster has not",
    "pair grid": "whole clusters",
    "outside": "leaves the shared memory",
    "tma outside": "leaves the shared memory",
    "tma aligned": "aligned to 1024 bytes",
    "tma unfenced": "without fence_proxy_async",
    "map not encoded": "not encoded",
    "map stride": "bad stride",
    "map overlap": "strides overlap",
    "map box": "box out of range",
    "map row": "not 128 bytes",
    "map data": "unaligned data",
    "reserved": "bits that are reserved",
    "swizzle": "no 128B swizzle",
    "base offset": "a base offset",
    "stride": "stride is no multiple",
    "leading": "leading offset is no multiple",
    "start": "inside a swizzle atom",
    "operand outside": "leaves the shared memory",
    "registers": "more registers than the block has",
    "raise": "inc must raise",
    "multiple of 8": "a multiple of 8",
    "named barrier": "is 1 to 15",
    "whole warps": "whole warps",
    "global": "misaligned store",
    "not asked": "than was asked for",
    "asked once": "than was asked for",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    compiler = find_compiler()
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "rules.cpp").write_text(PROGRAM)
    sources = [str(folder / "rules.cpp"), *(str(EMULATION / f"{name}_emulator.cpp") for name in ("cuda", "hopper"))]
    includes = [f"-I{EMULATION}", f"-I{EMULATION.parent.parent / 'csrc'}"]
    command = [
        compiler,
        "-std=c++20",
        "-O0",
        "-w",
        "-DMOE_EXT_EMULATED",
        *includes,
        *sources,
        "-o",
        str(folder / "rules"),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return folder / "rules"


def test_a_right_kernel_ends(program):
    run = subprocess.run([str(program), "right"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "ended\n", run.stderr


@pytest.mark.parametrize("rule", MESSAGES)
def test_a_broken_rule_ends_the_process(rule, program):
    run = subprocess.run([str(program), rule], capture_output=True, text=True)
    assert run.returncode != 0 and "ended" not in run.stdout
    assert MESSAGES[rule] in run.stderr
