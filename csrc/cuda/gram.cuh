// The operation and its gradient without tensor cores: for small problems, and if the full precision of the dtype is
// required.
//
//   S[(a,i),(c,j)] = <z_(a,i), z_(c,j)> / tau
//   neg[a,c,i]     = log sum_{j != i} exp S           pos[a,c,i] = S[(a,i),(c,i)]
//   term[a,c,i]    = log(1 + (exp neg[a,a,i] + exp neg[a,c,i]) / exp pos[a,c,i])
//   W[(a,i),(c,j)] = [j != i] g_neg[a,c,i] exp(S - neg[a,c,i]) + [j = i] g_pos[a,c,i]
//   dz_(a,i)       = 1/tau sum_(c,j) (W + W^T)[(a,i),(c,j)] z_(c,j)
//
// There are four steps: rows, sums, coefficients, gradient. In each step, only one thread block writes to a value. A
// step may compute several problems in one launch.
#pragma once
#include "../problem.h"
#include "rows.cuh"

namespace tclr {
namespace {

constexpr int tile = 32;  // rows and columns of a tile of S
template <typename T>
constexpr int panel = 1024 / sizeof(T);  // features of a row that are in shared memory at a time
template <typename T, int groups = 1>
constexpr int blocks_at_once = sizeof(T) == 8 ? 1 : 4 - groups;  // thread blocks whose registers fit a multiprocessor
constexpr int lds = tile + 4;                                    // row stride of the tile of S
constexpr int per_row = tile_threads / tile;                     // threads that share a row of the tile
constexpr int quarters = tile_threads / 64;  // each group of 64 threads sums S over a quarter of the features
template <typename T>
constexpr T lowest = sizeof(T) == 8 ? T(-1.7e308) : T(-3.4e38);  // finite, so that lowest - lowest is not NaN

struct Place {  // a row of the problem
  int64_t g, a, i;
};

// A number n, by which kernels divide with a multiplication: x / n = (x * factor / 2^32 + x) / 2^shift for x < 2^31.
struct Divisor {
  uint32_t n = 1, factor = 1, shift = 0;

  constexpr Divisor() = default;
  constexpr Divisor(int64_t number) : n(number < 1 ? 1 : uint32_t(number)) {
    while (uint64_t(1) << shift < n) ++shift;
    factor = uint32_t((((uint64_t(1) << shift) - n) << 32) / n + 1);
  }
  constexpr operator uint32_t() const { return n; }
};

// The strides of z, in rows. Set a has the two indices a / inner and a % inner.
struct Order {
  int64_t first, of_group, of_outer, of_set, of_row;
  Divisor inner;
};

// Splits a block's number: returns number % n, and divides the number by n.
TCLR_DEVICE uint32_t last_digit(uint32_t& number, const Divisor& n) {
  uint32_t before = number;
  number = (uint32_t(uint64_t(number) * n.factor >> 32) + number) >> n.shift;
  return before - number * n.n;
}

// The sizes by which kernels decode the number of a block, in 32 bits, since arithmetic in 64 bits is slow. A group
// that is one tile has one set here.
struct Sizes {
  Divisor V, N, size, blocks;                         // size: rows of a tile; blocks: tiles of a set
  Divisor sets, parts, panels;                        // sets of tiles; parts and panels of the gradient, see Work
  Divisor splits;                                     // of the tiles of a set, whose sums different blocks compute
  uint32_t sum_blocks, term_blocks, gradient_blocks;  // thread blocks for each step
  bool whole;                                         // a group is one tile
};

// One problem, and the memory for the results of its steps.
template <typename T>
struct Gram {
  int64_t G, V, N, D, ldz;
  bool normalize, cross;
  Scalar tau;
  T *z, *dz;                    // z: [G, V, N, ldz]; dz: [parts, G, V, N, ldz]
  Norm<T>* norms;               // [G, V, N]
  T *term, *neg, *pos;          // [G, V, V, N]; neg: [splits, G, V, V, N]
  double *g_neg, *g_pos;        // [G, V, V, N]
  unsigned long long* largest;  // [G], the bits of the largest |g_neg| or |g_pos| of each group
  int64_t parts, splits;        // parts of the columns, computed by different thread blocks if there are few rows
  double boost;                 // a factor of the weights, in addition to the unit of their group
  Order order;                  // of z
  Sizes of;
  T inverse;      // 1 / tau, if tau is a value
  T* along;       // [parts, rows], <z, dz>; this and `units` are used by the objective only
  double* units;  // [tiles, parts], the unit of each part

