// From tensors to what the CUDA kernels take, by libtorch's stable ABI: one build serves every PyTorch from 2.11 on.
//
// With TCLR_HOST_EXECUTOR the same operators are made for CPU tensors, in a library of their own, for the tests.
#include <torch/csrc/stable/accelerator.h>

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

// The inputs' device, made the current one, and its current stream. The symbol is looked up in the library that is
// there: a CPU build of PyTorch has none, and this one must load beside it all the same.
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

std::tuple<Tensors, Tensor> gram_backward(Tensors sets, Optional tau, double tau_value, bool normalize, bool cross,
                                          Tensor neg, Tensor pos, Optional g_term, Optional g_neg, Optional g_pos,
                                          bool tf32) {
  Described d = describe(sets, tau, tau_value, normalize, cross, tf32);
  Device device(sets[0]);
  Tensors held, dz;
  auto pointer = [&](const Optional& x) -> const void* {
    if (!x) return nullptr;
    STD_TORCH_CHECK(sizes_of(*x) == std::vector<int64_t>({d.call.G, d.call.V, d.call.V, d.call.N}) &&
                        code_of(*x) == wide(sets[0]) && on_device(*x),
                    "neg, pos and their gradients: wanted CUDA tensors [G, V, V, N] of the forward's dtype");
    return held.emplace_back(torch::stable::contiguous(*x)).const_data_ptr();
  };
  d.call.neg = const_cast<void*>(pointer(neg)), d.call.pos = const_cast<void*>(pointer(pos));
  d.call.g_term = pointer(g_term), d.call.g_neg = pointer(g_neg), d.call.g_pos = pointer(g_pos);
  for (size_t a = 0; a < sets.size(); ++a)
    d.sets[a].gradient = dz.emplace_back(empty(sizes_of(sets[a]), code_of(sets[a]), sets[a])).mutable_data_ptr();
  d.call.sets = d.sets.data();
  Tensor zdz = empty({d.call.G, d.call.V, d.call.N}, wide(sets[0]), sets[0]);
  d.call.zdz = zdz.mutable_data_ptr();
  Tensor memory = bytes(cuda::gram_memory(d.call, true), sets[0]);
  check(cuda::gram_backward(d.call, memory.mutable_data_ptr(), device.stream));
  return {dz, zdz};
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
  m.impl("objective", TORCH_BOX(&tclr::objective));
  m.impl("objective_backward", TORCH_BOX(&tclr::objective_backward));
}

#ifdef TCLR_HOST_EXECUTOR
using torch::stable::detail::StableLibrary;
using Init = torch::stable::detail::StableTorchLibraryInit;

static const char* library = getenv("TCLR_HOST_LIBRARY");  // several of them may stand side by side
static const Init define_all(
    StableLibrary::Kind::DEF,
    [](StableLibrary& m) {
      for (const char* schema : tclr::schemas) m.def(schema);
    },
    library, nullptr, __FILE__, __LINE__);
static const Init implement_all(StableLibrary::Kind::IMPL, implement, library, "CPU", __FILE__, __LINE__);

#define TCLR_PUBLIC extern "C" __attribute__((visibility("default")))
TCLR_PUBLIC void run_downwards(bool downwards) { tclr::host::downwards = downwards; }
TCLR_PUBLIC int launches() { return tclr::host::launches; }
#else
STABLE_TORCH_LIBRARY_IMPL(tclr_kernels, CUDA, m) { implement(m); }

extern "C" __attribute__((visibility("default"))) const char* tclr_kernels_cuda_targets() { return TCLR_CUDA_TARGETS; }
#endif
