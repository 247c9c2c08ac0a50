// What the CPU's operators share: PyTorch's threads, and the kernels of the instruction-set level in use.
#pragma once
#include <time.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "busy_cores.h"
#include "cpu/gram.h"
#include "tensors.h"

namespace tclr {

inline double seconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

inline BusyCores busy_cores;

// Runs tasks on PyTorch's own thread pool, so that the process has no second one. The next free thread takes the next
// task; the threads are numbered from 0.
inline Executor threads() {
  auto run = [](int64_t n, Task task, void* argument) {
    std::atomic<int64_t> next = 0;
    int64_t count = std::min<int64_t>(n, torch::stable::get_num_threads());
    double begun = seconds(CLOCK_MONOTONIC), computed = -seconds(CLOCK_THREAD_CPUTIME_ID);
    torch::stable::parallel_for(0, count, 1, [&](int64_t thread, int64_t) {
      for (int64_t i = next++; i < n; i = next++) task(argument, i, thread);
      if (thread == 0) computed += seconds(CLOCK_THREAD_CPUTIME_ID);  // the calling thread
    });
    if (count > 1) busy_cores.observe(seconds(CLOCK_MONOTONIC) - begun, computed);
  };
  return {run, int64_t(torch::stable::get_num_threads()), busy_cores.least_work()};
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
  return rows <= 1024 && double(in.G * rows) * double(in.D + rows) < 1 << 21;
}

// Whether the gradients for an upstream of 1 can be kept and multiplied by the upstream gradient later: all must be
// finite, and not all near underflow.
template <typename T>
bool scalable(const Tensors& gradients) {
  T largest = 0;
  for (const Tensor& d : gradients) largest = std::max(largest, kernels<T>().largest(const_data<T>(d), d.numel()));
  return largest < std::numeric_limits<T>::infinity() &&
         (largest == 0 || largest > std::sqrt(std::numeric_limits<T>::min()));
}

// A contiguous tensor x times a number.
template <typename T>
Tensor times(const Tensor& x, double factor) {
  Tensor made = empty(sizes_of(x), code_of(x), x);
  const T* from = const_data<T>(x);
  T *to = data<T>(made), by = T(factor);
  int64_t at_once = 1 << 20;  // elements; multiplying fewer takes less time than waking another thread
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