  // If all rows of a group fit a tile, the group is one tile. Otherwise each set is divided into blocks of rows.
  constexpr bool whole() const { return V * N <= tile; }
  constexpr Problem sets() const { return {V, N, cross, tile, 1}; }
  constexpr Problem tiles() const { return whole() ? Problem(1, V * N, false, tile, 1) : sets(); }
  constexpr int64_t rows() const { return G * V * N; }
  constexpr int64_t row(const Place& r) const { return (r.g * V + r.a) * N + r.i; }
  constexpr int64_t at(int64_t g, int64_t a, int64_t c, int64_t i) const { return ((g * V + a) * V + c) * N + i; }
  constexpr Place place(int64_t row) const { return {row / (V * N), row / N % V, row % N}; }
  constexpr int lanes() const {  // lanes that finish a row: one for each set, at most 32
    int n = 1;
    while (n < V && n < 32) n *= 2;
    return n;
  }
  constexpr int64_t panels() const { return (ldz + panel<T> - 1) / panel<T>; }

  constexpr int64_t row_blocks() const { return (rows() * 32 + threads - 1) / threads; }
  constexpr int64_t term_blocks() const { return (rows() + tile - 1) / tile; }
  constexpr int64_t sum_blocks() const { return whole() ? G : G * V * V * tiles().blocks * splits; }
  constexpr int64_t finish_blocks() const { return (rows() * lanes() + threads - 1) / threads; }
  constexpr int64_t tile_count() const { return G * tiles().V * tiles().blocks; }
  constexpr int64_t gradient_blocks() const { return tile_count() * parts * panels(); }
  constexpr int slots() const { return V * N <= tile ? int(V) : 2; }  // see each_anchor
  constexpr bool exists(int64_t a, int64_t c) const { return !cross || (a < (V + 1) / 2) != (c < (V + 1) / 2); }
  TCLR_METHOD T inverse_tau() const { return tau.data ? T(1 / value_of(tau)) : inverse; }
};

// The shared memory of a tile: two panels of rows, and S as four partial sums, each over a quarter of the features.
template <typename T>
struct Tile {
  int ldp;  // row stride of the panels
  T *rows, *columns, *S;

  static constexpr int width(int64_t ldz) { return int(ldz < panel<T> ? ldz : panel<T>); }
  static constexpr size_t size(int64_t ldz) { return sizeof(T) * tile * (2 * (width(ldz) + 4) + quarters * lds); }
  TCLR_METHOD explicit Tile(int64_t ldz) {
    ldp = width(ldz) + 4;
    rows = shared_memory<T>();
    columns = rows + tile * ldp;
    S = columns + tile * ldp;
  }
  TCLR_METHOD T* end() const { return S + quarters * tile * lds; }
  // In a group that is one tile, the rows are the columns.
  TCLR_METHOD Tile(const Gram<T>& p) : Tile(p.ldz) {
    if (p.whole()) columns = rows;
  }
  TCLR_METHOD T product(int r, int j) const {
    T sum = 0;
    for (int k = 0; k < quarters; ++k) sum += S[(k * tile + r) * lds + j];
    return sum;
  }
};

template <typename T>
struct alignas(16) Quad {
  T x[4];
};

template <typename T>
TCLR_DEVICE const Quad<T>& quad(const T* p) {
  return *reinterpret_cast<const Quad<T>*>(p);
}

// ---- rows

template <typename T>
struct Same {  // rows are stored in the type of the arithmetic
  using Element = T;
  static constexpr T of(T x) { return x; }
};

// Computes the norm and the unit row of one row, by a warp. z: [rows, ldz] of E's elements.
template <typename E, typename T>
TCLR_DEVICE void read_row(const Gram<T>& p, typename E::Element* z, int64_t ldz, int64_t row, const Source& x,
                          int64_t D) {
  auto each = [&](auto f) {
    for (int64_t d = threadIdx.x % 32; d < D; d += 32) f(value_at<T>(x, d));
  };
  Norm<T> norm = p.normalize ? norm_of<T>(32, each) : Norm<T>{1, 1};
  if (D == 0) return;
  for (int64_t d = threadIdx.x % 32; d < ldz; d += 32)
    z[row * ldz + d] = E::of(d < D ? unit_value(value_at<T>(x, d), norm) : 0);
  if (threadIdx.x % 32 == 0) p.norms[row] = norm;
}

// ---- tiles

// Copies some features of a row to shared memory, by a warp; zeros if the row is not there.
template <typename T>
TCLR_DEVICE void copy_features(const T* from, bool there, int width, T* to) {
  TCLR_ROLLED
  for (int d = threadIdx.x % 32 * 4; d < width; d += 128)
    for (int k = 0; k < 4; k += 16 / sizeof(T))
      copy_async(reinterpret_cast<uint32_t*>(to + d + k), reinterpret_cast<const uint32_t*>(from + d + k), there);
}

template <typename T>
struct Span {  // rows that are `step` elements apart in memory
  const T* z;
  int64_t rows, step;

