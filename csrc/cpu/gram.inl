// The operation and its gradient, tiled; compiled once per instruction-set level (no ATen, no STL in here: the linker may
// keep any level's copy of an inline function).
//
//   S[(a,i),(c,j)] = <z_(a,i), z_(c,j)> / tau
//   neg[a,c,i]     = log sum_{j != i} exp S           pos[a,c,i] = S[(a,i),(c,i)]
//   term[a,c,i]    = log(1 + (exp neg[a,a,i] + exp neg[a,c,i]) / exp pos[a,c,i])
//   W[(a,i),(c,j)] = [j != i] g_neg[a,c,i] exp(S - neg[a,c,i]) + [j = i] g_pos[a,c,i]
//   dz_(a,i)       = 1/tau sum_(c,j) (W + W^T)[(a,i),(c,j)] z_(c,j)
//
// Each tile of S is computed once: its exponentials serve its rows and its columns, forward and backward. The order of
// the tiles is `Problem`'s tournament, so the result does not depend on the number of threads.
#include <math.h>
#include <string.h>

#include <utility>  // integer_sequence: types only

#include "../problem.h"
#include "gram.h"

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
#endif

#define INLINE static inline __attribute__((always_inline))

namespace tclr {
namespace {

// ---------------------------------------------------------------------------------------------- vectors

template <typename T>
struct Lane;

template <>
struct Lane<float> {
  typedef float vec __attribute__((vector_size(TCLR_VECTOR_BYTES)));
  typedef uint32_t ivec __attribute__((vector_size(TCLR_VECTOR_BYTES)));
  static constexpr int mantissa = 23;
  static constexpr float smallest = -126;          // of exp2: below, 0
  static constexpr float round = 12582912;         // 1.5 * 2^23: adding it rounds to an integer
  static constexpr double largest_inverse_tau = 40;  // up to here no exp(+-1/tau) of unit rows leaves the range
  // 2^f on [-1/2, 1/2], minimax, relative error 1.9e-9
  static constexpr float exp2[] = {1.0000000005541732f, 0.69314720573748053f, 0.24022646890602097f, 0.05550328776484039f,
                                   0.009618488958971071f, 0.001339993142907839f, 0.00015345811947492753f};
};

template <>
struct Lane<double> {
  typedef double vec __attribute__((vector_size(TCLR_VECTOR_BYTES)));
  typedef uint64_t ivec __attribute__((vector_size(TCLR_VECTOR_BYTES)));
  static constexpr int mantissa = 52;
  static constexpr double smallest = -1022;
  static constexpr double round = 6755399441055744;  // 1.5 * 2^52
  static constexpr double largest_inverse_tau = 300;
  // relative error 3.1e-18
  static constexpr double exp2[] = {0.9999999999999999971,   0.6931471805599453305,    0.2402265069591015621,
                                    0.05550410866481992157,  0.009618129107588334636,  0.001333355814678992723,
                                    0.0001540353046251521913, 0.00001525273348998493701, 1.321543308926845884e-6,
                                    1.017819802252533595e-7, 7.07410568648162007e-9,   4.435282667892443532e-10};
};

template <typename T>
using Vec = typename Lane<T>::vec;

template <typename T>
constexpr int lanes = TCLR_VECTOR_BYTES / sizeof(T);

template <typename T>
INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <typename T>
INLINE void store(T* p, Vec<T> v) {
  memcpy(p, &v, sizeof v);
}

template <typename T>
INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // x - 0: exact for every x, -0 and NaN included
}

template <typename T>
INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <typename T>
INLINE double sum(Vec<T> v) {
  double s = 0;
  for (int l = 0; l < lanes<T>; ++l) s += v[l];
  return s;
}

template <typename T>
INLINE T maximum(Vec<T> v) {
  T m = v[0];
  for (int l = 1; l < lanes<T>; ++l) m = v[l] > m ? v[l] : m;
  return m;
}

// 2^x for x < 128 (1,024 for double); 0 where the result would be subnormal, so also for -inf; NaN for NaN.
template <typename T>
INLINE Vec<T> exp2(Vec<T> x) {
  using L = Lane<T>;
  constexpr int degree = sizeof(L::exp2) / sizeof(T) - 1;
  Vec<T> shifted = x + L::round;
  Vec<T> f = x - (shifted - L::round);
  Vec<T> p = splat<T>(L::exp2[degree]);
  for (int d = degree; d-- > 0;) p = p * f + L::exp2[d];
  typename L::ivec bits = (typename L::ivec)p + ((typename L::ivec)shifted << L::mantissa);
  return x < L::smallest ? Vec<T>{} : (Vec<T>)bits;
}

constexpr double log2e = 1.4426950408889634;

// ---------------------------------------------------------------------------------------------- small products

constexpr int MR = TCLR_TILE_ROWS;  // rows of C held in registers
constexpr int strip = 24;           // rows of a tile scored at once: they stay in the first cache, as does their S
static_assert(strip % MR == 0);
template <typename T>
constexpr int NR = 2 * lanes<T>;  // columns of C held in registers

// C[r, n] (+)= sum_k A[r, k] B[k, n] for r < R, n < NR; A's strides are rs, cs, B is packed [K, NR].
template <typename T, int R, bool add>
void product(int64_t K, const T* A, int64_t rs, int64_t cs, const T* B, T* C, int64_t ldc) {
  constexpr int L = lanes<T>;
  Vec<T> c[R][2] = {};
  for (int64_t k = 0; k < K; ++k, A += cs, B += 2 * L) {
    Vec<T> b0 = load(B), b1 = load(B + L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vec<T> a = splat(A[r * rs]);
      c[r][0] += a * b0;
      c[r][1] += a * b1;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    T* out = C + r * ldc;
    store(out, add ? load(out) + c[r][0] : c[r][0]);
    store(out + L, add ? load(out + L) + c[r][1] : c[r][1]);
  }
}

template <typename T, bool add>
using Product = void (*)(int64_t, const T*, int64_t, int64_t, const T*, T*, int64_t);

template <typename T, bool add>
constexpr Product<T, add> products[] = {
    nullptr,
    product<T, 1, add>,
    product<T, 2, add>,
    product<T, 3, add>,
    product<T, 4, add>,
    product<T, 5, add>,
    product<T, 6, add>,
#if TCLR_TILE_ROWS == 12
    product<T, 7, add>,
    product<T, 8, add>,
    product<T, 9, add>,
    product<T, 10, add>,
    product<T, 11, add>,
    product<T, 12, add>,
#endif
};

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
INLINE int64_t padded(int64_t n) {
  return (n + NR<T> - 1) / NR<T> * NR<T>;
}

// One step of a transpose: the off-diagonal s x s squares of two registers change places.
template <typename T, int s, int... l>
INLINE void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, l...>) {
  constexpr int n = lanes<T>;
  Vec<T> low = __builtin_shufflevector(a, b, (l & s ? n + l - s : l)...);
  b = __builtin_shufflevector(a, b, (l & s ? n + l : l + s)...);
  a = low;
}

template <typename T, int s = 1>
INLINE void transpose(Vec<T>* v) {
  if constexpr (s < lanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; ++i)
      if ((i & s) == 0) exchange<T, s>(v[i], v[i + s], std::make_integer_sequence<int, lanes<T>>());
    transpose<T, 2 * s>(v);
  }
}

