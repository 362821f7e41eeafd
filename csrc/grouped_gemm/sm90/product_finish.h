// From the accumulators of product_kernel.h to memory.
#pragma once

#include "product_kernel.h"

namespace moe_ext::sm90 {

// One warpgroup's two buffers of shared memory, taken in turns. A buffer is opened, written by all threads, closed with
// at most one TMA store, and opened again when that store has read it.
struct Staging {
  char* buffers;
  int barrier;
  int thread;
  int current = 0;

  // The buffer to write, once the store before the last one has left it.
  __device__ char* open() {
    if (thread == 0) tma_store_wait_read<1>();
    named_barrier(barrier, kWarpgroup);
    return buffers + current * kPieceBytes;
  }
  // After every thread has written: all may read, and TMA too.
  __device__ void written() {
    fence_proxy_async();
    named_barrier(barrier, kWarpgroup);
  }
  __device__ void close() {
    if (thread == 0) tma_store_commit();
    current ^= 1;
  }
};

// Two neighbouring 16-bit elements as floats.
template <typename Element>
__device__ float2 load_pair(const Element* pair) {
  const auto packed = *reinterpret_cast<const Vector<Element, 2>*>(pair);
  return {static_cast<float>(packed.values[0]), static_cast<float>(packed.values[1])};
}

// Accumulator columns first to first + 128 / sizeof(Output) of 64 rows into a buffer, with `bias` (of these columns, or
// null; `columns` of it exist) added.
template <typename Output, int count>
__device__ void write_piece(char* buffer, const float (&accumulators)[count], int first, int thread,
                            const Output* bias, int64_t columns) {
  const int row = thread / kWarpSize * 16 + thread % kWarpSize / 4;
#pragma unroll
  for (int block = 0; block < kRowBytes / static_cast<int>(sizeof(Output)) / 8; ++block) {
    const int column = block * 8 + thread % 4 * 2;
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = accumulators[(first / 8 + block) * 4 + i];
    char* upper = buffer + swizzled(row, column * static_cast<int>(sizeof(Output)));
    char* lower = upper + 8 * kRowBytes;
    if constexpr (sizeof(Output) == 4) {
      store_shared(upper, values[0], values[1]);
      store_shared(lower, values[2], values[3]);
    } else {
      if (bias && column < columns) {
        const float2 added = load_pair(bias + column);
        values[0] += added.x, values[1] += added.y, values[2] += added.x, values[3] += added.y;
      }
      store_shared(upper, pack<Output>(values[0], values[1]));
      store_shared(lower, pack<Output>(values[2], values[3]));
    }
  }
}

// The first `rows` rows and `columns` columns of a written buffer to `output`, 16 bytes per thread at a time.
template <typename Output>
__device__ void copy_rows(const char* buffer, Output* output, int64_t leading, int64_t rows, int64_t columns,
                          int thread) {
  constexpr int kRowChunks = kRowBytes / 16, kChunkElements = 16 / sizeof(Output);
#pragma unroll
  for (int i = 0; i < kPieceRows * kRowChunks / kWarpgroup; ++i) {
    const int row = (i * kWarpgroup + thread) / kRowChunks, chunk = thread % kRowChunks;
    if (row < rows && chunk * kChunkElements < columns) {
      *reinterpret_cast<uint4*>(output + row * leading + chunk * kChunkElements) =
          load_shared_16(buffer + swizzled(row, chunk * 16));
    }
  }
}

template <typename Config>
__device__ void store_product(const ProductArguments& arguments, const Work& work, const MathThread& self,
                              Staging& staging, const float (&accumulators)[Config::kWarpgroupColumns / 2]) {
  using Output = typename Config::Output;
  constexpr int kPieceColumns = kRowBytes / sizeof(Output);
  const int64_t row = work.row + self.first_row, rows = work.row_end - row;
  if (rows <= 0) return;
#pragma unroll
  for (int first = 0; first < Config::kWarpgroupColumns; first += kPieceColumns) {
    const int64_t column = work.column + self.first_column + first, columns = arguments.columns - column;
    if (columns <= 0) break;
    char* buffer = staging.open();
    const auto* bias = static_cast<const Output*>(arguments.bias);
    write_piece(buffer, accumulators, first, self.thread,
                bias ? bias + work.expert * arguments.columns + column : nullptr, columns);
    staging.written();
    // Columns past the end, and rows past the end of an expert's matrix, are dropped by TMA; the next expert's rows
    // are not.
    if (Config::kWgrad || rows >= kPieceRows) {
      if (self.thread == 0) {
        const int x = static_cast<int>(column), y = static_cast<int>(row);
        Config::kWgrad ? tma_store(arguments.d, buffer, x, y, static_cast<int>(work.expert))
                       : tma_store(arguments.d, buffer, x, 0, y);
      }
    } else {
      copy_rows(buffer, static_cast<Output*>(arguments.output) + row * arguments.columns + column, arguments.columns,
                rows, columns, self.thread);
    }
    staging.close();
  }
}

template <typename Config>
__device__ void compute(const ProductArguments& arguments, const SharedMemory<Config>& shared, int warpgroup) {
  const MathThread self = {warpgroup, static_cast<int>(threadIdx.x) % kWarpgroup,
                           Config::kSplitsColumns ? 0 : warpgroup * kPieceRows,
                           Config::kSplitsColumns ? warpgroup * Config::kWarpgroupColumns : 0};
  Staging staging = {shared.staging + warpgroup * 2 * kPieceBytes, kFirstWarpgroupBarrier + warpgroup, self.thread};
  RingPosition<Config::kStages> position;
  WorkQueue<Config> queue(arguments);
  for (Work work; queue.next(&work);) {
    float accumulators[Config::kWarpgroupColumns / 2];
    multiply<Config>(work, shared, self, position, accumulators);
    store_product<Config>(arguments, work, self, staging, accumulators);
  }
  if (self.thread == 0) tma_store_wait_all();
}

}  // namespace moe_ext::sm90
