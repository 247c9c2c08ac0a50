// The launches, and the memory that they share.
#include "objective.cuh"

namespace tclr {
namespace {

using cuda::GramCall;
using cuda::Set;

// Hands out memory from `base` on; from nullptr on it only counts.
struct Arena {
  char* base;
  size_t used = 0;

  template <typename T>
  void take(T*& p, int64_t n) {
    p = reinterpret_cast<T*>(base + used);
    used += (size_t(n) * sizeof(T) + 255) / 256 * 256;
  }
};

template <typename T>
Gram<T> describe(int64_t G, int64_t V, int64_t N, int64_t D, bool normalize, bool cross, const Scalar& tau) {
  Gram<T> p{};
  p.G = G, p.V = V, p.N = N, p.D = D, p.ldz = (D + 3) / 4 * 4, p.normalize = normalize, p.cross = cross, p.tau = tau;
  constexpr int64_t enough = 256;  // blocks to fill a device
  p.parts = 1;
  int64_t blocks = G > 0 ? p.gradient_blocks() : enough;
  while (p.parts < p.tiles().V && 2 * p.parts * blocks <= enough) p.parts *= 2;
  return p;
}

template <typename T>
void keep(Gram<T>& p, Arena& arena) {
  arena.take(p.dz, p.parts * p.rows() * p.ldz);
  arena.take(p.norms, p.rows());
  arena.take(p.largest, p.G);
}

template <typename T>
void scratch(Gram<T>& p, bool gradient, Arena& arena) {
  int64_t blocks = p.V * p.rows();
  arena.take(p.z, p.rows() * p.ldz);
  if (gradient) arena.take(p.g_neg, blocks), arena.take(p.g_pos, blocks);
}

// ---- one problem

constexpr int most_sets = 64;  // of one launch

template <typename T>
struct Call {
  Gram<T> p;
  Upstream<T> upstream;
  T* zdz;
  Dtype dtype;
  int64_t first, count;  // of the sets that this launch serves
  Set sets[most_sets];

  int64_t row_blocks() const { return (count * p.G * p.N * 32 + threads - 1) / threads; }
};

// The row of this thread's 32 lanes; beyond the last it is none, and D is 0.
template <typename T>
struct SetRow {
  Place r;
  const Set* set;
  Source x;
  int64_t D = 0;

