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

// Adds `bias`, of accumulator column `first` and the 63 after it, of which `columns` exist.
template <typename Element, int count>
__device__ void add_bias(float (&accumulators)[count], int first, int thread, const Element* bias, int64_t columns) {
  const int own = thread % 4 * 2, left = static_cast<int>(columns < 64 ? columns : 64) - own;
#pragma unroll
  for (int block = 0; block < 8; ++block) {
    if (block * 8 >= left) continue;
    const float2 added = load_pair(bias + own + block * 8);
    float* values = accumulators + (first / 8 + block) * 4;
    values[0] += added.x, values[1] += added.y, values[2] += added.x, values[3] += added.y;
  }
}

// Accumulator columns first to first + 128 / sizeof(Output) of 64 rows into a buffer.
template <typename Output, int count>
__device__ void write_piece(char* buffer, const float (&accumulators)[count], int first, int thread) {
  constexpr int kBlocks = kRowBytes / static_cast<int>(sizeof(Output)) / 8;  // of 8 columns
  const float* const block_values = accumulators + first / 2;
  const int lane = thread % kWarpSize, warp_row = thread / kWarpSize * 16;
  if constexpr (sizeof(Output) == 4) {
    const int row = warp_row + lane / 4;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const float* values = block_values + block * 4;
      char* upper = buffer + swizzled(row, (block * 8 + lane % 4 * 2) * static_cast<int>(sizeof(Output)));
      store_shared(upper, values[0], values[1]);
      store_shared(upper + 8 * kRowBytes, values[2], values[3]);
    }
  } else {
    // Matrices of a store: the upper and the lower 8 rows of a block, and of the next one.
    const int matrix = lane / 8, stored_row = warp_row + matrix % 2 * 8 + lane % 8;
#pragma unroll
    for (int block = 0; block < kBlocks; block += 2) {
      uint32_t matrices[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = block_values + block * 4 + 2 * i;
        matrices[i] = pack<Output>(pair[0], pair[1]);
      }
      store_matrices(buffer + swizzled(stored_row, block * 16 ^ matrix / 2 * 16), matrices);
    }
  }
}

// The first `rows` (of less than kPieceRows) rows and `columns` columns of a written buffer to `output`, 16 bytes per
// thread at a time.
template <typename Output>
__device__ void copy_rows(const char* buffer, Output* output, int64_t leading, int64_t rows, int64_t columns,
                          int thread) {
  constexpr int kChunkElements = 16 / sizeof(Output);
  const int first_row = thread / kRowChunks, chunk = thread % kRowChunks;
  if (chunk * kChunkElements >= columns) return;
  const char* source = buffer + swizzled(first_row, chunk * 16);
  output += first_row * leading + chunk * kChunkElements;
#pragma unroll 1
  for (int row = first_row; row < rows; row += kRowsAtOnce) {
    store_global_16(output, load_shared_16(source));
    source += kRowsAtOnce * kRowBytes;
    output += kRowsAtOnce * leading;
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
                              Staging& staging, float (&accumulators)[Config::kWarpgroupColumns / 2]) {
  using Output = typename Config::Output;
  const int64_t row = int64_t{work.row} + self.first_row, rows = work.row_end - row;
  if (rows <= 0) return;
#pragma unroll
  for (int first = 0; first < Config::kWarpgroupColumns; first += kRowBytes / static_cast<int>(sizeof(Output))) {
    const int64_t column = work.column + self.first_column + first, columns = arguments.columns - column;
    if (columns <= 0) break;
    if constexpr (sizeof(Output) == 2) {
      if (const Output* bias = bias_of<Output>(arguments, work.expert * arguments.columns + column)) {
        add_bias(accumulators, first, self.thread, bias, columns);
      }
    }
    char* buffer = staging.open();
    write_piece<Output>(buffer, accumulators, first, self.thread);
    staging.written();
    store_piece<Config>(arguments, {row, rows, column, columns, 0}, work.expert, arguments.columns, buffer,
                        self.thread);
    staging.close();
  }
}

// Eight 16-bit elements as floats. A bfloat16 is the upper half of its float.
template <typename Element>
__device__ void unpack(const Chunk& packed, float* values) {
  if constexpr (std::is_same_v<Element, BFloat16>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = __uint_as_float(packed.words[i] << 16);
      values[2 * i + 1] = __uint_as_float(packed.words[i] & 0xffff0000u);
    }
  } else {
    const auto elements = *reinterpret_cast<const Vector<Element, 8>*>(&packed);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = static_cast<float>(elements.values[i]);
  }
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
                                Staging& staging, float (&accumulators)[Config::kWarpgroupColumns / 2]) {
  using Element = typename Config::Element;
  constexpr cuda::RowMode kMode = Config::kMode;
  constexpr bool kPairs = Config::kPairsColumns, kInterleaved = kMode == cuda::RowMode::kInterleaved;
  constexpr int kBuffers = kMode == cuda::RowMode::kPlain ? 2 : 1;  // plain: each buffer gives outputs of its own
  const int64_t row = int64_t{work.row} + self.first_row, rows = work.row_end - row;
  if (rows <= 0) return;
  const int64_t width = kPairs ? 2 * arguments.columns : arguments.columns;  // of D
  const int64_t out_width = kInterleaved ? width / 2 : arguments.columns;
#pragma unroll
  for (int pair = 0; pair < Config::kWarpgroupColumns / 128; ++pair) {
    const int64_t column = work.column + (kPairs ? self.first_column / 2 + pair * 64 : self.first_column + pair * 128);
    if (column >= arguments.columns) break;
    const auto piece_of = [&](int buffer) -> Piece {
      const int64_t first = kPairs ? column : column + buffer * 64;
      return {row, rows, first, arguments.columns - first, kPairs ? buffer : 0};
    };
    staging.open_both();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Piece piece = piece_of(i);
      const int first = kPairs ? i * Config::kWarpgroupColumns / 2 + pair * 64 : pair * 128 + i * 64;
      const int64_t bias_column = work.expert * width + piece.half * arguments.columns + piece.column;
      if (const Element* bias = bias_of<Element>(arguments, bias_column)) {
        add_bias(accumulators, first, self.thread, bias, piece.columns);
      }
      write_piece<Element>(staging.buffer(i), accumulators, first, self.thread);
    }
    staging.written();
    if (arguments.output) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Piece piece = piece_of(i);
        if (piece.columns > 0) {
          store_piece<Config>(arguments, piece, work.expert, width, staging.buffer(i), self.thread);
        }
      }
      if (self.thread == 0) tma_store_commit();
    }
    const int first_row = self.thread / kRowChunks, chunk = self.thread % kRowChunks;
    const int end_row = static_cast<int>(rows < kPieceRows ? rows : kPieceRows);
