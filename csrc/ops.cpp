// The schemas of the operators, the checks of their arguments, and their implementation on the CPU, which calls the
// kernels with pointers and sizes.
#include <algorithm>
#include <tuple>

#include "keys.h"
#include "objective.h"
#include "schemas.h"
#include "threads.h"

namespace tclr {
namespace {

struct Sets {
  std::vector<Rows> rows;
  GramInput input;
};

// The sets as pointers, valid as long as the tensors are.
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

// The tensor, or a contiguous copy of it. PyTorch's own operator would be looked up by name, which takes a microsecond
// of the hundred that a small loss takes.
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

// How a whole loss is made of the terms, as tclr_kernels/reduced.py defines it: which are added, and what divides them.
struct Reduction {
  bool one_sided;
  double factor, count;
};

// The inputs as pointers: sets [N, D] or [G, N, D], or the views of one tensor [V, N, D].
Sets describe_inputs(const Tensors& inputs, const Optional& tau, double tau_value, bool normalize, bool cross) {
  bool views = inputs.size() == 1;
  STD_TORCH_CHECK(!inputs.empty() && (inputs[0].dim() == 3 || (inputs[0].dim() == 2 && !views)),
                  "inputs: wanted tensors [N, D] or [G, N, D], or one tensor [V, N, D]");
  Sets s;
  std::vector<int64_t> sizes = sizes_of(inputs[0]);
  Code dtype = code_of(inputs[0]);
  int64_t groups = sizes.size() == 3 ? sizes[0] : 1, last = inputs[0].dim() - 1;
  for (const Tensor& z : inputs) {
    STD_TORCH_CHECK(sizes_of(z) == sizes && code_of(z) == dtype && z.is_cpu(),
                    "inputs: wanted CPU tensors of one shape and dtype");
    const char* data = static_cast<const char*>(z.const_data_ptr());
    int64_t first = last == 2 ? z.stride(0) : 0, count = views ? groups : 1;
    for (int64_t v = 0; v < count; ++v)
      s.rows.push_back({data + v * first * bytes_of(z), views ? 0 : first, z.stride(last - 1), z.stride(last)});
  }
  s.input = {views ? 1 : groups,  int64_t(s.rows.size()), sizes[last - 1], sizes[last], s.rows.data(),
             dtype_of(inputs[0]), tau_of(tau, tau_value), normalize,       cross};
  return s;
}

// By PyTorch's own operator, so that a loss has the same bits as the one that Python composes.
Tensor total(const Tensor& x) { return torch::stable::sum(x); }

// term[:, 0, 1], contiguous
template <typename T>
Tensor first_pair(const Tensor& term) {
  int64_t G = term.size(0), V = term.size(1), N = term.size(3);
  Tensor chosen = empty({G, N}, code_of(term), term);
  for (int64_t g = 0; g < G; ++g) std::copy_n(const_data<T>(term) + (g * V * V + 1) * N, N, data<T>(chosen) + g * N);
  return chosen;
}

// The gradients of `upstream` times the loss: of the inputs, in float32 or float64, and the sum of <z, dz> if tau is a
// tensor. memory: the forward's workspace, if the forward kept its rows in it.
template <typename T>
Tensors gradients_of(const Tensors& inputs, const GramInput& in, const Reduction& how, const Tensor& neg,
                     const Tensor& pos, T upstream, bool with_tau, const Optional& memory) {
  const Tensor& like = inputs[0];
  Tensors made;
  std::vector<Gradient<T>> outputs;
  for (const Tensor& z : inputs) {
    T* to = data<T>(made.emplace_back(empty(sizes_of(z), wide(like), like)));
    for (int64_t v = 0; v < in.V / int64_t(inputs.size()); ++v)
      outputs.push_back({to + v * in.N * in.D, in.N * in.D, in.D, false});
  }
  Tensor g_term = empty(sizes_of(neg), wide(like), like), zdz = empty({in.G, in.V, in.N}, wide(like), like);
  T value = upstream / T(how.count) * T(how.factor), *to = data<T>(g_term);
  std::fill_n(to, g_term.numel(), how.one_sided ? T(0) : value);
  for (int64_t g = 0; how.one_sided && g < in.G; ++g) std::fill_n(to + (g * in.V * in.V + 1) * in.N, in.N, value);

  Executor executor = threads();
  const Kernels<T>& k = kernels<T>();
  Tensor own = memory ? *memory : empty({k.workspace(in, executor.threads, true)}, wide(like), like);
  k.backward(in, {const_data<T>(neg), const_data<T>(pos), to, nullptr, nullptr, outputs.data(), data<T>(zdz)},
             data<T>(own), executor);
  if (with_tau) made.push_back(total(zdz));
  return made;
}

template <typename T>
std::tuple<Tensor, Tensors> reduced_of(const Tensors& inputs, GramInput in, const Reduction& how, bool with_tau,
                                       bool gradient) {
  const Tensor& like = inputs[0];
  auto made_of = [&](const std::vector<int64_t>& sizes) { return empty(sizes, wide(like), like); };
  std::vector<int64_t> blocks{in.G, in.V, in.V, in.N};
  Executor executor = threads();
  const Kernels<T>& k = kernels<T>();
  in.keep = gradient && keeps(in);
  int64_t workspace = k.workspace(in, executor.threads, gradient);
  Tensor term = made_of(blocks);
  // without a gradient neg and pos lie behind the workspace: two tensors less to make
  int64_t count = term.numel();
  Tensor memory = made_of({workspace + (gradient ? 0 : 2 * count)});
  Optional kept_neg, kept_pos;
  if (gradient) kept_neg = made_of(blocks), kept_pos = made_of(blocks);
  T* neg = gradient ? data<T>(*kept_neg) : data<T>(memory) + workspace;
  T* pos = gradient ? data<T>(*kept_pos) : neg + count;
  k.forward(in, {data<T>(term), neg, pos}, data<T>(memory), executor);
  Tensor loss = total(how.one_sided ? first_pair<T>(term) : term);
  T* value = data<T>(loss);
  *value = *value * T(how.factor) / T(how.count);
  if (!gradient) return {loss, {}};
  Tensors made = gradients_of<T>(inputs, in, how, *kept_neg, *kept_pos, T(1), with_tau, memory);
  if (!scalable<T>({made.begin(), made.begin() + int64_t(inputs.size())})) return {loss, {*kept_neg, *kept_pos}};
  return {loss, made};
}

std::tuple<Tensor, Tensors> reduced(Tensors inputs, Optional tau, double tau_value, bool normalize, bool cross,
                                    bool one_sided, double factor, double count, bool gradient, bool) {
  Sets s = describe_inputs(inputs, tau, tau_value, normalize, cross);
  auto run = s.input.dtype == Dtype::f64 ? reduced_of<double> : reduced_of<float>;
  return run(inputs, s.input, {one_sided, factor, count}, tau.has_value(), gradient);
}

// kept: the gradients, or neg and pos of the forward.
template <typename T>
Tensors reduced_gradients(const Tensors& inputs, const GramInput& in, const Reduction& how, const Tensors& kept,
                          double upstream, bool with_tau) {
  Tensors made;
  if (kept[0].dim() == 4)
    made = gradients_of<T>(inputs, in, how, kept[0], kept[1], T(upstream), with_tau, std::nullopt);
  else
    for (const Tensor& d : kept) made.push_back(times<T>(d, upstream));
  for (size_t k = 0; k < inputs.size(); ++k) made[k] = converted(made[k], inputs[k]);
  return made;
}

Tensors reduced_backward(Tensors inputs, Optional tau, double tau_value, bool normalize, bool cross, bool one_sided,
                         double factor, double count, Tensors kept, Tensor upstream, bool) {
  Sets s = describe_inputs(inputs, tau, tau_value, normalize, cross);
  STD_TORCH_CHECK(kept.size() >= 2 || kept.size() >= inputs.size(), "kept: wanted what the forward returned");
  STD_TORCH_CHECK(upstream.dim() == 0 && upstream.is_cpu(), "upstream: wanted a 0-d CPU tensor");
  auto run = s.input.dtype == Dtype::f64 ? reduced_gradients<double> : reduced_gradients<float>;
  return run(inputs, s.input, {one_sided, factor, count}, kept, host_value(upstream), tau.has_value());
}

// The arguments of a rectangle as pointers, valid as long as the tensors and this object are.
struct Rectangle {
  std::vector<Rows> rows, columns;
  std::vector<int64_t> row_order, column_order;
  std::vector<Match> match;
  RectangleInput input;
  Tensors kept;

