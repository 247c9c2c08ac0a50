// The interface of the CUDA kernels, with pointers and sizes instead of tensors. Every call returns nullptr, or an
// error message.
#pragma once
#include <cstddef>

#include "../rows.h"

namespace tclr {
namespace cuda {

struct Scalar {  // `data` points to a number on the device, or is null, and then `value` is the number
  const void* data;
  Dtype dtype;
  double value;
};

struct Set {
  Rows rows;
  void* gradient;  // [G, N, D], contiguous, with the dtype of the rows
};

// neg, pos, term and their gradients: [G, V, V, N] and zdz: [G, V, N], in double for f64 and in float for the others.
struct GramCall {
  int64_t G, V, N, D;
  const Set* sets;  // [V]
  Dtype dtype;
  Scalar tau;
  bool normalize, cross, tf32;         // tf32: float32 products may be computed in TF32
  bool half;                           // whether rows of float32 were of half precision; only of rectangles
  void *term, *neg, *pos;              // outputs of the forward; the backward reads neg and pos
  const void *g_term, *g_neg, *g_pos;  // upstream gradients, null if not given
  void* zdz;
};

// The labels [G, N] of one side of a rectangle; data is null if there are none.
struct Keys {
  const int64_t* data;
  int64_t stride_g, stride_n;
};

// The outputs and upstream gradients of one side's rows as anchors, from which their weights in the gradient follow:
// [G, sets, sets of the other side, N], or null if not given. If neg is given and g_neg is null, g_neg is 1 everywhere.
struct Anchors {
  const double *neg = nullptr, *g_neg = nullptr, *g_pos = nullptr;  // in all calls except `pairs`
  const double *pos_lse = nullptr, *g_pos_lse = nullptr, *g_spread = nullptr, *count = nullptr;  // with keys
  const double *negatives = nullptr, *g_pairs = nullptr;                                         // in `pairs`
};

// Rows against columns, as tclr_kernels/general.py defines it. Outputs have the layout of Anchors.
struct RectangleCall {
  GramCall rows, columns;  // their sizes, sets and settings; zdz if the gradient of this side is requested
  bool symmetric;          // the rows are the columns: only of_rows and for_rows count
  int64_t first;           // the column that has the index of the first row, or -1
  Keys row_keys, column_keys;
  double *neg, *pos, *pos_lse, *spread, *count;  // outputs of the forward, the last three only with keys
  double *pair_sums, *slope;                     // outputs instead of these, if of_rows.negatives is given
  void* mean;                                    // output [G, n, D], in the type of the arithmetic; null: not requested
  Anchors of_rows, of_columns;
  bool for_rows, for_columns;  // which gradients are requested
};

// The TCLR objective. Inputs are g [V, B, 1, D], s and x [V, B, T, D] with any strides; the order of the terms is
// ic_global, ic_local, ll, gl.
struct Input {
  const void* data;
  int64_t strides[4];
  void* gradient;  // contiguous, with the dtype of the input
};

struct ObjectiveCall {
  int64_t V, B, T, D;
  Input g, s, x;
  Dtype dtype;
  Scalar tau;
  bool normalize, gradient;
  double scales[4], weights[4];
  void* terms[5];  // total and the four terms
  Scalar upstream;
  void* g_tau;  // with the dtype of the terms
};

struct ObjectiveMemory {
  size_t kept, scratch;  // bytes: kept for the backward, and used in the forward only
};

size_t gram_memory(const GramCall& call, bool backward);  // bytes
size_t rectangle_memory(const RectangleCall& call, bool backward);
ObjectiveMemory objective_memory(const ObjectiveCall& call);

const char* gram_forward(const GramCall& call, void* memory, void* stream);
const char* gram_backward(const GramCall& call, void* memory, void* stream);
const char* rectangle_forward(const RectangleCall& call, void* memory, void* stream);
const char* rectangle_backward(const RectangleCall& call, void* memory, void* stream);
const char* objective_forward(const ObjectiveCall& call, void* kept, void* memory, void* stream);
const char* objective_backward(const ObjectiveCall& call, void* kept, void* stream);

}  // namespace cuda
}  // namespace tclr
