// A set of rows in memory, and conversions between its dtypes. Plain arithmetic, shared by all kernels.
#pragma once
#include <cstdint>
#include <cstring>

namespace tclr {

enum class Dtype { f64, f32, bf16, f16 };

struct Rows {  // one set: [G, N, D]
  const void* data;
  int64_t stride_g, stride_n, stride_d;  // in elements
};

namespace {

template <typename To, typename From>
constexpr To bits_as(From from) {
  return __builtin_bit_cast(To, from);
}

constexpr float from_bf16(uint16_t h) { return bits_as<float>(uint32_t(h) << 16); }

constexpr float from_f16(uint16_t h) {
  uint32_t exponent = h >> 10 & 31, mantissa = h & 1023;
  uint32_t bits = exponent == 31 ? 0x7f800000 | mantissa << 13 : (exponent + 112) << 23 | mantissa << 13;
  float x = exponent == 0 ? mantissa * 0x1p-24f : bits_as<float>(bits);
  return h & 0x8000 ? -x : x;
}

// Rounds to the nearest value, ties to even. A NaN stays a NaN.
constexpr uint16_t to_bf16(float x) {
  uint32_t bits = bits_as<uint32_t>(x);
  return x == x ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
}

constexpr uint16_t to_f16(float x) {
  uint32_t bits = bits_as<uint32_t>(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (x != x) return uint16_t(sign | 0x7e00);
  if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and beyond
  if (size < 0x38800000)  // below 2^-14, subnormal: the addition rounds to a multiple of 2^-24
    return uint16_t(sign | (bits_as<uint32_t>(bits_as<float>(size) + 0.5f) - 0x3f000000));
  size += 0xfff + (size >> 13 & 1);
  return uint16_t(sign | (size - 0x38000000) >> 13);
}

}  // namespace
}  // namespace tclr