  Rectangle(const Tensors& row_sets, const Tensors& column_sets, const Optional& tau, double tau_value, bool normalize,
            bool cross, int64_t first, const Optional& row_keys, const Optional& column_keys) {
    bool symmetric = row_sets.empty();
    Side of_columns = side("columns", column_sets, column_sets, columns);
    Side of_rows = symmetric ? of_columns : side("rows", row_sets, column_sets, rows);
    STD_TORCH_CHECK(first < 0 || (of_rows.sets == of_columns.sets && first + of_rows.N <= of_columns.N),
                    "first: wanted the rows' place among the columns, or -1");
    STD_TORCH_CHECK(!symmetric || first == 0, "first: wanted 0 without rows");
    input = {
        column_sets[0].size(0),   column_sets[0].size(2), of_rows,   of_columns, symmetric, bool(row_keys), nullptr,
        dtype_of(column_sets[0]), tau_of(tau, tau_value), normalize, cross};
    find_matches(row_keys, column_keys, first);
  }

  static Side side(const char* name, const Tensors& sets, const Tensors& like, std::vector<Rows>& pointers) {
    STD_TORCH_CHECK(!sets.empty() && sets[0].dim() == 3, name, ": wanted at least one tensor [G, N, D]");
    for (const Tensor& z : sets) {
      STD_TORCH_CHECK(sizes_of(z) == sizes_of(sets[0]) && z.size(0) == like[0].size(0) &&
                          z.size(2) == like[0].size(2) && code_of(z) == code_of(like[0]) && z.is_cpu(),
                      name, ": wanted CPU tensors of one shape and dtype, G and D as the columns'");
      pointers.push_back({z.const_data_ptr(), z.stride(0), z.stride(1), z.stride(2)});
    }
    return {int64_t(sets.size()), sets[0].size(1), pointers.data(), nullptr};
  }

