// PyTorch's threads and the level of kernels in use, for the CPU's operators.
#pragma once
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/gram.h"
#include "tensors.h"

namespace tclr {

inline double seconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

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

inline Crowd crowd;

// PyTorch's own pool, so that the process has one. Whichever thread is free takes the next task; each has a number of
// its own, below `threads`.
inline Executor threads() {
  auto run = [](int64_t n, Task task, void* argument) {
    std::atomic<int64_t> next = 0;
    int64_t count = std::min<int64_t>(n, torch::stable::get_num_threads());
    double begun = seconds(CLOCK_MONOTONIC), computed = -seconds(CLOCK_THREAD_CPUTIME_ID);
    torch::stable::parallel_for(0, count, 1, [&](int64_t thread, int64_t) {
      for (int64_t i = next++; i < n; i = next++) task(argument, i, thread);
      if (thread == 0) computed += seconds(CLOCK_THREAD_CPUTIME_ID);  // the calling thread
    });
    if (count > 1) crowd.saw(seconds(CLOCK_MONOTONIC) - begun, computed);
  };
  return {run, int64_t(torch::stable::get_num_threads()), crowd.least()};
}

template <typename T>
const Kernels<T>& kernels() {
  if constexpr (std::is_same_v<T, double>)
    return level_in_use().f64;
  else
    return level_in_use().f32;
}

template <typename T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <typename T>
const T* const_data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

// Whether a problem is small enough that its rows and similarities stay in memory from the forward to the backward.
inline bool keeps(const GramInput& in) {
  int64_t rows = in.V * in.N;
  return rows <= 512 && double(in.G * rows) * double(in.D + rows) < 1 << 20;
}

// Whether gradients may be multiplied by what comes from above: where all are finite, and not all near underflow.
template <typename T>
bool scalable(const Tensors& gradients) {
  T largest = 0;
  for (const Tensor& d : gradients) largest = std::max(largest, kernels<T>().largest(const_data<T>(d), d.numel()));
  return largest < std::numeric_limits<T>::infinity() &&
         (largest == 0 || largest > std::sqrt(std::numeric_limits<T>::min()));
}

// x, contiguous, times a number.
template <typename T>
Tensor times(const Tensor& x, double factor) {
  Tensor made = empty(sizes_of(x), code_of(x), x);
  const T* from = const_data<T>(x);
  T *to = data<T>(made), by = T(factor);
  int64_t at_once = 1 << 20;  // the time it takes to wake another thread
  torch::stable::parallel_for(0, x.numel(), at_once, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = from[i] * by;
  });
  return made;
}

inline double tau_of(const Optional& tau, double value) {
  if (!tau) return value;
  STD_TORCH_CHECK(tau->dim() == 0 && tau->is_cpu(), "tau: wanted a 0-d CPU tensor");
  return host_value(*tau);
}

}  // namespace tclr
