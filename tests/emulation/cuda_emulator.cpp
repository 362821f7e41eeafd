#include "cuda_emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

namespace moe_emulator {

dim3 thread_index, block_index, block_size, grid_size;

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "cuda emulator: %s (block %u, thread %u)\n", message.c_str(), block_index.x, thread_index.x);
  std::abort();
}

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned char kPoison = 0xcd;

// Saves the callee-saved registers on the stack and continues on another one. ucontext would do it with two system
// calls; a kernel of shuffles switches a million times.
#if defined(__x86_64__)
extern "C" void moe_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl moe_emulator_switch
.hidden moe_emulator_switch
moe_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

struct Context {
  void* stack_pointer = nullptr;
  void start(char* stack, size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<uint64_t*>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
    *--top = 0;  // entry never returns; also aligns the stack as after a call
    *--top = reinterpret_cast<uint64_t>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    stack_pointer = top;
  }
  static void switch_to(Context& from, Context& to) { moe_emulator_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;
  void start(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

// A warp collective in flight: lanes of one mask meet here; two buffers, since a fast lane may be one meeting ahead.
struct Meeting {
  uint64_t generation = 0;
  unsigned arrived = 0;
  uint64_t slots[2][kWarpSize];
};

enum class Barrier { kNone, kBlock, kCluster };

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  dim3 index, block_index;
  unsigned linear = 0, rank = 0;  // in its block; of its block in the cluster
  bool done = false;
  // What it waits for: nothing, a barrier, a condition, or a meeting to reach a generation.
  Barrier barrier = Barrier::kNone;
  const std::function<bool()>* ready = nullptr;
  const Meeting* meeting = nullptr;
  uint64_t until_generation = 0;
};

// What runs at a time.
struct Cluster {
  unsigned size = 1, block_threads = 0;
  std::vector<Fiber> fibers;  // of one block after the other
  std::vector<std::map<unsigned, Meeting>> warps;
  Context scheduler;
  Fiber* current = nullptr;
  const std::function<void()>* thread = nullptr;
  std::vector<std::function<void()>> in_flight;
  struct alignas(1024) Shared {
    char bytes[kMaxCluster][kMaxSharedBytes];
  };
  std::unique_ptr<Shared> shared = std::make_unique<Shared>();
  size_t shared_bytes = 0;

  unsigned threads() const { return size * block_threads; }
  std::map<unsigned, Meeting>& warp_of(const Fiber& fiber) {
    return warps[fiber.rank * (kMaxThreads / kWarpSize) + fiber.linear / kWarpSize];
  }
};

Cluster cluster;

struct Hooks {
  std::function<void()> start, end;
};
Hooks& hooks() {
  static Hooks registered;
  return registered;
}
std::mutex one_grid_at_a_time;
std::map<const void*, size_t> allowed_shared;  // by kernel, until its next launch

void yield() { Context::switch_to(cluster.current->context, cluster.scheduler); }

void fiber_entry() {
  (*cluster.thread)();
  cluster.current->done = true;
  yield();
  fail("a finished thread was resumed");
}

bool can_run(const Fiber& fiber) {
  if (fiber.done || fiber.barrier != Barrier::kNone || (fiber.ready && !(*fiber.ready)())) return false;
  return !fiber.meeting || fiber.meeting->generation >= fiber.until_generation;
}

void deliver_one(std::mt19937& random) {
  std::swap(cluster.in_flight[random() % cluster.in_flight.size()], cluster.in_flight.back());
  const std::function<void()> delivery = std::move(cluster.in_flight.back());
  cluster.in_flight.pop_back();
  delivery();
}

// Opens the barriers `kind` at which all threads that have not ended stand, of the blocks from `first` to `end`.
bool open_barrier(Barrier kind, unsigned first, unsigned end) {
  const auto begin = cluster.fibers.begin();
  const auto from = begin + first * cluster.block_threads, to = begin + end * cluster.block_threads;
  if (!std::all_of(from, to, [&](const Fiber& fiber) { return fiber.done || fiber.barrier == kind; })) return false;
  bool any = false;
  for (auto fiber = from; fiber != to; ++fiber) {
    any = any || fiber->barrier == kind;
    fiber->barrier = Barrier::kNone;
  }
  return any;
}

// The cluster whose first block is `corner`.
void run_cluster(dim3 corner, std::mt19937& random) {
  cluster.block_threads = block_size.x * block_size.y * block_size.z;
  const unsigned threads = cluster.threads();
  cluster.fibers.resize(std::max<size_t>(cluster.fibers.size(), threads));
  cluster.warps.assign(kMaxCluster * (kMaxThreads / kWarpSize), {});
  std::vector<unsigned> order(threads);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = cluster.fibers[t];
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
    fiber.context.start(fiber.stack.get(), kStackBytes, fiber_entry);
    const unsigned linear = t % cluster.block_threads;
    fiber.index =
        dim3(linear % block_size.x, linear / block_size.x % block_size.y, linear / block_size.x / block_size.y);
    fiber.linear = linear;
    fiber.rank = t / cluster.block_threads;
    fiber.block_index = dim3(corner.x + fiber.rank, corner.y, corner.z);
    fiber.done = false;
    fiber.barrier = Barrier::kNone;
    fiber.meeting = nullptr;
    fiber.ready = nullptr;
    order[t] = t;
  }
  if (hooks().start) hooks().start();
  unsigned alive = threads;
  while (alive > 0) {
    std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    for (unsigned t : order) {
      Fiber& fiber = cluster.fibers[t];
      if (!can_run(fiber)) continue;
      fiber.meeting = nullptr;
      fiber.ready = nullptr;
      cluster.current = &fiber;
      thread_index = fiber.index;
      block_index = fiber.block_index;
      Context::switch_to(cluster.scheduler, fiber.context);
      progress = true;
      alive -= fiber.done;
    }
    const bool hurry = !progress || random() % 4 == 0;
    if (!cluster.in_flight.empty() && hurry) {
      deliver_one(random);
      continue;
    }
    if (progress) continue;
    // Everyone waits.
    bool opened = open_barrier(Barrier::kCluster, 0, cluster.size);
    for (unsigned rank = 0; rank < cluster.size; ++rank) opened |= open_barrier(Barrier::kBlock, rank, rank + 1);
    if (!opened) fail("deadlock: a barrier or a warp collective that some of its threads never reach");
  }
  while (!cluster.in_flight.empty()) deliver_one(random);
  if (hooks().end) hooks().end();
}

}  // namespace

