// The launches of a rectangle: some rows against some columns.
//
// Forward: read the rows, read the columns, sum, finish. The mean is computed as a gradient with weights exp(S - neg).
//
// Backward: read both sides, find the largest coefficients, and for each side whose gradient is requested, compute and
// write it. For pairs, the sums are computed again, to find the size of their coefficients.
#include "calls.cuh"
#include "rectangle_tensor.cuh"

namespace tclr {
namespace {

using cuda::RectangleCall;

// The arguments of the kernels.
template <typename T>
struct Step {
  Rectangle<T> p;
  Packed z, passing_z;  // for tensor cores
};

template <typename T>
using Kernel = void (*)(Step<T>);

// A rectangle is computed either without tensor cores or on them, as in calls.cuh.
template <typename T>
struct PlainRectangle {
  using Number = T;
  using Path = Plain<T>;

  static int64_t resident_tiles(const Step<T>& s) {
    const Gram<T>& R = s.p.resident;
    return R.G * Cut{R.V * R.N, tile}.tiles();
  }
  static int64_t tiles_of_set(const Step<T>& s) { return Cut{s.p.passing.N, tile}.tiles(); }
  static int64_t passing_tiles(const Step<T>& s) { return Cut{s.p.passing.V * s.p.passing.N, tile}.tiles(); }
  static int64_t panels(const Step<T>& s) { return s.p.resident.panels(); }
  static size_t shared(const Step<T>& s) {
    size_t tiles = Tile<T>::size(s.p.resident.ldz), sums = tile_threads * sizeof(Sums<T>);
    return tiles > sums ? tiles : sums;
  }
  template <bool keyed>
  TCLR_METHOD static void sum(const Step<T>& s, int64_t block) {
    rectangle_sums<T, keyed>(s.p, block);
  }
  template <bool keyed, int>
  TCLR_METHOD static void add_gradient(const Step<T>& s, int64_t block) {
    rectangle_gradient<T, keyed>(s.p, block);
  }
  template <bool keyed>
  static Kernel<T> gradient_kernel(const Step<T>&);
  static Kernel<T> mean_kernel(const Step<T>&) { return nullptr; }
  TCLR_METHOD static void finish_mean(const Step<T>& s, int64_t k) { write_mean(s.p, k); }
};

template <typename E>
struct RectangleOnTensorCores {
  using Number = float;
  using Path = OnTensorCores<E>;

  TCLR_METHOD static TwoSides sides(const Step<float>& s) { return {s.p, s.z, s.passing_z}; }
  static int64_t resident_tiles(const Step<float>& s) {
    const Gram<float>& R = s.p.resident;
    return R.G * R.V * Cut{R.N, tensor_tile}.tiles();
  }
  static int64_t tiles_of_set(const Step<float>& s) { return Cut{s.p.passing.N, tensor_tile}.tiles(); }
  static int64_t passing_tiles(const Step<float>& s) {
    return (s.p.resident.cross ? s.p.passing.V / 2 : s.p.passing.V) * tiles_of_set(s);
  }
  static int64_t panels(const Step<float>& s) { return s.z.chunks(); }
  static size_t shared(const Step<float>& s) {
    return TwoSides{s.p, s.z, s.passing_z}.shared() + tensor_tile * sizeof(Coefficients<true>);
  }
  template <bool keyed>
  TCLR_METHOD static void sum(const Step<float>& s, int64_t block) {
    rectangle_sums_on_tensor_cores<E, keyed>(s.p, sides(s), block);
  }
  template <bool keyed, int weighed>
  TCLR_METHOD static void add_gradient(const Step<float>& s, int64_t block) {
    rectangle_gradient_on_tensor_cores<E, keyed, weighed>(s.p, sides(s), block);
  }
  template <bool keyed>
  static Kernel<float> gradient_kernel(const Step<float>&);
  static Kernel<float> mean_kernel(const Step<float>& s);
  TCLR_METHOD static void finish_mean(const Step<float>& s, int64_t k) {
    s.z.chunks() == 1 ? join_mean(s.p, k) : write_mean(s.p, k);
  }
};

template <typename RectanglePath>
using StepOf = Step<typename RectanglePath::Number>;

template <typename RectanglePath, bool keyed>
TCLR_KERNEL_OF(RectanglePath::Path::of_block, 1)
sum_rectangle(TCLR_ARGUMENT StepOf<RectanglePath> s) {
  RectanglePath::template sum<keyed>(s, blockIdx.x);
}

template <typename T, bool keyed>
TCLR_KERNEL finish_rectangle(TCLR_ARGUMENT Step<T> s) {
  finish_sums<T, keyed>(s.p, int64_t(blockIdx.x) * threads + threadIdx.x);
}

template <typename T>
TCLR_KERNEL note_coefficients(TCLR_ARGUMENT Step<T> s) {
  note_largest(s.p, int64_t(blockIdx.x) * threads + threadIdx.x);
}

template <typename RectanglePath, bool keyed, int weighed>
TCLR_KERNEL_OF(RectanglePath::Path::of_block, 1)
make_rectangle_gradient(TCLR_ARGUMENT StepOf<RectanglePath> s) {
  RectanglePath::template add_gradient<keyed, weighed>(s, blockIdx.x);
}

template <typename E>
TCLR_KERNEL sum_rectangle_with_mean(TCLR_ARGUMENT Step<float> s) {
  rectangle_mean_on_tensor_cores<E>(s.p, {s.p, s.z, s.passing_z}, blockIdx.x);
}

template <typename RectanglePath>
TCLR_KERNEL write_means(TCLR_ARGUMENT StepOf<RectanglePath> s) {
  RectanglePath::finish_mean(s, int64_t(blockIdx.x) * threads + threadIdx.x);
}

template <typename T>
template <bool keyed>
Kernel<T> PlainRectangle<T>::gradient_kernel(const Step<T>&) {
  return make_rectangle_gradient<PlainRectangle, keyed, of_resident | of_passing>;
}

bool has(const Anchors& x) { return x.neg || x.g_pairs; }

template <typename E>
template <bool keyed>
Kernel<float> RectangleOnTensorCores<E>::gradient_kernel(const Step<float>& s) {
  if (!has(s.p.passing_anchors)) return make_rectangle_gradient<RectangleOnTensorCores, keyed, of_resident>;
  if (!has(s.p.anchors)) return make_rectangle_gradient<RectangleOnTensorCores, keyed, of_passing>;
  return make_rectangle_gradient<RectangleOnTensorCores, keyed, of_resident | of_passing>;
}

template <typename E>
Kernel<float> RectangleOnTensorCores<E>::mean_kernel(const Step<float>& s) {
  return s.z.chunks() == 1 ? sum_rectangle_with_mean<E> : nullptr;
}

// One call: its sides, its memory and its launches.
template <typename RectanglePath>
struct RectangleLaunches {
  using T = typename RectanglePath::Number;
  using Path = typename RectanglePath::Path;