// [n, D] rows to panels [n / NR, D, NR] of columns, the missing rows of the last one zero; ldz >= D is padded to NR.
template <typename T>
void pack_transposed(const T* z, int64_t ldz, int64_t n, int64_t D, T* panels) {
  constexpr int L = lanes<T>;
  for (int64_t j = 0; j < n; j += L) {
    T* panel = panels + j / (2 * L) * D * 2 * L + j % (2 * L);
    for (int64_t d = 0; d < D; d += L) {
      Vec<T> v[L];
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) v[l] = j + l < n ? load(z + (j + l) * ldz + d) : Vec<T>{};
      transpose<T>(v);
      for (int l = 0; l < smaller(L, D - d); ++l) store(panel + (d + l) * 2 * L, v[l]);
    }
  }
  if ((n - 1) % (2 * L) < L)  // the second half of the last panel
    for (int64_t d = 0; d < D; ++d) store(panels + n / (2 * L) * D * 2 * L + d * 2 * L + L, Vec<T>{});
}

// [n, ldz] rows to panels [ldz / NR, n, NR].
template <typename T>
void pack_rows(const T* z, int64_t ldz, int64_t n, T* panels) {
  constexpr int W = NR<T>;
  for (int64_t d = 0; d < ldz; d += W)
    for (int64_t j = 0; j < n; ++j, panels += W) memcpy(panels, z + j * ldz + d, W * sizeof(T));
}

