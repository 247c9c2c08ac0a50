// The host's executor: see executor.h. Between two barriers of a block its warps run one after the other, and so do the
// lanes of a warp between two barriers of their own, upwards or downwards: results that depend on which are a race.
// Shared memory is given filled with 0xA5.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
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

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_size]};
  bool done, within_warp;  // within_warp: it waits for its warp alone
  static constexpr size_t stack_size = 64 << 10;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers(tile_threads);
inline int of_block;  // threads of the blocks that run
inline int current;
inline unsigned char* shared;
inline void (*body)();
inline bool downwards;
inline int launches;
inline bool dry;  // launches are counted, and do nothing

inline void enter() {
  body();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void start(Fiber& fiber) {
  fiber.done = fiber.within_warp = false;
  getcontext(&fiber.context);
  fiber.context.uc_stack = {fiber.stack.get(), 0, Fiber::stack_size};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
}

inline void wait(bool within_warp) {
  fibers[current].within_warp = within_warp;
  swapcontext(&fibers[current].context, &scheduler);
}

}  // namespace host
}  // namespace tclr

inline tclr::host::Index threadIdx, blockIdx, gridDim;

inline void __syncthreads() { tclr::host::wait(false); }
inline void __syncwarp() { tclr::host::wait(true); }

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

// The lanes of a warp up to a barrier of the block, or to their end; returns how many ended.
inline int run_warp(int warp) {
  for (;;) {
    int done = 0, waiting = 0;
    for (int k = 0; k < 32; ++k) {
      threadIdx.x = host::current = warp * 32 + (host::downwards ? 31 - k : k);
      host::Fiber& fiber = host::fibers[threadIdx.x];
      swapcontext(&host::scheduler, &fiber.context);
      done += fiber.done, waiting += !fiber.done && fiber.within_warp;
    }
    if (waiting == 0) return done;
    if (waiting != 32) {
      std::fprintf(stderr, "block %u: %d lanes of warp %d came to a barrier of it, not 32\n", blockIdx.x, waiting,
                   warp);
      std::abort();
    }
  }
}

// Every thread up to its next barrier, or to its end; all of them must come to the same.
inline bool run_to_barrier() {
  int done = 0;
  int warps = host::of_block / 32;
  for (int k = 0; k < warps; ++k) done += run_warp(host::downwards ? warps - 1 - k : k);
  if (done != 0 && done != host::of_block) {
    std::fprintf(stderr, "block %u: %d of %d threads ended before a barrier of the others\n", blockIdx.x, done,
                 host::of_block);
    std::abort();
  }
  return done == 0;
}

template <typename A>
const char* launch(void (*kernel)(A), int64_t blocks, size_t shared, Stream, const A& argument, int of_block = threads,
                   bool = false) {
  static thread_local void (*called)(A);
  static thread_local const A* with;
  if (blocks == 0) return nullptr;
  called = kernel, with = &argument, host::of_block = of_block;
  host::body = [] { called(*with); };
  ++host::launches;
  if (host::dry) return nullptr;
  gridDim.x = unsigned(blocks);
  for (int64_t k = 0; k < blocks; ++k) {
    blockIdx.x = unsigned(host::downwards ? blocks - 1 - k : k);
    std::unique_ptr<unsigned char[]> memory(new unsigned char[shared]);
    std::memset(memory.get(), 0xA5, shared);
    host::shared = memory.get();
    for (int t = 0; t < of_block; ++t) host::start(host::fibers[t]);
    while (run_to_barrier()) {
    }
  }
  return nullptr;
}

}  // namespace tclr