  TCLR_METHOD const T* at(int r) const { return z + r * step; }
  TCLR_METHOD void copy(int r, bool there, int64_t first, int width, T* to) const {
    copy_features(at(r) + first, there, width, to);
  }
};

struct Block {  // a block of rows of a set
  int64_t g, a, index;
};

template <typename T>
TCLR_DEVICE uint32_t begin(const Gram<T>& p, const Block& b) {
  return uint32_t(b.index) * p.of.size;
}

template <typename T>
TCLR_DEVICE int count(const Gram<T>& p, const Block& b) {
  uint32_t all = p.of.whole ? p.of.size.n : p.of.N.n, rest = all - begin(p, b);
  return int(rest < p.of.size ? rest : p.of.size.n);
}

// The index in z of a row of the problem.
template <typename T>
TCLR_DEVICE int64_t stored(const Gram<T>& p, const Place& r) {
  auto outer = uint32_t(r.a);
  uint32_t inner = last_digit(outer, p.order.inner);
  return p.order.first + r.g * p.order.of_group + outer * p.order.of_outer + inner * p.order.of_set +
         r.i * p.order.of_row;
}

// The rows of a block: rows of one set, or all rows of a group that is one tile.
template <typename T>
struct BlockRows {
  const Gram<T>& p;
  uint32_t g;
  int rows;
  Span<T> of_set;

