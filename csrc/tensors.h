// How the bindings of the CPU and CUDA kernels read and make tensors. They use libtorch's stable ABI, so a library that
// is built with the headers of PyTorch 2.11 can be loaded by every later PyTorch.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "rows.h"

namespace tclr {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;

// A dtype as a number of PyTorch's C functions. torch::headeronly::ScalarType would cost a conversion, which compares
// with the numbers of all dtypes in turn.
using Code = int32_t;

inline Code code_of(const Tensor& x) {
  Code code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &code));
  return code;
}

inline Dtype dtype_of(const Tensor& x) {
  Code code = code_of(x);
  if (code == aoti_torch_dtype_float32()) return Dtype::f32;
  if (code == aoti_torch_dtype_float64()) return Dtype::f64;
  if (code == aoti_torch_dtype_bfloat16()) return Dtype::bf16;
  STD_TORCH_CHECK(code == aoti_torch_dtype_float16(), "wanted float64, float32, bfloat16 or float16");
  return Dtype::f16;
}

// The dtype of results: float64 for float64, float32 for the others.
inline Code wide(const Tensor& x) {
  return code_of(x) == aoti_torch_dtype_float64() ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

// The size of one element.
inline int64_t bytes_of(const Tensor& x) {
  switch (dtype_of(x)) {
    case Dtype::f64:
      return 8;
    case Dtype::f32:
      return 4;
    default:
      return 2;
  }
}

inline std::vector<int64_t> sizes_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

// A contiguous, uninitialised tensor on the device of `beside`.
inline Tensor empty(const std::vector<int64_t>& sizes, Code dtype, const Tensor& beside) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t k = sizes.size(); k-- > 1;) strides[k - 1] = strides[k] * sizes[k];
  int32_t device_type;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(beside.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                  device_type, beside.get_device_index(), &handle));
  return Tensor(handle);
}

// x in the dtype of `like`.
inline Tensor converted(const Tensor& x, const Tensor& like) {
  return code_of(x) == code_of(like) ? x : torch::stable::to(x, like.scalar_type());
}

// The value of a 0-d tensor in the host's memory.
inline double host_value(const Tensor& x) {
  const void* data = x.const_data_ptr();
  switch (dtype_of(x)) {
    case Dtype::f64:
      return *static_cast<const double*>(data);
    case Dtype::f32:
      return *static_cast<const float*>(data);
    case Dtype::bf16:
      return from_bf16(*static_cast<const uint16_t*>(data));
    default:
      return from_f16(*static_cast<const uint16_t*>(data));
  }
}

}  // namespace tclr
