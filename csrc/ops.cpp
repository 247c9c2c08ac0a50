// Schemas, checks, and the CPU implementation: tensors in, pointers and sizes on.
#include <tuple>

#include "objective.h"
#include "schemas.h"
#include "threads.h"

namespace tclr {
namespace {

struct Sets {
  std::vector<Rows> rows;
  GramInput input;
};

// The sets as pointers, alive as long as the tensors are.
Sets describe(const Tensors& sets, const Optional& tau, double tau_value, bool normalize, bool cross) {
  STD_TORCH_CHECK(!sets.empty() && sets[0].dim() == 3, "sets: wanted at least one tensor [G, N, D]");
  Sets s;
  std::vector<int64_t> sizes = sizes_of(sets[0]);
  Code dtype = code_of(sets[0]);
  for (const Tensor& z : sets) {
    STD_TORCH_CHECK(sizes_of(z) == sizes && code_of(z) == dtype && z.is_cpu(),
                    "sets: wanted CPU tensors of one shape and dtype");
    s.rows.push_back({z.const_data_ptr(), z.stride(0), z.stride(1), z.stride(2)});
  }
  auto V = static_cast<int64_t>(sets.size());
  s.input = {sizes[0],  V,    sizes[1], sizes[2], s.rows.data(), dtype_of(sets[0]), tau_of(tau, tau_value),
             normalize, cross};
  return s;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensors& sets, const GramInput& in) {
  Code dtype = wide(sets[0]);
  auto block = [&] { return empty({in.G, in.V, in.V, in.N}, dtype, sets[0]); };
  Tensor term = block(), neg = block(), pos = block();
  Executor executor = threads();
  Tensor memory = empty({kernels<T>().workspace(in, executor.threads, false)}, dtype, sets[0]);
  kernels<T>().forward(in, {data<T>(term), data<T>(neg), data<T>(pos)}, data<T>(memory), executor);
  return {term, neg, pos};
}

std::tuple<Tensor, Tensor, Tensor> gram_forward(Tensors sets, Optional tau, double tau_value, bool normalize,
                                                bool cross, bool) {
  Sets s = describe(sets, tau, tau_value, normalize, cross);
  return s.input.dtype == Dtype::f64 ? forward<double>(sets, s.input) : forward<float>(sets, s.input);
}

// A copy in the order of the indices, where that is not the order in memory already. Not by PyTorch's operator, which
// costs a look-up by name: a microsecond, of the hundred that a small loss takes.
template <typename T>
Tensor contiguous(const Tensor& x) {
  if (x.is_contiguous()) return x;
  Tensor copy = empty(sizes_of(x), code_of(x), x);
  const T* from = const_data<T>(x);
  T* to = data<T>(copy);
  int64_t s0 = x.stride(0), s1 = x.stride(1), s2 = x.stride(2), s3 = x.stride(3), N = x.size(3);
  for (int64_t g = 0; g < x.size(0); ++g)
    for (int64_t a = 0; a < x.size(1); ++a)
      for (int64_t c = 0; c < x.size(2); ++c)
        for (int64_t i = 0; i < N; ++i) *to++ = from[g * s0 + a * s1 + c * s2 + i * s3];
  return copy;
}

template <typename T>
std::tuple<Tensors, Tensor> backward(const Tensors& sets, const GramInput& in, const Tensor& neg, const Tensor& pos,
                                     const Optional& g_term, const Optional& g_neg, const Optional& g_pos) {
  Code dtype = wide(sets[0]);
  Tensors kept;
  auto pointer = [&](const Optional& x) -> const T* {
    if (!x) return nullptr;
    STD_TORCH_CHECK(
        sizes_of(*x) == std::vector<int64_t>({in.G, in.V, in.V, in.N}) && code_of(*x) == dtype && x->is_cpu(),
        "neg, pos and their gradients: wanted CPU tensors [G, V, V, N] of the forward's dtype");
    return const_data<T>(kept.emplace_back(contiguous<T>(*x)));
  };
  Tensors dz;
  std::vector<Gradient<T>> outputs;
  for (size_t a = 0; a < sets.size(); ++a)
    outputs.push_back({data<T>(dz.emplace_back(empty(sizes_of(sets[a]), dtype, sets[a]))), in.N * in.D, in.D, false});
  Tensor zdz = empty({in.G, in.V, in.N}, dtype, sets[0]);
  Executor executor = threads();
  Tensor memory = empty({kernels<T>().workspace(in, executor.threads, true)}, dtype, sets[0]);
  GramBackward<T> call{pointer(neg),   pointer(pos),   pointer(g_term), pointer(g_neg),
                       pointer(g_pos), outputs.data(), data<T>(zdz)};
  kernels<T>().backward(in, call, data<T>(memory), executor);
  for (Tensor& d : dz) d = converted(d, sets[0]);
  return {dz, zdz};
}

std::tuple<Tensors, Tensor> gram_backward(Tensors sets, Optional tau, double tau_value, bool normalize, bool cross,
                                          Tensor neg, Tensor pos, Optional g_term, Optional g_neg, Optional g_pos,
                                          bool) {
  Sets s = describe(sets, tau, tau_value, normalize, cross);
  auto run = s.input.dtype == Dtype::f64 ? backward<double> : backward<float>;
  return run(sets, s.input, neg, pos, g_term, g_neg, g_pos);
}

}  // namespace
}  // namespace tclr

STABLE_TORCH_LIBRARY(tclr_kernels, m) {
  for (const char* schema : tclr::schemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(tclr_kernels, CPU, m) {
  m.impl("gram_forward", TORCH_BOX(&tclr::gram_forward));
  m.impl("gram_backward", TORCH_BOX(&tclr::gram_backward));
  m.impl("objective", TORCH_BOX(&tclr::objective));
  m.impl("objective_backward", TORCH_BOX(&tclr::objective_backward));
}