  TCLR_METHOD BlockRows(const Gram<T>& p, const Block& b)
      : p(p),
        g(uint32_t(b.g)),
        rows(count(p, b)),
        of_set{p.z + stored(p, {b.g, b.a, begin(p, b)}) * p.ldz, rows, p.order.of_row * p.ldz} {}
  TCLR_METHOD const T* at(int r) const {
    if (!p.of.whole) return of_set.at(r);
    uint32_t a = r, i = last_digit(a, p.of.N);
    return p.z + stored(p, {g, a, i}) * p.ldz;
  }
  TCLR_METHOD void copy(int r, bool there, int64_t first, int width, T* to) const {
    copy_features(at(r) + first, there, width, to);
  }
};

// The rows in groups of eight, rounded up. At least two groups, so that there are fewer variants of the products.
TCLR_DEVICE int eights(int64_t rows) { return rows < 9 ? 2 : int(rows + 7) / 8; }

// Loads some features of rows, each row by a warp, and fills up with rows of zeros to a multiple of eight.
template <typename Rows, typename T>
TCLR_DEVICE void load(const Rows& x, int64_t first, int width, T* to, int ldp) {
  for (int r = threadIdx.x / 32; r < eights(x.rows) * 8; r += tile_threads / 32)
    x.copy(r < x.rows ? r : 0, r < x.rows, first, width, to + r * ldp);
}

// Adds the products of two tiles over a quarter of the features, from `k` on. A warp computes every other group of four
// rows; a thread computes `eights` rows and columns, each 8 apart.
template <int eights, typename T>
TCLR_DEVICE void add_products(T (&sum)[4][4], const Tile<T>& t, int k, int width) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T *rows = t.rows + (lane / 8 + warp % 2 * 4) * t.ldp, *columns = t.columns + lane % 8 * t.ldp;
  TCLR_ROLLED
  for (; k < width; k += 4 * quarters) {
    Quad<T> x[eights];
    for (int r = 0; r < eights; ++r) x[r] = quad(rows + 8 * r * t.ldp + k);
    for (int j = 0; j < eights; ++j) {
      Quad<T> y = quad(columns + 8 * j * t.ldp + k);
      for (int r = 0; r < eights; ++r)
        for (int e = 0; e < 4; ++e) sum[r][j] += x[r].x[e] * y.x[e];
    }
  }
}

// Computes the products of two blocks of rows, which t.product returns. again: the rows of I are still in shared
// memory. meanwhile() runs while rows are fetched; what it writes to shared memory can be read afterwards.
template <typename T, typename Rows, typename Meanwhile>
TCLR_DEVICE void products(const Gram<T>& p, const Rows& I, const Rows& J, const Tile<T>& t, bool again,
                          Meanwhile meanwhile) {
  int quarter = threadIdx.x / 64, most = eights(I.rows > J.rows ? I.rows : J.rows);
  T sum[4][4] = {};
  for (int64_t d = 0; d < p.ldz; d += panel<T>) {
    int width = Tile<T>::width(p.ldz - d);
    if (!again || p.panels() > 1) load(I, d, width, t.rows, t.ldp);
    load(J, d, width, t.columns, t.ldp);
    if (d == 0) meanwhile();
    wait_for_copies();
    __syncthreads();
    switch (most) {
      case 2:
        add_products<2>(sum, t, 4 * quarter, width);
        break;
      case 3:
        add_products<3>(sum, t, 4 * quarter, width);
        break;
      default:
        add_products<4>(sum, t, 4 * quarter, width);
    }
    if (d + panel<T> < p.ldz) __syncthreads();
  }
  int r = threadIdx.x % 32 / 8 + threadIdx.x / 32 % 2 * 4 + quarter * tile, j = threadIdx.x % 8;
  for (int x = 0; x < 4; ++x)
    for (int y = 0; y < 4; ++y) t.S[(r + 8 * x) * lds + j + 8 * y] = sum[x][y];
  __syncthreads();
}

// Calls f(r, j, k) for the k-th entry of this thread, in row r and column j of the tile. r is the same for all of them.
template <typename F>
TCLR_DEVICE void each_entry(F f) {
  for (int k = 0; k < tile / per_row; ++k) f(threadIdx.x / per_row, int(threadIdx.x % per_row) + per_row * k, k);
}

// Computes S of two blocks of rows, and stores put(r, j, S) in the tile.
template <typename T, typename Put>
TCLR_DEVICE void scores(const Gram<T>& p, const Span<T>& I, const Span<T>& J, const Tile<T>& t, bool again,
                        T inverse_tau, Put put) {
  products(p, I, J, t, again, [] {});
  each_entry([&](int r, int j, int) { t.S[r * lds + j] = put(r, j, t.product(r, j) * inverse_tau); });
  __syncthreads();
}

// ---- sums

// Adds exp(s) to the pair (largest, sum), which represents sum * exp(largest).
template <typename T>
TCLR_DEVICE void add_exponential(T& largest, T& sum, T s) {
  if (s > largest) {
    sum = sum * exponential(largest - s) + 1;
    largest = s;
  } else {
    sum += exponential(s - largest);
  }
}

// neg and pos of a group that is one tile. A thread computes them for a row and a set.
template <typename T>
TCLR_DEVICE void sums_of_group(const Gram<T>& p, int64_t g) {
  Tile<T> t(p);
  T inverse_tau = p.inverse_tau();
  BlockRows<T> all(p, {g, 0, 0});
  products(p, all, all, t, true, [] {});
  uint32_t N = p.of.N, V = p.of.V;
  TCLR_ROLLED
  for (uint32_t k = threadIdx.x; k < V * N * V; k += tile_threads) {
    uint32_t row = k, c = last_digit(row, p.of.V), a = row, i = last_digit(a, p.of.N);
    bool exists = p.exists(a, c);
    T largest = lowest<T>, sum = 0;
    TCLR_ROLLED
    for (uint32_t j = 0; j < N && exists; ++j)
      if (j != i) add_exponential(largest, sum, t.product(row, c * N + j) * inverse_tau);
    int64_t at = p.at(g, a, c, i);
    p.neg[at] = largest + logarithm(sum), p.pos[at] = exists && c != a ? t.product(row, c * N + i) * inverse_tau : 0;
  }
}

// neg and pos of one block of rows with one set, or with some of its tiles.
template <typename T>
TCLR_DEVICE void sums(const Gram<T>& p, uint32_t block) {
  if (p.of.whole) return sums_of_group(p, block);
  uint32_t c = last_digit(block, p.of.V), split = last_digit(block, p.of.splits);
  uint32_t index = last_digit(block, p.of.blocks), a = last_digit(block, p.of.V);
  uint32_t b = split * p.of.blocks, end = (split + 1) * p.of.blocks;
  last_digit(b, p.of.splits), last_digit(end, p.of.splits);
  Block I{block, a, index};
  Tile<T> t(p);
  T inverse_tau = p.inverse_tau(), largest = lowest<T>, sum = 0;
  int r = threadIdx.x / per_row;
  bool valid = r < count(p, I), paired = p.exists(a, c) && c != a, one = valid && threadIdx.x % per_row == 0;
  uint32_t i = valid ? begin(p, I) + r : UINT32_MAX;
  int64_t at = p.at(I.g, a, c, i);
  if (!p.exists(a, c)) b = end;
  BlockRows<T> rows(p, I);
  TCLR_ROLLED
  for (bool again = false; b < end; ++b, again = true) {
    Block J{I.g, c, b};
    products(p, rows, BlockRows<T>(p, J), t, again, [] {});
    uint32_t first = begin(p, J);
    int columns = count(p, J);
    T s[tile / per_row], top = largest;
    each_entry([&](int r, int j, int k) {
      s[k] = t.product(r, j) * inverse_tau;
      if (paired && j < columns && first + j == i) p.pos[at] = s[k];
      if (j < columns && first + j != i && s[k] > top) top = s[k];
    });
    T offset = top < INFINITY ? top : 0;
    sum *= exponential(largest - offset), largest = top;
    each_entry([&](int, int j, int k) {
      if (j < columns && first + j != i) sum += exponential(s[k] - offset);
    });
  }
  T top = over_row(largest, per_row, [](T x, T y) { return y > x ? y : x; }), offset = top < INFINITY ? top : 0;
  T all = sum_over_row(T(sum * exponential(largest - offset)), per_row);
  if (one) p.neg[split * p.V * p.rows() + at] = offset + logarithm(all);
  if (one && !paired && split == 0) p.pos[at] = 0;
}

// ---- coefficients

TCLR_DEVICE double log_add(double x, double y) {
  double high = x > y ? x : y, low = x > y ? y : x;
  return low == -INFINITY ? high : high + log1p(exp(low - high));
}

template <typename T>
TCLR_DEVICE T softplus(T t) {
  return (t > 0 ? t : 0) + log1p(exp(t > 0 ? -t : t));
}

TCLR_DEVICE double sigmoid(double t) {
  double e = exp(t > 0 ? -t : t), r = 1 / (1 + e);
  return t > 0 ? r : e * r;
}

// A row, and this thread's lane among those that share it.
template <typename T>
struct Finisher {
  const Gram<T>& p;
  Place r;
  bool valid;
  int lane, lanes;

