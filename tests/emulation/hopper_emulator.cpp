#include "hopper_emulator.h"

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "../../csrc/grouped_gemm/sm90/tensor_map.h"

namespace moe_ext::sm90 {
namespace {

using moe_emulator::fail;
using moe_emulator::linear_thread;

constexpr uint32_t kSharedBase = 0x400;  // where the window of dynamic shared memory starts
constexpr unsigned char kPoison = 0xff;  // NaN in every floating dtype
constexpr int kUnit = 4;                 // bytes whose visibility is tracked together
constexpr int kWarpgroup = 128;
constexpr int kRegisters = 64 * 1024;            // of a multiprocessor
constexpr int64_t kMaxExpected = (1 << 20) - 1;  // bytes that a barrier can count

struct BarrierState {
  uint32_t arrivals = 0, pending = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;

  void settle() {
    if (pending > 0 || bytes != 0) return;
    ++phase;
    pending = arrivals;
  }
};

struct NamedBarrier {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Wgmma {
  float* accumulators;
  int columns;
  uint64_t descriptor_a, descriptor_b;
  bool a_is_k_major, b_is_k_major, accumulate;
  ToFloat to_float;

  bool same_instruction(const Wgmma& other) const {
    return columns == other.columns && descriptor_a == other.descriptor_a && descriptor_b == other.descriptor_b &&
           a_is_k_major == other.a_is_k_major && b_is_k_major == other.b_is_k_major && accumulate == other.accumulate &&
           to_float == other.to_float;
  }
};

struct Store {
  TensorMap map;
  const char* shared;
  int32_t corner[3];
};

struct Copy {
  char* shared;
  const char* source;
  bool valid;
};

// Groups of operations of one thread: the last one is open, those before are committed and wait.
template <typename Operation>
using Groups = std::deque<std::vector<Operation>>;

struct Thread {
  Groups<Wgmma> wgmmas{1};
  Groups<Store> stores{1};
  std::vector<Copy> copies;  // that no barrier tracks yet
  int copies_in_flight = 0;
  uint64_t fenced_at = 0;  // how many copies had landed at its last fence_proxy_async
  bool wgmma_fenced = false;
  std::vector<int> unfenced;                  // units written by ordinary stores since the last fence_proxy_async
  std::map<const Barrier*, uint64_t> passed;  // phases that this thread has seen end
  int registers = 0;                          // 0: as launched
};

// Of a block, or of all blocks of a cluster.
struct State {
  std::map<const Barrier*, BarrierState> barriers;
  NamedBarrier named[moe_emulator::kMaxCluster][16];
  std::vector<Thread> threads = std::vector<Thread>(moe_emulator::kMaxCluster * moe_emulator::kMaxThreads);
  std::vector<bool> unfenced = std::vector<bool>(moe_emulator::kMaxCluster * moe_emulator::kMaxSharedBytes / kUnit);
  std::vector<uint64_t> landed = std::vector<uint64_t>(unfenced.size());  // number of the cp.async that wrote a unit
  uint64_t copies_landed = 0;
  bool barriers_unfenced = false;
};

State state;
bool used = false;  // by a block that runs a kernel with barriers

char* shared_base() { return static_cast<char*>(moe_emulator::dynamic_shared()); }
int unit_of(const char* pointer) {
  return static_cast<int>((pointer - static_cast<char*>(moe_emulator::dynamic_shared_of(0))) / kUnit);
}
Thread* block_threads() { return &state.threads[moe_emulator::cluster_rank() * moe_emulator::kMaxThreads]; }
Thread& self() { return block_threads()[linear_thread()]; }
// The same place in the shared memory of another block of the cluster.
template <typename T>
T* at_rank(T* shared, unsigned rank) {
  if (rank >= moe_emulator::cluster_size()) fail("a block that the cluster has not");
  if (moe_emulator::block_ended(rank)) fail("a block of the cluster is reached after it has ended");
  const int64_t away = int64_t{rank} - moe_emulator::cluster_rank();
  return reinterpret_cast<T*>(reinterpret_cast<char*>(shared) +
                              away * static_cast<int64_t>(moe_emulator::kMaxSharedBytes));
}

void start_block() {
  if (used) state = State();
  used = false;
}

// A block must leave nothing in flight.
void end_block() {
  if (!used) return;
  for (const Thread& thread : state.threads) {
    if (thread.wgmmas.size() > 1 || thread.stores.size() > 1) {
      fail("a block ended with wgmmas or TMA stores that no thread waited for");
    }
    if (!thread.wgmmas[0].empty() || !thread.stores[0].empty() || !thread.copies.empty()) {
      fail("a block ended with wgmmas or TMA stores that were never committed, or cp.asyncs that never arrive");
    }
  }
  for (const auto& [barrier, s] : state.barriers) {
    if (s.bytes != 0) fail("a block ended with bytes expected on a barrier");
  }
}

const bool registered = (moe_emulator::on_block(start_block, end_block), true);

BarrierState& barrier_state(const Barrier* barrier) {
  if (state.barriers_unfenced) fail("a barrier was used before barrier_init_fence");
  const auto found = state.barriers.find(barrier);
  if (found == state.barriers.end()) fail("a barrier was used before it was initialised");
  return found->second;
}

int box_bytes(const TensorMap& map) {
  return map.box[0] * map.box[1] * (map.rank > 2 ? map.box[2] : 1) * map.element_bytes;
}

void check_inside(const char* shared, int64_t bytes, const char* who) {
  const int64_t first = shared - shared_base(), size = static_cast<int64_t>(moe_emulator::dynamic_shared_bytes());
  if (first < 0 || first + bytes > size) fail(std::string(who) + " leaves the shared memory of the launch");
}

void check_buffer(const TensorMap& map, const void* shared) {
  if (shared_address(shared) % 1024 != 0) fail("TMA: a swizzled buffer must be aligned to 1024 bytes");
  if (reinterpret_cast<uintptr_t>(&map) % 64 != 0) fail("TMA: a tensor map must be aligned to 64 bytes");
  if (!map.data) fail("TMA: a tensor map that was not encoded");
  check_inside(static_cast<const char*>(shared), box_bytes(map), "TMA");
}

// body(where the box's 16 bytes lie in `shared`, its bytes in memory or nullptr, how many of them are inside)
template <typename Body>
void for_each_chunk(const TensorMap& map, const char* shared, const int32_t* corner, Body&& body) {
  const int chunk_elements = 16 / map.element_bytes;
  int row = 0;
  const int boxes_z = map.rank > 2 ? map.box[2] : 1;
  for (int z = 0; z < boxes_z; ++z) {
    for (int y = 0; y < map.box[1]; ++y, ++row) {
      const int64_t cy = int64_t{corner[1]} + y, cz = int64_t{corner[2]} + z;
      const bool row_inside = cy >= 0 && cy < map.sizes[1] && (map.rank < 3 || (cz >= 0 && cz < map.sizes[2]));
      for (int x = 0; x < map.box[0]; x += chunk_elements) {
        const int64_t cx = int64_t{corner[0]} + x;
        const int64_t inside = std::clamp<int64_t>(map.sizes[0] - cx, 0, chunk_elements);
        const char* source =
            map.data + cx * map.element_bytes + cy * map.strides[1] + (map.rank > 2 ? cz * map.strides[2] : 0);
        char* place = const_cast<char*>(shared) + swizzled(row, x * map.element_bytes);
        body(place, row_inside && inside > 0 ? source : nullptr, inside * map.element_bytes);
      }
    }
  }
}

void require_fenced(const char* shared, int bytes, const char* who) {
  for (int unit = unit_of(shared); unit < unit_of(shared + bytes); ++unit) {
    if (state.unfenced[unit]) fail(std::string(who) + " was written to shared memory without fence_proxy_async");
  }
}

void mark_unfenced(const char* shared, int bytes) {
  for (int unit = unit_of(shared); unit < unit_of(shared + bytes); ++unit) {
    state.unfenced[unit] = true;
    self().unfenced.push_back(unit);
  }
}

// Element (row, depth) of a 16-deep operand, as the hardware finds it: the matrix is made of 16-byte pieces whose
// address is the start plus multiples of the offsets in the descriptor; then the swizzle permutes address bits 4-6 by
// bits 7-9.
uint32_t element_address(uint64_t descriptor, bool k_major, int row, int depth) {
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  uint32_t address = start;
  if (k_major) {
    address += row % 8 * 128 + row / 8 * stride + depth * 2;
  } else {
    address += row % 64 * 2 + row / 64 * leading + depth % 8 * 128 + depth / 8 * stride;
  }
  return address ^ (address >> 7 & 7) << 4;
}

// Fields of a descriptor: 0-13 start, 16-29 leading, 32-45 stride, all in 16 bytes, 49-51 base offset, 62-63 swizzle.
// Without a base offset the atoms of 8 rows of 128 bytes must lie at multiples of 1024 bytes.
void check_descriptor(uint64_t descriptor, bool k_major, int rows) {
  constexpr uint64_t kFields = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 7ull << 49 | 3ull << 62;
  if (descriptor & ~kFields) fail("wgmma: the descriptor sets bits that are reserved");
  if (descriptor >> 62 != 1) fail("wgmma: the descriptor names no 128B swizzle");
  if (descriptor >> 49 & 7) fail("wgmma: the descriptor has a base offset");
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  constexpr uint32_t kAtom = 1024;
  if (stride == 0 || stride % kAtom != 0) fail("wgmma: the stride is no multiple of a swizzle atom");
  if (!k_major && rows > 64 && (leading == 0 || leading % kAtom != 0)) {
    fail("wgmma: the leading offset is no multiple of a swizzle atom");
  }
  // K-major operands may start inside the first row of an atom, MN-major ones at an atom.
  if (start % kAtom >= (k_major ? 128u : 1u)) fail("wgmma: the operand starts inside a swizzle atom");
}

// The copies that every lane of the warp of `lanes` has fenced.
uint64_t fenced_by(const Thread* lanes) {
  uint64_t fenced = lanes[0].fenced_at;
  for (int lane = 1; lane < 32; ++lane) fenced = std::min(fenced, lanes[lane].fenced_at);
  return fenced;
}

// Rows [first, end) of an operand of `rows` rows.
std::vector<float> read_operand(uint64_t descriptor, bool k_major, int rows, int first, int end, ToFloat to_float,
                                uint64_t fenced) {
  check_descriptor(descriptor, k_major, rows);
  const char* const own = shared_base();
  const int first_unit = unit_of(own);
  const auto bytes = static_cast<uint32_t>(moe_emulator::dynamic_shared_bytes());
  std::vector<float> values((end - first) * kInstructionDepth);
  for (int row = first; row < end; ++row) {
    for (int depth = 0; depth < kInstructionDepth; ++depth) {
      const uint32_t offset = element_address(descriptor, k_major, row, depth) - kSharedBase;
      if (offset + 2 > bytes) fail("wgmma leaves the shared memory of the launch");
      const int unit = first_unit + static_cast<int>(offset) / kUnit;
      if (state.unfenced[unit]) fail("wgmma reads what was written to shared memory without fence_proxy_async");
      if (state.landed[unit] > fenced) fail("wgmma reads what came by cp.async without fence_proxy_async");
      values[(row - first) * kInstructionDepth + depth] = to_float(own + offset);
    }
  }
  return values;
}

// One instruction of one warp: its 16 of the 64 rows. `fenced`: the copies it may see.
void multiply(const Wgmma& shared_part, float* const (&accumulators)[32], int warp, uint64_t fenced) {
  const int columns = shared_part.columns, first_row = warp % 4 * 16;
  const auto a = read_operand(shared_part.descriptor_a, shared_part.a_is_k_major, 64, first_row, first_row + 16,
                              shared_part.to_float, fenced);
  const auto b = read_operand(shared_part.descriptor_b, shared_part.b_is_k_major, columns, 0, columns,
                              shared_part.to_float, fenced);
  for (int lane = 0; lane < 32; ++lane) {
    for (int index = 0; index < columns / 2; ++index) {
      const FragmentPosition position = fragment_position(warp % 4 * 32 + lane, index);
      const float* row = &a[(position.row - first_row) * kInstructionDepth];
      const float* column = &b[position.column * kInstructionDepth];
      float sum = shared_part.accumulate ? accumulators[lane][index] : 0.f;
      for (int depth = 0; depth < kInstructionDepth; ++depth) sum += row[depth] * column[depth];
      accumulators[lane][index] = sum;
    }
  }
}

// One block's copy of a load: the barrier and the memory are that block's.
void load_later(const TensorMap& map, Barrier* barrier, char* shared, unsigned rank, int32_t x, int32_t y, int32_t z) {
  require_fenced(shared, box_bytes(map), "a TMA load overwrites what");
  std::memset(shared, kPoison, box_bytes(map));
  BarrierState& s = barrier_state(barrier);
  moe_emulator::deliver_later([map, &s, shared, rank, x, y, z] {
    if (moe_emulator::block_ended(rank)) fail("a TMA load lands in a block that has ended");
    const int32_t corner[3] = {x, y, z};
    for_each_chunk(map, shared, corner, [](char* place, const char* source, int64_t bytes) {
      std::memset(place, 0, 16);
      if (source) std::memcpy(place, source, bytes);
    });
    s.bytes -= box_bytes(map);
    s.settle();
  });
}

}  // namespace

uint32_t shared_address(const void* pointer) {
  return kSharedBase + static_cast<uint32_t>(static_cast<const char*>(pointer) - shared_base());
}

void barrier_init(Barrier* barrier, uint32_t arrivals) {
  used = true;
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) fail("a barrier must be aligned to 8 bytes");
  check_inside(reinterpret_cast<const char*>(barrier), sizeof(Barrier), "a barrier");
  state.barriers[barrier] = {arrivals, arrivals, 0, 0};
  state.barriers_unfenced = true;
}
void barrier_init_fence() { state.barriers_unfenced = false; }

void barrier_arrive(Barrier* barrier) { barrier_arrive_expect(barrier, 0); }

void barrier_arrive_at(Barrier* barrier, unsigned rank) { barrier_arrive(at_rank(barrier, rank)); }

void barrier_arrive_expect(Barrier* barrier, uint32_t bytes) {
  BarrierState& s = barrier_state(barrier);
  if (s.pending == 0) fail("more arrivals on a barrier than it expects in one phase");
  s.bytes += bytes;
  if (s.bytes > kMaxExpected) fail("a barrier expects more bytes than it can count");
  --s.pending;
  s.settle();
}

void barrier_wait(Barrier* barrier, uint32_t parity) {
  if (parity > 1) fail("the parity of a barrier's phase is 0 or 1");
  const BarrierState& s = barrier_state(barrier);
  moe_emulator::wait_until([&s, parity] { return (s.phase & 1) != parity; });
  // Parities tell neighbouring phases apart: a thread that sleeps through one would take the next but one for it.
  const auto [passed, first] = self().passed.try_emplace(barrier, s.phase);
  if (!first && s.phase != passed->second + 1) fail("a thread did not see every phase of a barrier end");
  passed->second = s.phase;
}

void named_barrier(int id, int threads) {
  if (id < 1 || id > 15) fail("a named barrier is 1 to 15");
  if (threads % 32 != 0) fail("a named barrier is for whole warps");
  NamedBarrier& barrier = state.named[moe_emulator::cluster_rank()][id];
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  moe_emulator::wait_until([&barrier, generation] { return barrier.generation != generation; });
}

void fence_proxy_async() {
  for (int unit : self().unfenced) state.unfenced[unit] = false;
  self().unfenced.clear();
  self().fenced_at = state.copies_landed;
}

const char* encode_tensor_map(TensorMap* map, const TensorMapSpec& spec) {
  map->data = static_cast<const char*>(spec.data);
  map->element_bytes = spec.type == MapType::kFloat32 ? 4 : 2;
  map->rank = spec.rank;
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) return "emulated tensor map: the map itself is unaligned";
  if (reinterpret_cast<uintptr_t>(spec.data) % 16 != 0) return "emulated tensor map: unaligned data";
  if (spec.rank < 2 || spec.rank > 3 || spec.strides[0] != 1) return "emulated tensor map: bad rank or first stride";
  for (int axis = 0; axis < spec.rank; ++axis) {
    map->sizes[axis] = spec.sizes[axis];
    map->strides[axis] = spec.strides[axis] * map->element_bytes;
    map->box[axis] = spec.box[axis];
    if (spec.sizes[axis] < 1 || spec.sizes[axis] > int64_t{1} << 32) return "emulated tensor map: size out of range";
    if (spec.box[axis] < 1 || spec.box[axis] > 256) return "emulated tensor map: box out of range";
    const int64_t stride = map->strides[axis];
    if (axis > 0 && (stride % 16 != 0 || stride >= int64_t{1} << 40)) return "emulated tensor map: bad stride";
    const int64_t below = axis > 1 ? map->strides[axis - 1] : axis > 0 ? map->element_bytes * spec.sizes[0] : 0;
    if (axis > 0 && (axis > 1 ? stride % below != 0 : stride < below)) return "emulated tensor map: strides overlap";
  }
  return map->box[0] * map->element_bytes == kRowBytes ? nullptr : "emulated tensor map: a box row is not 128 bytes";
}

