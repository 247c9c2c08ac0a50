// The TCLR objective on a CUDA device. All of its problems are computed in the same launches:
//
//   ic_global   G = 1, V = the views,              N = the videos, from g
//   ic_local    G = 1, V = the views' local clips, N = the videos, from x; its matrix has the similarities of ll, too
//   ll          G = the videos, V = the views,     N = the clips,  from x, if ic_local is not computed
//   gl          G = the videos, V = the views of s and those of x, N = the clips, cross
//
// The forward has the kernels read_inputs, sum_all_tiles and finish_objective. In the last one, some thread blocks add
// up the terms, and the others compute parts of the gradient, from coefficients that each of them computes itself. The
// backward has the kernel write_gradients. It adds up the parts, and multiplies by the upstream gradient before it
// divides by the rows' norms, since without this factor the gradient of a row of tiny norm could be infinite.
//
// The coefficients of very confident pairs may be below float's range. They are therefore kept as logarithms, until a
// block knows the largest coefficient that it uses. The unit of its part is a power of two near that.
#pragma once
#include "gram.cuh"

namespace tclr {
namespace {

using cuda::Input;
using cuda::ObjectiveCall;

constexpr int objective_launches = 4;  // forward and backward together

enum Term { ic_global, ic_local, ll, gl, terms_of_objective };

struct InputRow {
  int input;  // 0: g, 1: s, 2: x
  uint32_t v, i, t;
};

template <typename T>
struct Objective {
  static constexpr int chunk = 128;  // features of a thread block in write_gradients
  ObjectiveCall call;
  int count = 0;
  Term kinds[3];
  Gram<T> problems[3];  // they share one z, the unit rows of g, s and x
  Norm<T>* norms;       // of the rows of z
  T log_upstream[terms_of_objective];
  double* along_blocks;                               // [thread blocks of finish_objective], sums of <z, dz>
  uint32_t sum_blocks, term_blocks, gradient_blocks;  // thread blocks for all problems together
  Divisor B, clips, of_chunks;                        // sizes
  uint32_t of_s, of_x;                                // the first rows of s and of x in z
  double* sums;                                       // [2, term blocks], of terms, and of LL if from ic_local
  unsigned* ticket;                                   // counts finished blocks; 0 between launches
  unsigned quads;                                     // bit k: whether rows of input k can be read as Quad<T>

  constexpr const Input& input(int k) const { return k == 0 ? call.g : k == 1 ? call.s : call.x; }
  constexpr int64_t rows_of(int k) const { return call.V * call.B * (k == 0 ? 1 : call.T); }
  constexpr int64_t rows() const { return rows_of(0) + rows_of(1) + rows_of(2); }
  constexpr int64_t ldz() const { return (call.D + 3) / 4 * 4; }
  constexpr int64_t chunks() const { return (call.D + chunk - 1) / chunk; }
  constexpr bool with_ll(Term kind) const { return kind == ic_local && call.weights[ll] != 0; }
  constexpr double upstream(Term kind) const { return call.scales[kind] * call.weights[kind]; }