  TCLR_METHOD Finisher(const Gram<T>& p, int64_t block) : p(p) {
    lanes = p.lanes(), lane = threadIdx.x % lanes;
    int64_t row = (block * threads + threadIdx.x) / lanes;
    valid = row < p.rows();
    r = p.place(row);
  }
  TCLR_METHOD int64_t at(int64_t c) const { return p.at(r.g, r.a, c, r.i); }
  // Calls f for the sets of this lane.
  template <typename F>
  TCLR_METHOD void each(F f) const {
    for (int64_t c = lane; c < p.V && valid; c += lanes) f(c);
  }
  TCLR_METHOD bool paired(int64_t c) const { return c != r.a && p.exists(r.a, c); }
  TCLR_METHOD double negatives(int64_t c) const {
    return p.cross ? p.neg[at(c)] : log_add(p.neg[at(r.a)], p.neg[at(c)]);
  }
};

// Writes this thread's terms, and returns their sum.
template <typename T>
TCLR_DEVICE double terms(const Finisher<T>& f) {
  double sum = 0;
  f.each([&](int64_t c) {
    double pos = f.p.pos[f.at(c)], term = 0;
    if (f.paired(c)) term = f.p.N > 1 ? softplus(f.negatives(c) - pos) : pos - pos;
    if (f.p.term) f.p.term[f.at(c)] = T(term);
    sum += term;
  });
  return sum;
}

// The upstream gradients of a problem. If `term` is null, `all` is that of every term.
template <typename T>
struct Upstream {
  const T *term, *neg, *pos;
  double all;
};

// Computes the gradients of neg and pos, including those that come from the terms.
template <typename T>
TCLR_DEVICE void coefficients(const Finisher<T>& f, const Upstream<T>& up) {
  const Gram<T>& p = f.p;
  auto given = [](const T* x, int64_t at) { return x ? double(x[at]) : 0; };
  double g_own = 0;
  f.each([&](int64_t c) {
    int64_t at = f.at(c);
    double g_neg = p.exists(f.r.a, c) ? given(up.neg, at) : 0, g_pos = f.paired(c) ? given(up.pos, at) : 0;
    double g_term = up.term ? up.term[at] : up.all;
    if (g_term != 0 && p.N > 1 && f.paired(c)) {
      double negatives = f.negatives(c), g = g_term * sigmoid(negatives - p.pos[at]);
      if (g != 0) g_neg += g * exp(p.neg[at] - negatives);
      if (g != 0 && !p.cross) g_own += g * exp(p.neg[f.at(f.r.a)] - negatives);
      g_pos -= g;
    }
    p.g_neg[at] = g_neg, p.g_pos[at] = g_pos;
  });
  g_own = sum_over_row(g_own, f.lanes);
  if (f.valid && f.lane == f.r.a % f.lanes) p.g_neg[f.at(f.r.a)] += g_own;
}

// Updates the largest coefficient of group g, called by all lanes of a warp. A maximum does not depend on the order of
// updates, and positive doubles have the same order as their bits. Updates of one number wait for each other, so a warp
// whose lanes all have the same group makes only one.
template <typename T>
TCLR_DEVICE void note_largest(const Gram<T>& p, int64_t g, bool valid, double top) {
  auto bits = bits_as<unsigned long long>(valid ? top : 0.0);
  int64_t least = over_row(valid ? g : p.G, 32, [](int64_t x, int64_t y) { return x < y ? x : y; });
  int64_t most = largest_over_row(valid ? g : 0, 32);
  if (least == most) {
    bits = largest_over_row(bits, 32);
    valid = valid && threadIdx.x % 32 == 0;
  }
  if (valid && bits > p.largest[g]) atomicMax(&p.largest[g], bits);
}

template <typename T>
TCLR_DEVICE void note_largest(const Finisher<T>& f) {
  double top = 0;
  f.each([&](int64_t c) {
    for (double x : {f.p.g_neg[f.at(c)], f.p.g_pos[f.at(c)]})
      if (fabs(x) > top && fabs(x) < INFINITY) top = fabs(x);
  });
  note_largest(f.p, f.r.g, f.valid, top);
}

// The unit of a group's gradient: a power of two near its largest coefficient, since the coefficients of very confident
// pairs are below float's range.
template <typename T>
TCLR_DEVICE double unit(const Gram<T>& p, int64_t g) {
  double top = bits_as<double>(p.largest[g]);
  return (top > 1e-300 && top < 1e300 ? ldexp(1.0, ilogb(top)) : 1) / p.boost;
}

// ---- gradient

// Calls f(slot, r, valid, anchor, set) for all anchors that a tile's weights depend on. These are the rows with the set
// of the columns (slot 0), and the columns with the set of the rows (slot 1). In a group that is one tile, they are all
// rows with every set, whose number is the slot. `lanes` lanes of a warp call f for the same anchor. If not valid,
// there is no such row, and f gets another one in its place.
template <int lanes, typename T, typename F>
TCLR_DEVICE void each_anchor(const Gram<T>& p, const Block& I, const Block& J, F f) {
  uint32_t slots = p.of.whole ? p.of.V.n : 2, all = (slots * p.of.size * lanes + 31) / 32 * 32;
  TCLR_ROLLED
  for (uint32_t k = threadIdx.x; k < all; k += tile_threads) {
    uint32_t slot = k / lanes, row = last_digit(slot, p.of.size);
    bool there = slot < slots;
    if (!there) slot = 0;
    int r = int(row);
    bool of_rows = slot == 0 || p.of.whole;
    Block b{I.g, of_rows ? I.a : J.a, of_rows ? I.index : J.index};
    bool valid = there && r < count(p, b);
    uint32_t of_block = valid ? r : 0, a = of_block, i = last_digit(a, p.of.N);
    Place x = p.of.whole ? Place{b.g, a, i} : Place{b.g, b.a, begin(p, b) + of_block};
    f(int(slot), r, valid, x, p.of.whole ? slot : of_rows ? J.a : I.a);
  }
}

// The coefficients of a tile's anchors, read from g_neg and g_pos, and divided by the unit of their group.
template <typename T>
struct StoredCoefficients {
  static constexpr int numbers = 3;  // for each anchor: neg and the two coefficients
  const Gram<T>& p;
  T* table;
  double inverse_unit;