void tma_load(const TensorMap& map, Barrier* barrier, void* shared, int32_t x, int32_t y, int32_t z) {
  tma_load_to_cluster(map, barrier, shared, static_cast<uint16_t>(1u << moe_emulator::cluster_rank()), x, y, z);
}

void tma_load_to_cluster(const TensorMap& map, Barrier* barrier, void* shared, uint16_t ranks, int32_t x, int32_t y,
                         int32_t z) {
  check_buffer(map, shared);
  for (unsigned rank = 0; ranks >> rank; ++rank) {
    if (ranks >> rank & 1)
      load_later(map, at_rank(barrier, rank), at_rank(static_cast<char*>(shared), rank), rank, x, y, z);
  }
}
void tma_store(const TensorMap& map, const void* shared, int32_t x, int32_t y, int32_t z) {
  check_buffer(map, shared);
  require_fenced(static_cast<const char*>(shared), box_bytes(map), "a TMA store reads what");
  self().stores.back().push_back({map, static_cast<const char*>(shared), {x, y, z}});
}

void tma_store_commit() { self().stores.emplace_back(); }

void tma_store_wait(int groups) {
  auto& stores = self().stores;
  while (static_cast<int>(stores.size()) - 1 > groups) {
    for (const Store& store : stores.front()) {
      for_each_chunk(store.map, store.shared, store.corner, [](char* place, const char* target, int64_t bytes) {
        if (target) std::memcpy(const_cast<char*>(target), place, bytes);
      });
    }
    stores.pop_front();
  }
}

