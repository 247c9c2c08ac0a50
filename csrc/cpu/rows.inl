// Rows in, converted and normalised; gradients of rows out.
#pragma once
#include "../problem.h"
#include "gram.h"
#include "vec.inl"

namespace tclr {
namespace {

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
// dz is in units of tau / unit.
template <typename T>
void write_block(const GramInput& in, const GramBackward<T>& out, const Problem& p, int64_t g, int64_t b, int64_t ldz,
                 double unit, const T* z, const T* dz, const Norm* norms) {
  int64_t a = p.set(b);
  for (int64_t r = 0; r < p.rows(b); ++r) {
    const T *row = z + r * ldz, *grad = dz + r * ldz;
    int64_t i = p.begin(b) + r;
    T* dx = out.dz[a] + (g * in.N + i) * in.D;
    double along = 0, scale = unit / in.tau;
    for (int64_t d = 0; d < in.D; ++d) along += double(row[d]) * double(grad[d]);
    out.zdz[(g * in.V + a) * in.N + i] = T(along * scale);
    if (!in.normalize) {
      for (int64_t d = 0; d < in.D; ++d) dx[d] = T(double(grad[d]) * scale);
      continue;
    }
    Norm n = norms[r];
    for (int64_t d = 0; d < in.D; ++d) {
      double g_unit = (double(grad[d]) - double(row[d]) * along) * (scale / n.rest);
      dx[d] = n.rest == 0 ? T(0) : T(sizeof(T) == sizeof(float) ? g_unit : g_unit / n.largest);  // of floats it is 1
    }
  }
}

}  // namespace
}  // namespace tclr