void run_grid(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& thread, unsigned blocks) {
  const std::lock_guard<std::mutex> lock(one_grid_at_a_time);
  grid_size = grid;
  block_size = threads;
  cluster.thread = &thread;
  cluster.shared_bytes = shared_bytes;
  cluster.size = blocks;
  const unsigned count = threads.x * threads.y * threads.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) fail("grid out of range");
  if (count == 0 || count > kMaxThreads) fail("block out of range");
  if (blocks == 0 || blocks > kMaxCluster || grid.x % blocks != 0) fail("a grid is made of whole clusters");
  if (shared_bytes > kMaxSharedBytes) fail("too much shared memory");
  const char* seed = std::getenv("MOE_EMULATOR_SEED");
  std::mt19937 random(seed ? static_cast<unsigned>(std::atoi(seed)) : 0);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; x += blocks) {
        block_index = dim3(x, y, z);
        for (unsigned rank = 0; rank < blocks; ++rank) std::memset(dynamic_shared_of(rank), kPoison, shared_bytes);
        run_cluster(block_index, random);
      }
    }
  }
}

unsigned cluster_rank() { return cluster.current ? cluster.current->rank : 0; }
unsigned cluster_size() { return cluster.size; }
bool block_ended(unsigned rank) {
  const auto first = cluster.fibers.begin() + rank * cluster.block_threads;
  return std::all_of(first, first + cluster.block_threads, [](const Fiber& fiber) { return fiber.done; });
}
void* dynamic_shared() { return dynamic_shared_of(cluster_rank()); }
void* dynamic_shared_of(unsigned rank) { return cluster.shared->bytes[rank]; }
size_t dynamic_shared_bytes() { return cluster.shared_bytes; }

void allow_shared(const void* kernel, size_t bytes) {
  if (bytes > kMaxSharedBytes) fail("more shared memory is asked for than a block can have");
  const std::lock_guard<std::mutex> lock(one_grid_at_a_time);
  allowed_shared[kernel] = bytes;
}

void require_shared(const void* kernel, size_t bytes) {
  const std::lock_guard<std::mutex> lock(one_grid_at_a_time);
  const auto allowed = allowed_shared.find(kernel);
  if (bytes > (allowed == allowed_shared.end() ? kDefaultSharedBytes : allowed->second)) {
    fail("a launch with more shared memory than was asked for");
  }
  if (allowed != allowed_shared.end()) allowed_shared.erase(allowed);
}

unsigned linear_thread() { return cluster.current->linear; }

void wait_until(const std::function<bool()>& ready) {
  if (ready()) return;
  cluster.current->ready = &ready;
  yield();
}

void deliver_later(std::function<void()> delivery) { cluster.in_flight.push_back(std::move(delivery)); }

void on_block(std::function<void()> start, std::function<void()> end) { hooks() = {std::move(start), std::move(end)}; }

void wait_at(Barrier barrier) {
  cluster.current->barrier = barrier;
  yield();
}
void sync_block() { wait_at(Barrier::kBlock); }
void sync_cluster() { wait_at(Barrier::kCluster); }

int lane() { return static_cast<int>(cluster.current->linear % kWarpSize); }

const uint64_t* exchange(unsigned mask, uint64_t value) {
  Fiber& self = *cluster.current;
  const unsigned own = 1u << lane();
  if (!(mask & own)) fail("a lane calls a collective whose mask leaves it out");
  Meeting& meeting = cluster.warp_of(self)[mask];
  if (meeting.arrived & own) fail("a lane comes twice to one collective");
  uint64_t* slots = meeting.slots[meeting.generation % 2];
  slots[lane()] = value;
  meeting.arrived |= own;
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    self.meeting = &meeting;
    self.until_generation = meeting.generation + 1;
    yield();
  }
  return slots;
}

}  // namespace moe_emulator