  const RectangleCall& call;
  Stream stream;
  Arena arena;
  bool keyed = call.row_keys.data, pairs = call.of_rows.negatives || call.of_columns.negatives;
  Call<T> rows = side(call.rows), columns = call.symmetric ? rows : side(call.columns);
  const char* error = nullptr;

  Call<T> side(const GramCall& of) {
    Call<T> c{};
    Gram<T>& p = c.p;
    p.G = of.G, p.V = of.V, p.N = of.N, p.D = of.D, p.ldz = (of.D + 3) / 4 * 4;
    p.normalize = of.normalize, p.cross = of.cross, p.tau = of.tau;
    Path::describe(c, arena);
    p.parts = 1;
    p.boost = std::is_same_v<Path, OnTensorCores<Half>> ? 4096 : 1;  // for weights of at most 12
    arena.take(p.norms, p.rows());
    c.zdz = static_cast<T*>(of.zdz), c.dtype = of.dtype;
    return c;
  }
  // The arguments of a step with the rows, or with the columns, as the resident side.
  Step<T> step(bool of_rows) const {
    const Call<T>&resident = of_rows ? rows : columns, &passing = of_rows ? columns : rows;
    Step<T> s{};
    s.p.resident = resident.p, s.p.passing = passing.p, s.z = resident.z, s.passing_z = passing.z;
    s.p.keys = of_rows ? call.row_keys : call.column_keys;
    s.p.passing_keys = of_rows ? call.column_keys : call.row_keys;
    s.p.anchors = of_rows ? call.of_rows : call.of_columns;
    s.p.passing_anchors = of_rows && !call.symmetric ? call.of_columns : call.of_rows;
    s.p.offset = call.first < 0 ? no_index : of_rows ? call.first : -call.first;
    s.p.pairs = pairs, s.p.parts = 1;
    return s;
  }

  // If only the memory is counted, nothing is launched.
  void run(Kernel<T> kernel, int64_t blocks, size_t shared, const Step<T>& s, int of_block = Path::of_block) {
    if (arena.base && !error) error = launch(kernel, blocks, shared, stream, s, of_block);
  }
  void run_for_each(Kernel<T> kernel, int64_t count, const Step<T>& s) {
    run(kernel, (count + threads - 1) / threads, 0, s, threads);
  }
  void over(const Call<T>& c, const GramCall& of, void (*kernel)(Call<T>), size_t shared) {
    if (arena.base && !error) error = over_sets(c, of, kernel, shared, stream);
  }

