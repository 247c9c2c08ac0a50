#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define TCLR_LEVEL avx2
#define TCLR_VECTOR_BYTES 32
#define TCLR_TILE_ROWS 6  // 6 x 2 accumulators of 16 registers
#include "level.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
