// How tasks wait for each other. A stage is a counter that only rises; a task waits until it has the value it needs.
//
// The thread that others wait for may not be running, where other processes want the same cores. A waiting thread
// therefore gives its core away after some tens of microseconds: it sleeps until the stage rises.
#pragma once
#include <linux/futex.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace tclr {
namespace {

constexpr int64_t awake = 50000;  // nanoseconds that a waiting thread spins before it sleeps

int64_t sleepers;  // threads that sleep below

static inline int64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline void futex(const int64_t* stage, int operation, int32_t value) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the system compares the low half of a stage");
  syscall(SYS_futex, stage, operation, value, nullptr, nullptr, 0);
}

// One step of a wait that began at `since` (0: begins now): spins for a moment or, after `awake`, sleeps.
__attribute__((noinline)) void linger(const int64_t* stage, int64_t wanted, int64_t& since) {
  if (since == 0) since = nanoseconds();
  if (nanoseconds() - since < awake) {
#if defined(__x86_64__)
    for (int k = 0; k < 8; ++k) __builtin_ia32_pause();
#endif
    return;
  }
  // A thread that raises the stage looks for sleepers afterwards, and the operating system compares the stage before it
  // lets a thread sleep. So at least one of the two notices the other, and no thread sleeps for ever.
  __atomic_add_fetch(&sleepers, 1, __ATOMIC_SEQ_CST);
  int64_t seen = __atomic_load_n(stage, __ATOMIC_SEQ_CST);
  if (seen < wanted) futex(stage, FUTEX_WAIT_PRIVATE, int32_t(seen));
  __atomic_sub_fetch(&sleepers, 1, __ATOMIC_SEQ_CST);
}

static inline void wait_for(const int64_t* stage, int64_t wanted) {
  int64_t since = 0;
  while (__atomic_load_n(stage, __ATOMIC_ACQUIRE) < wanted) linger(stage, wanted, since);
}

// alone: there is no other thread.
static inline void reach(int64_t* stage, int64_t reached, bool alone) {
  if (alone) {
    *stage = reached;
    return;
  }
  __atomic_store_n(stage, reached, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&sleepers, __ATOMIC_SEQ_CST) != 0) futex(stage, FUTEX_WAKE_PRIVATE, INT32_MAX);
}

}  // namespace
}  // namespace tclr
