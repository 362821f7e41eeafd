#include "sm80_emulator.h"

#include <cstdio>
#include <cstdlib>
#include <deque>

namespace moe_emulator {
namespace {

constexpr unsigned char kPoison = 0xcd;

// A cp.async under way.
struct Copy {
  void* destination;
  const void* source;
  size_t bytes;
  bool inside;
  unsigned group;
};

// Every kernel waits for all of its copies, so that the next block finds nothing under way.
struct Thread {
  std::deque<Copy> copies;
  unsigned group = 0;  // the one that is open
};

Thread threads[1024];
uint64_t copied_bytes = 0;

Thread& this_thread() {
  return threads[thread_index.x + block_size.x * (thread_index.y + block_size.y * thread_index.z)];
}

}  // namespace

void copy_async(void* destination, const void* source, size_t bytes, bool inside) {
  const auto misaligned = [&](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % bytes != 0; };
  if (misaligned(destination) || misaligned(source)) {
    std::fprintf(stderr, "cuda emulator: a misaligned cp.async\n");
    std::abort();
  }
  std::memset(destination, kPoison, bytes);
  copied_bytes += inside ? bytes : 0;
  this_thread().copies.push_back({destination, source, bytes, inside, this_thread().group});
}

void commit_copies() { ++this_thread().group; }

void wait_for_copies(int pending) {
  Thread& self = this_thread();
  while (!self.copies.empty() && self.copies.front().group + pending < self.group) {
    const Copy& copy = self.copies.front();
    if (copy.inside) {
      std::memcpy(copy.destination, copy.source, copy.bytes);
    } else {
      std::memset(copy.destination, 0, copy.bytes);
    }
    self.copies.pop_front();
  }
}

uint64_t moe_emulator_copied_bytes() { return copied_bytes; }

}  // namespace moe_emulator
