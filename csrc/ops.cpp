// Schemas, checks, and the CPU implementation: tensors in, pointers and sizes on.
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "objective.h"
#include "schemas.h"
#include "tensors.h"

namespace tclr {
namespace {

using at::Tensor;

struct Sets {
  std::vector<Rows> rows;
  GramInput input;
};

// The sets as pointers, alive as long as the tensors are.
Sets describe(at::TensorList sets, const std::optional<Tensor>& tau, double tau_value, bool normalize, bool cross) {
  TORCH_CHECK_VALUE(!sets.empty() && sets[0].dim() == 3, "sets: wanted at least one tensor [G, N, D]");
  Sets s;
  for (const Tensor& z : sets) {
    TORCH_CHECK_VALUE(z.sizes() == sets[0].sizes() && z.scalar_type() == sets[0].scalar_type() && z.is_cpu(),
                      "sets: wanted CPU tensors of one shape and dtype");
    s.rows.push_back({z.const_data_ptr(), z.stride(0), z.stride(1), z.stride(2)});
  }
  auto V = static_cast<int64_t>(sets.size());
  s.input = {
      sets[0].size(0), V,    sets[0].size(1), sets[0].size(2), s.rows.data(), dtype_of(sets[0]), tau_of(tau, tau_value),
      normalize,       cross};
  return s;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> forward(const GramInput& in, const at::TensorOptions& options) {
  auto block = [&] { return at::empty({in.G, in.V, in.V, in.N}, options); };
  Tensor term = block(), neg = block(), pos = block();
  Executor executor = threads();
  Tensor memory = workspace<T>(in, executor, false, options);
  GramForward<T> out{term.mutable_data_ptr<T>(), neg.mutable_data_ptr<T>(), pos.mutable_data_ptr<T>()};
  kernels<T>().forward(in, out, memory.mutable_data_ptr<T>(), executor);
  return {term, neg, pos};
}

std::tuple<Tensor, Tensor, Tensor> gram_forward(at::TensorList sets, const std::optional<Tensor>& tau, double tau_value,
                                                bool normalize, bool cross, bool) {
  Sets s = describe(sets, tau, tau_value, normalize, cross);
  if (s.input.dtype == Dtype::f64) return forward<double>(s.input, sets[0].options());
  return forward<float>(s.input, sets[0].options().dtype(at::kFloat));
}

using Upstream = std::optional<Tensor>;

template <typename T>
std::tuple<std::vector<Tensor>, Tensor> backward(at::TensorList sets, const GramInput& in, const Tensor& neg,
                                                 const Tensor& pos, const Upstream& g_term, const Upstream& g_neg,
                                                 const Upstream& g_pos, const at::TensorOptions& options) {
  std::vector<Tensor> kept;
  auto pointer = [&](const Upstream& x) -> const T* {
    if (!x) return nullptr;
    TORCH_CHECK_VALUE(x->sizes() == neg.sizes() && x->scalar_type() == options.dtype().toScalarType() && x->is_cpu(),
                      "neg, pos and their gradients: wanted CPU tensors [G, V, V, N] of the forward's dtype");
    return kept.emplace_back(x->contiguous()).const_data_ptr<T>();
  };
  TORCH_CHECK_VALUE((neg.sizes() == at::IntArrayRef{in.G, in.V, in.V, in.N}), "neg: wanted [G, V, V, N]");
  std::vector<Tensor> dz;
  std::vector<Gradient<T>> outputs;
  for (size_t a = 0; a < sets.size(); ++a) {
    T* data = dz.emplace_back(at::empty(sets[a].sizes(), options)).template mutable_data_ptr<T>();
    outputs.push_back({data, in.N * in.D, in.D, false});
  }
  Tensor zdz = at::empty({in.G, in.V, in.N}, options);
  Executor executor = threads();
  Tensor memory = workspace<T>(in, executor, true, options);
  GramBackward<T> call{pointer(neg),   pointer(pos),   pointer(g_term),          pointer(g_neg),
                       pointer(g_pos), outputs.data(), zdz.mutable_data_ptr<T>()};
  kernels<T>().backward(in, call, memory.mutable_data_ptr<T>(), executor);
  for (Tensor& d : dz) d = d.to(sets[0].scalar_type());
  return {dz, zdz};
}

std::tuple<std::vector<Tensor>, Tensor> gram_backward(at::TensorList sets, const std::optional<Tensor>& tau,
                                                      double tau_value, bool normalize, bool cross, const Tensor& neg,
                                                      const Tensor& pos, const Upstream& g_term, const Upstream& g_neg,
                                                      const Upstream& g_pos, bool) {
  Sets s = describe(sets, tau, tau_value, normalize, cross);
  auto options = sets[0].options();
  if (s.input.dtype == Dtype::f64) return backward<double>(sets, s.input, neg, pos, g_term, g_neg, g_pos, options);
  return backward<float>(sets, s.input, neg, pos, g_term, g_neg, g_pos, options.dtype(at::kFloat));
}

}  // namespace
}  // namespace tclr

TORCH_LIBRARY(tclr_kernels, m) {
  for (const char* schema : tclr::schemas) m.def(schema);
}

TORCH_LIBRARY_IMPL(tclr_kernels, CPU, m) {
  m.impl("gram_forward", tclr::gram_forward);
  m.impl("gram_backward", tclr::gram_backward);
  m.impl("objective", tclr::objective);
  m.impl("objective_backward", tclr::objective_backward);
}