  void check(const Optional& keys, const Side& side) const {
    STD_TORCH_CHECK(keys && sizes_of(*keys) == std::vector<int64_t>({input.G, side.N}) &&
                        code_of(*keys) == aoti_torch_dtype_int64() && keys->is_cpu(),
                    "keys: wanted CPU tensors of int64, [G, n] of the rows and [G, K] of the columns");
  }

  // Sorts both sides by their keys, and finds for each row the columns with its key and its index.
  void find_matches(const Optional& row_keys, const Optional& column_keys, int64_t first) {
    int64_t G = input.G, n = input.rows.N, K = input.columns.N;
    if (input.keys) {
      check(row_keys, input.rows), check(column_keys, input.columns);
      row_order.resize(G * n), column_order.resize(input.symmetric ? 0 : G * K);
    }
    bool matches = input.keys || first >= 0;
    if (matches) match.resize(G * n, {0, 0, -1});
    auto of_group = [&](int64_t g, int64_t* place) {
      int64_t *of_rows = nullptr, *of_columns = nullptr;
      Match* found = match.data() + g * n;
      if (input.keys) {
        auto keys = [&](const Tensor& x) { return Keys{const_data<int64_t>(x) + g * x.stride(0), x.stride(1)}; };
        of_rows = row_order.data() + g * n, of_columns = input.symmetric ? of_rows : column_order.data() + g * K;
        sort_by_key(keys(*row_keys), n, of_rows);
        if (!input.symmetric) sort_by_key(keys(*column_keys), K, of_columns);
        match_keys(keys(*row_keys), of_rows, n, keys(*column_keys), of_columns, K, found);
      }
      if (first >= 0) match_index(first, of_rows, n, of_columns, K, place, found);
    };
    int64_t at_once = 1 + 4096 / (n + K + 1);  // groups; fewer take less time than waking another thread
    torch::stable::parallel_for(0, matches ? G : 0, at_once, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> place(first >= 0 ? K : 0);
      for (int64_t g = begin; g < end; ++g) of_group(g, place.data());
    });
    input.rows.order = row_order.data();
    input.columns.order = input.symmetric ? row_order.data() : column_order.data();
    if (matches) input.match = match.data();
  }