  // The row of a problem for a row of an input; a < 0 if the problem does not use this input.
  constexpr Place place(Term kind, const InputRow& r) const {
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
  TCLR_METHOD InputRow row(uint32_t row) const {
    int k = (row >= of_s) + (row >= of_x);
    row -= k == 0 ? 0 : k == 1 ? of_s : of_x;
    uint32_t t = k == 0 ? 0 : last_digit(row, clips), i = last_digit(row, B);
    return {k, row, i, t};
  }
  TCLR_METHOD Source at(const InputRow& r) const {
    const Input& from = input(r.input);
    return {from.data, call.dtype, r.v * from.strides[0] + r.i * from.strides[1] + r.t * from.strides[2],
            from.strides[3]};
  }
};

// The problem of a thread block. `block` becomes its number within the problem.
template <typename T>
TCLR_DEVICE int problem_of(const Objective<T>& o, uint32_t Sizes::* blocks, uint32_t& block) {
  int k = 0;
  for (; k < o.count - 1 && block >= o.problems[k].of.*blocks; ++k) block -= o.problems[k].of.*blocks;
  return k;
}

template <typename T>
TCLR_KERNEL read_inputs(TCLR_ARGUMENT Objective<T> o) {
  uint32_t row = blockIdx.x * (threads / 32) + threadIdx.x / 32;
  bool valid = row < o.rows();
  InputRow r = o.row(valid ? row : 0);
  Source x = o.at(r);
  wait_for_former();
  let_next_start();
  bool quads = o.quads >> r.input & 1;
  if (blockIdx.x == 0 && threadIdx.x == 0) *o.ticket = 0;
  const T* vector = static_cast<const T*>(x.data) + x.first;
  // calls f for the quads of this lane
  auto each = [&](auto f) {
    for (int64_t d = threadIdx.x % 32 * 4; d < o.ldz() && valid; d += 128) {
      Quad<T> q;
      if (quads)
        q = quad(vector + d);
      else
        for (int e = 0; e < 4; ++e) q.x[e] = d + e < o.call.D ? value_at<T>(x, d + e) : 0;
      f(q, d);
    }
  };
  auto each_value = [&](auto f) {
    each([&](const Quad<T>& q, int64_t) {
      for (T x : q.x) f(x);
    });
  };
  Norm<T> norm = o.call.normalize ? norm_of<T>(32, each_value) : Norm<T>{1, 1};
  if (valid && threadIdx.x % 32 == 0) o.norms[row] = norm;
  T first = 1 / norm.scale, second = norm.rest == 0 ? 0 : 1 / norm.rest;
  each([&](Quad<T>& q, int64_t d) {
    for (T& x : q.x) x = x * first * second;
    *reinterpret_cast<Quad<T>*>(o.problems[0].z + row * o.ldz() + d) = q;
  });
}

template <typename T>
TCLR_KERNEL_OF(tile_threads, blocks_at_once<T>)
sum_all_tiles(TCLR_ARGUMENT Objective<T> o) {
  uint32_t block = blockIdx.x;
  const Gram<T>& p = o.problems[problem_of(o, &Sizes::sum_blocks, block)];
  wait_for_former();
  let_next_start();
  sums(p, block);
}

// ---- terms and coefficients

// log(1 + exp(-|t|)). Its absolute error is small, which suffices since it is added to another logarithm.
template <typename T>
TCLR_DEVICE T log_of_more(T t) {
  return logarithm(1 + exponential(t > 0 ? -t : t));
}

template <typename T>
TCLR_DEVICE T log_sigmoid(T t) {
  return (t < 0 ? t : 0) - log_of_more(t);
}

template <typename T>
TCLR_DEVICE T log_add(T x, T y) {
  T high = x > y ? x : y, low = x > y ? y : x;
  return low == -INFINITY ? high : high + log_of_more(low - high);
}

// A term of an anchor, from its log-sum-exps over its own set and over the other set, and from its positive.
template <typename T>
struct Pair {
  T high, more;  // log(exp own + exp other) = high + more
  T excess;      // this minus the positive

  TCLR_METHOD Pair(T own, T other, T pos) : high(own > other ? own : other) {
    T low = own > other ? other : own;
    more = low == -INFINITY ? 0 : log_of_more(low - high);
    excess = (high - pos) + more;
  }
  // The logarithm of the share of one of the two sets in the sum.
  TCLR_METHOD T share(T of) const { return (of - high) - more; }
};

// An anchor of a problem. Its neg and pos with set c are at first + N * c.
template <typename T>
struct Anchor {
  const Gram<T>& p;
  uint32_t a, first;
  T own;  // neg with its own set, -inf in a cross problem

