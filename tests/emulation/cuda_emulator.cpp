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

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  dim3 index;
  unsigned linear = 0;
  bool done = false;
  // What it waits for: nothing, the block barrier, a condition, or a meeting to reach a generation.
  bool at_barrier = false;
  const std::function<bool()>* ready = nullptr;
  const Meeting* meeting = nullptr;
  uint64_t until_generation = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<std::map<unsigned, Meeting>> warps;
  Context scheduler;
  Fiber* current = nullptr;
  const std::function<void()>* thread = nullptr;
  std::vector<std::function<void()>> in_flight;
  struct alignas(1024) Shared {
    char bytes[kMaxSharedBytes];
  };
  std::unique_ptr<Shared> shared = std::make_unique<Shared>();
  size_t shared_bytes = 0;
};

Block block;

struct Hooks {
  std::function<void()> start, end;
};
Hooks& hooks() {
  static Hooks registered;
  return registered;
}
std::mutex one_grid_at_a_time;
std::map<const void*, size_t> allowed_shared;  // by kernel, until its next launch

void yield() { Context::switch_to(block.current->context, block.scheduler); }

void fiber_entry() {
  (*block.thread)();
  block.current->done = true;
  yield();
  fail("a finished thread was resumed");
}

bool can_run(const Fiber& fiber) {
  if (fiber.done || fiber.at_barrier || (fiber.ready && !(*fiber.ready)())) return false;
  return !fiber.meeting || fiber.meeting->generation >= fiber.until_generation;
}

void deliver_one(std::mt19937& random) {
  std::swap(block.in_flight[random() % block.in_flight.size()], block.in_flight.back());
  const std::function<void()> delivery = std::move(block.in_flight.back());
  block.in_flight.pop_back();
  delivery();
}

void run_block(std::mt19937& random) {
  const unsigned threads = block_size.x * block_size.y * block_size.z;
  block.fibers.resize(std::max<size_t>(block.fibers.size(), threads));
  block.warps.assign((threads + kWarpSize - 1) / kWarpSize, {});
  std::vector<unsigned> order(threads);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = block.fibers[t];
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
    fiber.context.start(fiber.stack.get(), kStackBytes, fiber_entry);
    fiber.index = dim3(t % block_size.x, t / block_size.x % block_size.y, t / block_size.x / block_size.y);
    fiber.linear = t;
    fiber.done = fiber.at_barrier = false;
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
      Fiber& fiber = block.fibers[t];
      if (!can_run(fiber)) continue;
      fiber.meeting = nullptr;
      fiber.ready = nullptr;
      block.current = &fiber;
      thread_index = fiber.index;
      Context::switch_to(block.scheduler, fiber.context);
      progress = true;
      alive -= fiber.done;
    }
    const bool hurry = !progress || random() % 4 == 0;
    if (!block.in_flight.empty() && hurry) {
      deliver_one(random);
      continue;
    }
    if (progress) continue;
    // Everyone waits. A barrier opens when all threads that have not ended stand at it.
    const bool all_at_barrier = std::all_of(
        order.begin(), order.end(), [](unsigned t) { return block.fibers[t].done || block.fibers[t].at_barrier; });
    if (!all_at_barrier) fail("deadlock: a barrier or a warp collective that some of its threads never reach");
    for (unsigned t : order) block.fibers[t].at_barrier = false;
  }
  while (!block.in_flight.empty()) deliver_one(random);
  if (hooks().end) hooks().end();
}

}  // namespace

void run_grid(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_grid_at_a_time);
  grid_size = grid;
  block_size = threads;
  block.thread = &thread;
  block.shared_bytes = shared_bytes;
  const unsigned count = threads.x * threads.y * threads.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) fail("grid out of range");
  if (count == 0 || count > 1024) fail("block out of range");
  if (shared_bytes > kMaxSharedBytes) fail("too much shared memory");
  const char* seed = std::getenv("MOE_EMULATOR_SEED");
  std::mt19937 random(seed ? static_cast<unsigned>(std::atoi(seed)) : 0);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = dim3(x, y, z);
        std::memset(block.shared->bytes, kPoison, shared_bytes);
        run_block(random);
      }
    }
  }
}

void* dynamic_shared() { return block.shared->bytes; }
size_t dynamic_shared_bytes() { return block.shared_bytes; }

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

unsigned linear_thread() { return block.current->linear; }

void wait_until(const std::function<bool()>& ready) {
  if (ready()) return;
  block.current->ready = &ready;
  yield();
}

void deliver_later(std::function<void()> delivery) { block.in_flight.push_back(std::move(delivery)); }

void on_block(std::function<void()> start, std::function<void()> end) { hooks() = {std::move(start), std::move(end)}; }

void sync_block() {
  block.current->at_barrier = true;
  yield();
}

int lane() { return static_cast<int>(block.current->linear % kWarpSize); }

const uint64_t* exchange(unsigned mask, uint64_t value) {
  Fiber& self = *block.current;
  const unsigned own = 1u << lane();
  if (!(mask & own)) fail("a lane calls a collective whose mask leaves it out");
  Meeting& meeting = block.warps[self.linear / kWarpSize][mask];
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
