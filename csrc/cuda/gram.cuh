// The operation and its gradient in the arithmetic of their dtype: small problems, and those that want no less exact.
//
//   S[(a,i),(c,j)] = <z_(a,i), z_(c,j)> / tau
//   neg[a,c,i]     = log sum_{j != i} exp S           pos[a,c,i] = S[(a,i),(c,i)]
//   term[a,c,i]    = log(1 + (exp neg[a,a,i] + exp neg[a,c,i]) / exp pos[a,c,i])
//   W[(a,i),(c,j)] = [j != i] g_neg[a,c,i] exp(S - neg[a,c,i]) + [j = i] g_pos[a,c,i]
//   dz_(a,i)       = 1/tau sum_(c,j) (W + W^T)[(a,i),(c,j)] z_(c,j)
//
// Four steps of blocks, each with one writer for every value: rows, sums, coefficients, gradient. A step's blocks serve
// several problems at once.
#pragma once
#include "../problem.h"
#include "rows.cuh"

namespace tclr {
namespace {

constexpr int tile = 32;  // rows and columns of a tile of S
template <typename T>
constexpr int panel = 1024 / sizeof(T);  // features in shared memory at once
constexpr int lds = tile + 4;            // of the tile of S
template <typename T>
constexpr T lowest = sizeof(T) == 8 ? T(-1.7e308) : T(-3.4e38);  // finite: no difference of it is NaN

struct Place {  // a row of the problem
  int64_t g, a, i;
};

// One problem, and where its steps leave what the next ones read.
template <typename T>
struct Gram {
  int64_t G, V, N, D, ldz;
  bool normalize, cross;
  Scalar tau;
  T *z, *dz;                    // [G, V, N, ldz], dz once for every part
  Norm<T>* norms;               // [G, V, N]
  T *term, *neg, *pos;          // [G, V, V, N]
  double *g_neg, *g_pos;        // [G, V, V, N]
  unsigned long long* largest;  // [G] of g_neg and g_pos, as bits
  int64_t parts;                // of the sets that contribute to a row, so that few rows fill the device
  double boost;                 // of the weights, beyond the unit of their group

  // A group whose rows fit a tile is one tile; else each set is cut into blocks of rows.
  constexpr bool whole() const { return V * N <= tile; }
  constexpr Problem sets() const { return {V, N, cross, tile, 1}; }
  constexpr Problem tiles() const { return whole() ? Problem(1, V * N, false, tile, 1) : sets(); }
  constexpr int64_t rows() const { return G * V * N; }
  constexpr int64_t row(const Place& r) const { return (r.g * V + r.a) * N + r.i; }
  constexpr int64_t at(int64_t g, int64_t a, int64_t c, int64_t i) const { return ((g * V + a) * V + c) * N + i; }
  constexpr Place place(int64_t row) const { return {row / (V * N), row / N % V, row % N}; }
  constexpr int lanes() const {  // that finish a row: one for each set, 32 at most
    int n = 1;
    while (n < V && n < 32) n *= 2;
    return n;
  }
  constexpr int64_t panels() const { return (ldz + panel<T> - 1) / panel<T>; }

  constexpr int64_t row_blocks() const { return (rows() * 32 + threads - 1) / threads; }
  constexpr int64_t sum_blocks() const { return whole() ? G : G * V * V * sets().blocks; }
  constexpr int64_t finish_blocks() const { return (rows() * lanes() + threads - 1) / threads; }
  constexpr int64_t gradient_blocks() const { return G * tiles().V * tiles().blocks * parts * panels(); }
};

// Memory of a tile: two panels of rows, and S.
template <typename T>
struct Tile {
  int ldp;  // of the panels
  T *rows, *columns, *S;

