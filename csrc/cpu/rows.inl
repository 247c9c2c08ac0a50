// Reads rows, which are converted and normalised, and writes their gradients.
#pragma once
#include "../problem.h"
#include "gram.h"
#include "vec.inl"

namespace tclr {
namespace {

// Converts D values that are `step` elements apart. A NaN becomes the canonical NaN, the only one for which `exp2`
// returns NaN.
template <typename T, typename X, typename To>
INLINE void convert(const X* x, int64_t step, int64_t D, T* out, To to) {
  auto canonical = [&](X from) {
    T value = to(from);
    return value == value ? value : T(NAN);
  };
  if (step == 1)
    for (int64_t d = 0; d < D; ++d) out[d] = canonical(x[d]);
  else
    for (int64_t d = 0; d < D; ++d) out[d] = canonical(x[d * step]);
}

// Row i of a set, converted to T.
template <typename T>
void read_row(const Rows& rows, Dtype dtype, int64_t g, int64_t i, int64_t D, T* out) {
  int64_t first = g * rows.stride_g + i * rows.stride_n, step = rows.stride_d;
  if (dtype == Dtype::f64)
    convert((const double*)rows.data + first, step, D, out, [](double x) { return T(x); });
  else if (dtype == Dtype::f32)
    convert((const float*)rows.data + first, step, D, out, [](float x) { return T(x); });
  else if (dtype == Dtype::bf16)
    convert((const uint16_t*)rows.data + first, step, D, out, [](uint16_t x) { return T(from_bf16(x)); });
  else
    convert((const uint16_t*)rows.data + first, step, D, out, [](uint16_t x) { return T(from_f16(x)); });
}

// sum_d x_d y_d in double. Both rows are padded with zeros to a multiple of two vectors of doubles.
template <typename T>
INLINE double dot(const T* x, const T* y, int64_t D) {
  constexpr int L = lanes<double>;
  Vec<double> even = {}, odd = {};
  for (int64_t d = 0; d < D; d += 2 * L) {
    even += widen(x + d) * widen(y + d);
    odd += widen(x + d + L) * widen(y + d + L);
  }
  return sum<double>(even + odd);
}

// A norm as the product of a power of two, scale, and the rest, because the norm of a row of 1e308 overflows a double.
// rest is 0 for a row of zeros.
struct Norm {
  double scale, rest;
};

// Divides the row by its norm. A row that is not finite becomes NaN.
template <typename T>
Norm normalize(T* row, int64_t D) {
  double scale = 1;
  if (sizeof(T) == sizeof(double)) {  // squares of floats always fit a double
    double largest = 0;
    for (int64_t d = 0; d < D; ++d) {
      double size = fabs(double(row[d]));
      largest = size > largest || size != size ? size : largest;
    }
    if (largest == 0) return {1, 0};
    scale = ldexp(1, ilogb(largest));
    for (int64_t d = 0; d < D; ++d) row[d] = T(row[d] / scale);
  }
  double rest = sqrt(dot(row, row, D)), inverse = 1 / rest;
  if (rest == 0) return {1, 0};
  bool finite = rest * 0 == 0;
  for (int64_t d = 0; d < D; ++d) {
    double unit = sizeof(T) == sizeof(double) ? row[d] / rest : row[d] * inverse;
    row[d] = finite ? T(unit) : T(NAN);
  }
  return {scale, rest};
}

// Row i of a set, normalised if asked for, padded with zeros to ldz; and its norm.
template <typename T>
INLINE Norm read_unit(const Rows& rows, Dtype dtype, bool unit, int64_t g, int64_t i, int64_t D, int64_t ldz, T* row) {
  read_row(rows, dtype, g, i, D, row);
  for (int64_t d = D; d < ldz; ++d) row[d] = 0;
  return unit ? normalize(row, D) : Norm{};
}

// The rows of one block.
template <typename T>
void read_block(const GramInput& in, const Problem& p, int64_t g, int64_t b, int64_t ldz, T* z, Norm* norms) {
  for (int64_t r = 0; r < p.rows(b); ++r)
    norms[r] = read_unit(in.sets[p.set(b)], in.dtype, in.normalize, g, p.begin(b) + r, in.D, ldz, z + r * ldz);
}

// Writes row i of a gradient, dx = (dz - z <z, dz>) / |x|, and returns <z, dz>. row: the normalised row z; grad: its
// gradient dz divided by `scale`.
template <typename T>
INLINE T write_row(const Gradient<T>& to, int64_t g, int64_t i, int64_t D, double scale, bool unit, Norm norm,
                   const T* row, const T* grad) {
  T* dx = to.data + g * to.stride_g + i * to.stride_n;
  double along = dot(row, grad, D), scaled = along * scale, exponent = 1, projected = 0;
  bool zero = unit && norm.rest == 0;
  if (unit) exponent = norm.scale, projected = along, scale /= norm.rest;
  for (int64_t d = 0; d < D; ++d) {
    double value = (double(grad[d]) - double(row[d]) * projected) * scale;
    if (sizeof(T) == sizeof(double)) value /= exponent;  // for float rows it is 1
    value = zero ? 0 : value;
    dx[d] = to.add ? dx[d] + T(value) : T(value);
  }
  return T(scaled);
}

// Writes the gradients of one block's rows. dz: the gradients of the normalised rows, divided by unit / tau.
template <typename T>
void write_block(const GramInput& in, const GramBackward<T>& out, const Problem& p, int64_t g, int64_t b, int64_t ldz,
                 double unit, const T* z, const T* dz, const Norm* norms) {
  int64_t a = p.set(b);
  for (int64_t r = 0; r < p.rows(b); ++r) {
    int64_t i = p.begin(b) + r;
    out.zdz[(g * in.V + a) * in.N + i] =
        write_row(out.dz[a], g, i, in.D, unit / in.tau, in.normalize, norms[r], z + r * ldz, dz + r * ldz);
  }
}

}  // namespace
}  // namespace tclr