  void read(bool backward) {
    if (backward || call.mean) arena.take(rows.p.largest, rows.p.G);
    columns.p.largest = rows.p.largest;
    over(rows, call.rows, read_sets<Path>, 0);
    if (!call.symmetric) over(columns, call.columns, read_sets<Path>, 0);
  }
  void sum(Step<T>& s, Kernel<T> with_mean = nullptr) {
    int64_t sets = s.p.passing.V, tiles = RectanglePath::resident_tiles(s) * sets;
    s.p.parts = parts_of(RectanglePath::tiles_of_set(s), tiles, enough_blocks);
    int64_t size = keyed ? sizeof(SumsOf<T, true>) : sizeof(SumsOf<T, false>);
    char* sums;
    arena.take(sums, s.p.parts * s.p.anchor_count() * size);
    s.p.sums = reinterpret_cast<Sums<T>*>(sums);
    if (with_mean) arena.take(s.p.resident.dz, s.p.parts * s.p.resident.rows() * s.p.resident.ldz);
    Kernel<T> without = keyed ? sum_rectangle<RectanglePath, true> : sum_rectangle<RectanglePath, false>;
    run(with_mean ? with_mean : without, tiles * s.p.parts, RectanglePath::shared(s), s);
    run_for_each(keyed ? finish_rectangle<T, true> : finish_rectangle<T, false>, s.p.anchor_count(), s);
  }
  void make_gradient(Step<T>& s) {
    int64_t tiles = RectanglePath::resident_tiles(s) * RectanglePath::panels(s);
    Gram<T>& p = s.p.resident;
    s.p.parts = p.parts = parts_of(RectanglePath::passing_tiles(s), tiles, enough_blocks);
    arena.take(p.dz, p.parts * p.rows() * p.ldz);
    run(keyed ? RectanglePath::template gradient_kernel<true>(s) : RectanglePath::template gradient_kernel<false>(s),
        tiles * p.parts, RectanglePath::shared(s), s);
  }

  void forward() {
    read(false);
    Step<T> s = step(true);
    s.p.neg = call.neg, s.p.pos = call.pos, s.p.pos_lse = call.pos_lse, s.p.spread = call.spread;
    s.p.count = call.count, s.p.pair_sums = call.pair_sums, s.p.slope = call.slope;
    Kernel<T> with_mean = call.mean ? RectanglePath::mean_kernel(s) : nullptr;
    sum(s, with_mean);
    if (!call.mean) return;
    s.p.mean = static_cast<T*>(call.mean), s.p.anchors.neg = call.neg;
    if (!with_mean) make_gradient(s);
    run_for_each(write_means<RectanglePath>, s.p.resident.rows() * s.p.resident.D, s);
  }
  void note(bool of_rows) {
    Step<T> s = step(of_rows);
    if (!has(s.p.anchors) || (!of_rows && call.symmetric)) return;
    if (pairs) {
      arena.take(s.p.slope, s.p.anchor_count());
      sum(s);
    }
    run_for_each(note_coefficients<T>, s.p.anchor_count(), s);
  }
  void write(bool of_rows) {
    Step<T> s = step(of_rows);
    make_gradient(s);
    Call<T> c = of_rows ? rows : columns;
    c.p = s.p.resident;
    if (!c.zdz) arena.take(c.zdz, c.p.rows());
    over(c, of_rows ? call.rows : call.columns, write_sets<T>, 0);
  }
  void backward() {
    read(true);
    for (bool of_rows : {true, false}) note(of_rows);
    if (call.for_rows) write(true);
    if (call.for_columns) write(false);
  }
};

// Calls f with the RectanglePath for a call, as on_path does. `many`: enough rows and columns for a tile of tensor
// cores. Pairs are not computed on tensor cores, since each positive needs double precision. Rows of float32 that were
// of half precision become float16 if they are normalised. Other ones may have any size, and need the range of TF32.
template <typename F>
auto on_rectangle_path(const RectangleCall& call, F f) {
  bool pairs = call.of_rows.negatives || call.of_columns.negatives;
  bool many = !pairs && call.rows.N * call.columns.N >= tensor_tile * tensor_tile;
  Dtype dtype = call.rows.dtype;
  bool half = dtype == Dtype::f16 || dtype == Dtype::bf16, normalize = call.rows.normalize;
  if (dtype == Dtype::f64) return f(PlainRectangle<double>());
  if (many && half && !normalize && dtype == Dtype::bf16) return f(RectangleOnTensorCores<Bfloat>());
  if (many && half && !normalize) return f(RectangleOnTensorCores<Half>());
  if (many && (half || call.rows.half) && normalize && call.rows.D >= 64) return f(RectangleOnTensorCores<Half>());
  if (many && !half && (call.rows.tf32 || (call.rows.half && !normalize))) return f(RectangleOnTensorCores<Tf32>());
  return f(PlainRectangle<float>());
}

}  // namespace

namespace cuda {

size_t rectangle_memory(const RectangleCall& call, bool backward) {
  return on_rectangle_path(call, [&](auto path) {
    RectangleLaunches<decltype(path)> launches{call, nullptr, {nullptr}};
    backward ? launches.backward() : launches.forward();
    return launches.arena.used;
  });
}

const char* rectangle_forward(const RectangleCall& call, void* memory, void* stream) {
  return on_rectangle_path(call, [&](auto path) {
    RectangleLaunches<decltype(path)> launches{call, static_cast<Stream>(stream), {static_cast<char*>(memory)}};
    launches.forward();
    return launches.error;
  });
}

const char* rectangle_backward(const RectangleCall& call, void* memory, void* stream) {
  return on_rectangle_path(call, [&](auto path) {
    RectangleLaunches<decltype(path)> launches{call, static_cast<Stream>(stream), {static_cast<char*>(memory)}};
    launches.backward();
    return launches.error;
  });
}

}  // namespace cuda
}  // namespace tclr