// dz[r, :] += sum_k A[r, k] z[k, :] for r < rows, z as `pack_rows` leaves it.
template <typename T>
void accumulate(int64_t rows, int64_t K, const T* A, int64_t rs, int64_t cs, const T* panels, T* dz, int64_t ldz) {
  for (int64_t d = 0; d < ldz; d += NR<T>, panels += K * NR<T>)
    for (int64_t r = 0; r < rows; r += MR)
      products<T, true>[smaller(MR, rows - r)](K, A + r * rs, rs, cs, panels, dz + r * ldz + d, ldz);
}

// ---------------------------------------------------------------------------------------------- rows in and out

INLINE float from_bf16(uint16_t h) {
  uint32_t bits = uint32_t(h) << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

INLINE float from_f16(uint16_t h) {
  uint32_t exponent = h >> 10 & 31, mantissa = h & 1023, sign = uint32_t(h & 0x8000) << 16;
  uint32_t bits = exponent == 31 ? 0x7f800000 | mantissa << 13 : (exponent + 112) << 23 | mantissa << 13;
  float x;
  memcpy(&x, &bits, sizeof x);
  if (exponent == 0) x = mantissa * 0x1p-24f;
  return sign ? -x : x;
}

// Row i of a set, converted to T. A NaN becomes the canonical one: exp2 passes no other.
template <typename T>
void read_row(const Rows& rows, Dtype dtype, int64_t g, int64_t i, int64_t D, T* out) {
  int64_t first = g * rows.stride_g + i * rows.stride_n, step = rows.stride_d;
  if (dtype == Dtype::f64) {
    const double* x = (const double*)rows.data + first;
    for (int64_t d = 0; d < D; ++d) out[d] = T(x[d * step]);
  } else if (dtype == Dtype::f32) {
    const float* x = (const float*)rows.data + first;
    for (int64_t d = 0; d < D; ++d) out[d] = x[d * step];
  } else {
    const uint16_t* x = (const uint16_t*)rows.data + first;
    if (dtype == Dtype::bf16)
      for (int64_t d = 0; d < D; ++d) out[d] = from_bf16(x[d * step]);
    else
      for (int64_t d = 0; d < D; ++d) out[d] = from_f16(x[d * step]);
  }
  for (int64_t d = 0; d < D; ++d) out[d] = out[d] == out[d] ? out[d] : T(NAN);
}

// The norm as the product of two factors: a row of 1e308 has a norm that double does not hold. Both 0 for a zero row.
struct Norm {
  double largest, rest;
};

template <typename T>
Norm norm(const T* x, int64_t D) {
  double largest = 1, total = 0;
  if (sizeof(T) == sizeof(double)) {  // squares of floats always fit a double
    largest = 0;
    for (int64_t d = 0; d < D; ++d) {
      double size = fabs(double(x[d]));
      largest = size > largest || size != size ? size : largest;
    }
    if (largest == 0) return {0, 0};
  }
  for (int64_t d = 0; d < D; ++d) total += (x[d] / largest) * (x[d] / largest);
  return total == 0 ? Norm{0, 0} : Norm{largest, sqrt(total)};
}

// The rows of one block, normalised if asked for: z, padded with zeros to ldz, and their norms.
template <typename T>
void read_block(const GramInput& in, const Problem& p, int64_t g, int64_t b, int64_t ldz, T* z, Norm* norms) {
  for (int64_t r = 0; r < p.rows(b); ++r) {
    T* row = z + r * ldz;
    read_row(in.sets[p.set(b)], in.dtype, g, p.begin(b) + r, in.D, row);
    for (int64_t d = in.D; d < ldz; ++d) row[d] = 0;
    if (!in.normalize) continue;
    Norm n = norms[r] = norm(row, in.D);
    if (n.rest == 0) continue;
    bool finite = n.largest * 0 == 0 && n.rest * 0 == 0;
    if (sizeof(T) == sizeof(double))
      for (int64_t d = 0; d < in.D; ++d) row[d] = finite ? T(row[d] / n.largest / n.rest) : T(NAN);
    else
      for (int64_t d = 0; d < in.D; ++d) row[d] = finite ? T(row[d] * (1 / n.rest)) : T(NAN);
  }
}

// The gradient of one block's rows, from that of its unit rows: dx = (dz - z <z, dz>) / |x|; and <z, dz>.
template <typename T>
void write_block(const GramInput& in, const GramBackward<T>& out, const Problem& p, int64_t g, int64_t b, int64_t ldz,
                 const T* z, const T* dz, const Norm* norms) {
  int64_t a = p.set(b);
  for (int64_t r = 0; r < p.rows(b); ++r) {
    const T *row = z + r * ldz, *grad = dz + r * ldz;
    int64_t i = p.begin(b) + r;
    T* dx = out.dz[a] + (g * in.N + i) * in.D;
    double along = 0;
    for (int64_t d = 0; d < in.D; ++d) along += double(row[d]) * double(grad[d]);
    out.zdz[(g * in.V + a) * in.N + i] = T(along / in.tau);
    if (!in.normalize)
      for (int64_t d = 0; d < in.D; ++d) dx[d] = T(double(grad[d]) / in.tau);
    else if (norms[r].rest == 0)
      for (int64_t d = 0; d < in.D; ++d) dx[d] = 0;
    else
      for (int64_t d = 0; d < in.D; ++d)
        dx[d] = T((double(grad[d]) - double(row[d]) * along) / in.tau / norms[r].rest / norms[r].largest);
  }
}

// ---------------------------------------------------------------------------------------------- workspace

constexpr int64_t largest_block(size_t size) { return size == sizeof(float) ? 192 : 96; }

template <typename T>
Problem problem(const GramInput& in) {
  return Problem(in.V, in.N, in.cross, largest_block(sizeof(T)), NR<T>);
}

// One group's memory. Sums are double: thousands of tiles are added to them.
template <typename T>
struct Group {
  T *z, *dz;         // [V, N, ldz]
  Norm* norms;       // [V, N]
  double* sum;       // [V, V, N] of exp(S - largest), forward
  T* largest;        // [V, V, N] 0 where the sum needs no offset
  T *scale, *shift;  // [V, V, N] W = scale * exp(S - shift), backward
  T* g_pos;          // [V, V, N]

  static int64_t size(const GramInput& in, int64_t ldz, bool backward) {
    int64_t rows = in.V * in.N, blocks = in.V * rows, doubles = sizeof(double) / sizeof(T);
    return rows * ldz * (backward ? 2 : 1) + 2 * doubles * rows + (backward ? 3 * blocks : (doubles + 1) * blocks);
  }
  Group(const GramInput& in, int64_t ldz, bool backward, T* memory) {
    int64_t rows = in.V * in.N, blocks = in.V * rows;
    norms = (Norm*)memory;  // first, for its alignment
    sum = (double*)(norms + rows);
    memory = backward ? (T*)sum : (T*)(sum + blocks);
    largest = memory;
    scale = memory, shift = scale + blocks, g_pos = shift + blocks;
    z = backward ? g_pos + blocks : largest + blocks;
    dz = z + rows * ldz;
  }
};

// One thread's memory.
template <typename T>
struct Tile {
  int64_t lds;
  T *columns, *S, *rows_i, *rows_j, *column_sum, *column_max, *scale, *shift;

  static int64_t size(const Problem& p, int64_t ldz, bool backward) {
    return ldz * p.block * (backward ? 3 : 1) + p.block * (p.block + NR<T>) + 4 * p.block;
  }
  Tile(const Problem& p, int64_t ldz, T* memory) {
    lds = p.block + NR<T>;  // an odd number of cache lines, so that a column's lines do not share a set
    columns = memory;
    S = columns + ldz * p.block;
    column_sum = S + p.block * lds;
    column_max = column_sum + p.block;
    scale = column_max + p.block;
    shift = scale + p.block;
    rows_i = shift + p.block;
    rows_j = rows_i + ldz * p.block;
  }
};

// ---------------------------------------------------------------------------------------------- one tile

// What the tiles of one group share.
template <typename T>
struct Work {
  const GramInput& in;
  const Problem& p;
  int64_t g, ldz;
  Group<T> group;
  T* tiles;
  int64_t tile_size;
  bool bounded;  // |S| <= 1/tau is known to be small: no maximum is needed
  T inverse_tau;
  GramForward<T> out;
  const GramBackward<T>* gradient;

  T* block(T* rows, int64_t b) const { return rows + (p.set(b) * p.N + p.begin(b)) * ldz; }
  int64_t row(int64_t b) const { return p.set(b) * p.N + p.begin(b); }
};

// Rows r .. r + strip of the tile's similarities, with -inf for what no sum holds: j = i and the missing columns.
// pos, where given, receives the diagonal.
template <typename T>
void scores(const Work<T>& w, Pair pair, const Tile<T>& tile, int64_t r, T* S, T* pos, T* mirrored) {
  const Problem& p = w.p;
  int64_t rows = smaller(strip, p.rows(pair.left) - r), columns = p.rows(pair.right);
  const T* z = w.block(w.group.z, pair.left) + r * w.ldz;
  for (int64_t j = 0; j < columns; j += NR<T>)
    for (int64_t q = 0; q < rows; q += MR)
      products<T, false>[smaller(MR, rows - q)](w.in.D, z + q * w.ldz, w.ldz, 1, tile.columns + j * w.in.D,
                                                S + q * tile.lds + j, tile.lds);
  bool diagonal = p.begin(pair.left) == p.begin(pair.right);
  for (int64_t q = 0; q < rows; ++q) {
    T* s = S + q * tile.lds;
    if (!w.bounded)
      for (int64_t j = 0; j < columns; ++j) s[j] *= w.inverse_tau;
    if (diagonal) {
      if (pos) pos[r + q] = mirrored[r + q] = w.bounded ? s[r + q] * w.inverse_tau : s[r + q];
      s[r + q] = -INFINITY;
    }
    for (int64_t j = columns; j < padded<T>(columns); ++j) s[j] = -INFINITY;
  }
}

// (largest, sum) += (m, s), both meaning sum * exp(largest).
template <typename T>
INLINE void merge(T& largest, double& sum, T m, double s) {
  if (m > largest) {
    sum = sum * exp(double(largest) - double(m)) + s;
    largest = m;
  } else if (s != 0) {
    sum += m == largest ? s : s * exp(double(m) - double(largest));
  }
}

template <typename T>
INLINE Vec<T> finite(Vec<T> largest) {  // of nothing but -inf: any finite offset serves
  return largest == -INFINITY ? Vec<T>{} : largest;
}

// One row's share of its own sum and of the columns' sums; |S| is small.
template <typename T>
double exponentials_bounded(const T* s, int64_t n, T to_exponent, T* column_sum) {
  Vec<T> row = {};
  for (int64_t j = 0; j < n; j += lanes<T>) {
    Vec<T> e = exp2<T>(load(s + j) * to_exponent);
    row += e;
    store(column_sum + j, load(column_sum + j) + e);
  }
  return sum<T>(row);
}

template <typename T>
void row_exponentials(const T* s, int64_t n, T& largest, double& total) {
  Vec<T> m = splat<T>(-INFINITY), row = {};
  for (int64_t j = 0; j < n; j += lanes<T>) m = larger<T>(load(s + j), m);
  T top = maximum<T>(m);
  Vec<T> offset = finite<T>(splat(top));
  for (int64_t j = 0; j < n; j += lanes<T>) row += exp2<T>((load(s + j) - offset) * T(log2e));
  merge(largest, total, top, sum<T>(row));
}

// A strip's rows into the columns' running (maximum, sum).
template <typename T>
void column_exponentials(const T* S, int64_t lds, int64_t rows, int64_t n, T* column_max, T* column_sum) {
  for (int64_t j = 0; j < n; j += lanes<T>) {
    Vec<T> before = load(column_max + j), m = before;
    for (int64_t q = 0; q < rows; ++q) m = larger<T>(load(S + q * lds + j), m);
    Vec<T> offset = finite<T>(m);
    Vec<T> total = load(column_sum + j) * exp2<T>((before - offset) * T(log2e));
    for (int64_t q = 0; q < rows; ++q) total += exp2<T>((load(S + q * lds + j) - offset) * T(log2e));
    store(column_max + j, m);
    store(column_sum + j, total);
  }
}

template <typename T>
void forward_tile(const Work<T>& w, Pair pair, const Tile<T>& tile) {
  const Problem& p = w.p;
  int64_t I = pair.left, J = pair.right, a = p.set(I), c = p.set(J);
  int64_t rows = p.rows(I), columns = p.rows(J), width = padded<T>(columns);
  int64_t to_rows = p.at(a, c, p.begin(I)), to_columns = p.at(c, a, p.begin(J));
  const Group<T>& group = w.group;
  bool pairs = a != c && p.begin(I) == p.begin(J);
  T* base = w.out.pos + w.g * p.V * p.V * p.N;
  T *pos = pairs ? base + to_rows : nullptr, *mirrored = base + to_columns;

  pack_transposed(w.block(group.z, J), w.ldz, columns, w.in.D, tile.columns);
  for (int64_t j = 0; j < width; ++j) tile.column_sum[j] = 0, tile.column_max[j] = -INFINITY;
  for (int64_t r = 0; r < rows; r += strip) {
    int64_t scored = smaller(strip, rows - r);
    scores(w, pair, tile, r, tile.S, pos, mirrored);
    for (int64_t q = 0; q < scored; ++q) {
      const T* s = tile.S + q * tile.lds;
      double& total = group.sum[to_rows + r + q];
      if (w.bounded)
        total += exponentials_bounded(s, width, T(w.inverse_tau * log2e), tile.column_sum);
      else
        row_exponentials(s, width, group.largest[to_rows + r + q], total);
    }
    if (!w.bounded && I != J) column_exponentials(tile.S, tile.lds, scored, width, tile.column_max, tile.column_sum);
  }
  if (I == J) return;  // its columns are its rows
  for (int64_t j = 0; j < columns; ++j)
    if (w.bounded)
      group.sum[to_columns + j] += tile.column_sum[j];
    else
      merge(group.largest[to_columns + j], group.sum[to_columns + j], tile.column_max[j], double(tile.column_sum[j]));
}

// S to W + W^T. `scale` and `shift` are those of the columns.
template <typename T>
void weights(T* s, int64_t n, bool bounded, T to_exponent, T row_scale, T row_shift, const T* scale, const T* shift) {
  for (int64_t j = 0; j < n; j += lanes<T>) {
    Vec<T> x = load(s + j), both;
    if (bounded) {
      both = exp2<T>(x * to_exponent) * (load(scale + j) + row_scale);
    } else {
      both = exp2<T>((x - row_shift) * T(log2e)) * row_scale;
      both += exp2<T>((x - load(shift + j)) * T(log2e)) * load(scale + j);
    }
    store(s + j, both);
  }
}

template <typename T>
void backward_tile(const Work<T>& w, Pair pair, const Tile<T>& tile) {
  const Problem& p = w.p;
  int64_t I = pair.left, J = pair.right, a = p.set(I), c = p.set(J);
  int64_t rows = p.rows(I), columns = p.rows(J), width = padded<T>(columns);
  int64_t of_rows = p.at(a, c, p.begin(I)), of_columns = p.at(c, a, p.begin(J));
  const Group<T>& group = w.group;
  bool pairs = a != c && p.begin(I) == p.begin(J);
  T *zi = w.block(group.z, I), *zj = w.block(group.z, J);

  pack_transposed(zj, w.ldz, columns, w.in.D, tile.columns);
  for (int64_t j = 0; j < width; ++j) {
    tile.scale[j] = j < columns ? group.scale[of_columns + j] : T(0);
    tile.shift[j] = j < columns ? group.shift[of_columns + j] : T(0);
  }
  for (int64_t r = 0; r < rows; r += strip) {
    scores(w, pair, tile, r, tile.S + r * tile.lds, (T*)nullptr, (T*)nullptr);
    for (int64_t q = r; q < smaller(rows, r + strip); ++q) {
      T* s = tile.S + q * tile.lds;
      weights(s, width, w.bounded, T(w.inverse_tau * log2e), group.scale[of_rows + q], group.shift[of_rows + q],
              tile.scale, tile.shift);
      if (pairs) s[q] = group.g_pos[of_rows + q] + group.g_pos[of_columns + q];
    }
  }
  pack_rows(zj, w.ldz, columns, tile.rows_j);
  accumulate(rows, columns, tile.S, tile.lds, 1, tile.rows_j, w.block(group.dz, I), w.ldz);
  if (I == J) return;
  pack_rows(zi, w.ldz, rows, tile.rows_i);
  accumulate(columns, rows, tile.S, 1, tile.lds, tile.rows_i, w.block(group.dz, J), w.ldz);
}

// ---------------------------------------------------------------------------------------------- before and after

// log(exp x + exp y), -inf where both are.
INLINE double log_add(double x, double y) {
  double high = x > y ? x : y, low = x > y ? y : x;
  return low == -INFINITY && low == low ? high : high + log1p(exp(low - high));
}

INLINE double softplus(double t) { return t > 0 ? t + log1p(exp(-t)) : log1p(exp(t)); }

// neg and term of rows [begin, begin + n) of set a, from their sums.
template <typename T>
void finish(const Work<T>& w, int64_t b) {
  const Problem& p = w.p;
  int64_t a = p.set(b), first = w.g * p.V * p.V * p.N;
  for (int64_t c = 0; c < p.V; ++c)
    for (int64_t i = p.begin(b); i < p.begin(b) + p.rows(b); ++i) {
      int64_t at = p.at(a, c, i), own = p.at(a, a, i);
      double neg = log(w.group.sum[at]) + double(w.group.largest[at]);
      bool paired = a != c && p.exists(a, c);
      T pos = paired ? w.out.pos[first + at] : T(0), term = pos - pos;
      if (paired && p.N > 1) {
        double negatives = p.cross ? neg : log_add(log(w.group.sum[own]) + double(w.group.largest[own]), neg);
        term = T(softplus(negatives - double(pos)));
      }
      w.out.pos[first + at] = pos;
      w.out.neg[first + at] = p.N > 1 && p.exists(a, c) ? T(neg) : T(-INFINITY);
      w.out.term[first + at] = term;
    }
}

// The gradients of neg and pos of a block's rows, as what `weights` multiplies with.
template <typename T>
void prepare(const Work<T>& w, int64_t b) {
  const Problem& p = w.p;
  const GramBackward<T>& in = *w.gradient;
  int64_t a = p.set(b), first = w.g * p.V * p.V * p.N;
  for (int64_t i = p.begin(b); i < p.begin(b) + p.rows(b); ++i) {
    int64_t own = p.at(a, a, i);
    double g_own = in.g_neg ? in.g_neg[first + own] : 0;
    for (int64_t c = p.V; c-- > 0;) {
      int64_t at = p.at(a, c, i);
      if (c == a) continue;
      double g_neg = in.g_neg ? in.g_neg[first + at] : 0, g_pos = in.g_pos ? in.g_pos[first + at] : 0;
      double neg = in.neg[first + at], g_term = in.g_term ? in.g_term[first + at] : 0;
      if (g_term != 0 && p.N > 1 && p.exists(a, c)) {
        double negatives = p.cross ? neg : log_add(in.neg[first + own], neg);
        double g = g_term / (1 + exp(double(in.pos[first + at]) - negatives));
        g_neg += g * exp(neg - negatives);
        g_own += p.cross ? 0 : g * exp(in.neg[first + own] - negatives);
        g_pos -= g;
      }
      w.group.g_pos[at] = T(g_pos);
      w.group.scale[at] = T(g_neg);
    }
    w.group.g_pos[own] = 0;
    w.group.scale[own] = T(g_own);
  }
  for (int64_t c = 0; c < p.V; ++c)
    for (int64_t i = p.begin(b); i < p.begin(b) + p.rows(b); ++i) {
      int64_t at = p.at(a, c, i);
      T &scale = w.group.scale[at], neg = in.neg[first + at];
      w.group.shift[at] = scale == 0 ? T(0) : neg;  // neg may be -inf there
      if (w.bounded && scale != 0) scale = T(double(scale) * exp(-double(neg)));
    }
}

template <typename T>
void read(const Work<T>& w, int64_t b) {
  read_block(w.in, w.p, w.g, b, w.ldz, w.block(w.group.z, b), w.group.norms + w.row(b));
}

// ---------------------------------------------------------------------------------------------- one group

template <typename T, bool backward>
void run_tile(const Work<T>& w, int64_t round, int64_t place, int64_t thread) {
  Pair pair = w.p.pair(round, place);
  if (pair.left < 0) return;
  Tile<T> tile(w.p, w.ldz, w.tiles + thread * w.tile_size);
  if (backward)
    backward_tile(w, pair, tile);
  else
    forward_tile(w, pair, tile);
}

template <typename T, bool backward>
struct Round {
  const Work<T>& w;
  int64_t round;
};

template <typename T, bool backward>
void run_rounds(const Work<T>& w, const Executor& executor) {
  for (int64_t round = 0; round < w.p.rounds(); ++round) {
    Round<T, backward> work{w, round};
    executor.run(
        w.p.places(round),
        [](void* argument, int64_t place, int64_t thread) {
          auto& r = *(Round<T, backward>*)argument;
          run_tile<T, backward>(r.w, r.round, place, thread);
        },
        &work);
  }
}

template <typename T>
void clear(T* p, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

template <typename T>
void run_forward(Work<T>& w, const Executor& executor) {
  int64_t blocks = w.p.V * w.p.blocks, sums = w.p.V * w.p.V * w.p.N;
  clear(w.group.sum, sums, 0.0);
  clear(w.group.largest, sums, w.bounded ? T(0) : T(-INFINITY));
  executor.run(blocks, [](void* work, int64_t b, int64_t) { read(*(Work<T>*)work, b); }, &w);
  run_rounds<T, false>(w, executor);
  executor.run(blocks, [](void* work, int64_t b, int64_t) { finish(*(Work<T>*)work, b); }, &w);
}

template <typename T>
void run_backward(Work<T>& w, const Executor& executor) {
  int64_t blocks = w.p.V * w.p.blocks;
  auto before = [](void* argument, int64_t b, int64_t) {
    auto& w = *(Work<T>*)argument;
    read(w, b);
    prepare(w, b);
    clear(w.block(w.group.dz, b), w.p.rows(b) * w.ldz, T(0));
  };
  auto after = [](void* argument, int64_t b, int64_t) {
    auto& w = *(Work<T>*)argument;
    write_block(w.in, *w.gradient, w.p, w.g, b, w.ldz, w.block(w.group.z, b), w.block(w.group.dz, b),
                w.group.norms + w.row(b));
  };
  executor.run(blocks, before, &w);
  run_rounds<T, true>(w, executor);
  executor.run(blocks, after, &w);
}

// ---------------------------------------------------------------------------------------------- all groups

void serially(int64_t n, Task task, void* argument) {
  for (int64_t i = 0; i < n; ++i) task(argument, i, 0);
}

INLINE double group_work(const GramInput& in) { return double(in.V * in.N) * double(in.V * in.N) * double(in.D); }

// Many groups, or small ones: one thread each. Few large ones: one after the other, by all threads.
INLINE bool group_by_group(const GramInput& in, int64_t threads) {
  return in.G < 2 * threads && group_work(in) > 1e6;
}

// Rounded up to doubles.
template <typename T>
INLINE int64_t group_size(const GramInput& in, bool backward) {
  return (Group<T>::size(in, padded<T>(in.D), backward) + 1) / 2 * 2;
}

template <typename T>
int64_t workspace(const GramInput& in, int64_t threads, bool backward) {
  int64_t groups = group_by_group(in, threads) ? 1 : threads;
  return groups * group_size<T>(in, backward) + threads * Tile<T>::size(problem<T>(in), padded<T>(in.D), backward);
}

template <typename T>
struct Call {
  const GramInput& in;
  const GramForward<T>* forward;
  const GramBackward<T>* backward;
  T* memory;
  Executor executor;
  int64_t slots;  // of groups
};

template <typename T>
void run_group(const Call<T>& call, int64_t g, int64_t slot, const Executor& executor) {
  const GramInput& in = call.in;
  Problem p = problem<T>(in);
  bool backward = call.backward != nullptr, bounded = in.normalize && 1 / in.tau <= Lane<T>::largest_inverse_tau;
  int64_t ldz = padded<T>(in.D), size = group_size<T>(in, backward), tile_size = Tile<T>::size(p, ldz, backward);
  T* tiles = call.memory + call.slots * size + slot * tile_size;
  Work<T> w{in,    p,         g,       ldz,
            Group<T>(in, ldz, backward, call.memory + slot * size),
            tiles, tile_size, bounded, T(1 / in.tau),
            backward ? GramForward<T>{} : *call.forward,
            call.backward};
  if (backward)
    run_backward(w, executor);
  else
    run_forward(w, executor);
}

template <typename T>
void run(Call<T> call) {
  Executor one_thread{serially, 1};
  if (double(call.in.G) * group_work(call.in) < 2e6) call.executor = one_thread;  // waking another takes longer
  if (group_by_group(call.in, call.executor.threads)) {
    call.slots = 1;
    for (int64_t g = 0; g < call.in.G; ++g) run_group(call, g, 0, call.executor);
    return;
  }
  call.slots = call.executor.threads;
  auto one = [](void* argument, int64_t g, int64_t thread) {
    run_group(*(Call<T>*)argument, g, thread, Executor{serially, 1});
  };
  call.executor.run(call.in.G, one, &call);
}

template <typename T>
void forward(const GramInput& in, const GramForward<T>& out, T* memory, const Executor& executor) {
  run(Call<T>{in, &out, nullptr, memory, executor, 0});
}

template <typename T>
void backward(const GramInput& in, const GramBackward<T>& out, T* memory, const Executor& executor) {
  run(Call<T>{in, nullptr, &out, memory, executor, 0});
}

}  // namespace

#define TCLR_JOIN_(a, b) a##b
#define TCLR_JOIN(a, b) TCLR_JOIN_(a, b)
#define TCLR_NAME_(a) #a
#define TCLR_NAME(a) TCLR_NAME_(a)

const Level TCLR_JOIN(TCLR_LEVEL, _level) = {
    TCLR_NAME(TCLR_LEVEL),
    {workspace<float>, forward<float>, backward<float>},
    {workspace<double>, forward<double>, backward<double>},
};

}  // namespace tclr