  TCLR_METHOD Anchor(const Gram<T>& p, const Place& r)
      : p(p), a(uint32_t(r.a)), first((uint32_t(r.g) * p.of.V + a) * p.of.V * p.of.N + uint32_t(r.i)) {
    own = p.cross ? -INFINITY : neg(a);
  }
  TCLR_METHOD bool exists(uint32_t c) const { return !p.cross || (2 * a < p.of.V) != (2 * c < p.of.V); }
  TCLR_METHOD bool paired(uint32_t c) const { return c != a && p.of.N > 1 && exists(c); }
  TCLR_METHOD T neg(uint32_t c) const {
    const T* part = p.neg + first + c * p.of.N;
    T all = *part;
    TCLR_ROLLED
    for (uint32_t k = 1; k < p.of.splits; ++k) all = log_add(all, part[k * p.V * p.rows()]);
    return all;
  }
  TCLR_METHOD T pos(uint32_t c) const { return p.pos[first + c * p.of.N]; }
  TCLR_METHOD Pair<T> with(uint32_t c) const { return {own, neg(c), pos(c)}; }
};

// The local-local loss (LL) of one anchor, from the sets of ic_local. Computed by the lanes that share the anchor.
template <typename T>
struct LocalLocal {
  uint32_t mate;
  T negatives, excess;

  TCLR_METHOD LocalLocal(const Anchor<T>& x, int lanes) {
    uint32_t a = x.a, V = x.p.of.V, lane = threadIdx.x % lanes;
    mate = a < V / 2 ? a + V / 2 : a - V / 2;
    T top = -INFINITY, sum = 0;
#pragma unroll 2
    for (uint32_t c = lane; c < V; c += lanes) {
      T pos = x.pos(c);
      if (c != a && c != mate) top = pos > top || pos != pos ? pos : top;
    }
    top = largest_over_row(top, lanes);
    TCLR_ROLLED
    for (uint32_t c = lane; c < V; c += lanes)
      if (c != a && c != mate) sum += exponential(x.pos(c) - top);
    sum = sum_over_row(sum, lanes);
    negatives = top + logarithm(sum), excess = negatives - x.pos(mate);
  }
};

// The coefficients of a tile's anchors, computed in the thread block that uses them; compare StoredCoefficients.
template <typename T>
struct ComputedCoefficients {
  static constexpr int numbers = 4;  // for each anchor: see `make`
  static constexpr T none = lowest<T>;
  const Gram<T>& p;
  T log_upstream, log_ll;
  bool with_ll;
  T *table, *tops;
  T power = none;  // the unit of the gradient is 2^power
  T along = 0;     // this thread's part of <z, dz> of one row

  TCLR_METHOD ComputedCoefficients(const Objective<T>& o, int k)
      : p(o.problems[k]),
        log_upstream(o.log_upstream[o.kinds[k]]),
        log_ll(o.log_upstream[ll]),
        with_ll(o.with_ll(o.kinds[k])) {
    table = Tile<T>(p.ldz).end(), tops = table + p.slots() * tile * numbers;
  }
  TCLR_METHOD const T* of(int slot, int r) const { return table + (slot * tile + r) * numbers; }

