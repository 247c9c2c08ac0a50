// Small matrix products in registers, and the packed panels they read.
#pragma once
#include "vec.inl"

namespace tclr {
namespace {

constexpr int MR = TCLR_TILE_ROWS;  // rows of C held in registers
constexpr int strip = 48;           // rows of a tile whose similarities are computed and used while in the L1 cache
constexpr int64_t depth = 128;      // features of one pass of a product: a panel of so many stays in the L1 cache
static_assert(strip % MR == 0);
template <typename T>
constexpr int NR = 2 * lanes<T>;  // columns of C held in registers

// C[r, n] (+)= sum_k A[r, k] B[k, n] for r < R, n < W vectors; A's strides are rs, cs.
template <typename T, int R, bool add, int W = 2>
void product(int64_t K, const T* A, int64_t rs, int64_t cs, const T* B, int64_t ldb, T* C, int64_t ldc) {
  constexpr int L = lanes<T>;
  if (add)
    for (int r = 0; r < R; ++r) __builtin_prefetch(C + r * ldc, 1);  // at D = 512 C is not in the L1 cache: saves 5 %
  Vec<T> c[R][W] = {};
  for (int64_t k = 0; k < K; ++k, A += cs, B += ldb) {
    Vec<T> b[W];
    for (int w = 0; w < W; ++w) b[w] = load(B + w * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vec<T> a = splat(A[r * rs]);
      for (int w = 0; w < W; ++w) c[r][w] += a * b[w];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    T* out = C + r * ldc;
    for (int w = 0; w < W; ++w) store(out + w * L, add ? load(out + w * L) + c[r][w] : c[r][w]);
  }
}

template <typename T, bool add>
using Product = void (*)(int64_t, const T*, int64_t, int64_t, const T*, int64_t, T*, int64_t);

template <typename T, bool add, int W = 2>
constexpr Product<T, add> products[] = {
    nullptr,
    product<T, 1, add, W>,
    product<T, 2, add, W>,
    product<T, 3, add, W>,
    product<T, 4, add, W>,
    product<T, 5, add, W>,
    product<T, 6, add, W>,
#if TCLR_TILE_ROWS == 12
    product<T, 7, add, W>,
    product<T, 8, add, W>,
    product<T, 9, add, W>,
    product<T, 10, add, W>,
    product<T, 11, add, W>,
    product<T, 12, add, W>,
#endif
};

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
INLINE int64_t padded(int64_t n) {
  return (n + NR<T> - 1) / NR<T> * NR<T>;
}

// The number of columns that are computed for n columns: n, rounded up to whole vectors.
template <typename T>
INLINE int64_t covered(int64_t n) {
  return (n + lanes<T> - 1) / lanes<T> * lanes<T>;
}

template <typename T>
constexpr int64_t line = 64 / sizeof(T);

template <typename T>
INLINE int64_t whole_lines(int64_t n) {
  return (n + line<T> - 1) / line<T> * line<T>;
}

// The stride between rows of D values: whole vectors, and an odd number of cache lines, so that the lines of one column
// fall into different sets of the cache.
template <typename T>
INLINE int64_t leading(int64_t D) {
  int64_t n = whole_lines<T>(padded<T>(D));
  return n / line<T> % 2 ? n : n + line<T>;
}

// Packs rows [n, D] into panels of NR columns, [n / NR, D, NR]. The last panel is filled up with zeros. ldz, at least
// D, is a multiple of NR.
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

// S[q, j] = <z_q, column j> for q < rows and j < covered(count).
template <typename T>
INLINE void similarities(int64_t rows, const T* z, int64_t ldz, int64_t D, const T* panels, int64_t count, T* S,
                         int64_t lds) {
  for (int64_t d = 0; d < D; d += depth) {
    auto whole = d == 0 ? products<T, false> : products<T, true>;
    auto half = d == 0 ? products<T, false, 1> : products<T, true, 1>;
    int64_t K = smaller(depth, D - d);
    for (int64_t j = 0; j < count; j += NR<T>) {
      auto multiply = count - j > lanes<T> ? whole : half;
      for (int64_t q = 0; q < rows; q += MR)
        multiply[smaller(MR, rows - q)](K, z + q * ldz + d, ldz, 1, panels + j * D + d * NR<T>, NR<T>, S + q * lds + j,
                                        lds);
    }
  }
}

// dz[r, d] += sum_k A[r, k] z[k, d] for r < rows, d < padded(D).
template <typename T>
void accumulate(int64_t rows, int64_t K, int64_t D, const T* A, int64_t rs, int64_t cs, const T* z, T* dz,
                int64_t ldz) {
  for (int64_t d = 0; d < D; d += NR<T>)
    for (int64_t r = 0; r < rows; r += MR)
      products<T, true>[smaller(MR, rows - r)](K, A + r* rs, rs, cs, z + d, ldz, dz + r* ldz + d, ldz);
}

}  // namespace
}  // namespace tclr