  TCLR_METHOD StoredCoefficients(const Gram<T>& p, int64_t g)
      : p(p), table(Tile<T>(p.ldz).end()), inverse_unit(1 / unit(p, g)) {}
  TCLR_METHOD const T* of(int slot, int r) const { return table + (slot * tile + r) * numbers; }
  TCLR_METHOD void read(const Block& I, const Block& J) {
    each_anchor<1>(p, I, J, [&](int slot, int r, bool valid, const Place& x, int64_t c) {
      if (!valid) return;
      T* to = table + (slot * tile + r) * numbers;
      int64_t at = p.at(x.g, x.a, c, x.i);
      to[0] = p.neg[at], to[1] = T(p.g_neg[at] * inverse_unit), to[2] = T(p.g_pos[at] * inverse_unit);
    });
  }
  // The weight of an entry of S as a negative of this anchor.
  TCLR_METHOD T negative(int slot, int r, T s) const {
    const T* x = of(slot, r);
    return x[1] == 0 ? 0 : x[1] * exp(s - x[0]);  // neg may be -inf here
  }
  TCLR_METHOD T positive(int slot, int r) const { return of(slot, r)[2]; }
  // The factor by which to multiply the gradient so far, if new coefficients change its unit; see objective.cuh.
  TCLR_METHOD T rescale() { return 1; }
  // Called with the weight and the product of each entry of a tile.
  TCLR_METHOD void add_weight(T, T) {}
};

// Replaces the products of two blocks by W + W^T. whole: the group is one tile.
template <bool whole, typename T, typename Anchors>
TCLR_DEVICE void weights(const Gram<T>& p, const Block& I, const Block& J, const Tile<T>& t, Anchors& anchors) {
  int rows = count(p, I), columns = count(p, J);
  T inverse_tau = p.inverse_tau();
  uint32_t a = threadIdx.x / per_row, i = whole ? last_digit(a, p.of.N) : begin(p, I) + a, first = begin(p, J);
  bool same_set = I.a == J.a;
  each_entry([&](int r, int j, int) {
    T product = t.product(r, j), w = 0;
    uint32_t c = j, of_column = whole ? last_digit(c, p.of.N) : first + j;
    int slot = whole ? c : 0, back = whole ? a : 1;
    if (r < rows && j < columns) {
      if (i != of_column)
        w = anchors.negative(slot, r, product * inverse_tau) + anchors.negative(back, j, product * inverse_tau);
      else if (whole ? a != c : !same_set)
        w = anchors.positive(slot, r) + anchors.positive(back, j);
      anchors.add_weight(w, product);
    }
    t.S[r * lds + j] = w;
  });
}

// A thread's part of one panel of a gradient: every eighth row, and four features of every 128.
template <typename T, int groups = panel<T> / 128>
struct PanelSum {
  int row = threadIdx.x % 32 / 8 + threadIdx.x / 128 * 4;
  int feature = threadIdx.x % 128 / 32 * 32 + threadIdx.x % 8 * 4, width;
  T sum[groups][4][4] = {};

