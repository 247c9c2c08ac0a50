// The launches of the operation and of the objective.
#include "calls.cuh"
#include "hopper.cuh"
#include "objective.cuh"

namespace tclr {
namespace {

// ---- one problem

template <typename Path>
TCLR_KERNEL_OF(Path::of_block, Path::sums_at_once)
sum_tiles(TCLR_ARGUMENT CallOf<Path> c) {
  if (!c.elsewhere()) Path::sum(c, blockIdx.x);
}

template <typename T>
TCLR_KERNEL finish_terms(TCLR_ARGUMENT Call<T> c) {
  terms(Finisher<T>(c.p, blockIdx.x));
}

template <typename T>
TCLR_KERNEL make_coefficients(TCLR_ARGUMENT Call<T> c) {
  Finisher<T> f(c.p, blockIdx.x);
  coefficients(f, c.upstream);
  note_largest(f);
}

template <typename Path>
TCLR_KERNEL_OF(Path::of_block, Path::at_once)
make_gradient(TCLR_ARGUMENT CallOf<Path> c) {
  if (!c.elsewhere()) Path::add_gradient(c, blockIdx.x);
}

// Sets the pointers to the arguments and results of a call.
template <typename T>
void connect(Call<T>& c, const GramCall& call) {
  c.p.term = static_cast<T*>(call.term), c.p.neg = static_cast<T*>(call.neg), c.p.pos = static_cast<T*>(call.pos);
  auto given = [](const void* x) { return static_cast<const T*>(x); };
  c.upstream = {given(call.g_term), given(call.g_neg), given(call.g_pos), 0};
  c.zdz = static_cast<T*>(call.zdz), c.dtype = call.dtype;
}

template <typename Path>
CallOf<Path> arrange(const GramCall& call, bool backward, Arena& arena) {
  using T = typename Path::Number;
  Call<T> c{};
  c.p = describe<T>(call.G, call.V, call.N, call.D, call.normalize, call.cross, call.tau);
  Path::describe(c, arena);
  if (backward)
    take_gradient(c.p, arena);
  else
    arena.take(c.p.norms, c.p.rows());
  take_coefficients(c.p, backward, arena);
  connect(c, call);
  return c;
}

template <typename Path>
const char* forward(const GramCall& call, void* memory, Stream stream) {
  using T = typename Path::Number;
  Arena arena{static_cast<char*>(memory)};
  Call<T> c = arrange<Path>(call, false, arena);
  const char* error = over_sets(c, call, read_sets<Path>, 0, stream);
  if (!error) error = launch(sum_tiles<Path>, Path::sum_blocks(c), Path::shared(c), stream, c, Path::of_block);
  if (!error) error = launch(finish_terms<T>, c.p.finish_blocks(), 0, stream, c);
  return error;
}

template <typename Path>
const char* backward(const GramCall& call, void* memory, Stream stream) {
  using T = typename Path::Number;
  Arena arena{static_cast<char*>(memory)};
  Call<T> c = arrange<Path>(call, true, arena);
  const char* error = over_sets(c, call, read_sets<Path>, 0, stream);
  if (!error) error = launch(make_coefficients<T>, c.p.finish_blocks(), 0, stream, c);
  if (!error) error = launch(make_gradient<Path>, Path::gradient_blocks(c), Path::shared(c), stream, c, Path::of_block);
  if (!error) error = over_sets(c, call, write_sets<T>, 0, stream);
  return error;
}

// Calls f with the path for a call. With few features, rounding errors of float16 do not average out, so rows of fewer
// than 64 features are computed without tensor cores.
template <typename F>
auto on_path(const GramCall& call, F f) {
  bool many = call.N >= tensor_tile, half = call.dtype == Dtype::f16 || call.dtype == Dtype::bf16;
  if (call.dtype == Dtype::f64) return f(Plain<double>());
  if (many && half && !call.normalize && call.dtype == Dtype::bf16) return f(OnTensorCores<Bfloat>());
  if (many && half && (!call.normalize || call.D >= 64)) return f(OnTensorCores<Half>());
  if (many && !half && call.tf32) return f(OnTensorCores<Tf32>());
  return call.D <= 128 ? f(Plain<float, 1>()) : f(Plain<float>());
}

// ---- on Hopper. If the temperature is on the device, the kernels of tensor.cuh are launched, too: see hopper.cuh.

const char* forward_on_hopper(const GramCall& call, void* memory, Stream stream) {
  using Other = OnTensorCores<Half>;
  Arena arena{static_cast<char*>(memory)};
  hopper::Arrangement all(call, false, arena);
  Call<float>& c = all.c;
  connect(c, call);
  all.sums.neg = c.p.neg, all.sums.pos = c.p.pos;
  const char* error = hopper::over_rows({c, all.l, 0}, call, all.l.padded(), hopper::read_blocks, stream);
  if (!error) error = hopper::sum(all.sums, stream);
  if (!error && call.tau.data) error = over_sets(c, call, read_sets<Other>, 0, stream);
  if (!error && call.tau.data)
    error = launch(sum_tiles<Other>, Other::sum_blocks(c), Other::shared(c), stream, c, Other::of_block);
  if (!error) error = launch(finish_terms<float>, c.p.finish_blocks(), 0, stream, c);
  return error;
}

const char* backward_on_hopper(const GramCall& call, void* memory, Stream stream) {
  using Other = OnTensorCores<Half>;
  Arena arena{static_cast<char*>(memory)};
  hopper::Arrangement all(call, true, arena);
  Call<float>& c = all.c;
  connect(c, call);
  all.factors.p = c.p;
  hopper::RowsCall rows{c, all.l, all.gradient.parts};
  const char* error = hopper::over_rows(rows, call, all.l.padded(), hopper::read_blocks, stream);
  if (!error) error = launch(make_coefficients<float>, c.p.finish_blocks(), 0, stream, c);
  if (!error) error = hopper::add_gradient(all.factors, all.gradient, stream);
  if (!error && call.tau.data) error = over_sets(c, call, read_sets<Other>, 0, stream);
  if (!error && call.tau.data)
    error = launch(make_gradient<Other>, Other::gradient_blocks(c), Other::shared(c), stream, c, Other::of_block);
  if (!error) error = hopper::over_rows(rows, call, all.l.N, hopper::write_blocks, stream);
  return error;
}

// ---- the objective

template <typename T>
void add(Objective<T>& o, Term kind, int64_t G, int64_t V, int64_t N, const Order& order) {
  Gram<T>& p = o.problems[o.count];
  p = describe<T>(G, V, N, o.call.D, o.call.normalize, kind == gl, o.call.tau, true);
  p.order = order;
  o.kinds[o.count++] = kind;
}

template <typename T>
Objective<T> arrange(const ObjectiveCall& call, Arena& kept, Arena& memory) {
  Objective<T> o{};
  o.call = call;
  int64_t V = call.V, B = call.B, clips = call.T, of_s = V * B, of_x = of_s + V * B * clips;
  if (call.weights[ic_global] != 0) add(o, ic_global, 1, V, B, {0, 0, B, 0, 1, 1});
  if (call.weights[ic_local] != 0)
    add(o, ic_local, 1, V * clips, B, {of_x, 0, B * clips, 1, clips, clips});
  else if (call.weights[ll] != 0)
    add(o, ll, B, V, clips, {of_x, clips, B * clips, 0, 1, 1});
  if (call.weights[gl] != 0) add(o, gl, B, 2 * V, clips, {of_s, clips, B * clips, 0, 1, 1});
  for (int k = 0; k < terms_of_objective; ++k) o.log_upstream[k] = T(log(o.upstream(Term(k))));
  for (int k = 0; k < 3; ++k) {
    const Input& x = o.input(k);
    bool steps = x.strides[3] == 1 && call.D % 4 == 0 && uintptr_t(x.data) % 16 == 0;
    for (int d = 0; d < 3; ++d) steps = steps && x.strides[d] % 4 == 0;
    if (steps && call.dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32)) o.quads |= 1u << k;
  }
  o.B = B, o.clips = clips, o.of_chunks = o.chunks(), o.of_s = uint32_t(of_s), o.of_x = uint32_t(of_x);
  for (int k = 0; k < o.count; ++k) {
    const Sizes& of = o.problems[k].of;
    o.sum_blocks += of.sum_blocks, o.term_blocks += of.term_blocks, o.gradient_blocks += of.gradient_blocks;
  }
  T* z;
  kept.take(z, o.rows() * o.ldz());
  kept.take(o.norms, o.rows());
  for (int k = 0; k < o.count; ++k) {
    Gram<T>& p = o.problems[k];
    p.z = z;
    kept.take(p.dz, p.parts * p.rows() * p.ldz);
    kept.take(p.along, p.parts * p.rows());
    kept.take(p.units, p.parts * p.tile_count());
    memory.take(p.neg, p.splits * p.V * p.rows()), memory.take(p.pos, p.V * p.rows());
  }
  kept.take(o.along_blocks, int64_t(o.term_blocks) + o.gradient_blocks);
  memory.take(o.ticket, 1);
  memory.take(o.sums, 2 * int64_t(o.term_blocks));
  return o;
}

template <typename T>
const char* objective_forward(const ObjectiveCall& call, Arena kept, Arena memory, Stream stream) {
  Objective<T> o = arrange<T>(call, kept, memory);
  if (o.rows() * call.V > INT32_MAX) return "more rows than 32-bit numbers count";
  size_t tile = Tile<T>::size(o.ldz()), with_anchors = tile;
  for (int k = 0; k < o.count; ++k) {
    size_t of_problem = shared_of(o.problems[k], ComputedCoefficients<T>::numbers);
    with_anchors = of_problem > with_anchors ? of_problem : with_anchors;
  }
  int64_t gradient_blocks = call.gradient ? o.gradient_blocks : 0;
  auto finish = finish_objective<T, panel<T> / 128>;
  if (call.D <= 128) finish = finish_objective<T, 1>;
  const char* error = launch(read_inputs<T>, (o.rows() * 32 + threads - 1) / threads, 0, stream, o, threads, true);
  if (!error) error = launch(sum_all_tiles<T>, o.sum_blocks, tile, stream, o, tile_threads, true);
  if (!error) error = launch(finish, o.term_blocks + gradient_blocks, with_anchors, stream, o, tile_threads, true);
  return error;
}

template <typename T>
const char* objective_backward(const ObjectiveCall& call, Arena kept, Stream stream) {
  Arena none{nullptr};
  Objective<T> o = arrange<T>(call, kept, none);
  size_t shared = sizeof(double) * (threads / 32) * (o.chunk + 1);
  return launch(write_gradients<T>, 1 + o.rows() * o.chunks(), shared, stream, o, threads, true);
}

}  // namespace

