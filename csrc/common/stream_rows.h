// Rows written past the caches: an output larger than they are would only push everything else out, and an ordinary
// store first reads the line it overwrites. On x86-64; elsewhere an ordinary copy.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace moe_ext::cpu {

constexpr int64_t kStreamedBytes = 16 << 20;  // outputs from here on do not fit beside the inputs in a last-level cache

// Orders a thread's streamed stores before whatever comes next.
inline void fence_streamed_stores() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

#ifdef __SSE2__
// Whole cache lines, which leave the core at a quarter more of the rate than pieces of 16 bytes.
__attribute__((target("avx512f"))) inline void stream_lines(void* destination, const void* source, int64_t bytes) {
  auto* to = static_cast<char*>(destination);
  const auto* from = static_cast<const char*>(source);
  for (int64_t i = 0; i < bytes; i += 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
  }
}

inline bool streams_lines() {
  static const bool lines = __builtin_cpu_supports("avx512f");
  return lines;
}
#endif

class RowWriter {
 public:
  RowWriter(const void* output, int64_t num_rows, int64_t row_bytes) : row_bytes_(row_bytes) {
#ifdef __SSE2__
    streamed_ = num_rows * row_bytes >= kStreamedBytes && row_bytes % kVectorBytes == 0 &&
                reinterpret_cast<uintptr_t>(output) % kVectorBytes == 0;
#endif
  }

  bool streamed() const { return streamed_; }

  void copy(void* row, const void* source) const { write(row, source, row_bytes_); }

  // Parts of a row; where the rows are streamed, their places and sizes are multiples of 16 bytes.
  void write(void* destination, const void* source, int64_t bytes) const {
#ifdef __SSE2__
    if (streamed_) {
      if ((reinterpret_cast<uintptr_t>(destination) | static_cast<uintptr_t>(bytes)) % 64 == 0 && streams_lines()) {
        return stream_lines(destination, source, bytes);
      }
      auto* to = static_cast<__m128i*>(destination);
      const auto* from = static_cast<const __m128i*>(source);
      for (int64_t i = 0; i < bytes / kVectorBytes; ++i) _mm_stream_si128(to + i, _mm_loadu_si128(from + i));
      return;
    }
#endif
    std::memcpy(destination, source, bytes);
  }

  void zero(void* row) const { zero(row, row_bytes_); }

  void zero(void* destination, int64_t bytes) const {
#ifdef __SSE2__
    if (streamed_) {
      auto* to = static_cast<__m128i*>(destination);
      for (int64_t i = 0; i < bytes / kVectorBytes; ++i) _mm_stream_si128(to + i, _mm_setzero_si128());
      return;
    }
#endif
    std::memset(destination, 0, bytes);
  }

  // Each thread, when its rows are written.
  void finish() const {
    if (streamed_) fence_streamed_stores();
  }

 private:
  static constexpr int64_t kVectorBytes = 16;
  int64_t row_bytes_;
  bool streamed_ = false;
};

}  // namespace moe_ext::cpu
