// SIMD vectors as wide as the instruction-set level allows, as the compiler's generic vector types.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <utility>  // integer_sequence: types only

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
#endif

#define INLINE static inline __attribute__((always_inline))

namespace tclr {
namespace {

template <typename T>
struct Lane;

template <>
struct Lane<float> {
  typedef float vec __attribute__((vector_size(TCLR_VECTOR_BYTES)));
  typedef uint32_t ivec __attribute__((vector_size(TCLR_VECTOR_BYTES)));
  static constexpr int mantissa = 23;
  static constexpr float smallest = -126;            // below this, exp2 returns 0
  static constexpr float round = 12582912;           // 1.5 * 2^23: adding it rounds to an integer
  static constexpr double largest_inverse_tau = 40;  // up to this, exp(1/tau) and exp(-1/tau) are in range
  // 2^f on [-1/2, 1/2], minimax, relative error 1.9e-9
  static constexpr float exp2[] = {1.0000000005541732f,    0.69314720573748053f,  0.24022646890602097f,
                                   0.05550328776484039f,   0.009618488958971071f, 0.001339993142907839f,
                                   0.00015345811947492753f};
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
  static constexpr double exp2[] = {0.9999999999999999971,    0.6931471805599453305,     0.2402265069591015621,
                                    0.05550410866481992157,   0.009618129107588334636,   0.001333355814678992723,
                                    0.0001540353046251521913, 0.00001525273348998493701, 1.321543308926845884e-6,
                                    1.017819802252533595e-7,  7.07410568648162007e-9,    4.435282667892443532e-10};
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
INLINE Vec<T> magnitude(Vec<T> x) {
  return x < 0 ? -x : x;
}

template <typename T>
INLINE double sum(Vec<T> v) {
  double s = 0;
  for (int l = 0; l < lanes<T>; ++l) s += v[l];
  return s;
}

// lanes<double> values of T
template <typename T>
INLINE Vec<double> widen(const T* p) {
  typedef T part __attribute__((vector_size(lanes<double> * sizeof(T))));
  part v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Vec<double>);
}

// Loads and stores of n values; the missing lanes are 0. Half a vector has code of its own, because four clips of a
// video are half a vector of AVX-512.
template <typename T, int... l>
INLINE Vec<double> widen_half(const T* p, std::integer_sequence<int, l...>) {
  constexpr int n = lanes<double> / 2;
  typedef T part __attribute__((vector_size(n * sizeof(T))));
  typedef double wide __attribute__((vector_size(n * sizeof(double))));
  part v;
  memcpy(&v, p, sizeof v);
  return __builtin_shufflevector(__builtin_convertvector(v, wide), wide{}, l...);
}

template <typename T>
INLINE Vec<double> widen(const T* p, int64_t n) {
  if (n >= lanes<double>) return widen(p);
  if constexpr (lanes<double> > 2)
    if (n == lanes<double> / 2) return widen_half(p, std::make_integer_sequence<int, lanes<double>>());
  Vec<double> v = {};
  for (int64_t l = 0; l < n; ++l) v[l] = p[l];
  return v;
}

template <typename T, int n>
INLINE void narrow(T* p, Vec<double> v) {
  typedef T part __attribute__((vector_size(lanes<double> * sizeof(T))));
  part all = __builtin_convertvector(v, part);
  memcpy(p, &all, n * sizeof(T));
}

template <typename T>
INLINE void narrow(T* p, Vec<double> v, int64_t n) {
  if (n >= lanes<double>) return narrow<T, lanes<double>>(p, v);
  if (n == lanes<double> / 2) return narrow<T, lanes<double> / 2>(p, v);
  for (int64_t l = 0; l < n; ++l) p[l] = T(v[l]);
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

constexpr double log2e = 1.4426950408889634, ln2 = 0.6931471805599453;

INLINE Vec<double> exp(Vec<double> x) { return exp2<double>(x * log2e); }  // x < 709
// Not the C library's exp: linked with a current glibc, the wheel would not load with one older than 2.29.
INLINE double exp(double x) { return exp(splat<double>(x))[0]; }

// x is not subnormal. x = 2^e m, 1/sqrt 2 < m < sqrt 2; log m = 2 atanh f with f = (m - 1) / (m + 1), |f| < 0.172
INLINE Vec<double> log(Vec<double> x) {
  using Bits = Lane<double>::ivec;
  // one: the bits of 1; to_root: the bits of 2 minus the bits of sqrt 2
  constexpr uint64_t one = 0x3ff0000000000000, to_root = 0x95f619980c433;
  Bits shifted = (Bits)x + to_root;
  Bits biased = (shifted >> 52) | 0x4330000000000000;  // as a double: 2^52 + 1023 + e
  Vec<double> e = (Vec<double>)biased - 4503599627371519.0;
  Vec<double> m = (Vec<double>)((shifted & 0xfffffffffffff) + one - to_root);
  Vec<double> f = (m - 1) / (m + 1), square = f * f, series = splat(1.0 / 23);
#pragma GCC unroll 16
  for (int k = 21; k > 0; k -= 2) series = series * square + 1.0 / k;
  Vec<double> result = e * ln2 + 2 * f * series;
  result = x < INFINITY ? result : x;
  return x == 0 ? splat<double>(-INFINITY) : result;
}

INLINE Vec<double> log1p(Vec<double> x) {  // 0 <= x, finite
  Vec<double> u = 1 + x, lost = u - 1;
  return lost == 0 ? x : log(u) * (x / lost);
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

}  // namespace
}  // namespace tclr
