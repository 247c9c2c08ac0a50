// The schemas of the operators, the same on every device. tf32: products of float32 may be rounded to TF32, where the
// device has it. half: rows of float32 were of half precision, so that products of that accuracy are enough.
#pragma once

namespace tclr {

constexpr const char* schemas[] = {
    "gram_forward(Tensor[] sets, Tensor? tau, float tau_value, bool normalize, bool cross, "
    "bool tf32=False) -> (Tensor term, Tensor neg, Tensor pos)",
    "gram_backward(Tensor[] sets, Tensor? tau, float tau_value, bool normalize, bool cross, Tensor neg, Tensor pos, "
    "Tensor? g_term, Tensor? g_neg, Tensor? g_pos, bool tf32=False) -> (Tensor[] dz, Tensor zdz)",
    "reduced(Tensor[] inputs, Tensor? tau, float tau_value, bool normalize, bool cross, bool one_sided, float factor, "
    "float count, bool gradient, bool tf32=False) -> (Tensor loss, Tensor[] kept)",
    "reduced_backward(Tensor[] inputs, Tensor? tau, float tau_value, bool normalize, bool cross, bool one_sided, "
    "float factor, float count, Tensor[] kept, Tensor upstream, bool tf32=False) -> Tensor[] gradients",
    "rectangle(Tensor[] rows, Tensor[] columns, Tensor? tau, float tau_value, bool normalize, bool cross, SymInt "
    "first, "
    "Tensor? row_keys, Tensor? column_keys, bool mean, bool half=False, bool tf32=False) "
    "-> (Tensor neg, Tensor pos, Tensor pos_lse, Tensor spread, Tensor count, Tensor weighted)",
    "pairs(Tensor[] rows, Tensor[] columns, Tensor? tau, float tau_value, bool normalize, bool cross, SymInt first, "
    "Tensor row_keys, Tensor column_keys, Tensor negatives, bool half=False, bool tf32=False) "
    "-> (Tensor sums, Tensor slope)",
    "rectangle_backward(Tensor[] rows, Tensor[] columns, Tensor? tau, float tau_value, bool normalize, bool cross, "
    "SymInt first, Tensor? row_keys, Tensor? column_keys, Tensor[] of_rows, Tensor[] of_columns, bool for_rows, "
    "bool for_columns, bool half=False, bool tf32=False) -> (Tensor[] d_rows, Tensor[] d_columns, Tensor along)",
    "labelled(Tensor[] rows, Tensor[] columns, float tau, bool normalize, SymInt first, Tensor row_keys, "
    "Tensor column_keys, bool spread, float count, bool for_rows, bool for_columns) "
    "-> (Tensor loss, Tensor[] gradients)",
    "objective(Tensor g, Tensor s, Tensor x, Tensor? tau, float tau_value, bool normalize, float[] scales, "
    "float[] weights, bool gradient) -> (Tensor[] terms, Tensor[] kept)",
    "objective_backward(Tensor g, Tensor s, Tensor x, Tensor? tau, float tau_value, bool normalize, float[] scales, "
    "float[] weights, Tensor[] kept, Tensor upstream) -> Tensor[] gradients",
};

}  // namespace tclr
