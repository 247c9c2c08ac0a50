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
ObjectiveMemory objective_memory(const ObjectiveCall& call);

const char* gram_forward(const GramCall& call, void* memory, void* stream);
const char* gram_backward(const GramCall& call, void* memory, void* stream);
const char* objective_forward(const ObjectiveCall& call, void* kept, void* memory, void* stream);
const char* objective_backward(const ObjectiveCall& call, void* kept, void* stream);

}  // namespace cuda
}  // namespace tclr
