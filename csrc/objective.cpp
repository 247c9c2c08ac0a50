// The whole TCLR objective, with its gradient in the same call: each Gram matrix is computed once, without autograd.
#include "objective.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "threads.h"

namespace tclr {
namespace {

// An input and its gradient, to which several terms add. Both are indexed as [V, B, T, D]; T is 1 if the tensor has no
// such dimension.
struct Input {
  Tensor z;
  Optional gradient{};
  bool written = false;

  int64_t stride(int64_t dimension) const {
    if (z.dim() == 4) return z.stride(dimension);
    return dimension == 2 ? 0 : z.stride(dimension == 3 ? 2 : dimension);
  }
  // The same for the gradient, which is contiguous.
  int64_t gradient_stride(int64_t dimension) const {
    int64_t D = z.size(z.dim() - 1), T = z.dim() == 4 ? z.size(2) : 1;
    return std::array<int64_t, 4>{z.size(1) * T * D, T * D, D, 1}[dimension];
  }
};

// The sets of one Gram problem, all of them views of the inputs.
template <typename T>
struct Sets {
  std::vector<Rows> rows;
  std::vector<Gradient<T>> gradients;

  // Adds z[v, :, t] as a set of one group; or, with `clips`, z[v, i, :] as the set of group i, for every i.
  void add(const Input& from, int64_t v, int64_t t, bool clips) {
    int64_t first = v * from.stride(0) + t * from.stride(2), n = clips ? 2 : 1;
    const char* rows_begin = static_cast<const char*>(from.z.const_data_ptr()) + first * bytes_of(from.z);
    rows.push_back({rows_begin, from.stride(1), from.stride(n), from.stride(3)});
    if (!from.gradient) return;
    first = v * from.gradient_stride(0) + t * from.gradient_stride(2);
    gradients.push_back(
        {data<T>(*from.gradient) + first, from.gradient_stride(1), from.gradient_stride(n), from.written});
  }
};

template <typename T>
struct Objective {
  Dtype dtype;
  double tau;
  bool normalize, gradient;
  const Tensor& x;
  Executor executor;
  // One workspace for all problems: with one for each, the operating system had to map new pages every time.
  Optional memory{};
  double zdz = 0;  // sum of <z, dz> over all rows

  Tensor block(const std::vector<int64_t>& sizes) const { return empty(sizes, wide(x), x); }

  static double total(const Tensor& x) {
    const T* p = const_data<T>(x);
    double sum = 0;
    for (int64_t i = 0; i < x.numel(); ++i) sum += p[i];
    return sum;
  }

  GramInput problem(int64_t G, int64_t V, int64_t N, int64_t D, bool cross) const {
    GramInput in{G, V, N, D, nullptr, dtype, tau, normalize, cross};
    in.keep = gradient && keeps(in);
    return in;
  }

  int64_t workspace(const GramInput& in) const { return kernels<T>().workspace(in, executor.threads, gradient); }