  TCLR_METHOD explicit SetRow(const Call<T>& c) {
    int64_t k = (int64_t(blockIdx.x) * threads + threadIdx.x) / 32, rows = c.p.G * c.p.N;
    if (k < c.count * rows) D = c.p.D;
    if (D == 0) k = 0;
    set = &c.sets[k / rows];
    r = {k % rows / c.p.N, c.first + k / rows, k % c.p.N};
    const Rows& from = set->rows;
    x = {from.data, c.dtype, r.g * from.stride_g + r.i * from.stride_n, from.stride_d};
  }
};

template <typename T>
TCLR_KERNEL read_sets(TCLR_ARGUMENT Call<T> c) {
  for (int64_t g = int64_t(blockIdx.x) * threads + threadIdx.x; c.p.largest && g < c.p.G; g += gridDim.x * threads)
    c.p.largest[g] = 0;
  SetRow<T> row(c);
  read_row(c.p, c.p.row(row.r), row.x, row.D);
}

template <typename T>
TCLR_KERNEL sum_tiles(TCLR_ARGUMENT Call<T> c) {
  sums(c.p, blockIdx.x);
}

template <typename T>
TCLR_KERNEL finish_terms(TCLR_ARGUMENT Call<T> c) {
  terms(Finisher<T>(c.p, blockIdx.x));
}

template <typename T>
TCLR_KERNEL make_coefficients(TCLR_ARGUMENT Call<T> c) {
  Finisher<T> f(c.p, blockIdx.x);
  coefficients(f, c.upstream, shared_memory<double>());
  note_largest(f);
}

template <typename T>
TCLR_KERNEL make_gradient(TCLR_ARGUMENT Call<T> c) {
  gradient(c.p, blockIdx.x);
}

template <typename T>
TCLR_KERNEL write_sets(TCLR_ARGUMENT Call<T> c) {
  SetRow<T> row(c);
  Share<T> from[] = {share(c.p, row.r)};
  double factor = 1 / value_of(c.p.tau);
  double along = write_row(row.x, row.D, c.p.normalize, from, factor, row.set->gradient,
                           (row.r.g * c.p.N + row.r.i) * c.p.D, shared_memory<double>());
  if (row.D != 0 && threadIdx.x % 32 == 0) c.zdz[c.p.row(row.r)] = T(along * factor);
}

template <typename T>
Call<T> arrange(const GramCall& call, bool backward, Arena& arena) {
  Call<T> c{};
  c.p = describe<T>(call.G, call.V, call.N, call.D, call.normalize, call.cross, call.tau);
  if (backward)
    keep(c.p, arena);
  else
    arena.take(c.p.norms, c.p.rows());
  scratch(c.p, backward, arena);
  c.p.term = static_cast<T*>(call.term), c.p.neg = static_cast<T*>(call.neg), c.p.pos = static_cast<T*>(call.pos);
  auto given = [](const void* x) { return static_cast<const T*>(x); };
  c.upstream = {given(call.g_term), given(call.g_neg), given(call.g_pos), 0};
  c.zdz = static_cast<T*>(call.zdz), c.dtype = call.dtype;
  return c;
}

template <typename T>
const char* over_sets(Call<T> c, const GramCall& call, void (*kernel)(Call<T>), size_t shared, Stream stream) {
  for (c.first = 0; c.first < call.V; c.first += most_sets) {
    c.count = call.V - c.first < most_sets ? call.V - c.first : most_sets;
    for (int64_t k = 0; k < c.count; ++k) c.sets[k] = call.sets[c.first + k];
    if (const char* error = launch(kernel, c.row_blocks(), shared, stream, c)) return error;
  }
  return nullptr;
}

template <typename T>
const char* forward(const GramCall& call, void* memory, Stream stream) {
  Arena arena{static_cast<char*>(memory)};
  Call<T> c = arrange<T>(call, false, arena);
  const char* error = over_sets(c, call, read_sets<T>, threads * sizeof(T), stream);
  if (!error) error = launch(sum_tiles<T>, c.p.sum_blocks(), Tile<T>::size(c.p.ldz), stream, c);
  if (!error) error = launch(finish_terms<T>, c.p.finish_blocks(), 0, stream, c);
  return error;
}

template <typename T>
const char* backward(const GramCall& call, void* memory, Stream stream) {
  Arena arena{static_cast<char*>(memory)};
  Call<T> c = arrange<T>(call, true, arena);
  constexpr size_t shared = threads * sizeof(double);
  const char* error = over_sets(c, call, read_sets<T>, threads * sizeof(T), stream);
  if (!error) error = launch(make_coefficients<T>, c.p.finish_blocks(), shared, stream, c);
  if (!error) error = launch(make_gradient<T>, c.p.gradient_blocks(), Tile<T>::size(c.p.ldz), stream, c);
  if (!error) error = over_sets(c, call, write_sets<T>, shared, stream);
  return error;
}

// ---- the objective

template <typename T>
void add(Objective<T>& o, Term kind, int64_t G, int64_t V, int64_t N) {
  o.kinds[o.count] = kind;
  o.problems[o.count++] = describe<T>(G, V, N, o.call.D, o.call.normalize, kind == gl, o.call.tau);
}

template <typename T>
Objective<T> arrange(const ObjectiveCall& call, Arena& kept, Arena& memory) {
  Objective<T> o{};
  o.call = call;
  if (call.weights[ic_global] != 0) add(o, ic_global, 1, call.V, call.B);
  if (call.weights[ic_local] != 0)
    add(o, ic_local, 1, call.V * call.T, call.B);
  else if (call.weights[ll] != 0)
    add(o, ll, call.B, call.V, call.T);
  if (call.weights[gl] != 0) add(o, gl, call.B, 2 * call.V, call.T);
  kept.take(o.ticket, 1);
  kept.take(o.along, o.write_blocks());
  memory.take(o.sums, 2 * all_blocks<&Gram<T>::finish_blocks>(o));
  for (int k = 0; k < o.count; ++k) {
    Gram<T>& p = o.problems[k];
    keep(p, kept);
    scratch(p, call.gradient, memory);
    memory.take(p.neg, p.V * p.rows()), memory.take(p.pos, p.V * p.rows());
  }
  return o;
}

template <typename T>
const char* objective_forward(const ObjectiveCall& call, Arena kept, Arena memory, Stream stream) {
  Objective<T> o = arrange<T>(call, kept, memory);
  size_t tile = Tile<T>::size((call.D + 3) / 4 * 4);
  const char* error = launch(read_inputs<T>, all_blocks<&Gram<T>::row_blocks>(o), threads * sizeof(T), stream, o);
  if (!error) error = launch(sum_all_tiles<T>, all_blocks<&Gram<T>::sum_blocks>(o), tile, stream, o);
  if (!error)
    error = launch(finish_objective<T>, all_blocks<&Gram<T>::finish_blocks>(o), threads * sizeof(double), stream, o);
  if (!error && call.gradient)
    error = launch(make_all_gradients<T>, all_blocks<&Gram<T>::gradient_blocks>(o), tile, stream, o);
  return error;
}

template <typename T>
const char* objective_backward(const ObjectiveCall& call, Arena kept, Stream stream) {
  Arena none{nullptr};
  Objective<T> o = arrange<T>(call, kept, none);
  return launch(write_gradients<T>, o.write_blocks(), threads * sizeof(double), stream, o);
}

}  // namespace

namespace cuda {

size_t gram_memory(const GramCall& call, bool backward) {
  Arena arena{nullptr};
  if (call.dtype == Dtype::f64)
    arrange<double>(call, backward, arena);
  else
    arrange<float>(call, backward, arena);
  return arena.used;
}

const char* gram_forward(const GramCall& call, void* memory, void* stream) {
  auto run = call.dtype == Dtype::f64 ? forward<double> : forward<float>;
  return run(call, memory, static_cast<Stream>(stream));
}

const char* gram_backward(const GramCall& call, void* memory, void* stream) {
  auto run = call.dtype == Dtype::f64 ? backward<double> : backward<float>;
  return run(call, memory, static_cast<Stream>(stream));
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
