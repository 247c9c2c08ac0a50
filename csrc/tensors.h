// From tensors to what the CPU kernels take.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>

#include "cpu/gram.h"

namespace tclr {

inline Dtype dtype_of(const at::Tensor& z) {
  switch (z.scalar_type()) {
    case at::kDouble:
      return Dtype::f64;
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      TORCH_CHECK_TYPE(false, "sets: found dtype ", z.scalar_type(), ", wanted float64, float32, bfloat16 or float16");
  }
}

inline double tau_of(const std::optional<at::Tensor>& tau, double value) {
  if (!tau) return value;
  TORCH_CHECK_VALUE(tau->dim() == 0 && tau->is_cpu(), "tau: wanted a 0-d CPU tensor");
  return tau->item<double>();
}

// ATen's threads. Whichever is free takes the next task; each has a number of its own, below `threads`.
inline Executor threads() {
  at::internal::lazy_init_num_threads();  // else the first parallel_for of this library in a thread may change its
                                          // count
  auto run = [](int64_t n, Task task, void* argument) {
    std::atomic<int64_t> next = 0;
    at::parallel_for(0, std::min<int64_t>(n, at::get_num_threads()), 1, [&](int64_t thread, int64_t) {
      for (int64_t i = next++; i < n; i = next++) task(argument, i, thread);
    });
  };
  return {run, at::get_num_threads()};
}

template <typename T>
const Kernels<T>& kernels() {
  if constexpr (std::is_same_v<T, double>)
    return level_in_use().f64;
  else
    return level_in_use().f32;
}

template <typename T>
at::Tensor workspace(const GramInput& in, const Executor& executor, bool backward, const at::TensorOptions& options) {
  return at::empty({kernels<T>().workspace(in, executor.threads, backward)}, options);
}

}  // namespace tclr
