// The CPU kernels' interface: pointers and sizes, no tensors.
#pragma once
#include "../rows.h"

namespace tclr {

// Runs task(argument, i, thread) for i in [0, n). Tasks start in the order of i, so a task may wait for an earlier one.
// Two tasks with the same `thread` never run at the same time.
using Task = void (*)(void* argument, int64_t i, int64_t thread);
struct Executor {
  void (*run)(int64_t n, Task task, void* argument);
  int64_t threads;
  double least = 5e6;  // the work, as `group_work` counts it, from which several threads are used
};

struct GramInput {
  int64_t G, V, N, D;
  const Rows* sets;  // [V]
  Dtype dtype;
  double tau;
  bool normalize, cross;  // cross: see Problem
  // Forward leaves its rows and tiles in the workspace, which is then as large as backward's, and backward reuses them.
  bool keep = false;
};

// T is double for f64 inputs and float for the others; term, neg, pos, g_*: [G, V, V, N], contiguous.
template <typename T>
struct GramForward {
  T *term, *neg, *pos;
};

template <typename T>
struct Gradient {  // of one set: [G, N, D], its rows contiguous
  T* data;
  int64_t stride_g, stride_n;
  bool add;  // to the values in memory, instead of overwriting them
};

template <typename T>
struct GramBackward {
  const T *neg, *pos;
  const T *g_term, *g_neg, *g_pos;  // null: no upstream gradient
  const Gradient<T>* dz;            // [V]
  T* zdz;                           // [G, V, N]
};

// The matches of one row among the columns of a set, sorted by key: begin .. end have the row's key, and own has its
// index, or is -1.
struct Match {
  int64_t begin, end, own;
};

struct Side {
  int64_t sets, N;
  const Rows* rows;      // [sets]
  const int64_t* order;  // [G, N] the permutation that sorts the rows by key; not read without keys
};

// The operation of tclr_kernels/general.py. With keys both sides are taken in the order of their keys, so that the
// positives of a row are neighbours.
struct RectangleInput {
  int64_t G, D;
  Side rows, columns;
  bool symmetric, keys;  // symmetric: the rows are the columns
  const Match* match;    // [G, n] of the sorted rows; null: no row has the index or the key of a column
  Dtype dtype;
  double tau;
  bool normalize, cross;
  // The call for the sums leaves the rows and the similarities in the workspace, and the call for the gradients (with
  // the rows as anchors) reuses them.
  bool keep = false;
};

// What the weights W are computed from, with the rows of one side as anchors: saved outputs and upstream gradients,
// contiguous [G, A, C, n], or null.
struct Anchors {
  const double *neg{}, *g_neg{}, *g_pos{};
  const double *pos_lse{}, *g_pos_lse{}, *g_spread{}, *count{};
  const double *negatives{}, *g_pairs{};
};

enum class Wanted { blocks, pairs, gradients };

// Outputs are [G, A, C, n], contiguous; null: not wanted.
template <typename T>
struct RectangleCall {
  Wanted wanted;
  double *neg{}, *pos{}, *pos_lse{}, *spread{}, *count{};  // blocks
  T* mean{};                                               // [G, n, D]
  const double* negatives{};                               // pairs: [G, A, C, n]
  double *sums{}, *slope{};
  Anchors of_rows{}, of_columns{};           // gradients
  const Gradient<T>*d_rows{}, *d_columns{};  // one for each set
  // <r, dr> of each row [G, A, n], or <z, dz> of each column [G, C, K] if only the columns' gradients are wanted
  T* along{};

  bool of_pairs() const { return wanted == Wanted::pairs || of_rows.negatives || of_columns.negatives; }
};

// The terms of n rows with labels, softplus(neg - pos_lse) + spread, and the gradients of their sum times `scale`.
// Without a spread, that part is left out; with one, a row without positives has the term 0.
template <typename T>
struct LabelledTerms {
  int64_t n;
  const double *neg, *pos_lse, *spread, *count;
  double scale;
  T* terms;
  double *g_neg{}, *g_pos_lse{}, *g_spread{};  // null: no gradient is wanted
};

template <typename T>
struct Kernels {
  // The size of the workspace that forward or backward needs, in elements of T.
  int64_t (*workspace)(const GramInput&, int64_t threads, bool backward);
  void (*forward)(const GramInput&, const GramForward<T>&, T* workspace, const Executor&);
  void (*backward)(const GramInput&, const GramBackward<T>&, T* workspace, const Executor&);
  // The local-local loss (LL) from pos [V, V, N], the similarities between clips of the same video. A set is one clip
  // of one view: first all clips of view 0, then those of view 1. loss: [V, N]; g_pos: [V, V, N], `scale` times the
  // derivative of the sum of the losses.
  void (*local_local)(int64_t V, int64_t N, const T* pos, double scale, T* loss, T* g_pos, const Executor&);
  // The largest magnitude of n values; infinity where one of them is NaN.
  T (*largest)(const T* values, int64_t n);
  int64_t (*rectangle_workspace)(const RectangleInput&, const RectangleCall<T>&, int64_t threads);
  void (*rectangle)(const RectangleInput&, const RectangleCall<T>&, T* workspace, const Executor&);
  void (*labelled_terms)(const LabelledTerms<T>&);
};

struct Level {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
};

// The instruction-set levels compiled in, lowest first; the one in use is the highest that this machine has, or the one
// that TCLR_KERNELS_ISA names.
int level_count();
const Level& level(int i);
bool level_runs_here(int i);
const Level& level_in_use();  // throws std::runtime_error if TCLR_KERNELS_ISA names one that cannot run here

extern const Level portable_level;
#if defined(__x86_64__)
extern const Level avx2_level;
extern const Level avx512_level;
#endif

}  // namespace tclr
