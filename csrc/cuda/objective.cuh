// The TCLR objective on a CUDA device: its problems side by side in the same launches.
//
//   ic_global   G = 1, V = the views,             N = the videos, from g
//   ic_local    G = 1, V = the views' local clips, N = the videos, from x; its matrix holds LL's similarities too
//   ll          G = the videos, V = the views,    N = the clips,  from x, where ic_local is not computed
//   gl          G = the videos, V = the views of s, then those of x, cross
//
// Forward: read_inputs, sum_all_tiles, finish_objective, then where a gradient is wanted make_all_gradients.
// Backward: write_gradients, which multiplies by what comes from above before it divides by the rows' norms: rows so
// short that their gradient is infinite but for that factor exist.
#pragma once
#include "gram.cuh"

namespace tclr {
namespace {

using cuda::Input;
using cuda::ObjectiveCall;

constexpr int objective_launches = 5;  // forward and backward together

enum Term { ic_global, ic_local, ll, gl, terms_of_objective };

struct InputRow {
  int input;  // 0: g, 1: s, 2: x
  int64_t v, i, t;
};

template <typename T>
struct Objective {
  ObjectiveCall call;
  int count = 0;
  Term kinds[3];
  Gram<T> problems[3];
  double* sums;      // [2, finish blocks] of terms, and of LL beside ic_local
  double* along;     // [write blocks] of <z, dz>
  unsigned* ticket;  // 0 between launches

  constexpr const Input& input(int k) const { return k == 0 ? call.g : k == 1 ? call.s : call.x; }
  constexpr int64_t rows_of(int k) const { return call.V * call.B * (k == 0 ? 1 : call.T); }
  constexpr int64_t write_blocks() const {
    int64_t rows = rows_of(0) + rows_of(1) + rows_of(2);
    return (rows * 32 + threads - 1) / threads;
  }
  constexpr bool with_ll(Term kind) const { return kind == ic_local && call.weights[ll] != 0; }
  constexpr double upstream(Term kind) const { return call.scales[kind] * call.weights[kind]; }

