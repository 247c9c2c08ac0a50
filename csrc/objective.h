#pragma once
#include <tuple>

#include "tensors.h"

namespace tclr {

// The TCLR objective on the CPU, see tclr_kernels/objective.py. Returns the total and its four terms and, if asked for,
// the gradients of the total for g, s, x (contiguous, float32 or float64) and tau, or none if one of them is not
// finite.
std::tuple<Tensors, Tensors> objective(Tensor g, Tensor s, Tensor x, Optional tau, double tau_value, bool normalize,
                                       std::vector<double> scales, std::vector<double> weights, bool gradient);

// These gradients times the upstream gradient, in the dtype of the inputs.
Tensors objective_backward(Tensor g, Tensor s, Tensor x, Optional tau, double tau_value, bool normalize,
                           std::vector<double> scales, std::vector<double> weights, Tensors kept, Tensor upstream);

}  // namespace tclr
