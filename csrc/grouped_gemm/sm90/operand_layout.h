// How operands lie in shared memory and in wgmma's registers on sm_90a. Plain C++: kernels, the emulator and
// tests/test_sm90_layouts.py, which holds it against CuTe's own layouts and descriptors, share it.
//
// Everything moves in rows of 128 bytes, swizzled: the 16-byte chunk c of row r lies at chunk c ^ (r % 8), which is
// what TMA's 128B swizzle does to buffers aligned to 1024 bytes. An operand of 16-bit elements is
//   K-major:  one such row per row of the matrix, 64 deep; 8 rows are an atom of 1024 bytes
//   MN-major: per 64 rows of the matrix a block of 64 such rows, one for each step along the depth
// so either way 64 rows of the matrix by 64 deep take 8 KiB, and 64 more rows lie 8 KiB further.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MOE_LAYOUT_FUNCTION __host__ __device__ constexpr
#else
#define MOE_LAYOUT_FUNCTION constexpr
#endif

namespace moe_ext::sm90 {

enum class Major { kK = 0, kMN = 1 };  // the values of wgmma's transpose bits

constexpr int kBlockDepth = 64;        // of a pipeline stage
constexpr int kInstructionDepth = 16;  // of one wgmma
constexpr int kRowBytes = 128;         // of a row in shared memory, the reach of the swizzle
constexpr int kRowChunks = kRowBytes / 16;
constexpr int kBlockBytes = 64 * kRowBytes;       // 64 rows of a matrix, one stage deep
constexpr int kMatrixRowBytes = kBlockDepth * 2;  // bytes that a stage holds per row of a matrix, whatever its major

// What the swizzle moves as one.
struct alignas(16) Chunk {
  uint32_t words[4];
};

MOE_LAYOUT_FUNCTION int swizzled(int row, int byte) { return row * kRowBytes + (byte ^ (row % 8 * 16)); }

// Bytes between the descriptors of neighbouring wgmma steps along the depth.
MOE_LAYOUT_FUNCTION int step_bytes(Major major) {
  return major == Major::kK ? kInstructionDepth * 2 : kInstructionDepth * kRowBytes;
}

// wgmma's shared-memory descriptor of an operand that starts at `address` (in the shared window, 128B swizzle). Stride:
// from 8 rows to the next 8, along the matrix (K-major) or the depth (MN-major). Leading: from 64 rows of the matrix to
// the next 64 (MN-major); unused for K-major, where CuTe writes 1.
MOE_LAYOUT_FUNCTION uint64_t make_descriptor(uint32_t address, Major major) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  const uint64_t leading = major == Major::kK ? 1 : kBlockBytes / 16;
  const uint64_t stride = 8 * kRowBytes / 16;
  return kSwizzle128 | stride << 32 | leading << 16 | (address & 0x3ffff) >> 4;
}

// Where register `index` of `thread` (of 128) of a 64-row accumulator lies.
struct FragmentPosition {
  int row, column;
};
MOE_LAYOUT_FUNCTION FragmentPosition fragment_position(int thread, int index) {
  return {thread / 32 * 16 + index / 2 % 2 * 8 + thread % 32 / 4, index / 4 * 8 + thread % 4 * 2 + index % 2};
}

}  // namespace moe_ext::sm90
