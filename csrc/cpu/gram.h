// The CPU kernels' interface: pointers and sizes, no tensors.
#pragma once
#include "../rows.h"

namespace tclr {

// Runs task(argument, i, thread) for i in [0, n), begun in this order; a task may wait for one begun before it. Calls
// with the same thread never overlap.
using Task = void (*)(void* argument, int64_t i, int64_t thread);
struct Executor {
  void (*run)(int64_t n, Task task, void* argument);
  int64_t threads;
  double least = 5e6;  // the work, in the unit of `group_work`, that several threads are for
};

struct GramInput {
  int64_t G, V, N, D;
  const Rows* sets;  // [V]
  Dtype dtype;
  double tau;
  bool normalize, cross;
  bool keep = false;  // forward leaves in a workspace of backward's size what backward, given the same, need not redo
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
  bool add;  // to what is there
};

template <typename T>
struct GramBackward {
  const T *neg, *pos;
  const T *g_term, *g_neg, *g_pos;  // null: no gradient arrives there
  const Gradient<T>* dz;            // [V]
  T* zdz;                           // [G, V, N]
};

// Of one row, among the sorted columns of a set: those with its key, and the one with its index, or -1.
struct Match {
  int64_t begin, end, own;
};

struct Side {
  int64_t sets, N;
  const Rows* rows;      // [sets]
  const int64_t* order;  // [G, N] the rows sorted by their keys; not read without keys
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
  // The call for the sums leaves the rows and the similarities in the workspace, where the call for the gradients, of
  // the rows as anchors, finds them.
  bool keep = false;
};

// What the weights are made of with one side as anchors, contiguous [G, A, C, n]; null where there is none.
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
  const Gradient<T>*d_rows{}, *d_columns{};  // one a set
  T* along{};                                // [G, A, n], or [G, C, K] where only the columns' gradients are wanted

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
  double *g_neg, *g_pos_lse, *g_spread;  // null: no gradient is wanted
};

template <typename T>
struct Kernels {
  // Elements of T that forward or backward wants as workspace.
  int64_t (*workspace)(const GramInput&, int64_t threads, bool backward);
  void (*forward)(const GramInput&, const GramForward<T>&, T* workspace, const Executor&);
  void (*backward)(const GramInput&, const GramBackward<T>&, T* workspace, const Executor&);
  // LL from the similarities of the same video in different sets, pos: [V, V, N], the sets (v, t), v outermost.
  // loss: [V, N]; g_pos: [V, V, N], `scale` times the derivative of their sum.
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
