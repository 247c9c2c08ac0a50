// Whether a call should use several threads, by the work it has and by what else runs on the cores.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace tclr {

// If other processes want the same cores, a thread of ours may be delayed for milliseconds, and the calling thread
// waits for it. After that was seen, calls with little work use one thread for a while; then a call with several
// threads finds out whether the cores are still busy. Results do not depend on the number of threads.
class BusyCores {
 public:
  // The work that the next call must have to use several threads.
  double least_work() {
    int64_t left = calls_alone.load(std::memory_order_relaxed);
    if (left <= 0) return worth_waking;
    calls_alone.store(left - 1, std::memory_order_relaxed);
    return worth_waiting;
  }

  // What the calling thread measured of a parallel region: its duration, and for how many seconds it computed itself.
  void observe(double time, double computed) {
    double lost = time - computed;
    if (lost < 5e-4 || lost < time / 2) {
      if (undisturbed.fetch_add(1, std::memory_order_relaxed) > 64)
        calls_next_time.store(shortest, std::memory_order_relaxed);
      return;
    }
    int64_t calls = calls_next_time.load(std::memory_order_relaxed);
    undisturbed.store(0, std::memory_order_relaxed);
    calls_alone.store(calls, std::memory_order_relaxed);
    calls_next_time.store(std::min<int64_t>(2 * calls, longest), std::memory_order_relaxed);
  }

 private:
  // As `group_work` counts work; a thread does 1e8 in 2 ms.
  static constexpr double worth_waking = 5e6, worth_waiting = 1e9;
  static constexpr int64_t shortest = 8, longest = 256;  // calls
  std::atomic<int64_t> calls_alone{0}, calls_next_time{shortest}, undisturbed{0};
};

}  // namespace tclr
