// What the sm_90a kernels use of the hardware, one function per instruction; tests/emulation/hopper_emulator.h has a
// model of each under the same name. Every asm that orders memory names "memory": the compiler may move no access
// across it.
#pragma once

#include "operand_layout.h"
#include "tensor_map.h"

#ifndef MOE_EXT_EMULATED
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "../../common/dtypes.h"

#define MOE_GRID_CONSTANT __grid_constant__

namespace moe_ext::sm90 {

using Barrier = uint64_t;

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- mbarriers: a phase ends when `arrivals` have come and all expected bytes
__device__ inline void barrier_init(Barrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to TMA; a barrier of the block or cluster must follow.
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// At the barrier in the same place of a block of the cluster. Says that memory has been read, not written: a release to
// the cluster would be a fence of the whole GPU.
__device__ inline void barrier_arrive_at(Barrier* barrier, unsigned rank) {
  asm volatile(
      "{\n\t"
      ".reg .b32 there;\n\t"
      "mapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
__device__ inline void barrier_arrive_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Until the phase of this parity has ended. A fresh barrier is in phase 0, so parity 1 passes at once.
__device__ inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n\t"
      ".reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@done bra over;\n\t"
      "bra again;\n\t"
      "over:\n\t"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Barrier `id` (1 to 15) among `threads` threads of the block.
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// All threads of all blocks of the cluster meet; what they did before, arrivals at each other's barriers too, is done.
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// What this thread wrote to shared memory, and what it has seen other threads' copies arrive with at a barrier, becomes
// visible to TMA and wgmma: of others once they have synchronised with it, of its own at once.
__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- TMA
__device__ inline void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}
constexpr uint64_t kEvictNormal = 0x1000000000000000;
__device__ inline void tma_load(const TensorMap& map, Barrier* barrier, void* shared, int32_t x, int32_t y) {
  cute::SM90_TMA_LOAD_2D::copy(&map, barrier, kEvictNormal, shared, x, y);
}
__device__ inline void tma_load(const TensorMap& map, Barrier* barrier, void* shared, int32_t x, int32_t y, int32_t z) {
  cute::SM90_TMA_LOAD_3D::copy(&map, barrier, kEvictNormal, shared, x, y, z);
}
// To the same place of every block of the cluster in the bit mask `ranks`, its own bytes counted by each one's barrier.
__device__ inline void tma_load_to_cluster(const TensorMap& map, Barrier* barrier, void* shared, uint16_t ranks,
                                           int32_t x, int32_t y) {
  cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&map, barrier, ranks, kEvictNormal, shared, x, y);
}
__device__ inline void tma_load_to_cluster(const TensorMap& map, Barrier* barrier, void* shared, uint16_t ranks,
                                           int32_t x, int32_t y, int32_t z) {
  cute::SM90_TMA_LOAD_MULTICAST_3D::copy(&map, barrier, ranks, kEvictNormal, shared, x, y, z);
}
__device__ inline void tma_store(const TensorMap& map, const void* shared, int32_t x, int32_t y, int32_t z) {
  cute::SM90_TMA_STORE_3D::copy(&map, shared, x, y, z);
}
// Stores of a thread since its last commit form a group, an empty one too.
__device__ inline void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but the last `groups` groups of this thread have read their shared memory.
template <int groups>
__device__ inline void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(groups) : "memory");
}
__device__ inline void tma_store_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// ---- cp.async: 16 bytes, zeros if not `valid` (then `source` is not read)
__device__ inline void copy_async_16(void* shared, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}
// Arrives at the barrier, as one of the arrivals it was initialised with, once all copies of this thread have landed.
__device__ inline void copy_async_arrive(Barrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Until all copies of this thread have landed.
__device__ inline void copy_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- shared memory by ordinary stores and loads
__device__ inline void store_shared(void* shared, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared_address(shared)), "f"(first), "f"(second) : "memory");
}
__device__ inline void store_shared_16(void* shared, const Chunk& value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)), "r"(value.words[0]),
               "r"(value.words[1]), "r"(value.words[2]), "r"(value.words[3])
               : "memory");
}
__device__ inline Chunk load_shared_16(const void* shared) {
  Chunk value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.words[0]), "=r"(value.words[1]), "=r"(value.words[2]), "=r"(value.words[3])
               : "r"(shared_address(shared))
               : "memory");
  return value;
}

// Four 8 x 8 matrices of 16-bit elements from a warp's registers. Of matrix i, lane l holds elements 2 (l % 4) and
// 2 (l % 4) + 1 of row l / 4, and the `row` of lane 8 i + r is where its row r goes.
__device__ inline void store_matrices(void* row, const uint32_t (&matrices)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
}

// One 16-byte store to device memory, which the compiler would not always make of a struct.
__device__ inline void store_global_16(void* global, const Chunk& value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(value.words[0]), "r"(value.words[1]),
               "r"(value.words[2]), "r"(value.words[3])
               : "memory");
}

// Two floats to two 16-bit elements, round to nearest even; the first in the low half.
template <typename Element>
__device__ inline uint32_t pack(float first, float second) {
  uint32_t packed;
  if constexpr (std::is_same_v<Element, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  }
  return packed;
}

// ---- registers per thread from here on; all warps of a warpgroup must call
template <int registers>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// ---- wgmma: called by the 128 threads of a warpgroup together
__device__ inline void wgmma_fence() { cute::warpgroup_arrive(); }
__device__ inline void wgmma_commit() { cute::warpgroup_commit_batch(); }
// Until all but the last `groups` committed groups are done: shared memory read, accumulators written.
template <int groups>
__device__ inline void wgmma_wait() {
  cute::warpgroup_wait<groups>();
}
// The compiler keeps accumulators in their registers across this point.
template <int count>
__device__ inline void hold_registers(float (&accumulators)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) cute::warpgroup_fence_operand(accumulators[i]);
}

template <typename Element, int columns, cute::SM90::GMMA::Major a, cute::SM90::GMMA::Major b>
struct WgmmaInstruction;
#define MOE_WGMMA(columns, element, name)                                            \
  template <cute::SM90::GMMA::Major a, cute::SM90::GMMA::Major b>                    \
  struct WgmmaInstruction<element, columns, a, b> {                                  \
    using type = cute::SM90::GMMA::MMA_64x##columns##x16_F32##name##name##_SS<a, b>; \
  };
MOE_WGMMA(256, BFloat16, BF16)
MOE_WGMMA(128, BFloat16, BF16)
MOE_WGMMA(256, Half, F16)
MOE_WGMMA(128, Half, F16)
#undef MOE_WGMMA

// accumulators = A B^T (+ accumulators): A 64 x 16 and B columns x 16 behind the descriptors; see fragment_position.
template <typename Element, int columns, Major a, Major b>
__device__ inline void wgmma(float (&accumulators)[columns / 2], uint64_t descriptor_a, uint64_t descriptor_b,
                             bool accumulate) {
  using Instruction = typename WgmmaInstruction<Element, columns, static_cast<cute::SM90::GMMA::Major>(a),
                                                static_cast<cute::SM90::GMMA::Major>(b)>::type;
  [&]<size_t... i>(std::index_sequence<i...>) {
    Instruction::fma(descriptor_a, descriptor_b, accumulators[i]...,
                     accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
  }(std::make_index_sequence<columns / 2>{});
}

}  // namespace moe_ext::sm90
#endif
