// Where a kernel runs: on a CUDA device, or, so that its very source is tested without one, on the host, block after
// block, its threads as fibers that change places at every barrier. Kernels take one struct and use nothing else of
// CUDA than what is here, in warp.h and in wgmma.h.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tclr {
constexpr int threads = 128;       // of every block whose launch names no other number
constexpr int tile_threads = 256;  // of one that has tiles in the arithmetic of the rows' dtype
}  // namespace tclr

#ifdef __CUDACC__

// one block a multiprocessor is enough: else ptxas spills for the sake of more of them
#define TCLR_KERNEL_OF(threads, blocks) static __global__ void __launch_bounds__(threads, blocks)
#define TCLR_KERNEL TCLR_KERNEL_OF(tclr::threads, 1)
#define TCLR_ARGUMENT const __grid_constant__
#define TCLR_ROLLED _Pragma("unroll 1")  // before a loop of few rounds: code that runs once costs its fetching
#define TCLR_DEVICE static __device__ __forceinline__
#define TCLR_METHOD __device__ __forceinline__

namespace tclr {

using Stream = cudaStream_t;

constexpr int64_t enough_blocks = 512, enough_tiles = 512;  // to fill a device

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

// Waits until the kernel before this one has ended and what it wrote can be read: of a kernel launched `early`.
TCLR_DEVICE void wait_for_former() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the kernel after this one start, if it is launched `early`.
TCLR_DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Nothing, or CUDA's name for what went wrong. early: the kernel may start before the one before it ends, where its
// code was compiled for devices that have that.
template <typename A>
const char* launch(void (*kernel)(A), int64_t blocks, size_t shared, Stream stream, const A& argument,
                   int of_block = threads, bool early = false) {
  constexpr size_t always_there = 48 << 10;
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "more blocks than a grid can hold";
  cudaError_t error = cudaSuccess;
  if (shared > always_there)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  cudaFuncAttributes compiled;
  if (error == cudaSuccess && early) error = cudaFuncGetAttributes(&compiled, kernel);
  if (error == cudaSuccess) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(blocks)), config.blockDim = dim3(of_block);
    config.dynamicSmemBytes = shared, config.stream = stream;
    config.attrs = &attribute, config.numAttrs = early && compiled.ptxVersion >= 90;
    error = cudaLaunchKernelEx(&config, kernel, argument);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tclr

#else
#include "host.h"
#endif
