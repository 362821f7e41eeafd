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

  __device__ char* buffer(int index) const { return buffers + index * kPieceBytes; }
  // The buffer to write, once the store before the last one has left it.
  __device__ char* open() {
    if (thread == 0) tma_store_wait_read<1>();
    named_barrier(barrier, kWarpgroup);
    return buffer(current);
  }
  // Both buffers, once every store has left them.
  __device__ void open_both() {
    if (thread == 0) tma_store_wait_read<0>();
    named_barrier(barrier, kWarpgroup);
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
__device__ void write_piece(char* buffer, const float (&accumulators)[count], int first, int thread, const Output* bias,
                            int64_t columns) {
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
  constexpr int kChunkElements = 16 / sizeof(Output);
#pragma unroll 1
  for (int i = 0; i < kPieceRows * kRowChunks / kWarpgroup; ++i) {
    const int row = (i * kWarpgroup + thread) / kRowChunks, chunk = thread % kRowChunks;
    if (row < rows && chunk * kChunkElements < columns) {
      store_global_16(output + row * leading + chunk * kChunkElements,
                      load_shared_16(buffer + swizzled(row, chunk * 16)));
    }
  }
}

// What a written buffer holds of D: `rows` rows from `row` on belong to the group, `columns` columns from `column` on
// exist; `half` is 1 for ups that are stored behind their gates.
struct Piece {
  int64_t row, rows, column, columns;
  int half;
};

// Stores a written buffer. Columns past the end, and rows past the end of an expert's matrix, are dropped by TMA; the
// next expert's rows are not.
template <typename Config>
__device__ void store_piece(const ProductArguments& arguments, const Piece& piece, int64_t expert, int64_t leading,
                            const char* buffer, int thread) {
  using Output = typename Config::Output;
  if (Config::kWgrad || piece.rows >= kPieceRows) {
    if (thread == 0) {
      const int x = static_cast<int>(piece.column), y = static_cast<int>(piece.row);
      Config::kWgrad ? tma_store(arguments.d, buffer, x, y, static_cast<int>(expert))
                     : tma_store(arguments.d, buffer, x, piece.half, y);
    }
  } else {
    Output* output = static_cast<Output*>(arguments.output) + piece.row * leading + piece.column;
    copy_rows(buffer, output + piece.half * arguments.columns, leading, piece.rows, piece.columns, thread);
  }
}

template <typename Output>
__device__ const Output* bias_of(const ProductArguments& arguments, int64_t offset) {
  return arguments.bias ? static_cast<const Output*>(arguments.bias) + offset : nullptr;
}

template <typename Config>
__device__ void store_product(const ProductArguments& arguments, const Work& work, const MathThread& self,
                              Staging& staging, const float (&accumulators)[Config::kWarpgroupColumns / 2]) {
  using Output = typename Config::Output;
  const int64_t row = work.row + self.first_row, rows = work.row_end - row;
  if (rows <= 0) return;
#pragma unroll
  for (int first = 0; first < Config::kWarpgroupColumns; first += kRowBytes / static_cast<int>(sizeof(Output))) {
    const int64_t column = work.column + self.first_column + first, columns = arguments.columns - column;
    if (columns <= 0) break;
    char* buffer = staging.open();
    write_piece(buffer, accumulators, first, self.thread,
                bias_of<Output>(arguments, work.expert * arguments.columns + column), columns);
    staging.written();
    store_piece<Config>(arguments, {row, rows, column, columns, 0}, work.expert, arguments.columns, buffer,
                        self.thread);
    staging.close();
  }
}

// Eight 16-bit elements as floats.
template <typename Element>
__device__ void unpack(const Chunk& packed, float* values) {
  const auto elements = *reinterpret_cast<const Vector<Element, 8>*>(&packed);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = static_cast<float>(elements.values[i]);
}

template <typename Element>
__device__ Chunk packed(const float (&values)[8]) {
  Chunk result;
#pragma unroll
  for (int i = 0; i < 4; ++i) result.words[i] = pack<Element>(values[2 * i], values[2 * i + 1]);
  return result;
}

// Two buffers at a time hold D + bias, rounded as it is kept: 64 gates and their 64 ups (concatenated), or 128 columns.
// From there it is stored, and activated 8 outputs at a time in registers. So the activation is a loop that exists
// once, and sees the very values that the backward will see.
template <typename Config>
__device__ void store_activated(const ProductArguments& arguments, const Work& work, const MathThread& self,
                                Staging& staging, const float (&accumulators)[Config::kWarpgroupColumns / 2]) {
  using Element = typename Config::Element;
  constexpr cuda::RowMode kMode = Config::kMode;
  constexpr bool kPairs = Config::kPairsColumns, kInterleaved = kMode == cuda::RowMode::kInterleaved;
  constexpr int kBuffers = kMode == cuda::RowMode::kPlain ? 2 : 1;  // plain: each buffer gives outputs of its own
  const int64_t row = work.row + self.first_row, rows = work.row_end - row;
  if (rows <= 0) return;
  const int64_t width = kPairs ? 2 * arguments.columns : arguments.columns;  // of D
  const int64_t out_width = kInterleaved ? width / 2 : arguments.columns;
#pragma unroll
  for (int pair = 0; pair < Config::kWarpgroupColumns / 128; ++pair) {
    const int64_t column = work.column + (kPairs ? self.first_column / 2 + pair * 64 : self.first_column + pair * 128);
    if (column >= arguments.columns) break;
    staging.open_both();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Piece piece = {row, rows, kPairs ? column : column + i * 64,
                           arguments.columns - (kPairs ? column : column + i * 64), kPairs ? i : 0};
      const int first = kPairs ? i * Config::kWarpgroupColumns / 2 + pair * 64 : pair * 128 + i * 64;
      write_piece(staging.buffer(i), accumulators, first, self.thread,
                  bias_of<Element>(arguments, work.expert * width + piece.half * arguments.columns + piece.column),
                  piece.columns);
    }
    staging.written();
    if (arguments.output) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Piece piece = {row, rows, kPairs ? column : column + i * 64,
                             arguments.columns - (kPairs ? column : column + i * 64), kPairs ? i : 0};
        if (piece.columns > 0) {
          store_piece<Config>(arguments, piece, work.expert, width, staging.buffer(i), self.thread);
        }
      }
      if (self.thread == 0) tma_store_commit();
    }
    constexpr int kChunks = kPieceRows * kRowChunks / kWarpgroup;
