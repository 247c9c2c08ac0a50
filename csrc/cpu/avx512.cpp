#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,fma,prefer-vector-width=512")
#endif
#define TCLR_LEVEL avx512
#define TCLR_VECTOR_BYTES 64
#define TCLR_TILE_ROWS 12  // 12 x 2 accumulators of 32 registers
#include "level.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