void copy_async_16(void* shared, const void* source, bool valid) {
  if (shared_address(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0) fail("cp.async: unaligned");
  std::memset(shared, kPoison, 16);
  self().copies.push_back({static_cast<char*>(shared), static_cast<const char*>(source), valid});
}

// The copies land, and then the thread arrives, at a random later time. Who has waited for the barrier sees them once
// it has fenced.
void copy_async_arrive(Barrier* barrier) {
  Thread& thread = self();
  BarrierState& s = barrier_state(barrier);
  ++thread.copies_in_flight;
  moe_emulator::deliver_later([&thread, &s, copies = std::move(thread.copies)] {
    for (const Copy& copy : copies) {
      if (copy.valid) {
        std::memcpy(copy.shared, copy.source, 16);
      } else {
        std::memset(copy.shared, 0, 16);
      }
      const uint64_t number = ++state.copies_landed;
      for (int unit = unit_of(copy.shared); unit < unit_of(copy.shared + 16); ++unit) state.landed[unit] = number;
    }
    --thread.copies_in_flight;
    if (s.pending == 0) fail("more arrivals on a barrier than it expects in one phase");
    --s.pending;
    s.settle();
  });
  thread.copies.clear();
}

void copy_async_wait_all() {
  Thread& thread = self();
  if (!thread.copies.empty()) fail("a wait for cp.asyncs that no barrier tracks");
  moe_emulator::wait_until([&thread] { return thread.copies_in_flight == 0; });
}

void store_global_16(void* global, const Chunk& value) {
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("a misaligned store of 16 bytes");
  *static_cast<Chunk*>(global) = value;
}

// All warps of a warpgroup change to the same number, and all warps together hold no more than there are.
void set_registers(int registers, bool more) {
  used = true;
  const unsigned threads = moe_emulator::block_size.x, first = linear_thread() / kWarpgroup * kWarpgroup;
  const int launched = kRegisters / static_cast<int>(threads) / 8 * 8;
  if (registers % 8 != 0 || registers < 24 || registers > 256) fail("setmaxnreg: 24 to 256, a multiple of 8");
  if (more ? registers < launched : registers > launched) fail("setmaxnreg: inc must raise and dec must lower");
  self().registers = registers;
  int total = 0;
  for (unsigned t = 0; t < threads; ++t) {
    const int own = block_threads()[t].registers;
    if (t / kWarpgroup == first / kWarpgroup && own != 0 && own != registers) fail("setmaxnreg: warps disagree");
    total += own ? own : 0;
  }
  if (total > launched * static_cast<int>(threads)) fail("setmaxnreg: more registers than the block has");
}

void store_shared_bytes(void* shared, const void* bytes, int count) {
  if (reinterpret_cast<uintptr_t>(shared) % count != 0) fail("a misaligned store to shared memory");
  check_inside(static_cast<const char*>(shared), count, "a store");
  std::memcpy(shared, bytes, count);
  mark_unfenced(static_cast<char*>(shared), count);
}

void store_matrices(void* row, const uint32_t (&matrices)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("stmatrix: a misaligned row");
  const uint64_t* rows = moe_emulator::exchange_value(0xffffffffu, reinterpret_cast<uint64_t>(row));
  const int lane = moe_emulator::lane();
  char* own[4];
  for (int i = 0; i < 4; ++i) own[i] = reinterpret_cast<char*>(rows[8 * i + lane / 4]) + lane % 4 * 4;
  for (int i = 0; i < 4; ++i) store_shared_bytes(own[i], &matrices[i], 4);
}

Chunk load_shared_16(const void* shared) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) fail("a misaligned load from shared memory");
  check_inside(static_cast<const char*>(shared), 16, "a load");
  Chunk value;
  std::memcpy(&value, shared, sizeof(value));
  return value;
}

