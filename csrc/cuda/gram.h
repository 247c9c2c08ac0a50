// The CUDA kernels' interface: pointers and sizes, no tensors. Every call returns nothing, or what went wrong.
#pragma once
#include <cstddef>

#include "../rows.h"

namespace tclr {
namespace cuda {

struct Scalar {  // on the device, or a value
  const void* data;
  Dtype dtype;
  double value;
};

struct Set {
  Rows rows;
  void* gradient;  // [G, N, D], of the rows' dtype, contiguous
};

// neg, pos, term and their gradients: [G, V, V, N] and zdz: [G, V, N], in double for f64 and in float for the others.
struct GramCall {
  int64_t G, V, N, D;
  const Set* sets;  // [V]
  Dtype dtype;
  Scalar tau;
  bool normalize, cross, tf32;         // tf32: products of floats may be rounded to it
  void *term, *neg, *pos;              // written by the forward, neg and pos read by the backward
  const void *g_term, *g_neg, *g_pos;  // null: no gradient arrives there
  void* zdz;
};

// Of a side of a rectangle, [G, N] by strides; null: none.
struct Keys {
  const int64_t* data;
  int64_t stride_g, stride_n;
};

// What the weights are made of with the rows of one side as the anchors: [G, sets, sets of the other side, N], null
// where there is none; g_neg null beside neg: all of it is 1.
struct Anchors {
  const double *neg, *g_neg, *g_pos;                     // of every call but for pairs
  const double *pos_lse, *g_pos_lse, *g_spread, *count;  // with keys
  const double *negatives, *g_pairs;                     // of pairs
};

// Rows against columns: what tclr_kernels/general.py defines. Results and gradients of anchors are laid out as Anchors.
struct RectangleCall {
  GramCall rows, columns;  // their sizes, sets and settings, and zdz of a side whose gradient is wanted
  bool symmetric;          // the rows are the columns: of_rows holds for both, and there is no gradient of columns
  int64_t first;           // the rows' place among the columns, or -1
  Keys row_keys, column_keys;
  double *neg, *pos, *pos_lse, *spread, *count;  // written by the forward, the last three with keys
  double *pair_sums, *slope;                     // written by it in their place, where there are of_rows.negatives
  void* mean;                                    // [G, n, D], of the arithmetic's type; null: not wanted
  Anchors of_rows, of_columns;
  bool for_rows, for_columns;  // which gradients are wanted
};

// The TCLR objective: g [V, B, 1, D], s and x [V, B, T, D] by their strides; weights of ic_global, ic_local, ll, gl.
struct Input {
  const void* data;
  int64_t strides[4];
  void* gradient;  // contiguous, of the input's dtype
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
  void* g_tau;  // of the terms' dtype
};

struct ObjectiveMemory {
  size_t kept, scratch;  // bytes; what the backward reads, and what the forward alone does
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
