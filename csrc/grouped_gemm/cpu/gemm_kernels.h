// The inner loops of a packed GEMM on the CPU, one set for each instruction set and dtype. multiply_tile_cpu.cpp drives
// them; gemm_kernels_impl.h holds the code, which gemm_kernels_<isa>.cpp compiles with the flags of that ISA.
//
// No other header may be included here or there: an inline function compiled with AVX-512 could be the copy that the
// linker keeps for everyone.
#pragma once

#include <cstdint>

namespace moe_ext::cpu {

// A unit is what one lane of a multiply-add takes: a float, a double, or (AVX512_BF16) two bfloat16 along the inner
// dimension. 16-bit factors of other instruction sets are widened to float when they are packed.
constexpr int64_t kDepth = 256;            // units of the inner dimension in one packed block
constexpr int64_t kLeftStride = 256 + 16;  // units from row to row of a packed left block: not a power of two
constexpr int64_t kMaxPanelCols = 32;
constexpr int64_t kDotRoom = 16;
constexpr int64_t kTurnedRows = 96;  // the most that `turned` takes, and the most columns
constexpr int64_t kTurnedCols = 64;

enum class GemmType { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Cache lines that a kernel fetches on the side: bytes [first_byte, first_byte + bytes) of each line.
struct Fetch {
  const char* const* lines = nullptr;
  int64_t num_lines = 0;
  int64_t first_byte = 0;
  int64_t bytes = 0;
};

// What `multiply` does on the side: it packs the next right panel and fetches what comes after it. pack_right_inner
// (`inner`) would be given `lines`, `first` and `count`, which is whole vectors; pack_right_outer `lines`, `count` and
// `first`. The panel has all its columns, and no line along the inner dimension is null. Without `right` nothing is
// packed.
struct Ahead {
  void* right = nullptr;
  const char* const* lines = nullptr;
  int64_t first = 0;
  int64_t count = 0;
  bool inner = false;
  Fetch after;
};

// Where the finished sums of a panel go: rows of output elements, each a whole panel wide. `bias` has the factors' type
// or is null; `stream` writes past the caches, if the output starts and steps by whole cache lines.
struct PanelOutput {
  char* data = nullptr;
  int64_t stride_bytes = 0;
  const char* bias = nullptr;
  bool stream = false;
};

// `lines` are pointers to the start of rows (or columns) whose elements are adjacent in memory; null is a line of
// zeros. "inner" functions take lines that run along the inner dimension, "outer" functions lines across it.
struct GemmKernels {
  int64_t element_bytes;      // of a factor
  int64_t output_bytes;       // of an output element
  int64_t unit_bytes;         // also of an accumulator
  int64_t elements_per_unit;  // along the inner dimension
  int64_t vector_elements;    // of the inner dimension in a register
  int64_t panel_cols;         // columns of a packed right block
  int64_t strip_rows;         // rows that `multiply` keeps in registers
  bool packs_ahead;           // whether `multiply` takes an Ahead with a panel

  // left [rows][stride] of units, zeros up to a whole vector of them; first and count are elements of the lines.
  void (*pack_left_inner)(void* left, int64_t stride, const char* const* rows, int64_t num_rows, int64_t first,
                          int64_t count);
  // left [rows][kLeftStride] of units.
  void (*pack_left_outer)(void* left, const char* const* lines, int64_t num_lines, int64_t first_row, int64_t num_rows);
  // right [depth][panel_cols] of units, zeros in the columns past num_cols.
  void (*pack_right_inner)(void* right, const char* const* cols, int64_t num_cols, int64_t first, int64_t count);
  void (*pack_right_outer)(void* right, const char* const* lines, int64_t num_lines, int64_t first_col,
                           int64_t num_cols);
  // sums [num_rows][panel_cols] (+)= left @ right over `depth` units; with output.data they go there instead, from the
  // registers, and `sums` are only read. After streamed stores the caller fences.
  void (*multiply)(const void* left, const void* right, int64_t num_rows, int64_t depth, void* sums, bool first,
                   const PanelOutput& output, const Ahead& ahead);
  // sums [num_rows][sums_stride] (+)= rows @ cols^T over elements [first, first + count) of the columns, which are read
  // in place; rows are packed [num_rows][row_stride]. Writes up to kDotRoom sums past the last column. `after`, of as
  // many lines as columns or fewer, is what is read next.
  void (*dot)(const void* rows, int64_t row_stride, int64_t num_rows, const char* const* cols, int64_t num_cols,
              int64_t first, int64_t count, void* sums, int64_t sums_stride, bool first_block, const Fetch& after);
  // sums [num_rows][sums_stride] = rows @ cols^T over `count` elements of num_cols columns, which lie stride_bytes
  // apart and are read in place; rows are the columns of panels as pack_right_inner leaves them, panel_units apart.
  // Writes sums of whole vectors of rows, and up to kDotRoom past the last column. `next` is the column read next. Null
  // where the format has none.
  void (*turned)(const void* rows, int64_t panel_units, int64_t num_rows, const char* cols, int64_t stride_bytes,
                 int64_t num_cols, int64_t count, const char* next, void* sums, int64_t sums_stride);
  // sums [num_rows][sums_stride] (+)= packed left @ lines, for a few rows and lines across the inner dimension, none of
  // them null. `after` is what is read next.
  void (*axpy)(const void* left, int64_t num_rows, const char* const* lines, int64_t num_lines, int64_t first_col,
               int64_t num_cols, void* sums, int64_t sums_stride, bool first, const Fetch& after);
  // sums [num_rows][sums_stride] = elements of the factors' type.
  void (*widen)(const char* from, int64_t from_stride_bytes, int64_t num_rows, int64_t num_cols, void* sums,
                int64_t sums_stride);
  // output = sums + bias, rounded once. `bias` has the factors' type or is null.
  void (*finish)(const void* sums, int64_t sums_stride, int64_t num_rows, int64_t num_cols, const char* bias,
                 char* output, int64_t output_stride_bytes);
};

// For factors of `type`; `wide` outputs are float32 for 16-bit factors. One function per instruction set.
#define MOE_GEMM_KERNELS(isa)                                \
  namespace isa {                                            \
  const GemmKernels& gemm_kernels(GemmType type, bool wide); \
  }
MOE_GEMM_KERNELS(portable)
MOE_GEMM_KERNELS(avx2)
MOE_GEMM_KERNELS(avx512)
MOE_GEMM_KERNELS(avx512_bf16)
#undef MOE_GEMM_KERNELS

}  // namespace moe_ext::cpu
