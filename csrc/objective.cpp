// The whole TCLR objective, and its gradient in the same call: each Gram matrix once, no autograd in between.
#include "objective.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "tensors.h"

namespace tclr {
namespace {

using at::Tensor;

constexpr double small = 1 << 20;  // elements of a problem whose rows and similarities stay for the backward

// An input [V, B, T, D] and its gradient, to which several terms add.
struct Input {
  Tensor z, gradient;
  bool written = false;
};

// The sets of one Gram problem, all of them views of the inputs.
template <typename T>
struct Sets {
  std::vector<Rows> rows;
  std::vector<Gradient<T>> gradients;

  // z[v, :, t] as a set, or (clips) every z[v, i, :] as the set of group i.
  void add(const Input& from, int64_t v, int64_t t, bool clips) {
    const Tensor &z = from.z, &d = from.gradient;
    const char* data = static_cast<const char*>(z.const_data_ptr());
    int64_t first = v * z.stride(0) + t * z.stride(2), n = clips ? 2 : 1;
    rows.push_back({data + first * int64_t(z.element_size()), z.stride(1), z.stride(n), z.stride(3)});
    if (!d.defined()) return;
    first = v * d.stride(0) + t * d.stride(2);
    gradients.push_back({d.mutable_data_ptr<T>() + first, d.stride(1), d.stride(n), from.written});
  }
};

template <typename T>
struct Objective {
  Dtype dtype;
  double tau;
  bool normalize, gradient;
  at::TensorOptions options;
  Executor executor;
  Tensor memory{};  // one for all problems: where each had its own, the system gave its pages anew
  double zdz = 0;   // sum of <z, dz> over all rows

  Tensor block(at::IntArrayRef sizes) const { return at::empty(sizes, options); }

  static double total(const Tensor& x) {
    const T* p = x.const_data_ptr<T>();
    double sum = 0;
    for (int64_t i = 0; i < x.numel(); ++i) sum += p[i];
    return sum;
  }

  GramInput problem(int64_t G, int64_t V, int64_t N, int64_t D, bool cross) const {
    bool keep = gradient && V * N <= 512 && double(G * V * N) * double(D + V * N) < small;
    return {G, V, N, D, nullptr, dtype, tau, normalize, cross, keep};
  }

  int64_t workspace(const GramInput& in) const { return kernels<T>().workspace(in, executor.threads, gradient); }