void wgmma_fence() { self().wgmma_fenced = true; }

void wgmma_commit() {
  self().wgmmas.emplace_back();
  self().wgmma_fenced = false;
}

void wgmma_issue(float* accumulators, int columns, uint64_t descriptor_a, uint64_t descriptor_b, bool a_is_k_major,
                 bool b_is_k_major, bool accumulate, ToFloat to_float) {
  if (!self().wgmma_fenced) fail("wgmma without wgmma_fence");
  self().wgmmas.back().push_back(
      {accumulators, columns, descriptor_a, descriptor_b, a_is_k_major, b_is_k_major, accumulate, to_float});
}

void wgmma_wait_for(int groups) {
  // The lanes of a warp meet, the last of them to come computes for all, and they part together.
  const auto mine = moe_emulator::linear_thread();
  moe_emulator::exchange(0xffffffffu, 0);
  if (mine % 32 == 0) {
    Thread* lanes = &block_threads()[mine];
    while (static_cast<int>(lanes[0].wgmmas.size()) - 1 > groups) {
      const size_t count = lanes[0].wgmmas.front().size();
      for (size_t i = 0; i < count; ++i) {
        float* accumulators[32];
        for (int lane = 0; lane < 32; ++lane) {
          const auto& group = lanes[lane].wgmmas.front();
          if (group.size() != count || !group[i].same_instruction(lanes[0].wgmmas.front()[i])) {
            fail("the lanes of a warp issued different wgmmas");
          }
          accumulators[lane] = group[i].accumulators;
        }
        multiply(lanes[0].wgmmas.front()[i], accumulators, static_cast<int>(mine / 32), fenced_by(lanes));
      }
      for (int lane = 0; lane < 32; ++lane) lanes[lane].wgmmas.pop_front();
    }
  }
  moe_emulator::exchange(0xffffffffu, 0);
}

}  // namespace moe_ext::sm90