  std::vector<int64_t> blocks() const { return {input.G, input.rows.sets, input.columns.sets, input.rows.N}; }

  const double* block(const Tensor& x, bool of_columns) {
    auto sizes = blocks();
    if (of_columns) std::swap(sizes[1], sizes[2]), sizes[3] = input.columns.N;
    STD_TORCH_CHECK(sizes_of(x) == sizes && code_of(x) == aoti_torch_dtype_float64() && x.is_cpu(),
                    "negatives, of_rows, of_columns: wanted CPU tensors [G, A, C, n] of float64");
    return const_data<double>(kept.emplace_back(contiguous<double>(x)));
  }

  // from: neg, g_neg, g_pos and, with keys, pos_lse, g_pos_lse, g_spread, count; or negatives, g_pairs
  Anchors anchors(const Tensors& from, bool of_columns) {
    size_t expected = input.keys ? 7 : 3;
    STD_TORCH_CHECK(from.empty() || from.size() == expected || (expected == 7 && from.size() == 2),
                    "of_rows, of_columns: found ", from.size(), " tensors, wanted none or ", expected);
    auto at = [&](size_t k) { return k < from.size() ? block(from[k], of_columns) : nullptr; };
    if (from.size() == 2) return {.negatives = at(0), .g_pairs = at(1)};
    return {at(0), at(1), at(2), at(3), at(4), at(5), at(6)};
  }