  // The sum of the problem's terms, and that of LL over the same matrix; adds the gradient of the former times
  // `of_term` plus that of the latter times `of_ll`.
  std::pair<double, double> contrast(GramInput in, const Sets<T>& sets, double of_term, bool with_ll, double of_ll) {
    auto [G, V, N] = std::tuple(in.G, in.V, in.N);
    in.sets = sets.rows.data();
    Tensor term = block({G, V, V, N}), neg = block({G, V, V, N}), pos = block({G, V, V, N}), g_pos, ll;
    const Kernels<T>& k = kernels<T>();
    k.forward(in, {term.mutable_data_ptr<T>(), neg.mutable_data_ptr<T>(), pos.mutable_data_ptr<T>()},
              memory.mutable_data_ptr<T>(), executor);
    if (with_ll) {
      ll = block({V, N}), g_pos = block({V, V, N});
      k.local_local(V, N, pos.const_data_ptr<T>(), of_ll, ll.mutable_data_ptr<T>(), g_pos.mutable_data_ptr<T>(),
                    executor);
    }
    if (gradient) {
      Tensor g_term = at::full({G, V, V, N}, of_term, options), along = block({G, V, N});
      k.backward(in,
                 {neg.const_data_ptr<T>(), pos.const_data_ptr<T>(), g_term.const_data_ptr<T>(), nullptr,
                  with_ll ? g_pos.const_data_ptr<T>() : nullptr, sets.gradients.data(), along.mutable_data_ptr<T>()},
                 memory.mutable_data_ptr<T>(), executor);
      zdz += total(along);
    }
    return {total(term), with_ll ? total(ll) : 0};
  }
};

// Each value times zero, several sums side by side: a NaN or an infinity makes its sum NaN.
template <typename T>
bool finite(const Tensor& x) {
  constexpr int64_t lanes = 64 / sizeof(T);
  const T* data = x.const_data_ptr<T>();
  T sums[lanes] = {};
  int64_t n = x.numel(), i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int64_t k = 0; k < lanes; ++k) sums[k] += data[i + k] * 0;
  for (; i < n; ++i) sums[0] += data[i] * 0;
  return std::all_of(sums, sums + lanes, [](T sum) { return sum == 0; });
}

enum Term { ic_global, ic_local, ll, gl, terms };

template <typename T>
std::tuple<std::vector<Tensor>, std::vector<Tensor>> compute(std::array<Input, 3> inputs, double tau, bool normalize,
                                                             at::ArrayRef<double> scales, at::ArrayRef<double> weights,
                                                             bool gradient) {
  auto& [g, s, x] = inputs;
  int64_t V = x.z.size(0), B = x.z.size(1), clips = x.z.size(2), D = x.z.size(3);
  at::TensorOptions options = x.z.options().dtype(c10::CppTypeToScalarType<T>::value);
  for (Input& in : inputs)
    if (gradient) in.gradient = at::empty(in.z.sizes(), options);
  Objective<T> run{dtype_of(x.z), tau, normalize, gradient, options, threads()};
  double sums[terms] = {}, up[terms];
  for (int k = 0; k < terms; ++k) up[k] = scales[k] * weights[k];

  bool with_ic = weights[ic_global] != 0, with_local = weights[ic_local] != 0, with_ll = weights[ll] != 0,
       with_gl = weights[gl] != 0;
  GramInput of_videos = run.problem(1, V, B, D, false), of_clips = run.problem(1, V * clips, B, D, false),
            of_views = run.problem(B, V, clips, D, false), of_slices = run.problem(B, 2 * V, clips, D, true);
  int64_t size = 0;
  if (with_ic) size = std::max(size, run.workspace(of_videos));
  if (with_local) size = std::max(size, run.workspace(of_clips));
  if (with_ll && !with_local) size = std::max(size, run.workspace(of_views));
  if (with_gl) size = std::max(size, run.workspace(of_slices));
  run.memory = run.block({size});

  if (with_ic) {
    Sets<T> sets;
    for (int64_t v = 0; v < V; ++v) sets.add(g, v, 0, false);
    sums[ic_global] = run.contrast(of_videos, sets, up[ic_global], false, 0).first;
    g.written = true;
  }
  if (with_local) {  // its one Gram matrix holds all that LL needs
    Sets<T> sets;
    for (int64_t v = 0; v < V; ++v)
      for (int64_t t = 0; t < clips; ++t) sets.add(x, v, t, false);
    std::tie(sums[ic_local], sums[ll]) = run.contrast(of_clips, sets, up[ic_local], with_ll, up[ll]);
    x.written = true;
  } else if (with_ll) {
    Sets<T> sets;
    for (int64_t v = 0; v < V; ++v) sets.add(x, v, 0, true);
    sums[ll] = run.contrast(of_views, sets, up[ll], false, 0).first;
    x.written = true;
  }
  if (with_gl) {
    Sets<T> sets;
    for (Input* in : {&s, &x})
      for (int64_t v = 0; v < V; ++v) sets.add(*in, v, 0, true);
    sums[gl] = run.contrast(of_slices, sets, up[gl], false, 0).first;
    s.written = x.written = true;
  }

  std::vector<Tensor> values, gradients;
  double total = 0;
  for (int k = 0; k < terms; ++k) total += up[k] * sums[k];
  values.push_back(at::scalar_tensor(total, options));
  for (int k = 0; k < terms; ++k) values.push_back(at::scalar_tensor(scales[k] * sums[k], options));
  if (gradient) {
    for (Input& in : inputs)
      if (in.written && !finite<T>(in.gradient)) return {values, {}};
    for (Input& in : inputs) gradients.push_back(in.written ? in.gradient : in.gradient.zero_());
    gradients[0] = gradients[0].squeeze(2);
    gradients.push_back(at::scalar_tensor(run.zdz / (-2 * tau), options));
  }
  return {values, gradients};
}

}  // namespace

std::tuple<std::vector<Tensor>, std::vector<Tensor>> objective(const Tensor& g, const Tensor& s, const Tensor& x,
                                                               const std::optional<Tensor>& tau, double tau_value,
                                                               bool normalize, at::ArrayRef<double> scales,
                                                               at::ArrayRef<double> weights, bool gradient) {
  TORCH_CHECK_VALUE(x.dim() == 4 && s.sizes() == x.sizes() && g.dim() == 3 && g.size(2) == x.size(3) &&
                        g.sizes().slice(0, 2) == x.sizes().slice(0, 2),
                    "wanted g [V, B, D], s and x [V, B, T, D]");
  for (const Tensor& z : {g, s, x})
    TORCH_CHECK_VALUE(z.is_cpu() && z.scalar_type() == x.scalar_type(), "g, s, x: wanted CPU tensors of one dtype");
  TORCH_CHECK_VALUE(scales.size() == terms && weights.size() == terms, "scales, weights: wanted one for each term");
  std::array<Input, 3> inputs{Input{g.unsqueeze(2)}, Input{s}, Input{x}};
  auto run = x.scalar_type() == at::kDouble ? compute<double> : compute<float>;
  return run(inputs, tau_of(tau, tau_value), normalize, scales, weights, gradient);
}

std::vector<Tensor> objective_backward(const Tensor& g, const Tensor&, const Tensor&, const std::optional<Tensor>&,
                                       double, bool, at::ArrayRef<double>, at::ArrayRef<double>, at::TensorList kept,
                                       const Tensor& upstream) {
  std::vector<Tensor> gradients;
  for (const Tensor& d : kept) gradients.push_back(d.mul(upstream));
  for (size_t k = 0; k < 3; ++k) gradients.at(k) = gradients[k].to(g.scalar_type());
  return gradients;
}

}  // namespace tclr
