// The operators, as PyTorch's dispatcher knows them on every device.
#pragma once

namespace tclr {

constexpr const char* schemas[] = {
    "gram_forward(Tensor[] sets, Tensor? tau, float tau_value, bool normalize, bool cross) -> "
    "(Tensor term, Tensor neg, Tensor pos)",
    "gram_backward(Tensor[] sets, Tensor? tau, float tau_value, bool normalize, bool cross, Tensor neg, Tensor pos, "
    "Tensor? g_term, Tensor? g_neg, Tensor? g_pos) -> (Tensor[] dz, Tensor zdz)",
    "objective(Tensor g, Tensor s, Tensor x, Tensor? tau, float tau_value, bool normalize, float[] scales, "
    "float[] weights, bool gradient) -> (Tensor[] terms, Tensor[] kept)",
    "objective_backward(Tensor g, Tensor s, Tensor x, Tensor? tau, float tau_value, bool normalize, float[] scales, "
    "float[] weights, Tensor[] kept, Tensor upstream) -> Tensor[] gradients",
};

}  // namespace tclr