  // The row of the inputs that a problem's row is.
  constexpr InputRow source(Term kind, const Place& r) const {
    switch (kind) {
      case ic_global:
        return {0, r.a, r.i, 0};
      case ic_local:
        return {2, r.a / call.T, r.i, r.a % call.T};
      case ll:
        return {2, r.a, r.g, r.i};
      default:
        return r.a < call.V ? InputRow{1, r.a, r.g, r.i} : InputRow{2, r.a - call.V, r.g, r.i};
    }
  }
  // The other way round; no row of the problem: a < 0.
  constexpr Place target(Term kind, const InputRow& r) const {
    switch (kind) {
      case ic_global:
        return r.input == 0 ? Place{0, r.v, r.i} : Place{0, -1, 0};
      case ic_local:
        return r.input == 2 ? Place{0, r.v * call.T + r.t, r.i} : Place{0, -1, 0};
      case ll:
        return r.input == 2 ? Place{r.i, r.v, r.t} : Place{0, -1, 0};
      default:
        return r.input == 0 ? Place{0, -1, 0} : Place{r.i, r.v + (r.input == 2 ? call.V : 0), r.t};
    }
  }
  constexpr Source at(const InputRow& r) const {
    const Input& from = input(r.input);
    return {from.data, call.dtype, r.v * from.strides[0] + r.i * from.strides[1] + r.t * from.strides[2],
            from.strides[3]};
  }
};

// The problem that a block works for; `block` becomes its number among the problem's.
template <auto blocks, typename T>
TCLR_DEVICE int problem_of(const Objective<T>& o, int64_t& block) {
  int k = 0;
  for (; k < o.count - 1 && block >= (o.problems[k].*blocks)(); ++k) block -= (o.problems[k].*blocks)();
  return k;
}

template <auto blocks, typename T>
int64_t all_blocks(const Objective<T>& o) {
  int64_t n = 0;
  for (int k = 0; k < o.count; ++k) n += (o.problems[k].*blocks)();
  return n;
}

// Whether this block is the last to come here: what the others wrote before is then visible to it.
TCLR_DEVICE bool last_block(unsigned* ticket) {
  unsigned* before = shared_memory<unsigned>();
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *before = atomicAdd(ticket, 1u);
  __syncthreads();
  bool last = *before == gridDim.x - 1;
  __syncthreads();
  if (last && threadIdx.x == 0) *ticket = 0;
  __threadfence();
  return last;
}

// In the order of the numbers, whichever threads add them.
TCLR_DEVICE double sum_of_all(const volatile double* x, int64_t n) {
  double sum = 0;
  for (int64_t k = threadIdx.x; k < n; k += threads) sum += x[k];
  return sum_over_block(sum, shared_memory<double>());
}

template <typename T>
TCLR_KERNEL read_inputs(TCLR_ARGUMENT Objective<T> o) {
  int64_t block = blockIdx.x;
  int k = problem_of<&Gram<T>::row_blocks>(o, block);
  const Gram<T>& p = o.problems[k];
  if (blockIdx.x == 0 && threadIdx.x == 0) *o.ticket = 0;
  for (int64_t g = block * threads + threadIdx.x; g < p.G; g += p.row_blocks() * threads) p.largest[g] = 0;
  int64_t row = (block * threads + threadIdx.x) / 32;
  read_row<Same<T>>(p, p.z, p.ldz, row, o.at(o.source(o.kinds[k], p.place(row))), row < p.rows() ? p.D : 0);
}

template <typename T>
TCLR_KERNEL sum_all_tiles(TCLR_ARGUMENT Objective<T> o) {
  int64_t block = blockIdx.x;
  const Gram<T>& p = o.problems[problem_of<&Gram<T>::sum_blocks>(o, block)];
  sums(p, block);
}

template <typename T>
TCLR_DEVICE void write_terms(const Objective<T>& o) {
  double sums[terms_of_objective] = {}, total = 0;
  int64_t first = 0, all = gridDim.x;
  for (int k = 0; k < o.count; ++k) {
    int64_t n = o.problems[k].finish_blocks();
    sums[o.kinds[k]] = sum_of_all(o.sums + first, n);
    if (o.with_ll(o.kinds[k])) sums[ll] = sum_of_all(o.sums + all + first, n);
    first += n;
  }
  if (threadIdx.x != 0) return;
  for (int k = 0; k < terms_of_objective; ++k) {
    total += o.upstream(Term(k)) * sums[k];
    *static_cast<T*>(o.call.terms[1 + k]) = T(o.call.scales[k] * sums[k]);
  }
  *static_cast<T*>(o.call.terms[0]) = T(total);
}

template <typename T>
TCLR_KERNEL finish_objective(TCLR_ARGUMENT Objective<T> o) {
  int64_t block = blockIdx.x;
  int k = problem_of<&Gram<T>::finish_blocks>(o, block);
  const Gram<T>& p = o.problems[k];
  Term kind = o.kinds[k];
  double* shared = shared_memory<double>();
  Finisher<T> f(p, block);
  double of_terms = terms(f), of_ll = 0;
  if (o.call.gradient) coefficients(f, Upstream<T>{nullptr, nullptr, nullptr, o.upstream(kind)}, shared);
  if (o.with_ll(kind)) of_ll = local_local(f, o.upstream(ll), o.call.gradient, shared);
  if (o.call.gradient) note_largest(f);
  of_terms = sum_over_block(of_terms, shared), of_ll = sum_over_block(of_ll, shared);
  if (threadIdx.x == 0) o.sums[blockIdx.x] = of_terms, o.sums[gridDim.x + blockIdx.x] = of_ll;
  if (last_block(o.ticket)) write_terms(o);
}

template <typename T>
TCLR_KERNEL make_all_gradients(TCLR_ARGUMENT Objective<T> o) {
  int64_t block = blockIdx.x;
  const Gram<T>& p = o.problems[problem_of<&Gram<T>::gradient_blocks>(o, block)];
  gradient(p, block);
}

template <typename T>
TCLR_DEVICE InputRow input_row(const Objective<T>& o, int64_t row) {
  int k = 0;
  for (; k < 2 && row >= o.rows_of(k); ++k) row -= o.rows_of(k);
  int64_t clips = k == 0 ? 1 : o.call.T;
  return {k, row / clips / o.call.B, row / clips % o.call.B, row % clips};
}

template <typename T>
TCLR_KERNEL write_gradients(TCLR_ARGUMENT Objective<T> o) {
  double* shared = shared_memory<double>();
  int64_t row = (int64_t(blockIdx.x) * threads + threadIdx.x) / 32;
  bool valid = row < o.rows_of(0) + o.rows_of(1) + o.rows_of(2);
  InputRow r = input_row(o, valid ? row : 0);
  Share<T> shares[3] = {};
  bool reached = false;
  for (int k = 0; k < 3; ++k) {
    if (k >= o.count || !valid) continue;
    Place place = o.target(o.kinds[k], r);
    if (place.a >= 0) shares[k] = share(o.problems[k], place), reached = true;
  }
  int64_t clips = r.input == 0 ? 1 : o.call.T, first = ((r.v * o.call.B + r.i) * clips + r.t) * o.call.D;
  double tau = value_of(o.call.tau), upstream = value_of(o.call.upstream);
  double along = write_row(o.at(r), valid ? o.call.D : 0, o.call.normalize && reached, shares, upstream / tau,
                           o.input(r.input).gradient, first, shared);
  along = sum_over_block(reached && threadIdx.x % 32 == 0 ? along : 0, shared);
  if (threadIdx.x == 0) o.along[blockIdx.x] = along;
  if (!last_block(o.ticket)) return;
  double all = sum_of_all(o.along, gridDim.x);
  if (threadIdx.x == 0) *static_cast<T*>(o.call.g_tau) = T(-all * upstream / (2 * tau * tau));
}

}  // namespace
}  // namespace tclr
