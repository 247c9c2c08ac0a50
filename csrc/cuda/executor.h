// Where a kernel runs: on a CUDA device, or, so that its very source is tested without one, on the host, block after
// block, its threads as fibers that change places at every barrier. Kernels take one struct and use nothing else of
// CUDA than what is here, in warp.h and in wgmma.h.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tclr {
constexpr int threads = 128;  // of every block whose launch names no other number
}

#ifdef __CUDACC__

// one block a multiprocessor is enough: else ptxas spills for the sake of more of them
#define TCLR_KERNEL static __global__ void __launch_bounds__(tclr::threads, 1)
#define TCLR_ARGUMENT const __grid_constant__
#define TCLR_DEVICE static __device__ __forceinline__
#define TCLR_METHOD __device__ __forceinline__

namespace tclr {

using Stream = cudaStream_t;

constexpr int64_t enough_blocks = 512;  // to fill a device

template <typename T>
TCLR_DEVICE T* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

inline int attribute(cudaDeviceAttr name) {  // of the current device, 0 where that fails
  int device = 0, value = 0;
  return cudaGetDevice(&device) || cudaDeviceGetAttribute(&value, name, device) ? 0 : value;
}

inline bool on_hopper() {
  return attribute(cudaDevAttrComputeCapabilityMajor) == 9 && attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

inline int processors() {
  int count = attribute(cudaDevAttrMultiProcessorCount);
  return count > 0 ? count : 1;
}

// Nothing, or CUDA's name for what went wrong.
template <typename A>
const char* launch(void (*kernel)(A), int64_t blocks, size_t shared, Stream stream, const A& argument,
                   int threads = tclr::threads) {
  constexpr size_t always_there = 48 << 10;
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "more blocks than a grid can hold";
  cudaError_t error = cudaSuccess;
  if (shared > always_there)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error == cudaSuccess) {
    kernel<<<dim3(unsigned(blocks)), dim3(threads), shared, stream>>>(argument);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tclr

#else
#include "host.h"
#endif