#pragma unroll 1
    for (int i = 0; i < kBuffers * kChunks; ++i) {
      const int row_in_piece = (i % kChunks * kWarpgroup + self.thread) / kRowChunks;
      const int chunk = self.thread % kRowChunks, buffer = i / kChunks;
      const int64_t out_column = (kInterleaved ? column / 2 : column) + buffer * 64 + chunk * 8;
      if (row_in_piece >= rows || out_column >= out_width) continue;
      cuda::GateUpVector<8> x;
      if constexpr (kInterleaved) {
        float both[16];
        const char* source = staging.buffer(chunk / 4);
        unpack<Element>(load_shared_16(source + swizzled(row_in_piece, chunk % 4 * 32)), both);
        unpack<Element>(load_shared_16(source + swizzled(row_in_piece, chunk % 4 * 32 + 16)), both + 8);
#pragma unroll
        for (int e = 0; e < 8; ++e) x.gate[e] = both[2 * e], x.up[e] = both[2 * e + 1];
      } else {
        const int place = swizzled(row_in_piece, chunk * 16);
        unpack<Element>(load_shared_16(staging.buffer(buffer) + place), x.gate);
        if constexpr (kPairs) unpack<Element>(load_shared_16(staging.buffer(1) + place), x.up);
      }
      float value[8];
      cuda::GateUpVector<8> derivative;
      cuda::evaluate<kMode>(arguments.activation, x, value, derivative);
      store_global_16(static_cast<Element*>(arguments.activated) + (row + row_in_piece) * out_width + out_column,
                      packed<Element>(value));
    }
  }
}

