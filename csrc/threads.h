// PyTorch's threads and the level of kernels in use, for the CPU's operators.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/gram.h"
#include "tensors.h"

namespace tclr {

// PyTorch's own pool, so that the process has one. Whichever thread is free takes the next task; each has a number of
// its own, below `threads`.
inline Executor threads() {
  auto run = [](int64_t n, Task task, void* argument) {
    std::atomic<int64_t> next = 0;
    int64_t count = std::min<int64_t>(n, torch::stable::get_num_threads());
    torch::stable::parallel_for(0, count, 1, [&](int64_t thread, int64_t) {
      for (int64_t i = next++; i < n; i = next++) task(argument, i, thread);
    });
  };
  return {run, int64_t(torch::stable::get_num_threads())};
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

inline double tau_of(const Optional& tau, double value) {
  if (!tau) return value;
  STD_TORCH_CHECK(tau->dim() == 0 && tau->is_cpu(), "tau: wanted a 0-d CPU tensor");
  return host_value(*tau);
}

}  // namespace tclr