  static constexpr int width(int64_t ldz) { return int(ldz < panel<T> ? ldz : panel<T>); }
  static constexpr size_t size(int64_t ldz) { return sizeof(T) * tile * (2 * (width(ldz) + 4) + lds); }
  TCLR_METHOD explicit Tile(int64_t ldz) {
    ldp = width(ldz) + 4;
    rows = shared_memory<T>();
    columns = rows + tile * ldp;
    S = columns + tile * ldp;
  }
};

template <typename T>
struct alignas(16) Quad {
  T x[4];
};

template <typename T>
TCLR_DEVICE const Quad<T>& quad(const T* p) {
  return *reinterpret_cast<const Quad<T>*>(p);
}

// ---- rows

template <typename T>
struct Same {  // rows kept in the arithmetic's own type
  using Element = T;
  static constexpr T of(T x) { return x; }
};

// One row's norm and unit row, by 32 lanes; z: [rows, ldz] of E's elements.
template <typename E, typename T>
TCLR_DEVICE void read_row(const Gram<T>& p, typename E::Element* z, int64_t ldz, int64_t row, const Source& x,
                          int64_t D) {
  T* shared = shared_memory<T>();
  Norm<T> norm = p.normalize ? norm_of(x, D, 32, shared) : Norm<T>{1, 1};
  if (D == 0) return;
  for (int64_t d = threadIdx.x % 32; d < ldz; d += 32)
    z[row * ldz + d] = E::of(d < D ? unit_value(value_at<T>(x, d), norm) : 0);
  if (threadIdx.x % 32 == 0) p.norms[row] = norm;
}

// ---- tiles

// Some rows of a set, and from which feature on, into shared memory; zeros where there are none.
template <typename T>
TCLR_DEVICE void load(const T* z, int64_t ldz, int64_t rows, int width, T* to, int ldp) {
  int quads = width / 4;
  for (int k = threadIdx.x; k < tile * quads; k += threads) {
    int r = k / quads, d = k % quads * 4;
    Quad<T> q = r < rows ? quad(z + r * ldz + d) : Quad<T>{};
    *reinterpret_cast<Quad<T>*>(to + r * ldp + d) = q;
  }
}

struct Block {  // of rows
  int64_t g, a, index;
};

template <typename T>
struct Span {  // rows as they lie in memory
  const T* z;
  int64_t rows;
};

template <typename T>
TCLR_DEVICE Span<T> span(const Gram<T>& p, const Problem& problem, const Block& b) {
  return {p.z + p.row({b.g, b.a, problem.begin(b.index)}) * p.ldz, problem.rows(b.index)};
}

// S of two blocks of rows; `put(r, j, s)` is what the tile shall hold. The rows of I are already there if `again`.
// A thread makes 2 x 4 of its entries.
template <typename T, typename Rows, typename Columns, typename Put>
TCLR_DEVICE void scores(const Gram<T>& p, Rows rows, Columns columns, const Tile<T>& t, bool again, T inverse_tau,
                        Put put) {
  int ty = threadIdx.x / 8, tx = threadIdx.x % 8;
  T sum[2][4] = {};
  for (int64_t d = 0; d < p.ldz; d += panel<T>) {
    int width = Tile<T>::width(p.ldz - d);
    if (!again || p.panels() > 1) load(rows().z + d, p.ldz, rows().rows, width, t.rows, t.ldp);
    load(columns().z + d, p.ldz, columns().rows, width, t.columns, t.ldp);
    __syncthreads();
    for (int k = 0; k < width; k += 4) {
      Quad<T> x[2], y[4];
      for (int q = 0; q < 2; ++q) x[q] = quad(t.rows + (ty + 16 * q) * t.ldp + k);
      for (int q = 0; q < 4; ++q) y[q] = quad(t.columns + (tx + 8 * q) * t.ldp + k);
      for (int e = 0; e < 4; ++e)
        for (int r = 0; r < 2; ++r)
          for (int j = 0; j < 4; ++j) sum[r][j] += x[r].x[e] * y[j].x[e];
    }
    __syncthreads();
  }
  for (int r = 0; r < 2; ++r)
    for (int j = 0; j < 4; ++j)
      t.S[(ty + 16 * r) * lds + tx + 8 * j] = put(ty + 16 * r, tx + 8 * j, sum[r][j] * inverse_tau);
  __syncthreads();
}

template <typename T, typename Put>
TCLR_DEVICE void scores(const Gram<T>& p, const Problem& problem, const Block& I, const Block& J, const Tile<T>& t,
                        bool again, T inverse_tau, Put put) {
  auto of = [&](const Block& b) { return [&] { return span(p, problem, b); }; };
  scores(p, of(I), of(J), t, again, inverse_tau, put);
}

// ---- sums

// (largest, sum) += exp(s), the pair meaning sum * exp(largest).
template <typename T>
TCLR_DEVICE void add_exponential(T& largest, T& sum, T s) {
  if (s > largest) {
    sum = sum * exp(largest - s) + 1;
    largest = s;
  } else {
    sum += exp(s - largest);
  }
}

// neg and pos of one group, all of it in one tile. A thread makes them for a row and a set.
template <typename T>
TCLR_DEVICE void sums_of_group(const Gram<T>& p, int64_t g) {
  Block all{g, 0, 0};
  Tile<T> t(p.ldz);
  scores(p, p.tiles(), all, all, t, false, T(1 / value_of(p.tau)), [](int, int, T s) { return s; });
  int N = int(p.N), V = int(p.V);
  for (int k = threadIdx.x; k < V * N * V; k += threads) {
    int row = k / V, c = k % V, a = row / N, i = row % N;
    const T* S = t.S + row * lds + c * N;
    bool exists = p.sets().exists(a, c);
    T largest = lowest<T>, sum = 0;
    for (int j = 0; j < N && exists; ++j)
      if (j != i) add_exponential(largest, sum, S[j]);
    int64_t at = p.at(g, a, c, i);
    p.neg[at] = largest + log(sum), p.pos[at] = exists && c != a ? S[i] : 0;
  }
}

// neg and pos of one block of rows with one set. Four threads share a row.
template <typename T>
TCLR_DEVICE void sums(const Gram<T>& p, int64_t block) {
  if (p.whole()) return sums_of_group(p, block);
  Problem problem = p.sets();
  int64_t c = block % p.V, index = block / p.V % problem.blocks, set = block / (p.V * problem.blocks);
  Block I{set / p.V, set % p.V, index};
  Tile<T> t(p.ldz);
  T inverse_tau = T(1 / value_of(p.tau)), largest = lowest<T>, sum = 0;
  int r = threadIdx.x / 4, quarter = threadIdx.x % 4;
  int64_t i = problem.begin(index) + r, at = p.at(I.g, I.a, c, i);
  bool valid = r < problem.rows(index), exists = problem.exists(I.a, c), paired = exists && c != I.a;
  if (valid && quarter == 0 && !paired) p.pos[at] = 0;
  for (int64_t b = 0; b < problem.blocks && exists; ++b) {
    scores(p, problem, I, {I.g, c, b}, t, b > 0, inverse_tau, [](int, int, T s) { return s; });
    int64_t first = problem.begin(b), count = problem.rows(b);
    for (int j = quarter; j < count && valid; j += 4) {
      T s = t.S[r * lds + j];
      if (first + j != i)
        add_exponential(largest, sum, s);
      else if (paired)
        p.pos[at] = s;
    }
  }
  T* shared = shared_memory<T>();
  __syncthreads();
  T top = over_row(largest, 4, shared, [](T x, T y) { return y > x ? y : x; });
  T all = over_row(T(sum * exp(largest - top)), 4, shared, [](T x, T y) { return x + y; });
  if (valid && quarter == 0) p.neg[at] = top + log(all);
}

// ---- coefficients

TCLR_DEVICE double log_add(double x, double y) {
  double high = x > y ? x : y, low = x > y ? y : x;
  return low == -INFINITY ? high : high + log1p(exp(low - high));
}

TCLR_DEVICE double softplus(double t) { return (t > 0 ? t : 0) + log1p(exp(t > 0 ? -t : t)); }

TCLR_DEVICE double sigmoid(double t) {
  double e = exp(t > 0 ? -t : t), r = 1 / (1 + e);
  return t > 0 ? r : e * r;
}

// A row and the lane that this thread is of it.
template <typename T>
struct Finisher {
  const Gram<T>& p;
  Place r;
  bool valid;
  int lane, lanes;

