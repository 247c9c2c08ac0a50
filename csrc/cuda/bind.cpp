// The operators on CUDA devices: checks the tensors, and calls the CUDA kernels with pointers and sizes. By libtorch's
// stable ABI, one build works with every PyTorch from 2.11 on.
//
// With TCLR_HOST_EXECUTOR, the same operators are registered for CPU tensors in a separate library, for the tests.
#include <torch/csrc/stable/accelerator.h>

#include <array>

#include "../schemas.h"
#include "../tensors.h"
#include "gram.h"

#ifdef TCLR_HOST_EXECUTOR
#include "executor.h"
#else
#include <dlfcn.h>
#endif

namespace tclr {
namespace {

#ifdef TCLR_HOST_EXECUTOR

bool on_device(const Tensor& x) { return x.is_cpu(); }

struct Device {
  explicit Device(const Tensor&) {}
  void* stream = nullptr;
};

#else

bool on_device(const Tensor& x) { return x.is_cuda(); }

// Makes the inputs' device the current device, and gives its current stream. The symbol is looked up at run time: a CPU
// build of PyTorch lacks it, and this library must load beside that, too.
struct Device {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;

  explicit Device(const Tensor& x) : guard(x.get_device_index()) {
    using Current = AOTITorchError (*)(int32_t, void**);
    static auto current = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
      return library ? reinterpret_cast<Current>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    STD_TORCH_CHECK(current, "this PyTorch has no CUDA streams: its libtorch_cuda.so is not loaded");
    TORCH_ERROR_CODE_CHECK(current(x.get_device_index(), &stream));
  }
};

#endif

Tensor bytes(size_t n, const Tensor& beside) { return empty({int64_t(n)}, aoti_torch_dtype_uint8(), beside); }

// A 0-d tensor on the host is read here, one on the device by the kernels.
cuda::Scalar scalar(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 0, "tau: wanted a 0-d tensor");
  if (on_device(x)) return {x.const_data_ptr(), dtype_of(x), 0};
  return {nullptr, {}, host_value(x)};
}

cuda::Scalar scalar(const Optional& x, double value) { return x ? scalar(*x) : cuda::Scalar{nullptr, {}, value}; }

void check(const char* error) { STD_TORCH_CHECK(!error, "tclr_kernels on CUDA: ", error); }

// ---- one problem

struct Described {
  std::vector<cuda::Set> sets;
  cuda::GramCall call{};
};

Described describe(const Tensors& sets, const Optional& tau, double tau_value, bool normalize, bool cross, bool tf32) {
  STD_TORCH_CHECK(!sets.empty() && sets[0].dim() == 3, "sets: wanted at least one tensor [G, N, D]");
  Described d;
  auto sizes = sizes_of(sets[0]);
  for (const Tensor& z : sets) {
    STD_TORCH_CHECK(sizes_of(z) == sizes && code_of(z) == code_of(sets[0]) && on_device(z) &&
                        z.get_device_index() == sets[0].get_device_index(),
                    "sets: wanted CUDA tensors of one shape, dtype and device");
    d.sets.push_back({{z.const_data_ptr(), z.stride(0), z.stride(1), z.stride(2)}, nullptr});
  }
  auto V = int64_t(sets.size());
  d.call.G = sizes[0], d.call.V = V, d.call.N = sizes[1], d.call.D = sizes[2];
  d.call.dtype = dtype_of(sets[0]), d.call.tau = scalar(tau, tau_value);
  d.call.normalize = normalize, d.call.cross = cross, d.call.tf32 = tf32;
  return d;
}

std::tuple<Tensor, Tensor, Tensor> gram_forward(Tensors sets, Optional tau, double tau_value, bool normalize,
                                                bool cross, bool tf32) {
  Described d = describe(sets, tau, tau_value, normalize, cross, tf32);
  Device device(sets[0]);
  auto block = [&] { return empty({d.call.G, d.call.V, d.call.V, d.call.N}, wide(sets[0]), sets[0]); };
  Tensor term = block(), neg = block(), pos = block();
  d.call.sets = d.sets.data();
  d.call.term = term.mutable_data_ptr(), d.call.neg = neg.mutable_data_ptr(), d.call.pos = pos.mutable_data_ptr();
  Tensor memory = bytes(cuda::gram_memory(d.call, false), sets[0]);
  check(cuda::gram_forward(d.call, memory.mutable_data_ptr(), device.stream));
  return {term, neg, pos};
}

// Writes the gradient of each set where d.sets says; returns <z, dz> of each row.
Tensor run_backward(Described& d, const Tensor& like, const Tensor& neg, const Tensor& pos, const Optional& g_term,
                    const Optional& g_neg, const Optional& g_pos) {
  Device device(like);
  Tensors held;
  auto pointer = [&](const Optional& x) -> const void* {
    if (!x) return nullptr;
    STD_TORCH_CHECK(sizes_of(*x) == std::vector<int64_t>({d.call.G, d.call.V, d.call.V, d.call.N}) &&
                        code_of(*x) == wide(like) && on_device(*x),
                    "neg, pos and their gradients: wanted CUDA tensors [G, V, V, N] of the forward's dtype");
    return held.emplace_back(torch::stable::contiguous(*x)).const_data_ptr();
  };
  d.call.neg = const_cast<void*>(pointer(neg)), d.call.pos = const_cast<void*>(pointer(pos));
  d.call.g_term = pointer(g_term), d.call.g_neg = pointer(g_neg), d.call.g_pos = pointer(g_pos);
  d.call.sets = d.sets.data();
  Tensor zdz = empty({d.call.G, d.call.V, d.call.N}, wide(like), like);
  d.call.zdz = zdz.mutable_data_ptr();
  Tensor memory = bytes(cuda::gram_memory(d.call, true), like);
  check(cuda::gram_backward(d.call, memory.mutable_data_ptr(), device.stream));
  return zdz;
}

std::tuple<Tensors, Tensor> gram_backward(Tensors sets, Optional tau, double tau_value, bool normalize, bool cross,
                                          Tensor neg, Tensor pos, Optional g_term, Optional g_neg, Optional g_pos,
                                          bool tf32) {
  Described d = describe(sets, tau, tau_value, normalize, cross, tf32);
  Tensors dz;
  for (size_t a = 0; a < sets.size(); ++a)
    d.sets[a].gradient = dz.emplace_back(empty(sizes_of(sets[a]), code_of(sets[a]), sets[a])).mutable_data_ptr();
  Tensor zdz = run_backward(d, sets[0], neg, pos, g_term, g_neg, g_pos);
  return {dz, zdz};
}

// ---- a whole loss in one call. The forward keeps neg and pos for the gradient.

// How a whole loss is made of the terms, as tclr_kernels/reduced.py defines it: which are added, and what divides them.
struct Reduction {
  bool one_sided;
  double factor, count;
};

// The sets [G, N, D] of inputs [N, D] or [G, N, D], or of the views in one tensor [V, N, D].
Tensors sets_of(const Tensors& inputs) {
  bool views = inputs.size() == 1;
  STD_TORCH_CHECK(!inputs.empty() && (inputs[0].dim() == 3 || (inputs[0].dim() == 2 && !views)),
                  "inputs: wanted tensors [N, D] or [G, N, D], or one tensor [V, N, D]");
  Tensors sets;
  for (Tensor z : inputs)
    if (!views)
      sets.push_back(z.dim() == 3 ? z : torch::stable::unsqueeze(z, 0));
    else
      for (int64_t v = 0; v < z.size(0); ++v) sets.push_back(torch::stable::narrow(z, 0, v, 1));
  return sets;
}

// x times or divided by a number, by PyTorch's own operator (name: "aten::mul" or "aten::div"), so that the result has
// the same bits as in Python. x: 0-d, with the dtype of the terms.
Tensor with_number(const char* name, const Tensor& x, double number) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(0, nullptr, nullptr, code_of(x), aoti_torch_device_type_cpu(), 0, &handle));
  Tensor on_host(handle);
  if (dtype_of(x) == Dtype::f64)
    *static_cast<double*>(on_host.mutable_data_ptr()) = number;
  else
    *static_cast<float*>(on_host.mutable_data_ptr()) = float(number);
  std::array<StableIValue, 2> stack{torch::stable::detail::from(x), torch::stable::detail::from(on_host)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "Tensor", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// term[:, 0, 1]
Tensor first_pair(const Tensor& term) { return torch::stable::select(torch::stable::select(term, 1, 0), 1, 1); }

std::tuple<Tensor, Tensors> reduced(Tensors inputs, Optional tau, double tau_value, bool normalize, bool cross,
                                    bool one_sided, double factor, double count, bool gradient, bool tf32) {
  auto [term, neg, pos] = gram_forward(sets_of(inputs), tau, tau_value, normalize, cross, tf32);
  Device device(inputs[0]);
  Tensor chosen = one_sided ? torch::stable::contiguous(first_pair(term)) : term;
  Tensor loss = torch::stable::sum(chosen);
  if (factor != 1) loss = with_number("aten::mul", loss, factor);
  loss = with_number("aten::div", loss, count);
  return {loss, gradient ? Tensors{neg, pos} : Tensors{}};
}

Tensors reduced_backward(Tensors inputs, Optional tau, double tau_value, bool normalize, bool cross, bool one_sided,
                         double factor, double count, Tensors kept, Tensor upstream, bool tf32) {
  STD_TORCH_CHECK(kept.size() == 2, "kept: wanted what the forward returned");
  Described d = describe(sets_of(inputs), tau, tau_value, normalize, cross, tf32);
  Device device(inputs[0]);
  Tensor value = with_number("aten::div", upstream, count);
  if (factor != 1) value = with_number("aten::mul", value, factor);
  Tensor g_term = empty(sizes_of(kept[0]), wide(inputs[0]), inputs[0]);
  if (one_sided) torch::stable::zero_(g_term);
  Tensor reached = one_sided ? first_pair(g_term) : g_term;
  torch::stable::copy_(reached, value);

  Tensors made;
  size_t views = d.sets.size() / inputs.size();
  for (size_t k = 0; k < inputs.size(); ++k) {
    Tensor& to = made.emplace_back(empty(sizes_of(inputs[k]), code_of(inputs[k]), inputs[k]));
    int64_t bytes_per_view = d.call.N * d.call.D * bytes_of(to);
    for (size_t v = 0; v < views; ++v)
      d.sets[k * views + v].gradient = static_cast<char*>(to.mutable_data_ptr()) + int64_t(v) * bytes_per_view;
  }
  Tensor zdz = run_backward(d, inputs[0], kept[0], kept[1], g_term, {}, {});
  if (tau) made.push_back(torch::stable::sum(zdz));
  return made;
}

// ---- rectangles

struct DescribedRectangle {
  Described rows, columns;
  Tensors held;  // keeps the tensors alive to which `call` points
  cuda::RectangleCall call{};

  std::vector<int64_t> of_rows() const { return {rows.call.G, rows.call.V, columns.call.V, rows.call.N}; }
  std::vector<int64_t> of_columns() const { return {rows.call.G, columns.call.V, rows.call.V, columns.call.N}; }
};

const double* of_anchors(DescribedRectangle& d, const Tensor& x, const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(
      sizes_of(x) == sizes && code_of(x) == aoti_torch_dtype_float64() && on_device(x),
      "negatives, of_rows, of_columns: wanted CUDA tensors [G, sets, sets of the other side, N] of float64");
  return static_cast<const double*>(d.held.emplace_back(torch::stable::contiguous(x)).const_data_ptr());
}

// given: neg, g_neg, g_pos and, with keys, pos_lse, g_pos_lse, g_spread, count; or negatives and g_pairs.
cuda::Anchors anchors(DescribedRectangle& d, const Tensors& given, const std::vector<int64_t>& sizes) {
  std::vector<const double*> x;
  for (const Tensor& of_anchor : given) x.push_back(of_anchors(d, of_anchor, sizes));
  switch (x.size()) {
    case 0:
      return {};
    case 2:
      return {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, x[0], x[1]};
    case 3:
      return {x[0], x[1], x[2]};
    default:
      STD_TORCH_CHECK(x.size() == 7, "of_rows, of_columns: wanted none, 2, 3 or 7 tensors, found ", x.size());
      return {x[0], x[1], x[2], x[3], x[4], x[5], x[6]};
  }
}

cuda::Keys keys(const Optional& x, const cuda::GramCall& side) {
  if (!x) return {};
  STD_TORCH_CHECK(sizes_of(*x) == std::vector<int64_t>({side.G, side.N}) && on_device(*x) &&
                      code_of(*x) == aoti_torch_dtype_int64(),
                  "keys: wanted CUDA tensors [G, N] of int64");
  return {static_cast<const int64_t*>(x->const_data_ptr()), x->stride(0), x->stride(1)};
}

DescribedRectangle describe(const Tensors& rows, const Tensors& columns, const Optional& tau, double tau_value,
                            bool normalize, bool cross, int64_t first, const Optional& row_keys,
                            const Optional& column_keys, bool half, bool tf32) {
  DescribedRectangle d;
  d.columns = describe(columns, tau, tau_value, normalize, cross, tf32);
  d.rows = rows.empty() ? d.columns : describe(rows, tau, tau_value, normalize, cross, tf32);
  const cuda::GramCall &of_rows = d.rows.call, &of_columns = d.columns.call;
  STD_TORCH_CHECK(of_rows.G == of_columns.G && of_rows.D == of_columns.D && of_rows.dtype == of_columns.dtype,
                  "rows, columns: wanted tensors [G, n, D] and [G, K, D] of one dtype");
  STD_TORCH_CHECK(first < 0 || (of_rows.V == of_columns.V && first + of_rows.N <= of_columns.N),
                  "first: wanted the place of the rows among the columns");
  d.rows.call.half = d.columns.call.half = half;
  STD_TORCH_CHECK(!row_keys == !column_keys, "row_keys, column_keys: wanted both or neither");
  d.call.symmetric = rows.empty(), d.call.first = rows.empty() ? 0 : first;
  d.call.row_keys = keys(row_keys, of_rows), d.call.column_keys = keys(column_keys, of_columns);
  return d;
}

// Sets the pointers to the sets. They point into d, so d must not be moved afterwards.
const cuda::RectangleCall& ready(DescribedRectangle& d) {
  d.call.rows = d.rows.call, d.call.columns = d.columns.call;
  d.call.rows.sets = d.rows.sets.data(), d.call.columns.sets = d.columns.sets.data();
  return d.call;
}

double* data(const Tensor& x) { return static_cast<double*>(x.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rectangle(Tensors rows, Tensors columns, Optional tau,
                                                                     double tau_value, bool normalize, bool cross,
                                                                     int64_t first, Optional row_keys,
                                                                     Optional column_keys, bool mean, bool half,
                                                                     bool tf32) {
  DescribedRectangle d =
      describe(rows, columns, tau, tau_value, normalize, cross, first, row_keys, column_keys, half, tf32);
  const Tensor& like = columns[0];
  Device device(like);
  const cuda::GramCall& of_rows = d.rows.call;
  bool keyed = row_keys.has_value();
  STD_TORCH_CHECK(!mean || (of_rows.V == 1 && d.columns.call.V == 1 && !keyed && d.call.first < 0),
                  "mean: wanted one set of rows and one of columns, without keys or a place");
  Code wide_dtype = aoti_torch_dtype_float64();
  auto output = [&](bool exists) { return empty(exists ? d.of_rows() : std::vector<int64_t>{0}, wide_dtype, like); };
  Tensor neg = output(true), pos = output(true);
  Tensor pos_lse = output(keyed), spread = output(keyed), count = output(keyed);
  using Sizes = std::vector<int64_t>;
  Tensor weighted = empty(mean ? Sizes{of_rows.G, of_rows.N, of_rows.D} : Sizes{0}, wide(like), like);
  d.call.neg = data(neg), d.call.pos = data(pos);
  if (keyed) d.call.pos_lse = data(pos_lse), d.call.spread = data(spread), d.call.count = data(count);
  if (mean) d.call.mean = weighted.mutable_data_ptr();
  Tensor memory = bytes(cuda::rectangle_memory(ready(d), false), like);
  check(cuda::rectangle_forward(d.call, memory.mutable_data_ptr(), device.stream));
  return {neg, pos, pos_lse, spread, count, weighted};
}

std::tuple<Tensor, Tensor> pairs(Tensors rows, Tensors columns, Optional tau, double tau_value, bool normalize,
                                 bool cross, int64_t first, Tensor row_keys, Tensor column_keys, Tensor negatives,
                                 bool half, bool tf32) {
  DescribedRectangle d =
      describe(rows, columns, tau, tau_value, normalize, cross, first, row_keys, column_keys, half, tf32);
  const Tensor& like = columns[0];
  Device device(like);
  d.call.of_rows.negatives = of_anchors(d, negatives, d.of_rows());
  Tensor sums = empty(d.of_rows(), code_of(negatives), like), slope = empty(d.of_rows(), code_of(negatives), like);
  d.call.pair_sums = data(sums), d.call.slope = data(slope);
  Tensor memory = bytes(cuda::rectangle_memory(ready(d), false), like);
  check(cuda::rectangle_forward(d.call, memory.mutable_data_ptr(), device.stream));
  return {sums, slope};
}

// Allocates the gradients of the sets, for the kernels to write.
Tensors gradients_of(const Tensors& sets, Described& side) {
  Tensors made;
  for (size_t a = 0; a < sets.size(); ++a)
    side.sets[a].gradient = made.emplace_back(empty(sizes_of(sets[a]), code_of(sets[a]), sets[a])).mutable_data_ptr();
  return made;
}

std::tuple<Tensors, Tensors, Tensor> rectangle_backward(Tensors rows, Tensors columns, Optional tau, double tau_value,
                                                        bool normalize, bool cross, int64_t first, Optional row_keys,
                                                        Optional column_keys, Tensors of_rows, Tensors of_columns,
                                                        bool for_rows, bool for_columns, bool half, bool tf32) {
  DescribedRectangle d =
      describe(rows, columns, tau, tau_value, normalize, cross, first, row_keys, column_keys, half, tf32);
  const Tensor& like = columns[0];
  Device device(like);
  STD_TORCH_CHECK(for_rows || for_columns, "for_rows, for_columns: wanted one of them at least");
  STD_TORCH_CHECK(!d.call.symmetric || (for_rows && !for_columns && of_columns.empty()),
                  "rows that are the columns: wanted of_rows and for_rows alone");
  d.call.of_rows = anchors(d, of_rows, d.of_rows()), d.call.of_columns = anchors(d, of_columns, d.of_columns());
  Tensors d_rows, d_columns;
  if (for_rows) d_rows = gradients_of(rows.empty() ? columns : rows, d.rows);
  if (for_columns) d_columns = gradients_of(columns, d.columns);
  d.call.for_rows = for_rows, d.call.for_columns = for_columns;
  Described& side = for_rows ? d.rows : d.columns;
  Tensor along = empty({side.call.G, side.call.V, side.call.N}, wide(like), like);
  side.call.zdz = along.mutable_data_ptr();
  Tensor memory = bytes(cuda::rectangle_memory(ready(d), true), like);
  check(cuda::rectangle_backward(d.call, memory.mutable_data_ptr(), device.stream));
  return {d_rows, d_columns, along};
}

// ---- the objective

cuda::Input input(const Tensor& z) {
  int clips = z.dim() == 4;
  return {z.const_data_ptr(), {z.stride(0), z.stride(1), clips ? z.stride(2) : 0, z.stride(2 + clips)}, nullptr};
}

cuda::ObjectiveCall describe(const Tensor& g, const Tensor& s, const Tensor& x, const Optional& tau, double tau_value,
                             bool normalize, const std::vector<double>& scales, const std::vector<double>& weights) {
  auto of_g = sizes_of(x);
  STD_TORCH_CHECK(x.dim() == 4 && sizes_of(s) == of_g, "s, x: wanted [V, B, T, D]");
  of_g.erase(of_g.begin() + 2);
  STD_TORCH_CHECK(sizes_of(g) == of_g, "g: wanted [V, B, D] beside x [V, B, T, D]");
  for (const Tensor& z : {g, s, x})
    STD_TORCH_CHECK(on_device(z) && code_of(z) == code_of(x) && z.get_device_index() == x.get_device_index(),
                    "g, s, x: wanted CUDA tensors of one dtype and device");
  STD_TORCH_CHECK(scales.size() == 4 && weights.size() == 4, "scales, weights: wanted one for each term");
  cuda::ObjectiveCall call{};
  call.V = x.size(0), call.B = x.size(1), call.T = x.size(2), call.D = x.size(3);
  call.g = input(g), call.s = input(s), call.x = input(x);
  call.dtype = dtype_of(x), call.tau = scalar(tau, tau_value), call.normalize = normalize;
  for (int k = 0; k < 4; ++k) call.scales[k] = scales[k], call.weights[k] = weights[k];
  return call;
}

std::tuple<Tensors, Tensors> objective(Tensor g, Tensor s, Tensor x, Optional tau, double tau_value, bool normalize,
                                       std::vector<double> scales, std::vector<double> weights, bool gradient) {
  cuda::ObjectiveCall call = describe(g, s, x, tau, tau_value, normalize, scales, weights);
  Device device(x);
  call.gradient = gradient;
  Tensors terms;
  for (void*& term : call.terms) term = terms.emplace_back(empty({}, wide(x), x)).mutable_data_ptr();
  cuda::ObjectiveMemory sizes = cuda::objective_memory(call);
  Tensor kept = bytes(sizes.kept, x), memory = bytes(sizes.scratch, x);
  check(cuda::objective_forward(call, kept.mutable_data_ptr(), memory.mutable_data_ptr(), device.stream));
  return {terms, gradient ? Tensors{kept} : Tensors{}};
}

Tensors objective_backward(Tensor g, Tensor s, Tensor x, Optional tau, double tau_value, bool normalize,
                           std::vector<double> scales, std::vector<double> weights, Tensors kept, Tensor upstream) {
  cuda::ObjectiveCall call = describe(g, s, x, tau, tau_value, normalize, scales, weights);
  Device device(x);
  call.gradient = true;
  call.upstream = scalar(upstream);
  STD_TORCH_CHECK(kept.size() == 1 && uint64_t(kept[0].numel()) == cuda::objective_memory(call).kept,
                  "kept: wanted what the forward returned");
  Tensors gradients;
  for (auto [z, to] : {std::pair{&g, &call.g}, {&s, &call.s}, {&x, &call.x}})
    to->gradient = gradients.emplace_back(empty(sizes_of(*z), code_of(*z), *z)).mutable_data_ptr();
  call.g_tau = gradients.emplace_back(empty({}, wide(x), x)).mutable_data_ptr();
  check(cuda::objective_backward(call, kept[0].mutable_data_ptr(), device.stream));
  return gradients;
}

}  // namespace
}  // namespace tclr

static void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("gram_forward", TORCH_BOX(&tclr::gram_forward));
  m.impl("gram_backward", TORCH_BOX(&tclr::gram_backward));
  m.impl("reduced", TORCH_BOX(&tclr::reduced));
  m.impl("reduced_backward", TORCH_BOX(&tclr::reduced_backward));
  m.impl("rectangle", TORCH_BOX(&tclr::rectangle));
  m.impl("pairs", TORCH_BOX(&tclr::pairs));
  m.impl("rectangle_backward", TORCH_BOX(&tclr::rectangle_backward));
  m.impl("objective", TORCH_BOX(&tclr::objective));
  m.impl("objective_backward", TORCH_BOX(&tclr::objective_backward));
}