  template <typename T>
  void run(const RectangleCall<T>& call, const Tensor& beside) const {
    Executor executor = threads();
    Tensor memory = empty({kernels<T>().rectangle_workspace(input, call, executor.threads)}, wide(beside), beside);
    kernels<T>().rectangle(input, call, data<T>(memory), executor);
  }
};

using Blocks = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Blocks rectangle_of(const Rectangle& r, const Tensor& beside, bool mean) {
  const RectangleInput& in = r.input;
  bool keys = in.keys;
  auto block = [&](bool there) {
    return empty(there ? r.blocks() : std::vector<int64_t>{0}, aoti_torch_dtype_float64(), beside);
  };
  Tensor neg = block(true), pos = block(true), pos_lse = block(keys), spread = block(keys), count = block(keys);
  STD_TORCH_CHECK(!mean || (in.rows.sets == 1 && in.columns.sets == 1 && !in.match),
                  "mean: wanted only for one set against another, without keys and first");
  Tensor weighted =
      empty(mean ? std::vector<int64_t>{in.G, in.rows.N, in.D} : std::vector<int64_t>{0}, wide(beside), beside);
  RectangleCall<T> call{Wanted::blocks};
  call.neg = data<double>(neg), call.pos = data<double>(pos);
  if (keys) call.pos_lse = data<double>(pos_lse), call.spread = data<double>(spread), call.count = data<double>(count);
  if (mean) call.mean = data<T>(weighted);
  r.run(call, beside);
  return {neg, pos, pos_lse, spread, count, weighted};
}

Blocks rectangle(Tensors rows, Tensors columns, Optional tau, double tau_value, bool normalize, bool cross,
                 int64_t first, Optional row_keys, Optional column_keys, bool mean, bool, bool) {
  Rectangle r(rows, columns, tau, tau_value, normalize, cross, first, row_keys, column_keys);
  auto run = r.input.dtype == Dtype::f64 ? rectangle_of<double> : rectangle_of<float>;
  return run(r, columns[0], mean);
}

template <typename T>
std::tuple<Tensor, Tensor> pairs_of(Rectangle& r, const Tensor& beside, const Tensor& negatives) {
  RectangleCall<T> call{Wanted::pairs};
  Tensor sums = empty(r.blocks(), aoti_torch_dtype_float64(), beside), slope = empty(r.blocks(), code_of(sums), beside);
  call.negatives = r.block(negatives, false), call.sums = data<double>(sums), call.slope = data<double>(slope);
  r.run(call, beside);
  return {sums, slope};
}

std::tuple<Tensor, Tensor> pairs(Tensors rows, Tensors columns, Optional tau, double tau_value, bool normalize,
                                 bool cross, int64_t first, Tensor row_keys, Tensor column_keys, Tensor negatives, bool,
                                 bool) {
  Rectangle r(rows, columns, tau, tau_value, normalize, cross, first, row_keys, column_keys);
  return (r.input.dtype == Dtype::f64 ? pairs_of<double> : pairs_of<float>)(r, columns[0], negatives);
}

// Allocates the gradients of the sets in `made`, and returns pointers to them.
template <typename T>
std::vector<Gradient<T>> gradients(const Tensors& sets, bool wanted, Tensors& made) {
  std::vector<Gradient<T>> pointers;
  for (size_t a = 0; wanted && a < sets.size(); ++a) {
    int64_t N = sets[a].size(1), D = sets[a].size(2);
    Tensor& d = made.emplace_back(empty(sizes_of(sets[a]), wide(sets[a]), sets[a]));
    pointers.push_back({data<T>(d), N * D, D, false});
  }
  return pointers;
}

template <typename T>
std::tuple<Tensors, Tensors, Tensor> rectangle_gradients(Rectangle& r, const Tensors& rows, const Tensors& columns,
                                                         const Tensors& of_rows, const Tensors& of_columns,
                                                         bool for_rows, bool for_columns) {
  Tensors d_rows, d_columns;
  auto to_rows = gradients<T>(rows, for_rows, d_rows), to_columns = gradients<T>(columns, for_columns, d_columns);
  const Side& side = for_rows ? r.input.rows : r.input.columns;
  Tensor along = empty({r.input.G, side.sets, side.N}, wide(columns[0]), columns[0]);
  RectangleCall<T> call{Wanted::gradients};
  call.of_rows = r.anchors(of_rows, false), call.of_columns = r.anchors(of_columns, true);
  if (for_rows) call.d_rows = to_rows.data();
  if (for_columns) call.d_columns = to_columns.data();
  call.along = data<T>(along);
  r.run(call, columns[0]);
  for (Tensors* side : {&d_rows, &d_columns})
    for (Tensor& d : *side) d = converted(d, columns[0]);
  return {d_rows, d_columns, along};
}

std::tuple<Tensors, Tensors, Tensor> rectangle_backward(Tensors rows, Tensors columns, Optional tau, double tau_value,
                                                        bool normalize, bool cross, int64_t first, Optional row_keys,
                                                        Optional column_keys, Tensors of_rows, Tensors of_columns,
                                                        bool for_rows, bool for_columns, bool, bool) {
  Rectangle r(rows, columns, tau, tau_value, normalize, cross, first, row_keys, column_keys);
  STD_TORCH_CHECK(for_rows || for_columns, "for_rows, for_columns: wanted at least one");
  STD_TORCH_CHECK(!r.input.symmetric || (for_rows && !for_columns && of_columns.empty()),
                  "for_rows, for_columns, of_columns: wanted true, false, none: the rows are the columns");
  auto run = r.input.dtype == Dtype::f64 ? rectangle_gradients<double> : rectangle_gradients<float>;
  return run(r, r.input.symmetric ? columns : rows, columns, of_rows, of_columns, for_rows, for_columns);
}

// The sum of the terms of all rows, divided by `count`, or by the number of rows with positives if it is 0; and its
// gradients, which are left out if they cannot be multiplied by an upstream gradient later (see `scalable`).
template <typename T>
std::tuple<Tensor, Tensors> labelled_of(Rectangle& r, const Tensors& rows, const Tensors& columns, bool spread,
                                        double count, bool for_rows, bool for_columns) {
  const Tensor& like = columns[0];
  RectangleInput& in = r.input;
  bool gradient = in.keep = for_rows || for_columns;
  int64_t n = in.G * in.rows.N;
  Tensor numbers = empty({gradient ? 8 : 4, n}, aoti_torch_dtype_float64(), like);
  auto row = [&](int64_t k) { return data<double>(numbers) + k * n; };
  double *neg = row(0), *pos_lse = row(1), *of_each = row(2), *positives = row(3);
  Tensors d_rows, d_columns;
  auto to_rows = gradients<T>(rows, for_rows, d_rows), to_columns = gradients<T>(columns, for_columns, d_columns);
  Tensor along = empty({in.G, in.rows.N + in.columns.N}, wide(like), like);
  RectangleCall<T> sums{Wanted::blocks}, slopes{Wanted::gradients};
  sums.neg = neg, sums.pos_lse = pos_lse, sums.spread = of_each, sums.count = positives;
  if (for_rows) slopes.d_rows = to_rows.data();
  if (for_columns) slopes.d_columns = to_columns.data();
  slopes.along = data<T>(along);

  Executor executor = threads();
  const Kernels<T>& k = kernels<T>();
  Tensor memory = empty({k.rectangle_workspace(in, sums, executor.threads)}, wide(like), like);
  k.rectangle(in, sums, data<T>(memory), executor);
  if (count == 0) count = std::max<double>(1, n - std::count(positives, positives + n, 0.0));
  Tensor terms = empty({n}, wide(like), like);
  LabelledTerms<T> of_terms{n, neg, pos_lse, spread ? of_each : nullptr, positives, T(1) / T(count), data<T>(terms)};
  if (gradient) of_terms.g_neg = row(4), of_terms.g_pos_lse = row(5), of_terms.g_spread = row(6);
  k.labelled_terms(of_terms);
  Tensor loss = total(terms);
  *data<T>(loss) /= T(count);
  if (!gradient) return {loss, {}};

  std::fill_n(row(7), n, 0.0);
  slopes.of_rows = {neg, row(4), row(7), pos_lse, row(5), row(6), positives};
  k.rectangle(in, slopes, data<T>(memory), executor);
  d_rows.insert(d_rows.end(), d_columns.begin(), d_columns.end());
  return {loss, scalable<T>(d_rows) ? d_rows : Tensors{}};
}

std::tuple<Tensor, Tensors> labelled(Tensors rows, Tensors columns, double tau, bool normalize, int64_t first,
                                     Tensor row_keys, Tensor column_keys, bool spread, double count, bool for_rows,
                                     bool for_columns) {
  STD_TORCH_CHECK(rows.size() <= 1 && columns.size() == 1, "rows, columns: wanted one set of each, or no rows");
  Rectangle r(rows, columns, std::nullopt, tau, normalize, false, first, row_keys, column_keys);
  STD_TORCH_CHECK(!r.input.symmetric || !for_columns,
                  "for_columns: found true, wanted false where the rows are the columns");
  auto run = r.input.dtype == Dtype::f64 ? labelled_of<double> : labelled_of<float>;
  return run(r, r.input.symmetric ? columns : rows, columns, spread, count, for_rows, for_columns);
}

}  // namespace
}  // namespace tclr

STABLE_TORCH_LIBRARY(tclr_kernels, m) {
  for (const char* schema : tclr::schemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(tclr_kernels, CPU, m) {
  m.impl("gram_forward", TORCH_BOX(&tclr::gram_forward));
  m.impl("gram_backward", TORCH_BOX(&tclr::gram_backward));
  m.impl("reduced", TORCH_BOX(&tclr::reduced));
  m.impl("reduced_backward", TORCH_BOX(&tclr::reduced_backward));
  m.impl("rectangle", TORCH_BOX(&tclr::rectangle));
  m.impl("pairs", TORCH_BOX(&tclr::pairs));
  m.impl("rectangle_backward", TORCH_BOX(&tclr::rectangle_backward));
  m.impl("labelled", TORCH_BOX(&tclr::labelled));
  m.impl("objective", TORCH_BOX(&tclr::objective));
  m.impl("objective_backward", TORCH_BOX(&tclr::objective_backward));
}