  TCLR_METHOD Finisher(const Gram<T>& p, int64_t block) : p(p) {
    lanes = p.lanes(), lane = threadIdx.x % lanes;
    int64_t row = (block * threads + threadIdx.x) / lanes;
    valid = row < p.rows();
    r = p.place(row);
  }
  TCLR_METHOD int64_t at(int64_t c) const { return p.at(r.g, r.a, c, r.i); }
  // Calls f for the sets that this lane serves.
  template <typename F>
  TCLR_METHOD void each(F f) const {
    for (int64_t c = lane; c < p.V && valid; c += lanes) f(c);
  }
  TCLR_METHOD bool paired(int64_t c) const { return c != r.a && p.sets().exists(r.a, c); }
  TCLR_METHOD double negatives(int64_t c) const {
    return p.cross ? p.neg[at(c)] : log_add(p.neg[at(r.a)], p.neg[at(c)]);
  }
};

// The sum of this thread's terms.
template <typename T>
TCLR_DEVICE double terms(const Finisher<T>& f) {
  double sum = 0;
  f.each([&](int64_t c) {
    double pos = f.p.pos[f.at(c)], term = 0;
    if (f.paired(c)) term = f.p.N > 1 ? softplus(f.negatives(c) - pos) : pos - pos;
    if (f.p.term) f.p.term[f.at(c)] = T(term);
    sum += term;
  });
  return sum;
}

// The gradients that arrive at a problem; of its terms perhaps the same for all.
template <typename T>
struct Upstream {
  const T *term, *neg, *pos;
  double all;
};

// The gradients of neg and pos.
template <typename T>
TCLR_DEVICE void coefficients(const Finisher<T>& f, const Upstream<T>& up, double* shared) {
  const Gram<T>& p = f.p;
  auto given = [](const T* x, int64_t at) { return x ? double(x[at]) : 0; };
  double g_own = 0;
  f.each([&](int64_t c) {
    int64_t at = f.at(c);
    double g_neg = p.sets().exists(f.r.a, c) ? given(up.neg, at) : 0, g_pos = f.paired(c) ? given(up.pos, at) : 0;
    double g_term = up.term ? up.term[at] : up.all;
    if (g_term != 0 && p.N > 1 && f.paired(c)) {
      double negatives = f.negatives(c), g = g_term * sigmoid(negatives - p.pos[at]);
      if (g != 0) g_neg += g * exp(p.neg[at] - negatives);
      if (g != 0 && !p.cross) g_own += g * exp(p.neg[f.at(f.r.a)] - negatives);
      g_pos -= g;
    }
    p.g_neg[at] = g_neg, p.g_pos[at] = g_pos;
  });
  g_own = sum_over_row(g_own, f.lanes, shared);
  if (f.valid && f.lane == f.r.a % f.lanes) p.g_neg[f.at(f.r.a)] += g_own;
}

// LL of one row, the sets being (v, t), v outermost; `scale` times its gradient is added to that of pos.
template <typename T>
TCLR_DEVICE double local_local(const Finisher<T>& f, double scale, bool gradient, double* shared) {
  const Gram<T>& p = f.p;
  int64_t mate = (f.r.a + p.V / 2) % p.V;
  auto negative = [&](int64_t c) { return c != f.r.a && c != mate; };
  double top = -INFINITY, total = 0;
  f.each([&](int64_t c) {
    double pos = p.pos[f.at(c)];
    if (negative(c)) top = pos > top || pos != pos ? pos : top;
  });
  top = largest_over_row(top, f.lanes, shared);
  f.each([&](int64_t c) {
    if (negative(c)) total += exp(p.pos[f.at(c)] - top);
  });
  total = sum_over_row(total, f.lanes, shared);
  if (!f.valid) return 0;
  double negatives = top + log(total), excess = negatives - p.pos[f.at(mate)], g = scale * sigmoid(excess);
  if (gradient && g != 0)
    f.each([&](int64_t c) {
      if (c == mate) p.g_pos[f.at(c)] -= g;
      if (negative(c)) p.g_pos[f.at(c)] += g * exp(p.pos[f.at(c)] - negatives);
    });
  return f.lane == 0 ? softplus(excess) : 0;
}

// The group's largest coefficient: a maximum, so it is the same in any order. As bits, positive numbers keep theirs.
template <typename T>
TCLR_DEVICE void note_largest(const Finisher<T>& f) {
  double top = 0;
  f.each([&](int64_t c) {
    for (double x : {f.p.g_neg[f.at(c)], f.p.g_pos[f.at(c)]})
      if (fabs(x) > top && fabs(x) < INFINITY) top = fabs(x);
  });
  auto bits = bits_as<unsigned long long>(top);
  if (f.valid && bits > f.p.largest[f.r.g]) atomicMax(&f.p.largest[f.r.g], bits);
}

// The power of two of the group's largest coefficient, in which its gradient is made: those of very confident pairs are
// below float's range.
template <typename T>
TCLR_DEVICE double unit(const Gram<T>& p, int64_t g) {
  double top = bits_as<double>(p.largest[g]);
  return (top > 1e-300 && top < 1e300 ? ldexp(1.0, ilogb(top)) : 1) / p.boost;
}

// ---- gradient

// W of one entry.
template <typename T>
TCLR_DEVICE T weight(const Gram<T>& p, int64_t at, T s, double inverse_unit) {
  T g = T(p.g_neg[at] * inverse_unit);
  return g == 0 ? 0 : g * exp(s - p.neg[at]);  // neg may be -inf here
}

// W + W^T of two blocks.
template <typename T>
TCLR_DEVICE void weights(const Gram<T>& p, const Problem& problem, const Block& I, const Block& J, const Tile<T>& t,
                         bool again, T inverse_tau, double inverse_unit) {
  auto place = [&](const Block& b, int r) -> Place {
    auto row = uint32_t(b.a * p.N + problem.begin(b.index) + r), N = uint32_t(p.N);
    return {b.g, row / N, row % N};
  };
  scores(p, problem, I, J, t, again, inverse_tau, [&](int r, int j, T s) -> T {
    if (r >= problem.rows(I.index) || j >= problem.rows(J.index)) return 0;
    Place row = place(I, r), column = place(J, j);
    int64_t at = p.at(row.g, row.a, column.a, row.i), back = p.at(row.g, column.a, row.a, column.i);
    if (row.i != column.i) return weight(p, at, s, inverse_unit) + weight(p, back, s, inverse_unit);
    return row.a == column.a ? 0 : T((p.g_pos[at] + p.g_pos[back]) * inverse_unit);
  });
}

// What a thread has of one panel of a gradient: 4 x 4 entries of every 64 features.
template <typename T>
struct PanelSum {
  static constexpr int groups = panel<T> / 64;
  int dx = threadIdx.x % 16 * 4, ry = threadIdx.x / 16 * 4, width;
  T sum[groups][4][4] = {};

