#pragma once
#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

namespace tclr {

// Of the TCLR objective on the CPU: total and the four terms; and, if asked for, the gradient of the total for g, s, x
// (float at least, contiguous) and tau, or none where it is not finite. See tclr_kernels/objective.py.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> objective(
    const at::Tensor& g, const at::Tensor& s, const at::Tensor& x, const std::optional<at::Tensor>& tau,
    double tau_value, bool normalize, at::ArrayRef<double> scales, at::ArrayRef<double> weights, bool gradient);

// That gradient times upstream, in the inputs' dtype.
std::vector<at::Tensor> objective_backward(const at::Tensor& g, const at::Tensor& s, const at::Tensor& x,
                                           const std::optional<at::Tensor>& tau, double tau_value, bool normalize,
                                           at::ArrayRef<double> scales, at::ArrayRef<double> weights,
                                           at::TensorList kept, const at::Tensor& upstream);

}  // namespace tclr