// Both buffers hold the warpgroup's D = dA', rounded to 16 bits as it would be in memory; from there 8 columns of each
// at a time meet their part of H. A thread takes four rows, one after the other, so that the derivative is a loop that
// exists once; H of two rows is on its way meanwhile, the first two's while the buffers are written. The eight threads
// of a row add their parts of its dot product in a fixed order.
template <typename Config>
__device__ void store_derivatives(const ProductArguments& arguments, const Work& work, const MathThread& self,
                                  Staging& staging, const float (&accumulators)[Config::kWarpgroupColumns / 2]) {
  using Element = typename Config::Element;
  using Packed = Vector<Element, 8>;
  constexpr int kBuffers = 2, kBufferColumns = kRowBytes / static_cast<int>(sizeof(Element));
  static_assert(!Config::kSplitsColumns, "one warpgroup must own a row's partial dot product");
  static_assert(Config::kWarpgroupColumns == kBuffers * kBufferColumns);
  constexpr int kParts = Config::kMode == cuda::RowMode::kPlain ? 1 : 2;
  constexpr int kRowStride = kWarpgroup / kRowChunks, kThreadRows = kPieceRows / kRowStride;
  constexpr int kWarpRows = kWarpSize / kRowChunks;  // next to each other
  const Differentiation& to = arguments.differentiation;
  const int64_t row = work.row + self.first_row, rows = work.row_end - row;
  if (rows <= 0) return;
  const int64_t row_vectors = arguments.columns / 8;
  const int chunk = self.thread % kRowChunks, first_row = self.thread / kRowChunks;
  const int64_t first_vector = work.column / 8 + chunk;

  struct Ahead {
    cuda::PackedGateUp<Config::kMode, Element, 8> x[kBuffers];
  };
  const auto load = [&](int row_in_piece) {
    Ahead ahead = {};
    const auto* source = static_cast<const Packed*>(to.pre_activation) + (row + row_in_piece) * row_vectors * kParts;
#pragma unroll
    for (int b = 0; b < kBuffers; ++b) {
      const int64_t vector = first_vector + b * kRowChunks;
      if (row_in_piece < rows && vector < row_vectors) {
        ahead.x[b] = cuda::load_packed<Config::kMode>(source, vector, row_vectors);
      }
    }
    return ahead;
  };
  Ahead next = load(first_row), after_next = load(first_row + kRowStride);

  // Lane l looks after the slot of the warp's row l % kWarpRows of its thread row l / kWarpRows.
  static_assert(kWarpRows * kThreadRows <= kWarpSize);
  const int lane = self.thread % kWarpSize;
  const int slot_row =
      self.thread / kWarpSize * kWarpRows + lane % kWarpRows + lane / kWarpRows % kThreadRows * kRowStride;
  const int slot = slot_row < rows ? arguments.gather.permuted_to_slot[row + slot_row] : -1;
  const bool slot_held = slot >= 0 && slot < arguments.gather.num_slots;
  const float slot_weight = slot_held && to.topk_weights ? to.topk_weights[slot] : 1.f;

  staging.open_both();
#pragma unroll
  for (int b = 0; b < kBuffers; ++b) {
    write_piece<Element>(staging.buffer(b), accumulators, b * kBufferColumns, self.thread, nullptr, 0);
  }
  staging.written();

  const unsigned all_held = __ballot_sync(0xffffffffu, slot_held);
  float* partial = to.partial_dots + work.column / Config::kColumns * arguments.max_rows + row;
#pragma unroll 1
  for (int i = 0; i < kThreadRows; ++i) {
    const int row_in_piece = first_row + i * kRowStride, slot_lane = i * kWarpRows + lane / kRowChunks;
    const Ahead now = next;
    next = after_next;
    if (i + 2 < kThreadRows) after_next = load(row_in_piece + 2 * kRowStride);
    const float weight = __shfl_sync(0xffffffffu, slot_weight, slot_lane);
    const bool held = all_held >> slot_lane & 1;
    float dot = 0.f;
#pragma unroll
    for (int b = 0; b < kBuffers; ++b) {
      const int64_t vector = first_vector + b * kRowChunks, m = row + row_in_piece;
      if (row_in_piece >= rows || vector >= row_vectors) continue;
      float scaled[8] = {};
      cuda::GateUpVector<8> derivative = {};
      if (held) {
        float grad[8], value[8];
        unpack<Element>(load_shared_16(staging.buffer(b) + swizzled(row_in_piece, chunk * 16)), grad);
        cuda::evaluate<Config::kMode>(arguments.activation, cuda::unpack_gate_up(now.x[b]), value, derivative);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          dot += grad[e] * value[e];
          scaled[e] = weight * value[e];
          derivative.gate[e] *= weight * grad[e];
          if constexpr (Config::kMode != cuda::RowMode::kPlain) derivative.up[e] *= weight * grad[e];
        }
      }
      store_global_16(static_cast<Packed*>(to.scaled) + m * row_vectors + vector, packed<Element>(scaled));
      auto* gradient = static_cast<Packed*>(to.grad_pre_activation) + m * row_vectors * kParts;
      cuda::store_gate_up<Config::kMode>(gradient, vector, row_vectors, derivative);
    }
#pragma unroll
    for (int offset = 1; offset < kRowChunks; offset *= 2) dot += __shfl_xor_sync(0xffffffffu, dot, offset);
    if (chunk == 0 && row_in_piece < rows) partial[row_in_piece] = dot;
  }
}