  TCLR_METHOD explicit PanelSum(int width) : width(width) {}
  // Adds W z, W in the place of S, and z the panel of the columns.
  TCLR_METHOD void add(const Tile<T>& t) {
    for (int k = 0; k < tile; k += 4) {
      Quad<T> w[4];
      for (int r = 0; r < 4; ++r) w[r] = quad(t.S + (ry + r) * lds + k);
      for (int q = 0; q < groups; ++q) {
        if (q * 64 + dx >= width) continue;
        for (int e = 0; e < 4; ++e) {
          Quad<T> z = quad(t.columns + (k + e) * t.ldp + q * 64 + dx);
          for (int r = 0; r < 4; ++r)
            for (int x = 0; x < 4; ++x) sum[q][r][x] += w[r].x[e] * z.x[x];
        }
      }
    }
  }
  TCLR_METHOD void write(int64_t rows, int64_t ldz, T* dz) const {
    for (int r = 0; r < 4 && ry + r < rows; ++r)
      for (int q = 0; q < groups; ++q)
        if (q * 64 + dx < width)
          for (int x = 0; x < 4; ++x) dz[(ry + r) * ldz + q * 64 + dx + x] = sum[q][r][x];
  }
};

// One panel of features of the gradient of one block of rows, by one part of the sets; the rows are unit rows, the
// gradient in `unit` / tau.
template <typename T>
TCLR_DEVICE void gradient(const Gram<T>& p, int64_t block) {
  Problem problem = p.tiles();
  int64_t first = block % p.panels() * panel<T>, rest = block / p.panels();
  int64_t part = rest % p.parts, index = rest / p.parts % problem.blocks, set = rest / p.parts / problem.blocks;
  Block I{set / problem.V, set % problem.V, index};
  Tile<T> t(p.ldz);
  T inverse_tau = T(1 / value_of(p.tau));
  double inverse_unit = 1 / unit(p, I.g);
  PanelSum<T> dz(Tile<T>::width(p.ldz - first));
  bool again = false;
  for (int64_t c = part * problem.V / p.parts; c < (part + 1) * problem.V / p.parts; ++c) {
    for (int64_t b = 0; b < problem.blocks && problem.exists(I.a, c); ++b, again = true) {
      Block J{I.g, c, b};
      weights(p, problem, I, J, t, again, inverse_tau, inverse_unit);
      if (p.panels() > 1) {
        load(span(p, problem, J).z + first, p.ldz, problem.rows(b), dz.width, t.columns, t.ldp);
        __syncthreads();
      }
      dz.add(t);
      __syncthreads();
    }
  }
  int64_t row = part * p.rows() + p.row({I.g, I.a, problem.begin(index)});
  dz.write(problem.rows(index), p.ldz, p.dz + row * p.ldz + first);
}

// ---- rows again

// What a problem adds to the gradient of a unit row; null: nothing.
template <typename T>
struct Share {
  const Gram<T>* p;
  int64_t row;
  double unit;

