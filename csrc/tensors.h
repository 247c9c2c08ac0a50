// What the bindings of the CPU and the CUDA kernels read of tensors and how they make them, by libtorch's stable ABI:
// a library built on it with the headers of PyTorch 2.11 loads beside every later PyTorch.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "rows.h"

namespace tclr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    default:
      STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half, "wanted float64, float32, bfloat16 or float16");
      return Dtype::f16;
  }
}

// The dtype of results: float64 for float64, float32 for the others.
inline ScalarType wide(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::vector<int64_t> sizes_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

// A contiguous tensor of any values, on the same device as another.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& beside) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t k = sizes.size(); k-- > 1;) strides[k - 1] = strides[k] * sizes[k];
  int32_t device_type;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(beside.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
                               beside.get_device_index(), &handle));
  return Tensor(handle);
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
