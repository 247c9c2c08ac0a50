// Runs a kernel on a CUDA device, or on the host, so that the kernels' source can be tested without a GPU. On the host,
// thread blocks run one after another, and their threads are fibers that switch at every barrier. A kernel takes one
// struct, and uses only those parts of CUDA that are in this file, in warp.h and in wgmma.h.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tclr {
constexpr int threads = 128;       // of a thread block, unless the launch has another number
constexpr int tile_threads = 256;  // of a thread block that computes tiles without tensor cores
}  // namespace tclr

#ifdef __CUDACC__

// One thread block for each multiprocessor is enough. Without this, ptxas spills registers to fit more of them.
#define TCLR_KERNEL_OF(threads, blocks) static __global__ void __launch_bounds__(threads, blocks)
#define TCLR_KERNEL TCLR_KERNEL_OF(tclr::threads, 1)
#define TCLR_ARGUMENT const __grid_constant__
#define TCLR_ROLLED _Pragma("unroll 1")  // for loops of few iterations, where unrolled code takes longer to fetch
#define TCLR_DEVICE static __device__ __forceinline__
#define TCLR_METHOD __device__ __forceinline__

namespace tclr {

using Stream = cudaStream_t;

constexpr int64_t enough_blocks = 512, enough_tiles = 512;  // this many thread blocks fill a device

template <typename T>
TCLR_DEVICE T* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

inline int attribute(cudaDeviceAttr name) {  // of the current device, or 0 if that fails
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

// In a kernel that was launched `early`: waits until the previous kernel has ended and its results can be read.
TCLR_DEVICE void wait_for_former() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Allows the next kernel to start, if it is launched `early`.
TCLR_DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns nullptr, or CUDA's error message. early: the kernel may start before the previous one ends (programmatic
// dependent launch), if its code was compiled for devices that support this.
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