  // The logarithm of the coefficient of an anchor's neg with its own set, by the lanes that share the anchor.
  TCLR_METHOD T of_own_set(const Anchor<T>& x, int lanes) const {
    T all = -INFINITY;
#pragma unroll 2
    for (uint32_t c = threadIdx.x % lanes; c < p.of.V; c += lanes) {
      if (!x.paired(c)) continue;
      Pair<T> pair = x.with(c);
      all = log_add(all, log_sigmoid(pair.excess) + pair.share(x.own));
    }
    all = over_row(all, lanes, [](T x, T y) { return log_add(x, y); });
    return all + log_upstream;
  }
  // Computes the logarithms of the coefficient of an anchor's neg and of the negative and positive parts of pos's
  // coefficient, and neg minus the first of them. own, mates: whether any anchor of the call needs its coefficient with
  // its own set, and that of LL.
  TCLR_METHOD void make(const Anchor<T>& x, uint32_t c, bool own, bool mates, int lanes, T (&to)[numbers]) const {
    T neg = x.neg(c), of_neg = -INFINITY, less = -INFINITY, more = -INFINITY;  // less, more: the two parts of pos
    if (own) {
      T all = of_own_set(x, lanes);
      if (c == x.a) of_neg = all;
    }
    if (x.paired(c)) {
      Pair<T> pair(x.own, neg, x.pos(c));
      less = log_upstream + log_sigmoid(pair.excess), of_neg = less + pair.share(neg);
    }
    if (mates) {
      LocalLocal<T> of_ll(x, lanes);
      T g = log_ll + log_sigmoid(of_ll.excess);
      if (c == of_ll.mate)
        less = log_add(less, g);
      else if (c != x.a)
        more = g + (x.pos(c) - of_ll.negatives);
    }
    to[0] = of_neg == -INFINITY ? INFINITY : neg - of_neg, to[1] = of_neg, to[2] = less, to[3] = more;
  }
  TCLR_METHOD void read(const Block& I, const Block& J) {
    bool own = !p.cross && (p.of.whole || I.a == J.a);
    bool mates = with_ll && (p.of.whole || (I.a != J.a && I.index == J.index));
    wait_for_former();
    if (own || mates)
      read<4>(I, J, own, mates);
    else
      read<1>(I, J, false, false);
  }
  // The same, where some lanes share an anchor.
  template <int lanes>
  TCLR_METHOD void read(const Block& I, const Block& J, bool own, bool mates) {
    T top = none;
    each_anchor<lanes>(p, I, J, [&](int slot, int r, bool valid, const Place& x, int64_t c) {
      T made[numbers];
      make(Anchor<T>(p, x), uint32_t(c), own, mates, lanes, made);
      if (!valid) return;
      for (int k = 1; k < numbers; ++k)
        if (made[k] > top && made[k] < INFINITY) top = made[k];
      if (threadIdx.x % lanes == 0)
        *reinterpret_cast<Quad<T>*>(table + (slot * tile + r) * numbers) = {{made[0], made[1], made[2], made[3]}};
    });
    top = over_row(top, 32, [](T x, T y) { return y > x ? y : x; });
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
  }
  TCLR_METHOD T rescale() {
    T top = none, before = power;
    for (int k = 0; k < tile_threads / 32; ++k) top = tops[k] > top ? tops[k] : top;
    if (top == none) return 1;
    top = ceil(top * T(1.4426950408889634));
    top = top > 1000 ? 1000 : top < -1000 ? -1000 : top;
    if (top <= power) return 1;
    power = top;
    T by = before == none ? 0 : exp2(before - power);
    along *= by;
    return by;
  }
  TCLR_METHOD T in_unit(T logarithm) const { return logarithm - power * T(0.6931471805599453); }
  TCLR_METHOD T negative(int slot, int r, T s) const { return exponential(in_unit(s - *of(slot, r))); }
  TCLR_METHOD T positive(int slot, int r) const {
    const T* x = of(slot, r);
    return exponential(in_unit(x[3])) - exponential(in_unit(x[2]));
  }
  TCLR_METHOD void add_weight(T weight, T product) { along += weight * product; }
  TCLR_METHOD double unit() const { return power == none ? 1 : ldexp(1.0, int(power)); }
};

// ---- the sums of the terms

TCLR_DEVICE double sum_over_warps(const double* x, int warps) {
  double sum = 0;
  for (int k = 0; k < warps; ++k) sum += x[k];
  return sum;
}

// The terms of an anchor with the sets of this lane, and its LL term.
template <typename T>
TCLR_DEVICE void terms_of(const Objective<T>& o, int k, uint32_t row, double& of_pairs, double& of_ll) {
  const Gram<T>& p = o.problems[k];
  bool valid = row < p.rows(), with_ll = o.with_ll(o.kinds[k]);
  uint32_t g = valid ? row : 0, i = last_digit(g, p.of.N), a = last_digit(g, p.of.V), lane = threadIdx.x % per_row;
  Anchor<T> x(p, {g, a, i});
  for (uint32_t c = lane; c < p.of.V && valid; c += per_row) {
    if (x.paired(c))
      of_pairs += softplus(x.with(c).excess);
    else if (c != a && x.exists(c))
      of_pairs += x.pos(c) - x.pos(c);
  }
  if (!with_ll) return;
  T excess = LocalLocal<T>(x, per_row).excess;
  if (valid && lane == 0) of_ll = softplus(excess);
}

// Adds up the sums of all blocks, each term by a warp. Their order does not depend on which block is the last.
template <typename T>
TCLR_DEVICE void write_terms(const Objective<T>& o, double* shared) {
  static_assert(tile_threads / 32 >= terms_of_objective);
  int term = threadIdx.x / 32;
  int64_t all = o.term_blocks, first = 0;
  const volatile double* sums = o.sums;
  double sum = 0;
  for (int k = 0; k < o.count; ++k) {
    int64_t n = o.problems[k].of.term_blocks, from = first + (o.kinds[k] == term ? 0 : all);
    bool here = o.kinds[k] == term || (term == ll && o.with_ll(o.kinds[k]));
    for (int64_t b = threadIdx.x % 32; b < n && here; b += 32) sum += sums[from + b];
    first += n;
  }
  sum = sum_over_row(sum, 32);
  if (threadIdx.x % 32 == 0) shared[term] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int k = 0; k < terms_of_objective; ++k) {
    total += o.upstream(Term(k)) * shared[k];
    *static_cast<T*>(o.call.terms[1 + k]) = T(o.call.scales[k] * shared[k]);
  }
  *static_cast<T*>(o.call.terms[0]) = T(total);
}

// Adds up the terms of some anchors. The last block to finish adds up the sums of all blocks.
template <typename T>
TCLR_DEVICE void add_terms(const Objective<T>& o, int64_t blocks) {
  constexpr int warps = tile_threads / 32;
  double *shared = shared_memory<double>(), of_pairs = 0, of_ll = 0;
  auto* last = reinterpret_cast<unsigned*>(shared + 2 * warps);
  uint32_t block = blockIdx.x;
  int k = problem_of(o, &Sizes::term_blocks, block);
  wait_for_former();
  terms_of(o, k, block * tile + threadIdx.x / per_row, of_pairs, of_ll);
  of_pairs = sum_over_row(of_pairs, 32), of_ll = sum_over_row(of_ll, 32);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = of_pairs, shared[warps + threadIdx.x / 32] = of_ll;
  __syncthreads();
  if (threadIdx.x == 0) {
    o.sums[blockIdx.x] = sum_over_warps(shared, warps);
    o.sums[blocks + blockIdx.x] = sum_over_warps(shared + warps, warps);
    __threadfence();
    *last = atomicAdd(o.ticket, 1u) == blocks - 1;
    if (*last) *o.ticket = 0;
  }
  __syncthreads();
  if (!*last) return;
  __threadfence();
  write_terms(o, shared);
}

// ---- the gradient

template <typename T, int groups>
TCLR_DEVICE void add_gradient(const Objective<T>& o, uint32_t block) {
  int k = problem_of(o, &Sizes::gradient_blocks, block);
  const Gram<T>& p = o.problems[k];
  Work<T> work(p, block);
  ComputedCoefficients<T> anchors(o, k);
  gradient<groups>(p, work, anchors);
  T along = sum_over_row(anchors.along, per_row);
  int r = threadIdx.x / per_row;
  bool first = work.first == 0 && threadIdx.x % per_row == 0 && r < count(p, work.I);
  if (first) p.along[work.row + r] = along;
  along = sum_over_row(first ? along : 0, 32);
  T* shared = shared_memory<T>();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = along;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double sum = 0, unit = anchors.unit();
  for (int w = 0; w < tile_threads / 32; ++w) sum += shared[w];
  o.along_blocks[blockIdx.x] = sum * unit;
  if (work.first == 0) p.units[work.number] = unit;
}

template <typename T, int groups>
TCLR_KERNEL_OF(tile_threads, groups > 1 ? 1 : blocks_at_once<T>)
finish_objective(TCLR_ARGUMENT Objective<T> o) {
  int64_t blocks = o.term_blocks;
  if (blockIdx.x < blocks)
    add_terms(o, blocks);
  else
    add_gradient<T, groups>(o, uint32_t(blockIdx.x - blocks));
}

// The gradient of the temperature, computed by one thread block.
template <typename T>
TCLR_DEVICE void write_tau(const Objective<T>& o, double* shared) {
  double sum = 0, tau = value_of(o.call.tau);
  int64_t first = o.term_blocks, n = o.gradient_blocks;
  for (int64_t k = threadIdx.x; k < n; k += threads) sum += o.along_blocks[first + k];
  sum = sum_over_row(sum, 32);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
  __syncthreads();
  double factor = value_of(o.call.upstream) / (2 * tau * tau);
  if (threadIdx.x == 0) *static_cast<T*>(o.call.g_tau) = T(-sum_over_warps(shared, threads / 32) * factor);
}

// Writes some features of the gradient of a row. Each warp adds up a quarter of the parts; then each thread writes one
// feature.
template <typename T>
TCLR_KERNEL write_gradients(TCLR_ARGUMENT Objective<T> o) {
  constexpr int warps = threads / 32, chunk = Objective<T>::chunk;
  double* shared = shared_memory<double>();
  wait_for_former();
  if (blockIdx.x == 0) return write_tau(o, shared);
  uint32_t row = blockIdx.x - 1;
  int64_t first = int64_t(last_digit(row, o.of_chunks)) * chunk;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t d = first + threadIdx.x;
  bool valid = d < o.call.D, reached = false;
  InputRow r = o.row(row);
  T z = valid ? o.problems[0].z[row * o.ldz() + d] : 0;
  Norm<T> norm = o.norms[row];
  double sum[4] = {}, along = 0;
  for (int k = 0; k < o.count; ++k) {
    const Gram<T>& p = o.problems[k];
    Place place = o.place(o.kinds[k], r);
    if (place.a < 0) continue;
    reached = true;
    const Sizes& of = p.of;
    uint32_t tile = uint32_t(place.g);
    if (!of.whole) tile = (tile * of.V + uint32_t(place.a)) * of.blocks + uint32_t(place.i) / of.size;
    const double* units = p.units + int64_t(tile) * of.parts;
    for (uint32_t part = warp; part < of.parts; part += warps) {
      int64_t at = part * p.rows() + p.row(place);
      double unit = units[part];
      along += p.along[at] * unit;
      if (first + 4 * lane >= p.ldz) continue;
      const Quad<T>& dz = quad(p.dz + at * p.ldz + first + 4 * lane);
      for (int x = 0; x < 4; ++x) sum[x] += dz.x[x] * unit;
    }
  }
  for (int x = 0; x < 4; ++x) shared[warp * chunk + 4 * lane + x] = sum[x];
  if (lane == 0) shared[warps * chunk + warp] = along;
  double scale = value_of(o.call.upstream) / (value_of(o.call.tau) * norm.rest);
  __syncthreads();
  if (!valid) return;
  double dz = 0;
  for (int w = 0; w < warps; ++w) dz += shared[w * chunk + threadIdx.x];
  if (o.call.normalize) dz -= z * sum_over_warps(shared + warps * chunk, warps);
  int64_t clips = r.input == 0 ? 1 : o.call.T, to = ((r.v * o.call.B + r.i) * clips + r.t) * o.call.D + d;
  put_value(o.input(r.input).gradient, o.call.dtype, to,
            reached && norm.rest != 0 ? dz * scale * double(1 / norm.scale) : 0);
}

}  // namespace
}  // namespace tclr