#pragma unroll 1
    for (int buffer = 0; buffer < kBuffers; ++buffer) {
      const int64_t out_column = (kInterleaved ? column / 2 : column) + buffer * 64 + chunk * 8;
      if (out_column >= out_width) break;
      const int place = swizzled(first_row, kInterleaved ? chunk % 4 * 32 : chunk * 16);
      const int beside = swizzled(first_row, chunk % 4 * 32 + 16) - place;  // interleaved: the second of two chunks
      const char* source = staging.buffer(kInterleaved ? chunk / 4 : buffer) + place;
      Element* target = static_cast<Element*>(arguments.activated) + (row + first_row) * out_width + out_column;
#pragma unroll 1
      for (int r = first_row; r < end_row; r += kRowsAtOnce) {
        cuda::GateUpVector<8> x;
        if constexpr (kInterleaved) {
          float both[16];
          unpack<Element>(load_shared_16(source), both);
          unpack<Element>(load_shared_16(source + beside), both + 8);
#pragma unroll
          for (int e = 0; e < 8; ++e) x.gate[e] = both[2 * e], x.up[e] = both[2 * e + 1];
        } else {
          unpack<Element>(load_shared_16(source), x.gate);
          if constexpr (kPairs) unpack<Element>(load_shared_16(source + kPieceBytes), x.up);
        }
        float value[8];
        cuda::GateUpVector<8> derivative;
        cuda::evaluate<kMode, Element>(arguments.activation, x, value, derivative);
        store_global_16(target, packed<Element>(value));
        source += kRowsAtOnce * kRowBytes;
        target += kRowsAtOnce * out_width;
      }
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
  static_assert(Config::kColumns == kDifferentiatedColumns, "by which partial_dots is allocated");
  constexpr int kParts = Config::kMode == cuda::RowMode::kPlain ? 1 : 2;
  constexpr int kThreadRows = kPieceRows / kRowsAtOnce;
  constexpr int kWarpRows = kWarpSize / kRowChunks;  // next to each other
  const Differentiation& to = arguments.differentiation;
  const int64_t row = int64_t{work.row} + self.first_row, rows = work.row_end - row;
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
  Ahead next = load(first_row), after_next = load(first_row + kRowsAtOnce);

  // Lane l looks after the slot of the warp's row l % kWarpRows of its thread row l / kWarpRows.
  static_assert(kWarpRows * kThreadRows <= kWarpSize);
  const int lane = self.thread % kWarpSize;
  const int slot_row =
      self.thread / kWarpSize * kWarpRows + lane % kWarpRows + lane / kWarpRows % kThreadRows * kRowsAtOnce;
  const int slot = slot_row < rows ? arguments.gather.permuted_to_slot[row + slot_row] : -1;
  const bool slot_held = slot >= 0 && slot < arguments.gather.num_slots;
  const float slot_weight = slot_held && to.topk_weights ? to.topk_weights[slot] : 1.f;

  staging.open_both();
#pragma unroll
  for (int b = 0; b < kBuffers; ++b) {
    write_piece<Element>(staging.buffer(b), accumulators, b * kBufferColumns, self.thread);
  }
  staging.written();

  const unsigned all_held = __ballot_sync(0xffffffffu, slot_held);
  float* partial = to.partial_dots + work.column / Config::kColumns * arguments.max_rows + row;
#pragma unroll 1
  for (int i = 0; i < kThreadRows; ++i) {
    const int row_in_piece = first_row + i * kRowsAtOnce, slot_lane = i * kWarpRows + lane / kRowChunks;
    const Ahead now = next;
    next = after_next;
    if (i + 2 < kThreadRows) after_next = load(row_in_piece + 2 * kRowsAtOnce);
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
        cuda::evaluate<Config::kMode, Element>(arguments.activation, cuda::unpack_gate_up(now.x[b]), value, derivative);
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
    multiply<Config>(arguments.gather.source != nullptr, work, shared, self, position, accumulators);
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