// Zeroes the rows of no expert, before the first group and past the last, in `data` [max_rows, row_elements]: the math
// threads of all blocks together.
template <typename Element>
__device__ void zero_rows_of_no_expert(const ProductArguments& arguments, void* data, int64_t row_elements) {
  const int64_t begin = rows_of_expert(arguments.expert_offsets, 0, arguments.max_rows).begin;
  const int64_t last = rows_of_expert(arguments.expert_offsets, arguments.num_experts - 1, arguments.max_rows).end;
  const int64_t end = last < begin ? begin : last;
  const int64_t row_chunks = row_elements * static_cast<int>(sizeof(Element)) / 16;
  const int64_t head = begin * row_chunks, total = (begin + arguments.max_rows - end) * row_chunks;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kMathThreads + threadIdx.x - kWarpgroup;
  for (int64_t i = first; i < total; i += static_cast<int64_t>(gridDim.x) * kMathThreads) {
    store_global_16(static_cast<Chunk*>(data) + (i < head ? i : arguments.max_rows * row_chunks - total + i), Chunk{});
  }
}

template <typename Config>
__device__ void zero_idle_outputs(const ProductArguments& arguments) {
  using Element = typename Config::Element;
  if constexpr (Config::kFinish == Finish::kDifferentiate) {
    constexpr int kParts = Config::kMode == cuda::RowMode::kPlain ? 1 : 2;
    zero_rows_of_no_expert<Element>(arguments, arguments.differentiation.scaled, arguments.columns);
    zero_rows_of_no_expert<Element>(arguments, arguments.differentiation.grad_pre_activation,
                                    kParts * arguments.columns);
  } else {
    const int64_t width = Config::kPairsColumns ? 2 * arguments.columns : arguments.columns;
    if (arguments.output) zero_rows_of_no_expert<Element>(arguments, arguments.output, width);
    if constexpr (Config::kFinish == Finish::kActivate) {
      constexpr int kParts = Config::kMode == cuda::RowMode::kPlain ? 1 : 2;
      zero_rows_of_no_expert<Element>(arguments, arguments.activated, width / kParts);
    }
  }
}

template <typename Config>
__device__ void compute(const ProductArguments& arguments, const SharedMemory<Config>& shared, int warpgroup) {
  const MathThread self = {warpgroup, static_cast<int>(threadIdx.x) % kWarpgroup,
                           Config::kSplitsColumns ? 0 : warpgroup * kPieceRows,
                           Config::kSplitsColumns ? warpgroup * Config::kWarpgroupColumns : 0};
  Staging staging = {shared.staging + warpgroup * 2 * kPieceBytes, kFirstWarpgroupBarrier + warpgroup, self.thread};
  RingPosition<Config::kStages> position;
  if constexpr (!Config::kWgrad) zero_idle_outputs<Config>(arguments);
  WorkQueue<Config> queue(arguments);
  for (Work work; queue.next(&work);) {
    float accumulators[Config::kWarpgroupColumns / 2];
    multiply<Config>(work, shared, self, position, accumulators);
    if constexpr (Config::kFinish == Finish::kActivate) {
      store_activated<Config>(arguments, work, self, staging, accumulators);
    } else if constexpr (Config::kFinish == Finish::kDifferentiate) {
      store_derivatives<Config>(arguments, work, self, staging, accumulators);
    } else {
      store_product<Config>(arguments, work, self, staging, accumulators);
    }
  }
  if (self.thread == 0) tma_store_wait_all();
}

}  // namespace moe_ext::sm90