  // Returns the sum of the problem's terms and, with `with_ll`, the sum of the local-local losses (LL) of the same
  // matrix. Adds `of_term` times the gradient of the former, plus `of_ll` times that of the latter, to the gradients.
  std::pair<double, double> contrast(GramInput in, const Sets<T>& sets, double of_term, bool with_ll, double of_ll) {
    auto [G, V, N] = std::tuple(in.G, in.V, in.N);
    in.sets = sets.rows.data();
    Tensor term = block({G, V, V, N}), neg = block({G, V, V, N}), pos = block({G, V, V, N});
    Optional ll, g_pos;
    const Kernels<T>& k = kernels<T>();
    k.forward(in, {data<T>(term), data<T>(neg), data<T>(pos)}, data<T>(*memory), executor);
    if (with_ll) {
      ll = block({V, N}), g_pos = block({V, V, N});
      k.local_local(V, N, const_data<T>(pos), of_ll, data<T>(*ll), data<T>(*g_pos), executor);
    }
    if (gradient) {
      Tensor g_term = block({G, V, V, N}), along = block({G, V, N});
      std::fill_n(data<T>(g_term), g_term.numel(), T(of_term));
      k.backward(in,
                 {const_data<T>(neg), const_data<T>(pos), const_data<T>(g_term), nullptr,
                  with_ll ? const_data<T>(*g_pos) : nullptr, sets.gradients.data(), data<T>(along)},
                 data<T>(*memory), executor);
      zdz += total(along);
    }
    return {total(term), with_ll ? total(*ll) : 0};
  }
};

enum Term { ic_global, ic_local, ll, gl, terms };

template <typename T>
Tensor scalar(double value, const Tensor& beside) {
  Tensor made = empty({}, wide(beside), beside);
  *data<T>(made) = T(value);
  return made;
}

// The sum of each term with a weight. `up` times its gradient is added to the gradients of the inputs.
template <typename T>
std::array<double, terms> contrast_all(Objective<T>& run, std::array<Input, 3>& inputs,
                                       const std::vector<double>& weights, const std::array<double, terms>& up) {
  auto& [g, s, x] = inputs;
  int64_t V = x.z.size(0), B = x.z.size(1), clips = x.z.size(2), D = x.z.size(3);
  std::array<double, terms> sums{};
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
  if (with_local) {  // this Gram matrix has all similarities that the local-local loss needs
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
  return sums;
}

template <typename T>
std::tuple<Tensors, Tensors> compute(std::array<Input, 3> inputs, double tau, bool normalize,
                                     const std::vector<double>& scales, const std::vector<double>& weights,
                                     bool gradient) {
  const Tensor& x = inputs[2].z;
  for (Input& in : inputs)
    if (gradient) in.gradient = empty(sizes_of(in.z), wide(x), x);
  Objective<T> run{dtype_of(x), tau, normalize, gradient, x, threads()};
  std::array<double, terms> up;
  for (int k = 0; k < terms; ++k) up[k] = scales[k] * weights[k];
  std::array<double, terms> sums = contrast_all(run, inputs, weights, up);

  Tensors values, gradients;
  double total = 0;
  for (int k = 0; k < terms; ++k) total += up[k] * sums[k];
  values.push_back(scalar<T>(total, x));
  for (int k = 0; k < terms; ++k) values.push_back(scalar<T>(scales[k] * sums[k], x));
  if (gradient) {
    for (Input& in : inputs) {
      if (!in.written) std::memset(data<T>(*in.gradient), 0, in.gradient->numel() * sizeof(T));
      gradients.push_back(*in.gradient);
    }
    if (!scalable<T>(gradients)) return {values, {}};
    gradients.push_back(scalar<T>(run.zdz / (-2 * tau), x));
  }
  return {values, gradients};
}

}  // namespace

std::tuple<Tensors, Tensors> objective(Tensor g, Tensor s, Tensor x, Optional tau, double tau_value, bool normalize,
                                       std::vector<double> scales, std::vector<double> weights, bool gradient) {
  STD_TORCH_CHECK(x.dim() == 4 && sizes_of(s) == sizes_of(x), "s, x: wanted [V, B, T, D]");
  STD_TORCH_CHECK(sizes_of(g) == std::vector<int64_t>({x.size(0), x.size(1), x.size(3)}),
                  "g: wanted [V, B, D] beside x [V, B, T, D]");
  for (const Tensor& z : {g, s, x})
    STD_TORCH_CHECK(z.is_cpu() && code_of(z) == code_of(x), "g, s, x: wanted CPU tensors of one dtype");
  STD_TORCH_CHECK(scales.size() == terms && weights.size() == terms, "scales, weights: wanted one for each term");
  auto run = dtype_of(x) == Dtype::f64 ? compute<double> : compute<float>;
  return run({Input{g}, Input{s}, Input{x}}, tau_of(tau, tau_value), normalize, scales, weights, gradient);
}

Tensors objective_backward(Tensor g, Tensor, Tensor, Optional, double, bool, std::vector<double>, std::vector<double>,
                           Tensors kept, Tensor upstream) {
  STD_TORCH_CHECK(kept.size() == 4, "kept: wanted what the forward returned");
  STD_TORCH_CHECK(upstream.dim() == 0 && upstream.is_cpu(), "upstream: wanted a 0-d CPU tensor");
  auto scaled = dtype_of(kept[0]) == Dtype::f64 ? times<double> : times<float>;
  Tensors gradients;
  for (const Tensor& d : kept) gradients.push_back(scaled(d, host_value(upstream)));
  for (size_t k = 0; k < 3; ++k) gradients[k] = converted(gradients[k], g);
  return gradients;
}

}  // namespace tclr