namespace cuda {

size_t gram_memory(const GramCall& call, bool backward) {
  Arena arena{nullptr};
  if (hopper::serves(call)) {
    hopper::Arrangement(call, backward, arena);
    return arena.used;
  }
  on_path(call, [&](auto path) { arrange<decltype(path)>(call, backward, arena); });
  return arena.used;
}

const char* gram_forward(const GramCall& call, void* memory, void* stream) {
  if (hopper::serves(call)) return forward_on_hopper(call, memory, static_cast<Stream>(stream));
  return on_path(call, [&](auto path) { return forward<decltype(path)>(call, memory, static_cast<Stream>(stream)); });
}

const char* gram_backward(const GramCall& call, void* memory, void* stream) {
  if (hopper::serves(call)) return backward_on_hopper(call, memory, static_cast<Stream>(stream));
  return on_path(call, [&](auto path) { return backward<decltype(path)>(call, memory, static_cast<Stream>(stream)); });
}

ObjectiveMemory objective_memory(const ObjectiveCall& call) {
  Arena kept{nullptr}, memory{nullptr};
  if (call.dtype == Dtype::f64)
    arrange<double>(call, kept, memory);
  else
    arrange<float>(call, kept, memory);
  return {kept.used, memory.used};
}

const char* objective_forward(const ObjectiveCall& call, void* kept, void* memory, void* stream) {
  auto run = call.dtype == Dtype::f64 ? tclr::objective_forward<double> : tclr::objective_forward<float>;
  return run(call, {static_cast<char*>(kept)}, {static_cast<char*>(memory)}, static_cast<Stream>(stream));
}

const char* objective_backward(const ObjectiveCall& call, void* kept, void* stream) {
  auto run = call.dtype == Dtype::f64 ? tclr::objective_backward<double> : tclr::objective_backward<float>;
  return run(call, {static_cast<char*>(kept)}, static_cast<Stream>(stream));
}

}  // namespace cuda
}  // namespace tclr
