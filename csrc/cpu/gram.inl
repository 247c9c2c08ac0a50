// The operation and its gradient, tiled; compiled once for each instruction-set level. There is no ATen and no STL in
// here: of an inline function that several levels compile, the linker keeps one copy, which might need instructions
// that the machine lacks.
//
//   S[(a,i),(c,j)] = <z_(a,i), z_(c,j)> / tau
//   neg[a,c,i]     = log sum_{j != i} exp S           pos[a,c,i] = S[(a,i),(c,i)]
//   term[a,c,i]    = log(1 + (exp neg[a,a,i] + exp neg[a,c,i]) / exp pos[a,c,i])
//   W[(a,i),(c,j)] = [j != i] g_neg[a,c,i] exp(S - neg[a,c,i]) + [j = i] g_pos[a,c,i]
//   dz_(a,i)       = 1/tau sum_(c,j) (W + W^T)[(a,i),(c,j)] z_(c,j)
//
// Each tile of S is computed once: its exponentials serve its rows and its columns, forward and backward. The order of
// the tiles is `Problem`'s tournament, so the result does not depend on the number of threads.
#pragma once
#include "../problem.h"
#include "gram.h"
#include "product.inl"
#include "rows.inl"
#include "wait.inl"

namespace tclr {
namespace {

void serially(int64_t n, Task task, void* argument) {
  for (int64_t i = 0; i < n; ++i) task(argument, i, 0);
}

// The largest number of rows of a block. The tile of two blocks, their rows and their gradients fit the L2 cache. In
// large blocks, columns are packed once for more rows, and their sums are stored less often; small blocks leave work
// for every thread.
constexpr int64_t small_block = 96, large_block = 192, many_rows = 4096;

template <typename T>
Problem problem(const GramInput& in) {
  bool large = sizeof(T) == sizeof(float) && in.V * in.N >= many_rows && !in.keep;
  return Problem(in.V, in.N, in.cross, large ? large_block : small_block, NR<T>);
}

// The number of rows of a tile in memory, and the stride between them.
INLINE int64_t tile_rows(const Problem& p) { return smaller(p.block, p.N); }
template <typename T>
INLINE int64_t tile_stride(const Problem& p) {
  return leading<T>(p.block);
}

// Where the tile of a pair lies among those that are kept.
template <typename T>
INLINE int64_t kept_tile(const Problem& p, Pair pair) {
  return (pair.right * (pair.right + 1) / 2 + pair.left) * tile_rows(p) * tile_stride<T>(p);
}

// One group's memory. Sums are double: thousands of tiles are added to them.
template <typename T>
struct Group {
  T *z, *dz;              // [V, N, ldz], dz backward
  Norm* norms;            // [V, N]
  double* sum;            // [V, V, N] of exp(S - largest), forward
  T* largest;             // [V, V, N] 0 where the sum needs no offset
  double *g_neg, *g_pos;  // [V, V, N] backward: divided by `unit`; where S is bounded, g_neg times exp(-neg)
  int64_t* stage;         // [V, blocks] how many of its rounds each row block has completed
  double* top;            // [V, blocks] backward: the largest magnitude of each block's gradients
  T* S;                   // the tiles, where they are kept

  // dz and S come last, where a forward that keeps its rows leaves room for them. They begin at a cache line, so that
  // no vector lies across two.
  static int64_t before_dz(const GramInput& in, int64_t ldz) {
    int64_t rows = in.V * in.N, blocks = in.V * rows, doubles = sizeof(double) / sizeof(T);
    return whole_lines<T>(rows * ldz + 2 * doubles * blocks + 4 * doubles * rows);
  }
  static int64_t size(const GramInput& in, const Problem& p, int64_t ldz, bool backward) {
    int64_t blocks = p.V * p.blocks, kept = in.keep ? kept_tile<T>(p, {0, blocks}) : 0;
    return before_dz(in, ldz) + (backward ? in.V * in.N * ldz : 0) + kept;
  }
  Group(const GramInput& in, int64_t ldz, T* memory) {
    int64_t rows = in.V * in.N, blocks = in.V * rows;
    z = memory;
    norms = (Norm*)(z + rows * ldz);
    stage = (int64_t*)(norms + rows);
    top = (double*)(stage + rows);
    sum = g_neg = top + rows;
    g_pos = g_neg + blocks;
    largest = (T*)(sum + blocks);
    dz = z + before_dz(in, ldz);
    S = dz + rows * ldz;
  }
};

// One thread's memory.
template <typename T>
struct Tile {
  int64_t lds;
  T *columns, *S, *column_sum, *column_max, *scale, *shift;

