#pragma once
#include <tuple>

#include "tensors.h"

namespace tclr {

// Of the TCLR objective on the CPU: total and the four terms; and, if asked for, the gradient of the total for g, s, x
// (float at least, contiguous) and tau, or none where it is not finite. See tclr_kernels/objective.py.
std::tuple<Tensors, Tensors> objective(Tensor g, Tensor s, Tensor x, Optional tau, double tau_value, bool normalize,
                                       std::vector<double> scales, std::vector<double> weights, bool gradient);

// That gradient times upstream, in the inputs' dtype.
Tensors objective_backward(Tensor g, Tensor s, Tensor x, Optional tau, double tau_value, bool normalize,
                           std::vector<double> scales, std::vector<double> weights, Tensors kept, Tensor upstream);

}  // namespace tclr
