// The functions of csrc/grouped_gemm/sm90/hopper.h on the CPU.
//
// Asynchrony is modelled at its worst. A TMA load or cp.async poisons its destination when it is issued and delivers at
// a random later time; a TMA store and a wgmma read shared memory, and a wgmma writes accumulators, only when the
// thread waits for them. So a stage read too early or refilled too early gives NaN, and a wait that is missing gives
// stale values. A wgmma decodes its descriptors bit by bit. What this thread wrote by ordinary stores counts as
// invisible to TMA and wgmma until its fence_proxy_async, and what came by cp.async until the reader's. What the
// hardware leaves undefined ends the process: barriers that overflow, are used before their fence, or are passed a
// phase late; buffers outside the shared memory of the launch; descriptors and tensor maps against the rules of the PTX
// ISA and cuTensorMapEncodeTiled; registers that a multiprocessor has not; copies that never end; lanes of a warp that
// issue different wgmmas; arrivals and copies at a block of the cluster that has ended; deadlocks.
#pragma once

#include <cstdint>

#include "../../csrc/grouped_gemm/sm90/operand_layout.h"
#include "cuda_emulator.h"

#define MOE_GRID_CONSTANT

namespace moe_ext::sm90 {

struct alignas(64) TensorMap {  // as CUtensorMap
  const char* data;
  int element_bytes, rank;
  int64_t sizes[3];
  int64_t strides[3];  // in bytes
  int box[3];
};

using Barrier = uint64_t;

uint32_t shared_address(const void* pointer);

void barrier_init(Barrier* barrier, uint32_t arrivals);
void barrier_init_fence();
void barrier_arrive(Barrier* barrier);
void barrier_arrive_at(Barrier* barrier, unsigned rank);
void barrier_arrive_expect(Barrier* barrier, uint32_t bytes);
void barrier_wait(Barrier* barrier, uint32_t parity);
void named_barrier(int id, int threads);
inline void cluster_sync() { moe_emulator::sync_cluster(); }
void fence_proxy_async();

inline void prefetch_map(const TensorMap&) {}
void tma_load(const TensorMap& map, Barrier* barrier, void* shared, int32_t x, int32_t y, int32_t z = 0);
void tma_load_to_cluster(const TensorMap& map, Barrier* barrier, void* shared, uint16_t ranks, int32_t x, int32_t y,
                         int32_t z = 0);
void tma_store(const TensorMap& map, const void* shared, int32_t x, int32_t y, int32_t z);
void tma_store_commit();
void tma_store_wait(int groups);
template <int groups>
void tma_store_wait_read() {
  tma_store_wait(groups);
}
inline void tma_store_wait_all() { tma_store_wait(0); }

void copy_async_16(void* shared, const void* source, bool valid);
void copy_async_arrive(Barrier* barrier);
void copy_async_wait_all();

void store_shared_bytes(void* shared, const void* bytes, int count);
inline void store_shared(void* shared, float first, float second) {
  const float values[2] = {first, second};
  store_shared_bytes(shared, values, 8);
}
inline void store_shared_16(void* shared, const Chunk& value) { store_shared_bytes(shared, &value, 16); }
void store_matrices(void* row, const uint32_t (&matrices)[4]);
Chunk load_shared_16(const void* shared);
void store_global_16(void* global, const Chunk& value);

template <typename Element>
uint32_t pack(float first, float second) {
  const Element pair[2] = {static_cast<Element>(first), static_cast<Element>(second)};
  uint32_t packed;
  std::memcpy(&packed, pair, sizeof(packed));
  return packed;
}

void set_registers(int registers, bool more);
template <int registers>
void take_registers() {
  set_registers(registers, true);
}
template <int registers>
void give_registers() {
  set_registers(registers, false);
}

using ToFloat = float (*)(const void*);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait_for(int groups);
template <int groups>
void wgmma_wait() {
  wgmma_wait_for(groups);
}
template <int count>
void hold_registers(float (&accumulators)[count]) {}
void wgmma_issue(float* accumulators, int columns, uint64_t descriptor_a, uint64_t descriptor_b, bool a_is_k_major,
                 bool b_is_k_major, bool accumulate, ToFloat to_float);

template <typename Element, int columns, Major a, Major b>
void wgmma(float (&accumulators)[columns / 2], uint64_t descriptor_a, uint64_t descriptor_b, bool accumulate) {
  wgmma_issue(accumulators, columns, descriptor_a, descriptor_b, static_cast<int>(a) == 0, static_cast<int>(b) == 0,
              accumulate, [](const void* element) {
                Element value;
                std::memcpy(&value, element, sizeof(value));
                return static_cast<float>(value);
              });
}

}  // namespace moe_ext::sm90
