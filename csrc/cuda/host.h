// Runs kernels on the host: see executor.h. Between two barriers of a block, its warps run one after another, and so do
// the lanes of a warp between two barriers of the warp, in ascending or descending order (`downwards`). A result that
// depends on this order is a race. Shared memory is initialised with 0xA5. If no thread can continue, the launch
// returns an error. The library must not be used afterwards, since the requests of unfinished threads are not cleared.
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

constexpr int64_t enough_blocks = 8, enough_tiles = 20;  // so few that small problems test parts of several tiles

namespace host {

struct Index {
  unsigned x;
};

constexpr int most_threads = 384;

// A barrier. A phase ends when all threads have arrived and all expected bytes have been copied.
struct Barrier {
  int32_t bytes = 0;
  uint32_t arrivals : 12, missing : 12, phase : 1, started : 7;
  static constexpr uint32_t start = 0x35;  // marks an initialised barrier

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
  const Barrier* waits;  // the fiber waits until the phase of this barrier differs from `phase`; null: it can run
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
inline int current, count;  // count: the number of threads in the block
inline unsigned char* shared;
inline void (*body)();
inline bool downwards;
inline int launches, hopper_processors;
inline Barrier of_block, of_first;
inline std::vector<Barrier> of_warps(most_threads / 32);
inline std::vector<std::function<void()>> copies;  // bulk copies that are not done yet
inline bool dry;                                   // launches are counted, but run nothing
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

// Arrives at a barrier, and waits for the other threads.
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

// Runs the lanes of a warp until all of them wait for other warps. Returns whether any lane could run.
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

// Runs every thread once, and then half of the pending copies, the newest first. Returns whether anything was run.
inline bool run_once() {
  bool any = false;
  for (int warps = host::count / 32, k = 0; k < warps; ++k) any |= run_warp(host::downwards ? warps - 1 - k : k);
  for (int left = int(host::copies.size()), after = (left - 1) / 2; left > after; --left, any = true) {
    host::copies.back()();
    host::copies.pop_back();
  }
  return any;
}

// Runs a block. Returns nullptr, or an error if threads wait without end.
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