  static int64_t size(const Problem& p, int64_t D) { return (D + 4 + tile_stride<T>(p)) * p.block; }
  Tile(const Problem& p, int64_t D, T* memory) {
    lds = tile_stride<T>(p);
    columns = memory;
    S = columns + D * p.block;
    column_sum = S + p.block * lds;
    column_max = column_sum + p.block;
    scale = column_max + p.block;
    shift = scale + p.block;
  }
};

// What the tiles of one group share.
template <typename T>
struct Work {
  const GramInput& in;
  const Problem& p;
  int64_t g, ldz;
  Group<T> group;
  T* tiles;
  int64_t tile_size;
  bool bounded;  // |S| <= 1/tau is known to be small: no maximum is needed
  T inverse_tau;
  GramForward<T> out;
  const GramBackward<T>* gradient;
  bool alone;  // one thread runs all tasks

  T* block(T* rows, int64_t b) const { return rows + (p.set(b) * p.N + p.begin(b)) * ldz; }
  int64_t row(int64_t b) const { return p.set(b) * p.N + p.begin(b); }
};

// Computes rows r .. r + strip of the tile's similarities, times tau where S is bounded. They are -inf where nothing is
// summed: at j = i, and in the columns that fill up the last vector. The diagonal goes to pos, and to mirrored with the
// columns as anchors, if these are given.
template <typename T>
void scores(const Work<T>& w, Pair pair, const Tile<T>& tile, int64_t r, T* S, T* pos, T* mirrored) {
  const Problem& p = w.p;
  int64_t rows = smaller(strip, p.rows(pair.left) - r), count = p.rows(pair.right);
  const T* z = w.block(w.group.z, pair.left) + r * w.ldz;
  similarities(rows, z, w.ldz, w.in.D, tile.columns, count, S, tile.lds);
  bool diagonal = p.begin(pair.left) == p.begin(pair.right);
  for (int64_t q = 0; q < rows; ++q) {
    T* s = S + q * tile.lds;
    if (!w.bounded)
      for (int64_t j = 0; j < count; ++j) s[j] *= w.inverse_tau;
    if (diagonal) {
      T& own = s[r + q];
      if (pos) pos[r + q] = mirrored[r + q] = w.bounded ? own * w.inverse_tau : own;
      own = -INFINITY;
    }
    for (int64_t j = count; j < covered<T>(count); ++j) s[j] = -INFINITY;
  }
}

// Adds s * exp(m) to sum * exp(largest).
template <typename T>
INLINE void merge(T& largest, double& sum, T m, double s) {
  if (m > largest) {
    sum = sum * exp(double(largest) - double(m)) + s;
    largest = m;
  } else if (s != 0) {
    sum += m == largest ? s : s * exp(double(m) - double(largest));
  }
}

template <typename T>
INLINE Vec<T> finite(Vec<T> largest) {  // if all values are -inf, any finite offset will do
  return largest == -INFINITY ? Vec<T>{} : largest;
}

// For a row where S is bounded: returns the sum of its exponentials, and adds each to the sum of its column.
template <typename T>
double exponentials_bounded(const T* s, int64_t n, T to_exponent, T* column_sum) {
  Vec<T> row = {};
  for (int64_t j = 0; j < n; j += lanes<T>) {
    Vec<T> e = exp2<T>(load(s + j) * to_exponent);
    row += e;
    store(column_sum + j, load(column_sum + j) + e);
  }
  return sum<T>(row);
}

// Adds the exponentials of one row of a tile to its running (largest, total).
template <typename T>
void row_exponentials(const T* s, int64_t n, T& largest, double& total) {
  Vec<T> m = splat<T>(-INFINITY), row = {};
  for (int64_t j = 0; j < n; j += lanes<T>) m = larger<T>(load(s + j), m);
  T top = maximum<T>(m);
  Vec<T> offset = finite<T>(splat(top));
  for (int64_t j = 0; j < n; j += lanes<T>) row += exp2<T>((load(s + j) - offset) * T(log2e));
  merge(largest, total, top, sum<T>(row));
}

// Adds a strip's rows to the columns' running (maximum, sum).
template <typename T>
void column_exponentials(const T* S, int64_t lds, int64_t rows, int64_t n, T* column_max, T* column_sum) {
  for (int64_t j = 0; j < n; j += lanes<T>) {
    Vec<T> before = load(column_max + j), m = before;
    for (int64_t q = 0; q < rows; ++q) m = larger<T>(load(S + q * lds + j), m);
    Vec<T> offset = finite<T>(m);
    Vec<T> total = load(column_sum + j) * exp2<T>((before - offset) * T(log2e));
    for (int64_t q = 0; q < rows; ++q) total += exp2<T>((load(S + q * lds + j) - offset) * T(log2e));
    store(column_max + j, m);
    store(column_sum + j, total);
  }
}

template <typename T>
void forward_tile(const Work<T>& w, Pair pair, const Tile<T>& tile) {
  const Problem& p = w.p;
  int64_t I = pair.left, J = pair.right, a = p.set(I), c = p.set(J), rows = p.rows(I), count = p.rows(J),
          width = covered<T>(count);
  int64_t to_rows = p.at(a, c, p.begin(I)), to_columns = p.at(c, a, p.begin(J));
  const Group<T>& group = w.group;
  bool pairs = a != c && p.begin(I) == p.begin(J);
  T* base = w.out.pos + w.g * p.V * p.V * p.N;
  T *pos = pairs ? base + to_rows : nullptr, *mirrored = base + p.at(c, a, p.begin(J));

  pack_transposed(w.block(group.z, J), w.ldz, count, w.in.D, tile.columns);
  for (int64_t j = 0; j < width; ++j) tile.column_sum[j] = 0, tile.column_max[j] = -INFINITY;
  for (int64_t r = 0; r < rows; r += strip) {
    int64_t scored = smaller(strip, rows - r);
    T* S = tile.S + (w.in.keep ? r * tile.lds : 0);
    scores(w, pair, tile, r, S, pos, mirrored);
    for (int64_t q = 0; q < scored; ++q) {
      const T* s = S + q * tile.lds;
      double& total = group.sum[to_rows + r + q];
      if (w.bounded)
        total += exponentials_bounded(s, width, T(w.inverse_tau * log2e), tile.column_sum);
      else
        row_exponentials(s, width, group.largest[to_rows + r + q], total);
    }
    if (!w.bounded && I != J) column_exponentials(S, tile.lds, scored, width, tile.column_max, tile.column_sum);
  }
  if (I == J) return;  // in a diagonal tile, the columns are the rows
  for (int64_t j = 0; j < count; ++j)
    if (w.bounded)
      group.sum[to_columns + j] += tile.column_sum[j];
    else
      merge(group.largest[to_columns + j], group.sum[to_columns + j], tile.column_max[j], double(tile.column_sum[j]));
}

// W = scale * exp(S - shift)
template <typename T>
struct Weight {
  T scale, shift;
};

template <typename T>
Weight<T> weight(const Work<T>& w, int64_t at) {
  T scale = T(w.group.g_neg[at]), neg = w.gradient->neg[w.g * w.p.V * w.p.V * w.p.N + at];
  return {scale, scale == 0 ? T(INFINITY) : neg};  // exp(S - inf) is 0, and neg may be -inf here
}

// Turns one row of S into W + W^T, in place. `scale` and `shift` are those of the columns.
template <typename T>
void weights(T* s, int64_t n, bool bounded, T to_exponent, Weight<T> row, const T* scale, const T* shift) {
  for (int64_t j = 0; j < n; j += lanes<T>) {
    Vec<T> x = load(s + j), both;
    if (bounded) {
      both = exp2<T>(x * to_exponent) * (load(scale + j) + row.scale);
    } else {
      both = exp2<T>((x - row.shift) * T(log2e)) * row.scale;
      both += exp2<T>((x - load(shift + j)) * T(log2e)) * load(scale + j);
    }
    store(s + j, both);
  }
}

template <typename T>
void backward_tile(const Work<T>& w, Pair pair, const Tile<T>& tile) {
  const Problem& p = w.p;
  int64_t I = pair.left, J = pair.right, a = p.set(I), c = p.set(J), rows = p.rows(I), count = p.rows(J),
          width = covered<T>(count);
  int64_t of_rows = p.at(a, c, p.begin(I)), of_columns = p.at(c, a, p.begin(J));
  const Group<T>& group = w.group;
  bool pairs = a != c && p.begin(I) == p.begin(J);
  T *zi = w.block(group.z, I), *zj = w.block(group.z, J);

  if (!w.in.keep) pack_transposed(zj, w.ldz, count, w.in.D, tile.columns);
  for (int64_t j = 0; j < width; ++j) {
    Weight<T> column = j < count ? weight(w, of_columns + j) : Weight<T>{0, INFINITY};
    tile.scale[j] = column.scale, tile.shift[j] = column.shift;
  }
  for (int64_t r = 0; r < rows; r += strip) {
    if (!w.in.keep) scores(w, pair, tile, r, tile.S + r * tile.lds, (T*)nullptr, (T*)nullptr);
    for (int64_t q = r; q < smaller(rows, r + strip); ++q) {
      T* s = tile.S + q * tile.lds;
      weights(s, width, w.bounded, T(w.inverse_tau * log2e), weight(w, of_rows + q), tile.scale, tile.shift);
      if (pairs) s[q] = T(group.g_pos[of_rows + q] + group.g_pos[of_columns + q]);
    }
  }
  accumulate(rows, count, w.in.D, tile.S, tile.lds, 1, zj, w.block(group.dz, I), w.ldz);
  if (I == J) return;
  T* dzj = w.block(group.dz, J);
  accumulate(count, rows, w.in.D, tile.S, 1, tile.lds, zi, dzj, w.ldz);
}

// log(exp x + exp y), -inf where both are.
INLINE Vec<double> log_add(Vec<double> x, Vec<double> y) {
  Vec<double> high = x > y ? x : y, low = x > y ? y : x;
  return low == -INFINITY ? high : high + log1p(exp(low - high));
}

INLINE Vec<double> softplus(Vec<double> t) { return (t > 0 ? t : Vec<double>{}) + log1p(exp(t > 0 ? -t : t)); }

INLINE Vec<double> sigmoid(Vec<double> t) {
  Vec<double> e = exp(t > 0 ? -t : t), r = 1 / (1 + e);
  return t > 0 ? r : e * r;
}

// Writes neg and term of the rows of block b, from their sums.
template <typename T>
void finish(const Work<T>& w, int64_t b) {
  const Problem& p = w.p;
  int64_t a = p.set(b), end = p.begin(b) + p.rows(b), first = w.g * p.V * p.V * p.N;
  for (int64_t i = p.begin(b); i < end; i += lanes<double>) {
    int64_t n = end - i;
    auto negatives = [&](int64_t at) { return log(widen(w.group.sum + at, n)) + widen(w.group.largest + at, n); };
    Vec<double> own = p.cross ? Vec<double>{} : negatives(p.at(a, a, i));
    for (int64_t c = 0; c < p.V; ++c) {
      int64_t at = p.at(a, c, i);
      bool exists = p.exists(a, c), paired = exists && a != c;
      Vec<double> neg = splat<double>(-INFINITY), pos = {}, term = {};
      if (exists && p.N > 1) neg = c == a ? own : negatives(at);
      if (paired) {
        pos = widen(w.out.pos + first + at, n);
        term = p.N > 1 ? softplus((p.cross ? neg : log_add(own, neg)) - pos) : pos - pos;
      }
      narrow(w.out.neg + first + at, neg, n);
      narrow(w.out.pos + first + at, pos, n);
      narrow(w.out.term + first + at, term, n);
    }
  }
}

// Computes the gradients of neg and pos of the rows of block b, and their largest magnitude, for `unit`.
template <typename T>
void prepare(const Work<T>& w, int64_t b) {
  const Problem& p = w.p;
  const GramBackward<T>& in = *w.gradient;
  int64_t a = p.set(b), end = p.begin(b) + p.rows(b), first = w.g * p.V * p.V * p.N;
  Vec<double> top = {};
  for (int64_t i = p.begin(b); i < end; i += lanes<double>) {
    int64_t n = end - i, to_own = p.at(a, a, i);
    auto given = [&](const T* x, int64_t at) { return x ? widen(x + first + at, n) : Vec<double>{}; };
    Vec<double> own = given(in.neg, to_own), g_own = given(in.g_neg, to_own);
    for (int64_t c = 0; c < p.V; ++c) {
      int64_t at = p.at(a, c, i);
      if (c == a) continue;
      Vec<double> g_neg = given(in.g_neg, at), g_pos = given(in.g_pos, at);
      if (in.g_term && p.N > 1 && p.exists(a, c)) {
        Vec<double> neg = given(in.neg, at), negatives = p.cross ? neg : log_add(own, neg);
        Vec<double> g_term = given(in.g_term, at), g = g_term * sigmoid(negatives - given(in.pos, at));
        g = g_term == 0 ? Vec<double>{} : g;
        g_neg += g == 0 ? g : g * exp(neg - negatives);
        if (!p.cross) g_own += g == 0 ? g : g * exp(own - negatives);
        g_pos -= g;
      }
      narrow(w.group.g_neg + at, g_neg, n);
      narrow(w.group.g_pos + at, g_pos, n);
      top = larger<double>(magnitude<double>(g_pos), larger<double>(magnitude<double>(g_neg), top));
    }
    narrow(w.group.g_neg + to_own, g_own, n);
    narrow(w.group.g_pos + to_own, Vec<double>{}, n);
    top = larger<double>(magnitude<double>(g_own), top);
  }
  w.group.top[b] = maximum<double>(top);
}

// A power of two near the largest gradient of the group. All gradients are divided by it, because those of very
// confident pairs are below float's range.
template <typename T>
double unit(const Work<T>& w) {
  double top = 0;
  for (int64_t b = 0; b < w.p.V * w.p.blocks; ++b) top = w.group.top[b] > top ? w.group.top[b] : top;
  return top > 1e-300 && top < 1e300 ? ldexp(1, ilogb(top)) : 1;
}

// Divides the gradients of block b by `unit` and, where S is bounded, multiplies g_neg by exp(-neg), so that a tile
// needs exp(S) only.
template <typename T>
void absorb(const Work<T>& w, int64_t b) {
  const Problem& p = w.p;
  double inverse = 1 / unit(w);
  for (int64_t c = 0; c < p.V; ++c) {
    int64_t from = p.at(p.set(b), c, p.begin(b)), end = from + p.rows(b);
    for (int64_t at = from; at < end; at += lanes<double>) {
      double *to_neg = w.group.g_neg + at, *to_pos = w.group.g_pos + at;
      Vec<double> g = widen(to_neg, end - at) * inverse;
      if (w.bounded) {
        Vec<double> neg = widen(w.gradient->neg + w.g * p.V * p.V * p.N + at, end - at);
        g = g == 0 ? g : g * exp(-neg);
      }
      narrow(to_neg, g, end - at);
      narrow(to_pos, widen(to_pos, end - at) * inverse, end - at);
    }
  }
}

template <typename T>
struct LocalLocal {
  int64_t V, N;
  const T* pos;
  double scale;
  T *loss, *g_pos;
};

// The losses of the anchors of set a, softplus(log sum_{c not a, mate} exp pos[a,c] - pos[a,mate]), and their
// gradients. mate: the set of the same clip in the other view.
template <typename T>
void local_local_set(const LocalLocal<T>& w, int64_t a) {
  int64_t mate = (a + w.V / 2) % w.V;
  for (int64_t i = 0; i < w.N; i += lanes<double>) {
    int64_t n = w.N - i;
    auto at = [&](int64_t c) { return (a * w.V + c) * w.N + i; };
    auto pos = [&](int64_t c) { return widen(w.pos + at(c), n); };
    Vec<double> top = splat<double>(-INFINITY), total = {};
    for (int64_t c = 0; c < w.V; ++c)
      if (c != a && c != mate) top = larger<double>(pos(c), top);
    for (int64_t c = 0; c < w.V; ++c)
      if (c != a && c != mate) total += exp(pos(c) - top);
    Vec<double> negatives = top + log(total), excess = negatives - pos(mate);
    Vec<double> g = w.scale * sigmoid(excess);
    narrow(w.loss + a * w.N + i, softplus(excess), n);
    for (int64_t c = 0; c < w.V; ++c)
      narrow(w.g_pos + at(c), c == a ? Vec<double>{} : c == mate ? -g : g * exp(pos(c) - negatives), n);
  }
}

template <typename T>
void local_local(int64_t V, int64_t N, const T* pos, double scale, T* loss, T* g_pos, const Executor& executor) {
  LocalLocal<T> w{V, N, pos, scale, loss, g_pos};
  auto one = [](void* argument, int64_t a, int64_t) { local_local_set(*(LocalLocal<T>*)argument, a); };
  (double(V * V * N) < 1e4 ? Executor{serially, 1} : executor).run(V, one, &w);
}

template <typename T>
T largest(const T* values, int64_t n) {
  Vec<T> top = {}, spoilt = {};
  int64_t i = 0;
  for (; i + lanes<T> <= n; i += lanes<T>) {
    Vec<T> x = load(values + i);
    top = larger<T>(magnitude<T>(x), top);
    spoilt += x * 0;
  }
  T most = maximum<T>(top), rest = T(sum<T>(spoilt));
  for (; i < n; ++i) {
    T size = values[i] < 0 ? -values[i] : values[i];
    most = size > most ? size : most;
    rest += size * 0;
  }
  return rest == 0 ? most : T(INFINITY);
}

template <typename T>
void read(const Work<T>& w, int64_t b) {
  read_block(w.in, w.p, w.g, b, w.ldz, w.block(w.group.z, b), w.group.norms + w.row(b));
}

template <typename T>
void clear(T* p, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

template <typename T, bool backward>
void run_pair(const Work<T>& w, Pair pair, int64_t thread) {
  Tile<T> tile(w.p, w.in.D, w.tiles + thread * w.tile_size);
  if (w.in.keep) tile.S = w.group.S + kept_tile<T>(w.p, pair);
  if (backward)
    backward_tile(w, pair, tile);
  else
    forward_tile(w, pair, tile);
}

// What is done for a block before its first pair, and after its last.
template <typename T, bool backward>
void open(const Work<T>& w, int64_t b) {
  if (backward) {
    absorb(w, b);
    return clear(w.block(w.group.dz, b), w.p.rows(b) * w.ldz, T(0));
  }
  read(w, b);
  for (int64_t c = 0; c < w.p.V; ++c) {
    int64_t at = w.p.at(w.p.set(b), c, w.p.begin(b));
    clear(w.group.sum + at, w.p.rows(b), 0.0);
    clear(w.group.largest + at, w.p.rows(b), w.bounded ? T(0) : T(-INFINITY));
  }
}

template <typename T, bool backward>
void close(const Work<T>& w, int64_t b) {
  if (backward)
    write_block(w.in, *w.gradient, w.p, w.g, b, w.ldz, unit(w), w.block(w.group.z, b), w.block(w.group.dz, b),
                w.group.norms + w.row(b));
  else
    finish(w, b);
}

// The tasks of a group, in this order: backward prepares all blocks; all blocks are opened; the pairs of all rounds are
// computed; all blocks are closed. A task waits only until its own blocks have completed their earlier tasks, not for a
// whole round, so that a delayed thread delays few others.
constexpr int64_t unprepared = -2, prepared = -1;

template <typename T, bool backward>
void run_task(void* work, int64_t task, int64_t thread) {
  const Work<T>& w = *(const Work<T>*)work;
  const Problem& p = w.p;
  int64_t blocks = p.V * p.blocks, opened = backward ? task - blocks : task, met = opened - blocks,
          closing = met - p.rounds() * p.places();
  int64_t* stage = w.group.stage;
  if (opened < 0) {
    if (!w.in.keep) read(w, task);
    prepare(w, task);
    return reach(stage + task, prepared, w.alone);
  }
  if (met < 0) {
    for (int64_t b = 0; backward && b < blocks; ++b) wait_for(stage + b, prepared);
    open<T, backward>(w, opened);
    if (!p.cross) run_pair<T, backward>(w, {opened, opened}, thread);
    return reach(stage + opened, 0, w.alone);
  }
  if (closing >= 0) {
    wait_for(stage + closing, p.rounds());
    return close<T, backward>(w, closing);
  }
  int64_t round = met / p.places();
  Pair pair = p.pair(round, met % p.places());
  wait_for(stage + pair.left, round);
  if (pair.right >= 0) {
    wait_for(stage + pair.right, round);
    run_pair<T, backward>(w, pair, thread);
    reach(stage + pair.right, round + 1, w.alone);
  }
  reach(stage + pair.left, round + 1, w.alone);
}

template <typename T, bool backward>
void run_tasks(Work<T>& w, const Executor& executor) {
  int64_t blocks = w.p.V * w.p.blocks;
  clear(w.group.stage, blocks, unprepared);
  executor.run((backward ? 3 : 2) * blocks + w.p.rounds() * w.p.places(), run_task<T, backward>, &w);
}

INLINE double group_work(const GramInput& in) {
  double rows = double(in.V * in.N);
  return rows * (rows + 64) * double(in.D);  // reading and writing a row costs as much as some 64 products with it
}

// Many groups, or small ones: one thread each. Few large ones: one after the other, by all threads.
INLINE bool group_by_group(const GramInput& in, int64_t threads) { return in.G < 2 * threads && group_work(in) > 1e6; }

// How many groups have memory of their own at once.
INLINE int64_t slots(const GramInput& in, int64_t threads) {
  return in.keep ? in.G : group_by_group(in, threads) ? 1 : threads;
}

template <typename T>
int64_t workspace(const GramInput& in, int64_t threads, bool backward) {
  Problem p = problem<T>(in);
  return slots(in, threads) * Group<T>::size(in, p, leading<T>(in.D), backward || in.keep) +
         threads * Tile<T>::size(p, in.D);
}

template <typename T>
struct Call {
  const GramInput& in;
  const GramForward<T>* forward;
  const GramBackward<T>* backward;
  T* memory;
  Executor executor;
  int64_t threads;  // the number of threads that the workspace was sized for
};

template <typename T>
void run_group(const Call<T>& call, int64_t g, int64_t thread, const Executor& executor) {
  const GramInput& in = call.in;
  Problem p = problem<T>(in);
  bool backward = call.backward != nullptr, bounded = in.normalize && 1 / in.tau <= Lane<T>::largest_inverse_tau;
  int64_t ldz = leading<T>(in.D), size = Group<T>::size(in, p, ldz, backward || in.keep),
          tile_size = Tile<T>::size(p, in.D), slot = in.keep ? g : thread;
  T* tiles = call.memory + slots(in, call.threads) * size + thread * tile_size;
  Work<T> w{in,
            p,
            g,
            ldz,
            Group<T>(in, ldz, call.memory + slot * size),
            tiles,
            tile_size,
            bounded,
            T(1 / in.tau),
            backward ? GramForward<T>{} : *call.forward,
            call.backward,
            executor.threads == 1};
  if (backward)
    run_tasks<T, true>(w, executor);
  else
    run_tasks<T, false>(w, executor);
}

template <typename T>
void run(Call<T> call) {
  Executor one_thread{serially, 1};
  if (double(call.in.G) * group_work(call.in) < call.executor.least) call.executor = one_thread;
  if (group_by_group(call.in, call.threads)) {
    for (int64_t g = 0; g < call.in.G; ++g) run_group(call, g, 0, call.executor);
    return;
  }
  auto one = [](void* argument, int64_t g, int64_t thread) {
    run_group(*(Call<T>*)argument, g, thread, Executor{serially, 1});
  };
  call.executor.run(call.in.G, one, &call);
}

template <typename T>
void forward(const GramInput& in, const GramForward<T>& out, T* memory, const Executor& executor) {
  run(Call<T>{in, &out, nullptr, memory, executor, executor.threads});
}

template <typename T>
void backward(const GramInput& in, const GramBackward<T>& out, T* memory, const Executor& executor) {
  run(Call<T>{in, nullptr, &out, memory, executor, executor.threads});
}

}  // namespace

}  // namespace tclr
