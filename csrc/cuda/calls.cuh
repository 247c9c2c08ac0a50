// What all calls of the backend share: memory, the choice of tensor cores or ordinary arithmetic, and the launches that
// read and write sets of rows.
#pragma once
#include "tensor.cuh"

namespace tclr {
namespace {

using cuda::GramCall;
using cuda::Set;

// Assigns memory from `base` on. With base = nullptr it only counts the bytes.
struct Arena {
  char* base;
  size_t used = 0;

  template <typename T>
  void take(T*& p, int64_t n) {
    p = reinterpret_cast<T*>(base + used);
    used += (size_t(n) * sizeof(T) + 255) / 256 * 256;
  }
};

// The number of parts, at most `sets`, into which the sets are divided, so that parts * blocks thread blocks fill a
// device. `enough` blocks fill it.
int64_t parts_of(int64_t sets, int64_t blocks, int64_t enough = 256) {
  int64_t parts = 1;
  while (parts < sets && 2 * parts * blocks <= enough && blocks > 0) parts *= 2;
  return parts;
}

template <typename T>
Gram<T> describe(int64_t G, int64_t V, int64_t N, int64_t D, bool normalize, bool cross, const Scalar& tau,
                 bool split = false) {
  Gram<T> p{};
  p.G = G, p.V = V, p.N = N, p.D = D, p.ldz = (D + 3) / 4 * 4, p.normalize = normalize, p.cross = cross, p.tau = tau;
  p.parts = p.splits = p.boost = 1;
  p.inverse = T(1 / tau.value);
  p.order = {0, V * N, N, 0, 1, 1};
  Problem tiles = p.tiles();
  p.parts = parts_of(tiles.V * tiles.blocks, p.gradient_blocks(), enough_tiles);
  if (split) p.splits = parts_of(tiles.blocks, p.sum_blocks(), enough_tiles);
  auto narrow = [](int64_t n) { return uint32_t(n); };
  p.of = {V, N, tiles.block, tiles.blocks, tiles.V, p.parts, p.panels(), p.splits};
  p.of.sum_blocks = narrow(p.sum_blocks()), p.of.term_blocks = narrow(p.term_blocks());
  p.of.gradient_blocks = narrow(p.gradient_blocks()), p.of.whole = p.whole();
  return p;
}

template <typename T>
void take_gradient(Gram<T>& p, Arena& arena) {
  arena.take(p.dz, p.parts * p.rows() * p.ldz);
  arena.take(p.norms, p.rows());
  arena.take(p.largest, p.G);
}

template <typename T>
void take_coefficients(Gram<T>& p, bool gradient, Arena& arena) {
  int64_t blocks = p.V * p.rows();
  if (gradient) arena.take(p.g_neg, blocks), arena.take(p.g_pos, blocks);
}

// ---- sets of rows

constexpr int most_sets = 64;  // in one launch

template <typename T>
struct Call {
  Gram<T> p;
  Packed z;  // replaces p.z for tensor cores
  Upstream<T> upstream;
  T* zdz;
  Dtype dtype;
  double above;          // these kernels return at once if 1 / tau is at most this; 0: they always compute
  int64_t first, count;  // the sets of this launch
  Set sets[most_sets];

  TCLR_METHOD bool elsewhere() const { return above > 0 && 1 / value_of(p.tau) <= above; }
  int64_t row_blocks() const { return (count * p.G * p.N * 32 + threads - 1) / threads; }
};

// The row of this warp. D is 0 if there is none.
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

// The shared memory of a tile and of its anchors, which have so many numbers each.
template <typename T>
size_t shared_of(const Gram<T>& p, int numbers) {
  return Tile<T>::size(p.ldz) + sizeof(T) * (p.slots() * tile * numbers + tile_threads / 32);
}

// A problem is computed either in the arithmetic of T, with tiles of 32 rows (Plain), or on tensor cores. groups: how
// many groups of 128 features a thread block computes the gradient for. of_block: the threads of a thread block;
// at_once, sums_at_once: the thread blocks of a multiprocessor, in the gradient and in the sums.
template <typename T, int groups = panel<T> / 128>
struct Plain {
  using Number = T;
  using Stored = Same<T>;
  static constexpr int of_block = tile_threads, at_once = blocks_at_once<T, groups>;
  static constexpr int sums_at_once = blocks_at_once<T, 2>;