  TCLR_METHOD explicit PanelSum(int width) : width(width) {}
  TCLR_METHOD void scale(T by) {
    for (auto& group : sum)
      for (auto& of_row : group)
        for (T& x : of_row) x *= by;
  }
  template <int eights>
  TCLR_METHOD void add(const Tile<T>& t, int columns) {
#pragma unroll
    for (int q = 0; q < groups; ++q) {  // unrolled, so that the sums stay in registers
      if (q * 128 + feature >= width) continue;
      TCLR_ROLLED
      for (int k = 0; k < columns; k += 4) {
        Quad<T> z[4];
        for (int e = 0; e < 4; ++e) z[e] = quad(t.columns + (k + e) * t.ldp + q * 128 + feature);
        for (int r = 0; r < eights; ++r) {
          Quad<T> w = quad(t.S + (row + 8 * r) * lds + k);
          for (int e = 0; e < 4; ++e)
            for (int x = 0; x < 4; ++x) sum[q][r][x] += w.x[e] * z[e].x[x];
        }
      }
    }
  }
  // Adds W z, where W has replaced S, and z is the panel of the columns.
  TCLR_METHOD void add(const Tile<T>& t, int64_t rows, int64_t columns) {
    switch (eights(rows)) {
      case 2:
        return add<2>(t, int(columns));
      case 3:
        return add<3>(t, int(columns));
      default:
        return add<4>(t, int(columns));
    }
  }
  TCLR_METHOD void write(int64_t rows, int64_t ldz, T* dz) const {
    for (int q = 0; q < groups; ++q)
      for (int r = 0; r < 4; ++r)
        if (row + 8 * r < rows && q * 128 + feature < width)
          *reinterpret_cast<Quad<T>*>(dz + (row + 8 * r) * ldz + q * 128 +
                                      feature) = {{sum[q][r][0], sum[q][r][1], sum[q][r][2], sum[q][r][3]}};
  }
};

// The work of a thread block in the gradient: one panel of features of one block of rows, summed over one part of the
// tiles of columns.
template <typename T>
struct Work {
  Block I;
  uint32_t first;      // the first feature
  uint32_t number;     // of this part of this block of rows
  uint32_t tile, end;  // the range of tiles of columns
  uint32_t row;        // the first row in dz; 32 bits suffice, since many parts are used for few rows only

