// CUDA instructions for kernels on tensor cores: those that a whole warp executes, and asynchronous copies.
//
// Lane 4 g + t has these fragments, in words of 32 bits:
//   left     16 rows x 8 words    (row g, word t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//   right    8 columns x 8 words  (column g, word t), (g, t + 4)
//   result   16 x 8 floats        (row g, columns 2 t, 2 t + 1), (g + 8, 2 t, 2 t + 1)
#pragma once
#include <type_traits>

#include "../rows.h"
#include "executor.h"

namespace tclr {
namespace {

struct Half {  // words of two float16
  using Element = uint16_t;
  static constexpr Element of(float x) { return to_f16(x); }
};

struct Bfloat {  // words of two bfloat16
  using Element = uint16_t;
  static constexpr Element of(float x) { return to_bf16(x); }
};

struct Tf32 {  // a float with a mantissa of 10 bits
  using Element = uint32_t;
  static constexpr Element of(float x) { return (bits_as<uint32_t>(x) + (x == x ? 0x1000 : 0)) & ~0x1fffu; }
};

}  // namespace
}  // namespace tclr

#ifdef __CUDACC__

namespace tclr {
namespace {

TCLR_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Loads four matrices of 8 x 8 numbers of 16 bits, or of 8 x 4 words. Lane 8 m + r has the address of row r of matrix
// m.
TCLR_DEVICE void load_matrices(uint32_t (&x)[4], const uint32_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row)));
}

TCLR_DEVICE void load_transposed(uint32_t (&x)[4], const uint32_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row)));
}

#define TCLR_MMA(shape, type)                                                \
  asm("mma.sync.aligned." shape ".row.col.f32." type "." type                \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(result[0]), "+f"(result[1]), "+f"(result[2]), "+f"(result[3])   \
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_low), "r"(right_high))

// result += left right^T
template <typename E>
TCLR_DEVICE void multiply_add(float (&result)[4], const uint32_t (&left)[4], uint32_t right_low, uint32_t right_high) {
  if constexpr (std::is_same_v<E, Half>) TCLR_MMA("m16n8k16", "f16");
  if constexpr (std::is_same_v<E, Bfloat>) TCLR_MMA("m16n8k16", "bf16");
  if constexpr (std::is_same_v<E, Tf32>) TCLR_MMA("m16n8k8", "tf32");
}

#undef TCLR_MMA

// Two numbers, converted and packed in a word.
template <typename E>
TCLR_DEVICE uint32_t pair(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<E, Half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// x of the lane whose number differs from this lane's in these bits.
template <typename T>
TCLR_DEVICE T of_other_lane(T x, int bits) {
  return __shfl_xor_sync(0xffffffff, x, bits);
}

// 2^x to float's precision for |x| < 100, and 0 for x far below that.
TCLR_DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

TCLR_DEVICE float exponential(float x) { return exp2_of(x * 1.44269504f); }

// The logarithm with an absolute error of float's precision near 1.
TCLR_DEVICE float logarithm(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y * 0.693147181f;
}

// Copies four words to shared memory asynchronously, or zeros if not `there`. They can be read after waiting for their
// group and passing a barrier.
TCLR_DEVICE void copy_async(uint32_t* to, const uint32_t* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}

TCLR_DEVICE void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of copies except the last.
TCLR_DEVICE void wait_for_groups() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

// Waits for all copies.
TCLR_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace
}  // namespace tclr

#else
#include "host_warp.h"
#endif
