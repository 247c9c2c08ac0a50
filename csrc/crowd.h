// How many threads are worth it, by the work there is and by what else runs on the cores.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace tclr {

// Where other processes want the same cores, a thread that this one waits for may not be running for milliseconds,
// however little it has to do. What would take about as long in one thread alone is then left to one, for some calls;
// after them a call with several threads finds out whether that still holds. Results do not depend on any of this.
class Crowd {
 public:
  // The work that a call must have for several threads.
  double least() {
    int64_t left = alone.load(std::memory_order_relaxed);
    if (left <= 0) return worth_waking;
    alone.store(left - 1, std::memory_order_relaxed);
    return worth_waiting;
  }

  // What the calling thread saw of a parallel region: the time, and for how much of it it computed.
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
