// The host's executor: see executor.h. Between two barriers of a block its warps run one after the other, and so do the
// lanes of a warp between two barriers of their own, upwards or downwards: results that depend on which are a race.
// Shared memory is given filled with 0xA5. Where no thread can go on, the launch ends with an error, and with it the
// library's use: what its threads had asked for is still there.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <vector>

#define TCLR_KERNEL_OF(threads, blocks) static void
#define TCLR_KERNEL static void
#define TCLR_ARGUMENT const
#define TCLR_ROLLED
#define TCLR_DEVICE static inline
#define TCLR_METHOD

namespace tclr {

using Stream = void*;

constexpr int64_t enough_blocks = 8, enough_tiles = 20;  // so few that parts of small problems have several tiles

namespace host {

struct Index {
  unsigned x;
};

constexpr int most_threads = 384;

// What threads wait at. A phase of it ends with its last arrival, and not before the bytes that it expects have come.
struct Barrier {
  int32_t bytes = 0;
  uint32_t arrivals : 12, missing : 12, phase : 1, started : 7;
  static constexpr uint32_t start = 0x35;  // memory that is no barrier seldom has it

  explicit Barrier(int arrivals = 0) : arrivals(arrivals), missing(arrivals), phase(0), started(start) {}
  void arrive() {
    --missing;
    end_phase();
  }
  void take(int count) {
    bytes -= count;
    end_phase();
  }
  void end_phase() {
    if (missing == 0 && bytes == 0) missing = arrivals, phase ^= 1;
  }
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_size]};
  bool done;
  const Barrier* waits;  // until its phase is another than this; null: it only gives the others a turn
  uint32_t phase;
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t stack_size = 256 << 10;
#else
  static constexpr size_t stack_size = 64 << 10;
#endif

  bool ready() const { return !done && (!waits || waits->phase != phase); }
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers(most_threads);
inline int current, count;  // count: of this block's threads
inline unsigned char* shared;
inline void (*body)();
inline bool downwards;
inline int launches, hopper_processors;
inline Barrier of_block, of_first;
inline std::vector<Barrier> of_warps(most_threads / 32);
inline std::vector<std::function<void()>> copies;  // that have not landed yet
inline bool dry;                                   // launches are counted, and do nothing
inline char error[200];

inline void enter() {
  body();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void start(Fiber& fiber) {
  fiber.done = false, fiber.waits = nullptr;
  getcontext(&fiber.context);
  fiber.context.uc_stack = {fiber.stack.get(), 0, Fiber::stack_size};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
}

inline void wait(const Barrier* barrier, uint32_t phase = 0) {
  Fiber& fiber = fibers[current];
  fiber.waits = barrier, fiber.phase = phase;
  swapcontext(&fiber.context, &scheduler);
}

inline void give_turn() { wait(nullptr); }

// At a barrier of these threads alone.
inline void meet(Barrier& barrier) {
  uint32_t phase = barrier.phase;
  barrier.arrive();
  wait(&barrier, phase);
}

}  // namespace host
}  // namespace tclr

inline tclr::host::Index threadIdx, blockIdx, gridDim;

inline void __syncthreads() { tclr::host::meet(tclr::host::of_block); }
inline void __syncwarp() { tclr::host::meet(tclr::host::of_warps[threadIdx.x / 32]); }

inline void __threadfence() {}

namespace tclr {
inline void wait_for_former() {}
inline void let_next_start() {}
}  // namespace tclr

template <typename T>
T atomicAdd(T* x, T y) {
  T before = *x;
  *x += y;
  return before;
}

template <typename T>
T atomicMax(T* x, T y) {
  T before = *x;
  *x = before < y ? y : before;
  return before;
}

namespace tclr {

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(host::shared);
}

inline bool on_hopper() { return host::hopper_processors > 0; }
inline int processors() { return host::hopper_processors; }

// The lanes of a warp as far as they come without another warp; returns whether one could go on.
inline bool run_warp(int warp) {
  bool any = false;
  for (uint32_t phase;;) {
    phase = host::of_warps[warp].phase;
    for (int k = 0; k < 32; ++k) {
      threadIdx.x = host::current = warp * 32 + (host::downwards ? 31 - k : k);
      host::Fiber& fiber = host::fibers[threadIdx.x];
      if (!fiber.ready()) continue;
      any = true;
      swapcontext(&host::scheduler, &fiber.context);
    }
    if (host::of_warps[warp].phase == phase) return any;
  }
}

// A turn for every thread, after which half of the copies land, the newest first; whether anything happened.
inline bool run_once() {
  bool any = false;
  for (int warps = host::count / 32, k = 0; k < warps; ++k) any |= run_warp(host::downwards ? warps - 1 - k : k);
  for (int left = int(host::copies.size()), after = (left - 1) / 2; left > after; --left, any = true) {
    host::copies.back()();
    host::copies.pop_back();
  }
  return any;
}

// Nothing, or which threads of a block wait without end.
inline const char* run_block() {
  for (int k = 0; k < host::count; ++k) host::start(host::fibers[k]);
  host::of_block = host::Barrier(host::count), host::of_first = host::Barrier();
  for (host::Barrier& barrier : host::of_warps) barrier = host::Barrier(32);
  while (run_once()) {
  }
  int left = 0, one = 0;
  for (int k = 0; k < host::count; ++k)
    if (!host::fibers[k].done) one = k, ++left;
  if (left == 0) return nullptr;
  std::snprintf(host::error, sizeof host::error, "block %u: %d of %d threads wait without end, thread %d among them",
                blockIdx.x, left, host::count, one);
  return host::error;
}

struct SharedMemory {
  unsigned char* data;

  explicit SharedMemory(size_t size) : data(new (alignment) unsigned char[size]) { std::memset(data, 0xA5, size); }
  ~SharedMemory() { operator delete[](data, alignment); }
  static constexpr std::align_val_t alignment{1024};
};

template <typename A>
const char* launch(void (*kernel)(A), int64_t blocks, size_t shared, Stream, const A& argument, int of_block = threads,
                   bool = false) {
  static thread_local void (*called)(A);
  static thread_local const A* with;
  if (blocks == 0) return nullptr;
  called = kernel, with = &argument;
  host::body = [] { called(*with); };
  ++host::launches;
  if (host::dry) return nullptr;
  gridDim.x = unsigned(blocks), host::count = of_block;
  for (int64_t k = 0; k < blocks; ++k) {
    blockIdx.x = unsigned(host::downwards ? blocks - 1 - k : k);
    SharedMemory memory(shared);
    host::shared = memory.data;
    if (const char* error = run_block()) return error;
  }
  return nullptr;
}

}  // namespace tclr