  TCLR_METHOD Work(const Gram<T>& p, uint32_t block) {
    const Sizes& of = p.of;
    first = last_digit(block, of.panels) * panel<T>, number = block;
    uint32_t part = last_digit(block, of.parts), index = last_digit(block, of.blocks), a = last_digit(block, of.sets);
    I = {block, a, index};
    uint32_t tiles = of.sets * of.blocks;
    tile = part, end = part + 1;
    if (tiles != of.parts) {
      tile *= tiles, end *= tiles;
      last_digit(tile, of.parts), last_digit(end, of.parts);
    }
    row = uint32_t(part * p.rows() + p.row({block, a, begin(p, I)}));
  }
};

// Computes the gradient of unit rows, divided by the anchors' unit / tau.
template <int groups, typename T, typename Anchors>
TCLR_DEVICE void gradient(const Gram<T>& p, const Work<T>& work, Anchors& anchors) {
  const Block& I = work.I;
  Tile<T> t(p);
  PanelSum<T, groups> dz(Tile<T>::width(p.ldz - work.first));
  BlockRows<T> rows(p, I);
  bool again = p.of.whole;
  TCLR_ROLLED
  for (uint32_t k = work.tile; k < work.end; ++k) {
    uint32_t b = k, index = last_digit(b, p.of.blocks);
    Block J{I.g, b, index};
    if (!p.of.whole && !p.exists(I.a, J.a)) continue;
    BlockRows<T> columns(p, J);
    products(p, rows, columns, t, again, [&] { anchors.read(I, J); });
    if (T by = anchors.rescale(); by != 1) dz.scale(by);
    if (p.of.whole)
      weights<true>(p, I, J, t, anchors);
    else
      weights<false>(p, I, J, t, anchors);
    __syncthreads();
    if (p.panels() > 1) {
      load(columns, work.first, dz.width, t.columns, t.ldp);
      wait_for_copies();
      __syncthreads();
    }
    dz.add(t, rows.rows, columns.rows);
    __syncthreads();
    again = true;
  }
  dz.write(rows.rows, p.ldz, p.dz + int64_t(work.row) * p.ldz + work.first);
}

// ---- rows again

// The gradient of a unit row, which is the sum of its parts.
template <typename T>
struct SumOfParts {
  const Gram<T>& p;
  int64_t row;
  double unit;

  TCLR_METHOD double at(int64_t d) const {
    double sum = 0;
    for (int64_t part = 0; part < p.parts; ++part) sum += p.dz[(part * p.rows() + row) * p.ldz + d];
    return sum * unit;
  }
};

template <typename T>
TCLR_DEVICE SumOfParts<T> sum_of_parts(const Gram<T>& p, const Place& r) {
  return {p, p.row(r), unit(p, r.g)};
}

// Writes factor times the gradient of one row, by a warp, and returns <z, dz>. D is 0 if there is no row. The first
// features are kept in registers between the two passes.
template <typename T>
TCLR_DEVICE double write_row(const Source& x, int64_t D, const SumOfParts<T>& from, double factor, void* to,
                             int64_t first) {
  constexpr int held = 8;
  bool normalize = from.p.normalize;
  Norm<T> norm = normalize && D != 0 ? from.p.norms[from.row] : Norm<T>{1, 1};
  double dz[held] = {}, z[held] = {}, along = 0, scale = factor / norm.rest;
  auto z_at = [&](int64_t d) { return double(unit_value(value_at<T>(x, d), norm)); };
  auto put = [&](int64_t d, double dz, double z) {
    double value = normalize ? dz - z * along : dz;
    put_value(to, x.dtype, first + d, norm.rest == 0 ? 0 : value * scale / norm.scale);
  };
  int64_t lane = threadIdx.x % 32;
  for (int k = 0; k < held; ++k)
    if (lane + 32 * k < D) dz[k] = from.at(lane + 32 * k), z[k] = z_at(lane + 32 * k), along += z[k] * dz[k];
  for (int64_t d = lane + 32 * held; d < D; d += 32) along += z_at(d) * from.at(d);
  along = sum_over_row(along, 32);
  for (int k = 0; k < held; ++k)
    if (lane + 32 * k < D) put(lane + 32 * k, dz[k], z[k]);
  for (int64_t d = lane + 32 * held; d < D; d += 32) put(d, from.at(d), z_at(d));
  return norm.rest == 0 ? 0 : along;
}

}  // namespace
}  // namespace tclr
