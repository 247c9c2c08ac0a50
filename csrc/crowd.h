// Whether a call should use several threads, by the work it has and by what else runs on the cores.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace tclr {

// If other processes want the same cores, a thread of ours may be delayed for milliseconds, and the calling thread
// waits for it. After that was seen, calls with little work use one thread for a while; then a call with several
// threads finds out whether the cores are still busy. Results do not depend on the number of threads.
class Crowd {
 public:
  // The work that the next call must have to use several threads.
  double least() {
    int64_t left = alone.load(std::memory_order_relaxed);
    if (left <= 0) return worth_waking;
    alone.store(left - 1, std::memory_order_relaxed);
    return worth_waiting;
  }

  // What the calling thread measured of a parallel region: its duration, and for how many seconds it computed itself.
  void saw(double time, double computed) {
    double lost = time - computed;
    if (lost < 5e-4 || lost < time / 2) {
      if (good.fetch_add(1, std::memory_order_relaxed) > 64) next.store(shortest, std::memory_order_relaxed);
      return;
    }
    int64_t calls = next.load(std::memory_order_relaxed);
    good.store(0, std::memory_order_relaxed);
    alone.store(calls, std::memory_order_relaxed);
    next.store(std::min<int64_t>(2 * calls, longest), std::memory_order_relaxed);
  }

 private:
  // In the unit of `group_work`, of which a thread does 1e8 in 2 ms.
  static constexpr double worth_waking = 5e6, worth_waiting = 1e9;
  static constexpr int64_t shortest = 8, longest = 256;  // calls
  std::atomic<int64_t> alone{0}, next{shortest}, good{0};
};

}  // namespace tclr