  TCLR_METHOD double at(int64_t d) const {
    double sum = 0;
    for (int64_t part = 0; p && part < p->parts; ++part) sum += p->dz[(part * p->rows() + row) * p->ldz + d];
    return sum * unit;
  }
};

template <typename T>
TCLR_DEVICE Share<T> share(const Gram<T>& p, const Place& r) {
  return {&p, p.row(r), unit(p, r.g)};
}

// Writes factor times the gradient of one row from its shares, by 32 lanes; returns <z, dz>. Lanes without a row: D 0.
template <typename T, int count>
TCLR_DEVICE double write_row(const Source& x, int64_t D, bool normalize, const Share<T> (&shares)[count], double factor,
                             void* to, int64_t first, double* shared) {
  Norm<T> norm{1, 1};
  for (const Share<T>& s : shares)
    if (normalize && s.p) norm = s.p->norms[s.row];
  auto dz = [&](int64_t d) {
    double sum = 0;
    for (const Share<T>& s : shares) sum += s.at(d);
    return sum;
  };
  auto z = [&](int64_t d) { return double(unit_value(value_at<T>(x, d), norm)); };
  double along = 0;
  for (int64_t d = threadIdx.x % 32; d < D; d += 32) along += z(d) * dz(d);
  along = sum_over_row(along, 32, shared);
  double scale = factor / norm.rest;
  for (int64_t d = threadIdx.x % 32; d < D; d += 32) {
    double value = normalize ? dz(d) - z(d) * along : dz(d);
    put_value(to, x.dtype, first + d, norm.rest == 0 ? 0 : value * scale / norm.scale);
  }
  return norm.rest == 0 ? 0 : along;
}

}  // namespace
}  // namespace tclr