#ifdef TCLR_HOST_EXECUTOR
using torch::stable::detail::StableLibrary;
using Init = torch::stable::detail::StableTorchLibraryInit;

static const char* library = getenv("TCLR_HOST_LIBRARY");  // tests may load several such libraries
static const Init define_all(
    StableLibrary::Kind::DEF,
    [](StableLibrary& m) {
      for (const char* schema : tclr::schemas) m.def(schema);
    },
    library, nullptr, __FILE__, __LINE__);
static const Init implement_all(StableLibrary::Kind::IMPL, implement, library, "CPU", __FILE__, __LINE__);

#define TCLR_PUBLIC extern "C" __attribute__((visibility("default")))
TCLR_PUBLIC void run_downwards(bool downwards) { tclr::host::downwards = downwards; }
TCLR_PUBLIC void run_dry(bool dry) { tclr::host::dry = dry; }
TCLR_PUBLIC int launches() { return tclr::host::launches; }
TCLR_PUBLIC void be_hopper(int processors) { tclr::host::hopper_processors = processors; }
#else
STABLE_TORCH_LIBRARY_IMPL(tclr_kernels, CUDA, m) { implement(m); }

extern "C" __attribute__((visibility("default"))) const char* tclr_kernels_cuda_targets() { return TCLR_CUDA_TARGETS; }
#endif
