// Reads, converts and normalises rows, and writes their gradients. Several lanes share a row.
//
//   z  = x / |x|                     |x| = scale * rest, where scale is a power of two, since |x| itself may overflow
//   dx = (dz - z <z, dz>) / |x|
#pragma once
#include "../rows.h"
#include "gram.h"
#include "warp.h"

namespace tclr {
namespace {

TCLR_DEVICE double exponential(double x) { return exp(x); }

TCLR_DEVICE double logarithm(double x) { return log(x); }

// Combines the values of the lanes that share a row; every lane gets the same bits. lanes: a power of two.
template <typename T, typename Join>
TCLR_DEVICE T over_row(T value, int lanes, Join join) {
  for (int bits = 1; bits < lanes; bits *= 2) value = join(value, of_other_lane(value, bits));
  return value;
}

template <typename T>
TCLR_DEVICE T sum_over_row(T value, int lanes) {
  return over_row(value, lanes, [](T x, T y) { return x + y; });
}

template <typename T>
TCLR_DEVICE T largest_over_row(T value, int lanes) {
  return over_row(value, lanes, [](T x, T y) { return y > x || y != y ? y : x; });
}

template <typename T>
TCLR_DEVICE T value_at(const void* data, Dtype dtype, int64_t at) {
  switch (dtype) {
    case Dtype::f64:
      return T(static_cast<const double*>(data)[at]);
    case Dtype::f32:
      return T(static_cast<const float*>(data)[at]);
    case Dtype::bf16:
      return T(from_bf16(static_cast<const uint16_t*>(data)[at]));
    default:
      return T(from_f16(static_cast<const uint16_t*>(data)[at]));
  }
}

TCLR_DEVICE void put_value(void* data, Dtype dtype, int64_t at, double value) {
  switch (dtype) {
    case Dtype::f64:
      static_cast<double*>(data)[at] = value;
      break;
    case Dtype::f32:
      static_cast<float*>(data)[at] = float(value);
      break;
    case Dtype::bf16:
      static_cast<uint16_t*>(data)[at] = to_bf16(float(value));
      break;
    default:
      static_cast<uint16_t*>(data)[at] = to_f16(float(value));
  }
}

using cuda::Scalar;

TCLR_DEVICE double value_of(const Scalar& x) { return x.data ? value_at<double>(x.data, x.dtype, 0) : x.value; }

// A row in memory, with feature d at first + d * step.
struct Source {
  const void* data;
  Dtype dtype;
  int64_t first, step;
};

// The length of a row, scale * rest. rest is 0 for a row of zeros.
template <typename T>
struct Norm {
  T scale, rest;
};

template <typename T>
TCLR_DEVICE T value_at(const Source& x, int64_t d) {
  return value_at<T>(x.data, x.dtype, x.first + d * x.step);
}

// The norm of a row that `lanes` lanes share. each(f) calls f for every value of this lane, and for none if there is no
// row. The norm of a row that is not finite is NaN, and so are its unit row and its gradient.
template <typename T, typename Each>
TCLR_DEVICE Norm<T> norm_of(int lanes, Each each) {
  T largest = 0, scale = 1, squares = 0;
  each([&](T x) { largest = fabs(x) > largest || x != x ? fabs(x) : largest; });
  largest = largest_over_row(largest, lanes);
  constexpr int least = sizeof(T) == 8 ? -1022 : -126;  // 1 / scale is finite
  if (largest > 0 && largest * 0 == 0) {
    int exponent = ilogb(largest);
    scale = ldexp(T(1), exponent < least ? least : exponent);
  }
  T inverse = 1 / scale;
  each([&](T x) { squares += x * inverse * (x * inverse); });
  squares = sum_over_row(squares, lanes);
  return {scale, largest * 0 == 0 ? T(sqrt(squares)) : T(NAN)};
}

template <typename T>
TCLR_DEVICE T unit_value(T x, const Norm<T>& norm) {
  return norm.rest == 0 ? 0 : x * (1 / norm.scale) * (1 / norm.rest);
}

}  // namespace
}  // namespace tclr
