// Runs the project's CUDA kernels on the CPU, so that machines without a GPU can test them.
//
// The .cu files are compiled as C++ with this header in place of the CUDA runtime. Blocks run one after the other,
// those of a cluster together; their threads are fibers on one OS thread. A fiber runs until it meets a barrier or a
// warp collective, then the next one runs: between two barriers threads never interleave, but their order is shuffled
// (MOE_EMULATOR_SEED), so a missing barrier shows as a wrong result. Shared memory is poisoned before each block. A
// barrier that part of a block never reaches, or a collective whose mask names lanes that never come, ends the process
// with a message. Kernels of clusters may have no static shared memory: their blocks would share it. Timing, occupancy
// and memory ordering between blocks are out of scope. mma.sync and cp.async: sm80_emulator.h; what sm_90a adds
// (mbarriers, TMA, wgmma, ...) is modelled by hopper_emulator.h through the hooks below.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

namespace moe_emulator {

extern dim3 thread_index, block_index, block_size, grid_size;

constexpr int kWarpSize = 32;
constexpr size_t kMaxSharedBytes = 227 * 1024;  // what a block can opt into on sm_90
constexpr size_t kDefaultSharedBytes = 48 * 1024;
constexpr unsigned kMaxThreads = 1024;  // of a block
constexpr unsigned kMaxCluster = 2;     // blocks; the hardware takes 8

// Runs `thread` once for every thread of every block; `cluster` blocks along x form a cluster.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread, unsigned cluster = 1);

unsigned cluster_rank();  // of the block that runs, in its cluster
unsigned cluster_size();
bool block_ended(unsigned rank);         // all threads of this block of the cluster
void* dynamic_shared();                  // 1024-byte aligned
void* dynamic_shared_of(unsigned rank);  // they lie kMaxSharedBytes apart
size_t dynamic_shared_bytes();
// A launch that wants more than kDefaultSharedBytes must have asked for it, anew each time: the device may be another.
void allow_shared(const void* kernel, size_t bytes);
void require_shared(const void* kernel, size_t bytes);
void sync_block();
void sync_cluster();

// Ends the process, naming block and thread.
[[noreturn]] void fail(const std::string& message);
unsigned linear_thread();  // in its block
// The other threads of the block run until `ready` holds.
void wait_until(const std::function<bool()>& ready);
// An asynchronous copy in flight: carried out at a random later time, in random order, when all threads wait at the
// latest. A block ends only after all of its copies.
void deliver_later(std::function<void()> delivery);
// Called as each block, or cluster, starts and after it has ended.
void on_block(std::function<void()> start, std::function<void()> end);

// Every lane of `mask` leaves its 8 bytes; returns the 32 slots once all of them have come.
const uint64_t* exchange(unsigned mask, uint64_t value);
int lane();

template <typename T>
T from_slot(uint64_t slot) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  T value;
  std::memcpy(&value, &slot, sizeof(T));
  return value;
}

template <typename T>
const uint64_t* exchange_value(unsigned mask, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t slot = 0;
  std::memcpy(&slot, &value, sizeof(T));
  return exchange(mask, slot);
}

}  // namespace moe_emulator

#define threadIdx (::moe_emulator::thread_index)
#define blockIdx (::moe_emulator::block_index)
#define blockDim (::moe_emulator::block_size)
#define gridDim (::moe_emulator::grid_size)

inline void __syncthreads() { moe_emulator::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { moe_emulator::exchange(mask, 0); }

// ---- warp collectives
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = moe_emulator::kWarpSize) {
  const int first = moe_emulator::lane() / width * width;
  return moe_emulator::from_slot<T>(moe_emulator::exchange_value(mask, value)[first + (source & (width - 1))]);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = moe_emulator::kWarpSize) {
  const int lane = moe_emulator::lane(), source = lane ^ lane_mask;
  const uint64_t* slots = moe_emulator::exchange_value(mask, value);
  return source / width > lane / width ? value : moe_emulator::from_slot<T>(slots[source]);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = moe_emulator::kWarpSize) {
  const int lane = moe_emulator::lane(), source = lane - static_cast<int>(delta);
  const uint64_t* slots = moe_emulator::exchange_value(mask, value);
  return source < lane / width * width ? value : moe_emulator::from_slot<T>(slots[source]);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = moe_emulator::kWarpSize) {
  const int lane = moe_emulator::lane(), source = lane + static_cast<int>(delta);
  const uint64_t* slots = moe_emulator::exchange_value(mask, value);
  return source >= (lane / width + 1) * width ? value : moe_emulator::from_slot<T>(slots[source]);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* slots = moe_emulator::exchange_value(mask, predicate != 0);
  unsigned ballot = 0;
  for (int i = 0; i < moe_emulator::kWarpSize; ++i) ballot |= (mask >> i & 1) && slots[i] ? 1u << i : 0u;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  const uint64_t* slots = moe_emulator::exchange_value(mask, value);
  unsigned peers = 0;
  for (int i = 0; i < moe_emulator::kWarpSize; ++i) {
    if ((mask >> i & 1) && moe_emulator::from_slot<T>(slots[i]) == value) peers |= 1u << i;
  }
  return peers;
}
inline uint32_t __reduce_max_sync(unsigned mask, uint32_t value) {
  const uint64_t* slots = moe_emulator::exchange_value(mask, value);
  uint32_t best = 0;
  for (int i = 0; i < moe_emulator::kWarpSize; ++i) {
    const auto other = static_cast<uint32_t>(slots[i]);
    if ((mask >> i & 1) && other > best) best = other;
  }
  return best;
}
inline int __syncthreads_or(int predicate) {
  static int any;
  if (moe_emulator::thread_index.x == 0) any = 0;
  __syncthreads();
  if (predicate) any = 1;
  __syncthreads();
  const int result = any;
  __syncthreads();
  return result;
}

// ---- single-thread intrinsics
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline int __clz(int value) { return value ? __builtin_clz(static_cast<unsigned>(value)) : 32; }
inline float __expf(float value) { return std::exp(value); }
inline float __logf(float value) { return std::log(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float value) { return 1.f / std::sqrt(value); }
inline float __int_as_float(int bits) { return moe_emulator::from_slot<float>(static_cast<uint32_t>(bits)); }
inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline unsigned __float_as_uint(float value) { return static_cast<unsigned>(__float_as_int(value)); }
inline float __uint_as_float(unsigned bits) { return moe_emulator::from_slot<float>(bits); }
template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <typename T>
T __ldcg(const T* pointer) {
  return *pointer;
}
// Blocks run one after the other.
inline void __threadfence() {}
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = old < value ? value : old;
  return old;
}
template <typename T>
T atomicOr(T* address, T value) {
  const T old = *address;
  *address = old | value;
  return old;
}

// ---- the runtime calls that launchers make
inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}