  static void describe(Call<T>& c, Arena& arena) { arena.take(c.p.z, c.p.rows() * c.p.ldz); }
  TCLR_METHOD static T* rows(const Call<T>& c) { return c.p.z; }
  TCLR_METHOD static int64_t row_size(const Call<T>& c) { return c.p.ldz; }
  static int64_t sum_blocks(const Call<T>& c) { return c.p.sum_blocks(); }
  static int64_t gradient_blocks(const Call<T>& c) { return c.p.gradient_blocks(); }
  static size_t shared(const Call<T>& c) { return shared_of(c.p, StoredCoefficients<T>::numbers); }
  TCLR_METHOD static void sum(const Call<T>& c, uint32_t block) { sums(c.p, block); }
  TCLR_METHOD static void add_gradient(const Call<T>& c, uint32_t block) {
    Work<T> work(c.p, block);
    StoredCoefficients<T> anchors(c.p, work.I.g);
    gradient<groups>(c.p, work, anchors);
  }
};

template <typename E>
struct OnTensorCores {
  using Number = float;
  using Stored = E;
  static constexpr int of_block = threads, at_once = 1, sums_at_once = 1;

  static void describe(Call<float>& c, Arena& arena) {
    c.z.ldw = (c.p.D + 8 * in_word<E> - 1) / (8 * in_word<E>)*8;
    arena.take(c.z.words, c.p.rows() * c.z.ldw);
    c.p.parts = parts_of(c.p.cross ? (c.p.V + 1) / 2 : c.p.V, sum_blocks(c) / c.p.V * c.z.chunks());
    // Weights are at most 4. In float16, this factor keeps all but very small ones out of the subnormal range.
    if (std::is_same_v<E, Half>) c.p.boost = 8192;
  }
  TCLR_METHOD static auto* rows(const Call<float>& c) { return reinterpret_cast<typename E::Element*>(c.z.words); }
  TCLR_METHOD static int64_t row_size(const Call<float>& c) { return c.z.ldw * in_word<E>; }
  static int64_t sum_blocks(const Call<float>& c) {
    return c.p.G * c.p.V * c.p.V * TensorTiles(c.p, c.z).problem.blocks;
  }
  static int64_t gradient_blocks(const Call<float>& c) { return sum_blocks(c) / c.p.V * c.p.parts * c.z.chunks(); }
  static size_t shared(const Call<float>& c) { return TensorTiles(c.p, c.z).shared(); }
  TCLR_METHOD static void sum(const Call<float>& c, int64_t block) { tensor_sums<E>(c.p, c.z, block); }
  TCLR_METHOD static void add_gradient(const Call<float>& c, int64_t block) { tensor_gradient<E>(c.p, c.z, block); }
};

template <typename Path>
using CallOf = Call<typename Path::Number>;

template <typename Path>
TCLR_KERNEL read_sets(TCLR_ARGUMENT CallOf<Path> c) {
  if (c.elsewhere()) return;
  for (int64_t g = int64_t(blockIdx.x) * threads + threadIdx.x; c.p.largest && g < c.p.G; g += gridDim.x * threads)
    c.p.largest[g] = 0;
  SetRow row(c);
  read_row<typename Path::Stored>(c.p, Path::rows(c), Path::row_size(c), c.p.row(row.r), row.x, row.D);
}

template <typename T>
TCLR_KERNEL write_sets(TCLR_ARGUMENT Call<T> c) {
  SetRow row(c);
  double factor = 1 / value_of(c.p.tau);
  double along =
      write_row(row.x, row.D, sum_of_parts(c.p, row.r), factor, row.set->gradient, (row.r.g * c.p.N + row.r.i) * c.p.D);
  if (row.D != 0 && threadIdx.x % 32 == 0) c.zdz[c.p.row(row.r)] = T(along * factor);
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

}  // namespace
}  // namespace tclr
