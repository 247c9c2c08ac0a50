// The operation that tclr_kernels/general.py defines, some rows against some columns, tiled.
//
// With keys, the rows of both sides are sorted by key when they are read, so that the positives of a row are neighbours
// and most tiles have none. The few positives are taken out of a strip of S before its exponentials are computed, and
// are handled apart, in double; the rest is the same code as without keys. Each tile of S is computed once, for the
// gradients of both sides. Which task writes where, and in which order, depends on the sizes alone, never on the number
// of threads.
//
// Memory: a normalised copy of both sides; in the backward, as much again for the gradients that are wanted; sums or
// weights for every (set, other set, row); for the side with fewer blocks, copies of its sums and gradients, of up to
// 31 blocks of 192 rows; a tile for each thread.
#pragma once
#include "gram.inl"

namespace tclr {
namespace {

// One side, cut into blocks of rows.
struct Cut {
  int64_t sets, N, block, blocks;

  Cut(int64_t sets, int64_t N, int64_t largest, int64_t multiple)
      : sets(sets),
        N(N),
        block(N > 0 ? Problem::shares(N, largest, multiple) : multiple),
        blocks((N + block - 1) / block) {}

  int64_t all() const { return sets * blocks; }
  int64_t set(int64_t b) const { return b / blocks; }
  int64_t begin(int64_t b) const { return b % blocks * block; }  // first row within its set
  int64_t rows(int64_t b) const { return smaller(block, N - begin(b)); }
};

// The order in which each block of one side is paired with each block of the other. Two pairs that run at once must not
// add to the same rows. If one side has few blocks, there are therefore copies of their sums and gradients, each for a
// segment of the other side's blocks (the many). In a round, each of the few meets one block of every segment, or none.
struct Meetings {
  static constexpr int64_t at_once = 32;
  bool rows_few;
  int64_t few, many, segment, copies, rounds;

  Meetings(int64_t rows, int64_t columns)
      : rows_few(rows <= columns), few(rows_few ? rows : columns), many(rows_few ? columns : rows) {
    int64_t wanted = few > 0 ? smaller(many, (at_once + few - 1) / few) : 1;
    segment = wanted > 0 ? (many + wanted - 1) / wanted : 0;
    copies = segment > 0 ? (many + segment - 1) / segment : 1;
    rounds = few > segment ? few : segment;
  }
  int64_t places() const { return few * copies; }
  // The round in which the nth block of a segment first meets one of the few; and the next such round after `round`, in
  // which it meets block p of the few.
  int64_t first_round(int64_t nth) const { return nth < few ? 0 : nth - few + 1; }
  int64_t next_round(int64_t round, int64_t p) const { return round + 1 + (p == 0 ? rounds - few : 0); }
};

// Hands out memory in whole cache lines, or counts it where there is none yet.
struct Carver {
  char* base;
  int64_t used = 0;

  template <typename X>
  X* take(int64_t n) {
    X* taken = base ? (X*)(base + used) : nullptr;
    used += (n * int64_t(sizeof(X)) + 63) / 64 * 64;
    return taken;
  }
};

template <typename T>
struct Sums {  // the value is sum * exp(largest)
  double* sum;
  T* largest;
};

// One side of a group. An array with an entry for each (set, set of the other side, row) has size() elements.
template <typename T>
struct Half {
  Cut cut;
  int64_t others, copies, ldz;
  const int64_t* order = nullptr;
  T *z{}, *d{};               // [sets, N, ldz], [copies, sets, N, ldz]: the gradient, or the columns' weighted sum
  Norm* norms{};              // [sets, N]
  int64_t* stage{};           // [copies, blocks] the round in which each block is next
  Sums<T> neg{}, pos{};       // [copies, size]
  double *total{}, *slope{};  // [copies, size] of the positives: the sum of S or softplus, and of its derivative
  T *scale{}, *shift{};       // [size] the weight of a negative is scale * exp(S - shift), in `unit`s
  double *g_pos{}, *lse{}, *g_lse{}, *g_spread{}, *share{};  // [size] of the positives; for pairs, lse is `negatives`

  Half(Cut cut, int64_t others, int64_t copies, int64_t ldz) : cut(cut), others(others), copies(copies), ldz(ldz) {}

  int64_t size() const { return cut.sets * others * cut.N; }
  int64_t at(int64_t a, int64_t c, int64_t i) const { return (a * others + c) * cut.N + i; }
  int64_t row(int64_t b) const { return cut.set(b) * cut.N + cut.begin(b); }
  T* gradient(int64_t b, int64_t copy) const { return d + (copy * cut.sets * cut.N + row(b)) * ldz; }
  int64_t original(int64_t i) const { return order ? order[i] : i; }
  // Where the entry of the sorted row i lies in the operator's tensors, which have all groups and unsorted rows.
  int64_t source(int64_t g, int64_t a, int64_t c, int64_t i) const { return g * size() + at(a, c, original(i)); }

  void carve_rows(Carver& memory, bool with_d) {
    z = memory.take<T>(cut.sets * cut.N * ldz);
    norms = memory.take<Norm>(cut.sets * cut.N);
    stage = memory.take<int64_t>(copies * cut.all());
    d = with_d ? memory.take<T>(copies * cut.sets * cut.N * ldz) : nullptr;
  }
  void carve_sums(Carver& memory, bool keys) {
    int64_t n = copies * size(), of_positives = keys ? n : 0;
    neg = {memory.take<double>(n), memory.take<T>(n)};
    pos = {memory.take<double>(of_positives), memory.take<T>(of_positives)};
    total = memory.take<double>(of_positives), slope = memory.take<double>(of_positives);
  }
  void carve_weights(Carver& memory, bool keys) {
    int64_t n = size(), of_positives = keys ? n : 0;
    scale = memory.take<T>(n), shift = memory.take<T>(n), g_pos = memory.take<double>(n);
    lse = memory.take<double>(of_positives), g_lse = memory.take<double>(of_positives);
    g_spread = memory.take<double>(of_positives), share = memory.take<double>(of_positives);
  }
};

template <typename T>
INLINE int64_t tile_stride(const Cut& columns) {
  return leading<T>(columns.block);
}

// The size of one tile of S: its rows, and a vector more, which the products of the last row may overwrite.
template <typename T>
INLINE int64_t tile_size(const Cut& rows, const Cut& columns) {
  return rows.block * tile_stride<T>(columns) + NR<T>;
}

// One thread's memory.
template <typename T>
struct Patch {
  int64_t lds;
  T *columns, *S, *positives;  // the packed columns; a tile; a strip's positives, -inf elsewhere
  T* kept = nullptr;           // the tile in the memory that forward and backward share
  T *column_sum, *column_max, *scale, *shift, *positive_sum, *positive_max;
  double *total, *slope, *negatives;

  Patch(Carver& memory, const Cut& rows, const Cut& columns_cut, int64_t D) {
    lds = tile_stride<T>(columns_cut);
    columns = memory.take<T>(D * columns_cut.block);
    S = memory.take<T>(tile_size<T>(rows, columns_cut));
    positives = memory.take<T>(strip * lds + NR<T>);
    T** of_columns[] = {&column_sum, &column_max, &scale, &shift, &positive_sum, &positive_max};
    double** wide[] = {&total, &slope, &negatives};
    for (T** x : of_columns) *x = memory.take<T>(columns_cut.block);
    for (double** x : wide) *x = memory.take<double>(columns_cut.block);
  }
};

// What the tiles of one group share.
template <typename T>
struct Sheet {
  const RectangleInput& in;
  const RectangleCall<T>& call;
  int64_t g;
  bool bounded;  // |S| <= 1/tau is known to be small: no maximum is needed
  T inverse_tau;
  double unit;                     // the power of two by which all gradients are divided
  bool of_positives;               // whether an output that depends on positives has a gradient
  bool keys, by_rows, by_columns;  // by_*: whether the rows (columns) are anchors that have weights
  Problem tournament;              // of blocks with each other, where the rows are the columns
  Meetings meetings;
  Half<T> rows, columns;
  const Match* match;
  char* patches;
  int64_t patch_size;
  T* kept = nullptr;  // [row blocks, column blocks] tiles of S

  bool exists(int64_t a, int64_t c) const {
    return !in.cross || (a < (rows.cut.sets + 1) / 2) != (c < (columns.cut.sets + 1) / 2);
  }
  bool alone = false;  // one thread runs all tasks
};

INLINE bool large(const RectangleInput& in, bool narrow) {
  double pairs = double(in.rows.sets * in.rows.N) * double(in.columns.sets * in.columns.N);
  return narrow && pairs >= double(many_rows) * double(many_rows);
}

template <typename T>
Sheet<T> make_sheet(const RectangleInput& in, const RectangleCall<T>& call, int64_t g, Carver& memory) {
  int64_t block = large(in, sizeof(T) == sizeof(float)) ? large_block : small_block, ldz = leading<T>(in.D);
  Cut rows(in.rows.sets, in.rows.N, block, NR<T>), columns(in.columns.sets, in.columns.N, block, NR<T>);
  Meetings meetings(rows.all(), columns.all());
  bool gradients = call.wanted == Wanted::gradients, keys = in.keys;
  auto given = [](const Anchors& x) { return x.neg != nullptr || x.negatives != nullptr; };
  int64_t row_copies = in.symmetric || !meetings.rows_few ? 1 : meetings.copies;
  int64_t column_copies = in.symmetric || meetings.rows_few ? 1 : meetings.copies;
  Sheet<T> w{in,
             call,
             g,
             in.normalize && 1 / in.tau <= Lane<T>::largest_inverse_tau,
             T(1 / in.tau),
             1,
             true,
             keys,
             given(call.of_rows),
             in.symmetric || given(call.of_columns),
             Problem(in.rows.sets, in.rows.N > 0 ? in.rows.N : 1, in.cross, block, NR<T>),
             meetings,
             Half<T>(rows, columns.sets, row_copies, ldz),
             Half<T>(columns, rows.sets, column_copies, ldz),
             in.match ? in.match + g * in.rows.N : nullptr,
             nullptr,
             0};
  w.rows.order = keys ? in.rows.order + g * rows.N : nullptr;
  w.columns.order = keys ? in.columns.order + g * columns.N : nullptr;
  // if both calls share a workspace, it has room for what each of them needs
  bool for_rows = gradients ? call.d_rows != nullptr : call.mean != nullptr, for_columns = call.d_columns != nullptr;
  w.rows.carve_rows(memory, for_rows || in.keep);
  if (in.keep || (gradients && w.by_rows)) w.rows.carve_weights(memory, keys);
  if (in.keep || !gradients) w.rows.carve_sums(memory, keys);
  if (!for_rows) w.rows.d = nullptr;
  if (in.symmetric) {
    w.columns = w.rows;
  } else {
    w.columns.carve_rows(memory, for_columns || in.keep);
    if (gradients && w.by_columns) w.columns.carve_weights(memory, keys);
    if (!for_columns) w.columns.d = nullptr;
  }
  if (in.keep) w.kept = memory.take<T>(rows.all() * columns.all() * tile_size<T>(rows, columns));
  return w;
}

// A tile: the rows of one block against the columns of another.
struct Place {
  int64_t row_block, column_block, row_copy, column_copy;
  int64_t a, c, i, j;  // its first row and column
  int64_t rows, count, width;
  int64_t of_rows, of_columns;  // the indices of (a, c, i) and (c, a, j) in arrays of size()
};

// The matches of a row among the tile's columns: begin .. end have its key, perhaps the row itself among them, and own
// has its index, or is -1.
INLINE Match find(const Match* match, const Place& p, int64_t r) {
  if (match == nullptr) return {0, 0, -1};
  const Match& m = match[p.i + r];
  int64_t begin = m.begin > p.j ? m.begin - p.j : 0, end = smaller(m.end - p.j, p.count), own = m.own - p.j;
  return {begin, end > begin ? end : begin, own < p.count ? own : -1};
}

INLINE bool holds(const Match& m, int64_t j) { return m.begin <= j && j < m.end; }

INLINE bool any_positives(const Match* match, const Place& p) {
  for (int64_t r = 0; r < p.rows; ++r) {
    Match m = find(match, p, r);
    if (m.begin < m.end) return true;
  }
  return false;
}

// Computes rows r .. r + strip of the tile's similarities, times tau where S is bounded; -inf in the columns that fill
// up the last vector.
template <typename T>
void score(const Sheet<T>& w, const Place& p, int64_t r, const Patch<T>& patch, T* S) {
  int64_t rows = smaller(strip, p.rows - r), ldz = w.rows.ldz;
  similarities(rows, w.rows.z + (w.rows.row(p.row_block) + r) * ldz, ldz, w.in.D, patch.columns, p.count, S, patch.lds);
  for (int64_t q = 0; q < rows; ++q) {
    T* s = S + q * patch.lds;
    if (!w.bounded)
      for (int64_t j = 0; j < p.count; ++j) s[j] *= w.inverse_tau;
    for (int64_t j = p.count; j < p.width; ++j) s[j] = -INFINITY;
  }
}

// Takes a row's positives, and the column with its index, out of its similarities, which become -inf there. The
// positives go to `positives`, begin .. end, which is -inf elsewhere; the similarity of the same index in another set
// goes to the output.
template <typename T>
void take_out(const Sheet<T>& w, const Place& p, int64_t r, const Match& m, int64_t begin, int64_t end, T* s,
              T* positives) {
  T factor = w.bounded ? w.inverse_tau : T(1);
  for (int64_t j = begin; j < end; ++j) positives[j] = -INFINITY;
  for (int64_t j = m.begin; j < m.end; ++j) positives[j] = s[j] * factor;
  if (m.own >= 0 && p.a == p.c && holds(m, m.own)) positives[m.own] = -INFINITY;
  if (m.own >= 0 && p.a != p.c && w.call.pos) {
    double similarity = s[m.own] * factor;
    w.call.pos[w.rows.source(w.g, p.a, p.c, p.i + r)] = similarity;
    if (w.in.symmetric) w.call.pos[w.columns.source(w.g, p.c, p.a, p.j + m.own)] = similarity;
  }
  for (int64_t j = m.begin; j < m.end; ++j) s[j] = -INFINITY;
  if (m.own >= 0) s[m.own] = -INFINITY;
}

// Returns the sum of exp(S - offset) over one row. With `keep`, the exponentials take the place of S.
template <typename T, bool keep>
double exponentials(T* s, int64_t n, bool bounded, T to_exponent, T offset) {
  Vec<T> total = {};
  for (int64_t j = 0; j < n; j += lanes<T>) {
    Vec<T> x = load(s + j), e = exp2<T>(bounded ? x * to_exponent : (x - offset) * T(log2e));
    total += e;
    if (keep) store(s + j, e);
  }
  return sum<T>(total);
}

// For one row of the columns' weighted sum: the exponentials take the place of S, and what was summed before is scaled
// to the new maximum.
template <typename T>
void weigh_columns(T* s, int64_t n, T& largest, double& total, T* mean, int64_t D) {
  Vec<T> m = splat<T>(-INFINITY);
  for (int64_t j = 0; j < n; j += lanes<T>) m = larger<T>(load(s + j), m);
  T top = maximum<T>(m);
  if (top > largest) {
    double before = exp(double(largest) - double(top));
    total *= before, largest = top;
    for (int64_t d = 0; d < D; ++d) mean[d] *= T(before);
  }
  total += exponentials<T, true>(s, n, false, T(1), largest == -INFINITY ? T(0) : largest);
}

// Adds the negatives of a strip to the sums of its rows and, if mirrored (they are anchors too), of its columns.
template <typename T>
void add_negatives(const Sheet<T>& w, const Place& p, int64_t r, bool mirrored, T* S, const Patch<T>& patch) {
  T to_exponent = T(w.inverse_tau * log2e);
  int64_t scored = smaller(strip, p.rows - r), to = p.row_copy * w.rows.size() + p.of_rows + r;
  bool mean = w.call.mean != nullptr;
  for (int64_t q = 0; q < scored; ++q) {
    T *s = S + q * patch.lds, &largest = w.rows.neg.largest[to + q];
    double& total = w.rows.neg.sum[to + q];
    if (w.bounded && mirrored)
      total += exponentials_bounded(s, p.width, to_exponent, patch.column_sum);
    else if (w.bounded)
      total += (mean ? exponentials<T, true> : exponentials<T, false>)(s, p.width, true, to_exponent, 0);
    else if (mean)
      weigh_columns(s, p.width, largest, total, w.rows.gradient(p.row_block, p.row_copy) + (r + q) * w.rows.ldz,
                    w.in.D);
    else
      row_exponentials(s, p.width, largest, total);
  }
  if (!w.bounded && mirrored) column_exponentials(S, patch.lds, scored, p.width, patch.column_max, patch.column_sum);
}

// Returns the sum of a row's positives, and adds each to the sum of its column.
template <typename T>
double add_similarities(const T* positives, int64_t n, double* columns) {
  Vec<double> row = {};
  for (int64_t j = 0; j < n; j += lanes<double>) {
    Vec<double> x = widen(positives + j);
    x = x == -INFINITY ? Vec<double>{} : x;
    row += x;
    store(columns + j, load(columns + j) + x);
  }
  return sum<double>(row);
}

// Adds softplus(negatives - S) of a row's positives, and its derivative, to the sums of the row.
template <typename T>
void add_pairs(const T* positives, int64_t n, double negatives, double& total, double& slope) {
  Vec<double> totals = {}, slopes = {};
  for (int64_t j = 0; j < n; j += lanes<double>) {
    Vec<double> x = widen(positives + j), t = negatives - x;
    totals += x == -INFINITY ? Vec<double>{} : softplus(t);
    slopes += x == -INFINITY ? Vec<double>{} : sigmoid(t);
  }
  total += sum<double>(totals), slope += sum<double>(slopes);
}

template <typename T>
void add_pairs_of_columns(const T* positives, int64_t n, const double* negatives, double* total, double* slope) {
  for (int64_t j = 0; j < n; j += lanes<double>) {
    Vec<double> x = widen(positives + j), t = load(negatives + j) - x;
    store(total + j, load(total + j) + (x == -INFINITY ? Vec<double>{} : softplus(t)));
    store(slope + j, load(slope + j) + (x == -INFINITY ? Vec<double>{} : sigmoid(t)));
  }
}

// Adds the positives of a strip, between the columns begin and end, to the sums of its rows and its columns.
template <typename T>
void add_positives(const Sheet<T>& w, const Place& p, int64_t r, bool mirrored, int64_t begin, int64_t end,
                   const Patch<T>& patch) {
  int64_t scored = smaller(strip, p.rows - r), n = end - begin, to = p.row_copy * w.rows.size() + p.of_rows + r;
  for (int64_t q = 0; q < scored; ++q) {
    Match m = find(w.match, p, r + q);
    if (m.begin == m.end) continue;
    const T* positives = patch.positives + q * patch.lds;
    if (w.call.of_pairs()) {
      double negatives = w.call.negatives[w.rows.source(w.g, p.a, p.c, p.i + r + q)];
      add_pairs(positives + begin, n, negatives, w.rows.total[to + q], w.rows.slope[to + q]);
      if (mirrored)
        add_pairs_of_columns(positives + begin, n, patch.negatives + begin, patch.total + begin, patch.slope + begin);
    } else {
      row_exponentials(positives + begin, n, w.rows.pos.largest[to + q], w.rows.pos.sum[to + q]);
      w.rows.total[to + q] += add_similarities(positives + begin, n, patch.total + begin);
    }
  }
  if (mirrored && !w.call.of_pairs())
    column_exponentials(patch.positives + begin, patch.lds, scored, n, patch.positive_max + begin,
                        patch.positive_sum + begin);
}

template <typename T>
void clear_columns(const Sheet<T>& w, const Place& p, bool mirrored, const Patch<T>& patch) {
  clear(patch.column_sum, p.width, T(0)), clear(patch.column_max, p.width, T(-INFINITY));
  if (!w.keys) return;
  clear(patch.positive_sum, p.width, T(0)), clear(patch.positive_max, p.width, T(-INFINITY));
  clear(patch.total, p.width, 0.0), clear(patch.slope, p.width, 0.0);
  for (int64_t j = 0; mirrored && w.call.of_pairs() && j < p.width; ++j)
    patch.negatives[j] = j < p.count ? w.call.negatives[w.columns.source(w.g, p.c, p.a, p.j + j)] : 0;
}

// If the rows are the columns, a tile's columns are anchors too: adds their sums to those of the same rows.
template <typename T>
void add_columns(const Sheet<T>& w, const Place& p, const Patch<T>& patch) {
  const Half<T>& to = w.columns;
  for (int64_t j = 0; j < p.count; ++j) {
    int64_t at = p.of_columns + j;
    if (w.bounded)
      to.neg.sum[at] += patch.column_sum[j];
    else
      merge(to.neg.largest[at], to.neg.sum[at], patch.column_max[j], double(patch.column_sum[j]));
    if (!w.keys) continue;
    merge(to.pos.largest[at], to.pos.sum[at], patch.positive_max[j], double(patch.positive_sum[j]));
    to.total[at] += patch.total[j], to.slope[at] += patch.slope[j];
  }
}

template <typename T>
void forward_place(const Sheet<T>& w, const Place& p, const Patch<T>& patch) {
  bool mirrored = w.in.symmetric && p.row_block != p.column_block, mean = w.call.mean != nullptr;
  if (mirrored || w.keys) clear_columns(w, p, mirrored, patch);
  for (int64_t r = 0; r < p.rows; r += strip) {
    int64_t scored = smaller(strip, p.rows - r), begin = p.width, end = 0;
    T* S = patch.S + (mean ? r * patch.lds : 0);
    score(w, p, r, patch, S);
    if (patch.kept)
      for (int64_t k = 0; k < scored * patch.lds; ++k) patch.kept[r * patch.lds + k] = S[k];
    for (int64_t q = 0; q < scored; ++q) {
      Match m = find(w.match, p, r + q);
      if (m.begin < m.end) begin = smaller(begin, m.begin), end = m.end > end ? m.end : end;
    }
    begin = begin / lanes<T> * lanes<T>, end = (end + lanes<T> - 1) / lanes<T> * lanes<T>;
    if (w.match)
      for (int64_t q = 0; q < scored; ++q)
        take_out(w, p, r + q, find(w.match, p, r + q), begin, end, S + q * patch.lds, patch.positives + q * patch.lds);
    if (!w.call.of_pairs()) add_negatives(w, p, r, mirrored, S, patch);
    if (begin < end) add_positives(w, p, r, mirrored, begin, end, patch);
  }
  if (mirrored) add_columns(w, p, patch);
  if (mean)
    accumulate(p.rows, p.count, w.in.D, patch.S, patch.lds, 1, w.columns.z + (p.c * w.columns.cut.N + p.j) * w.rows.ldz,
               w.rows.gradient(p.row_block, p.row_copy), w.rows.ldz);
}

// For positives with the similarities S: the part of their weights that comes from the anchors of one side. read: takes
// an array with one entry for each anchor, and returns, for each lane, the entry of the anchor of that lane's positive.
template <typename T, typename Read>
INLINE Vec<double> positive_weights(const Half<T>& half, bool of_pairs, Vec<double> S, Read read) {
  Vec<double> g = read(half.g_lse), lse = read(half.lse);
  if (of_pairs) return -g * sigmoid(lse - S);
  Vec<double> e = exp(S - lse);
  return g * e + read(half.g_spread) * (e - read(half.share));
}

// Writes the weights of one row's positives to `weights`. s: the similarities of the row.
template <typename T>
void weigh_positives(const Sheet<T>& w, const Place& p, int64_t r, const Match& m, const T* s, T* weights) {
  T factor = w.bounded ? w.inverse_tau : T(1);
  for (int64_t j = m.begin; j < m.end; j += lanes<double>) {
    int64_t n = m.end - j;
    T scaled[lanes<double>] = {};
    for (int64_t l = 0; l < smaller(n, lanes<double>); ++l) scaled[l] = s[j + l] * factor;
    Vec<double> S = widen(scaled), both = {};
    bool of_pairs = w.call.of_pairs();
    if (w.by_rows)
      both += positive_weights(w.rows, of_pairs, S, [&](const double* x) { return splat(x[p.of_rows + r]); });
    if (w.by_columns)
      both += positive_weights(w.columns, of_pairs, S, [&](const double* x) { return widen(x + p.of_columns + j, n); });
    narrow(weights + j, both, n);
  }
}

// Turns one row of S into weights, in place, where only the rows are anchors.
template <typename T>
void weigh_negatives(T* s, int64_t n, bool bounded, T to_exponent, Weight<T> row) {
  for (int64_t j = 0; j < n; j += lanes<T>) {
    Vec<T> x = load(s + j);
    store(s + j, exp2<T>(bounded ? x * to_exponent : (x - row.shift) * T(log2e)) * row.scale);
  }
}

template <typename T>
void weigh_row(const Sheet<T>& w, const Place& p, int64_t r, T* s, const Patch<T>& patch) {
  Match m = find(w.match, p, r);
  int64_t row = p.of_rows + r, column = p.of_columns + m.own;
  T to_exponent = T(w.inverse_tau * log2e);
  if (w.of_positives) weigh_positives(w, p, r, m, s, patch.positives);
  Weight<T> weight{0, INFINITY};
  if (w.by_rows && !w.call.of_pairs()) weight = {w.rows.scale[row], w.rows.shift[row]};
  if (w.call.of_pairs())
    clear(s, p.width, T(0));
  else if (w.by_columns)
    weights(s, p.width, w.bounded, to_exponent, weight, patch.scale, patch.shift);
  else
    weigh_negatives(s, p.width, w.bounded, to_exponent, weight);
  for (int64_t j = m.begin; j < m.end; ++j) s[j] = w.of_positives ? patch.positives[j] : T(0);
  if (m.own < 0) return;
  bool itself = p.a == p.c;
  double of_index = itself || !holds(m, m.own) ? 0 : double(s[m.own]);
  if (!itself && !w.call.of_pairs())
    of_index += (w.by_rows ? w.rows.g_pos[row] : 0) + (w.by_columns ? w.columns.g_pos[column] : 0);
  s[m.own] = T(of_index);
}

template <typename T>
void backward_place(const Sheet<T>& w, const Place& p, const Patch<T>& patch) {
  const Half<T>&rows = w.rows, &columns = w.columns;
  int64_t ldz = rows.ldz;
  if (w.by_columns && !w.call.of_pairs())
    for (int64_t j = 0; j < p.width; ++j) {
      bool there = j < p.count;
      patch.scale[j] = there ? columns.scale[p.of_columns + j] : T(0);
      patch.shift[j] = there ? columns.shift[p.of_columns + j] : T(INFINITY);
    }
  for (int64_t r = 0; r < p.rows; r += strip) {
    T* S = patch.S + r * patch.lds;
    if (!patch.kept) score(w, p, r, patch, S);
    for (int64_t q = r; q < smaller(p.rows, r + strip); ++q) weigh_row(w, p, q, patch.S + q * patch.lds, patch);
  }
  int64_t first = p.c * columns.cut.N + p.j;
  if (rows.d)
    accumulate(p.rows, p.count, w.in.D, patch.S, patch.lds, 1, columns.z + first * ldz,
               rows.gradient(p.row_block, p.row_copy), ldz);
  if (columns.d && !(w.in.symmetric && p.row_block == p.column_block))
    accumulate(p.count, p.rows, w.in.D, patch.S, 1, patch.lds, rows.z + rows.row(p.row_block) * ldz,
               columns.d + (p.column_copy * columns.cut.sets * columns.cut.N + first) * ldz, ldz);
}

// Computes the pair of a block of rows and a block of columns, and adds to the given copies of their results.
template <typename T>
void meet(const Sheet<T>& w, int64_t row, int64_t column, int64_t row_copy, int64_t column_copy, int64_t thread) {
  const Cut &rows = w.rows.cut, &columns = w.columns.cut;
  int64_t a = rows.set(row), c = columns.set(column), i = rows.begin(row), j = columns.begin(column),
          count = columns.rows(column);
  if (!w.exists(a, c)) return;
  Carver memory{w.patches + thread * w.patch_size};
  Patch<T> patch(memory, rows, columns, w.in.D);
  bool gradients = w.call.wanted == Wanted::gradients;
  if (w.kept) patch.kept = w.kept + (row * columns.all() + column) * tile_size<T>(rows, columns);
  if (w.kept && gradients) patch.S = patch.kept;
  Place p{row,
          column,
          row_copy,
          column_copy,
          a,
          c,
          i,
          j,
          rows.rows(row),
          count,
          covered<T>(count),
          w.rows.at(a, c, i),
          w.columns.at(c, a, j)};
  if (w.call.of_pairs() && !any_positives(w.match, p)) return;
  if (!(w.kept && gradients))
    pack_transposed(w.columns.z + (c * columns.N + j) * w.rows.ldz, w.rows.ldz, count, w.in.D, patch.columns);
  if (gradients)
    backward_place(w, p, patch);
  else
    forward_place(w, p, patch);
}

// The largest magnitude of `top` and of the upstream gradients of n anchors.
INLINE double unit(const Anchors& from, int64_t first, int64_t n, double top) {
  Vec<double> largest = splat(top);
  const double* gradients[] = {from.g_neg, from.g_pos, from.g_pos_lse, from.g_spread, from.g_pairs};
  for (const double* x : gradients)
    for (int64_t i = 0; x && i < n; i += lanes<double>)
      largest = larger<double>(magnitude<double>(widen(x + first + i, n - i)), largest);
  return maximum<double>(largest);
}

INLINE bool reaches_positives(const Anchors& from, int64_t first, int64_t n) {
  for (const double* x : {from.g_pos_lse, from.g_spread, from.g_pairs})
    for (int64_t i = 0; x && i < n; ++i)
      if (!(x[first + i] == 0)) return true;
  return false;
}

// Computes the weights of one block's rows as anchors, in the order of the sorted rows: divided by `unit`, and with
// exp(S - neg) as exp(S) exp(-neg) where S is bounded. An anchor without negatives has neg = -inf and weight 0. What
// neg loses when it is rounded to T goes into the scale.
template <typename T>
void absorb(const Sheet<T>& w, const Half<T>& half, const Anchors& from, int64_t b) {
  double inverse = 1 / w.unit;
  for (int64_t k = 0; k < half.others * half.cut.rows(b); ++k) {
    int64_t a = half.cut.set(b), c = k / half.cut.rows(b), i = half.cut.begin(b) + k % half.cut.rows(b);
    int64_t at = half.at(a, c, i), source = half.source(w.g, a, c, i);
    if (from.negatives) {
      half.lse[at] = from.negatives[source], half.g_lse[at] = from.g_pairs[source] * inverse;
      continue;
    }
    double neg = from.neg[source], g = neg == -INFINITY ? 0 : from.g_neg[source] * inverse;
    double shift = w.bounded ? 0 : double(T(neg));
    half.scale[at] = T(g == 0 ? 0 : g * exp(shift - neg));
    half.shift[at] = half.scale[at] == 0 ? T(INFINITY) : T(shift);
    half.g_pos[at] = from.g_pos[source] * inverse;
    if (!w.keys) continue;
    double count = from.count[source];
    half.lse[at] = from.pos_lse[source], half.g_lse[at] = from.g_pos_lse[source] * inverse;
    half.g_spread[at] = count > 1 ? from.g_spread[source] * inverse : 0;
    half.share[at] = 1 / (count > 1 ? count : 1);
  }
}

template <typename T>
void read(const Sheet<T>& w, const Half<T>& half, const Side& side, int64_t b) {
  for (int64_t r = 0; r < half.cut.rows(b); ++r) {
    int64_t at = half.row(b) + r, i = half.original(half.cut.begin(b) + r);
    half.norms[at] = read_unit(side.rows[half.cut.set(b)], w.in.dtype, w.in.normalize, w.g, i, w.in.D, half.ldz,
                               half.z + at * half.ldz);
  }
}

// Before a block's first pair: reads its rows, and clears its sums and gradients.
template <typename T>
void open(const Sheet<T>& w, const Half<T>& half, const Side& side, const Anchors& from, bool anchors, int64_t b) {
  if (!(w.kept && w.call.wanted == Wanted::gradients)) read(w, half, side, b);
  int64_t n = half.cut.rows(b);
  for (int64_t copy = 0; half.d && copy < half.copies; ++copy) clear(half.gradient(b, copy), n * half.ldz, T(0));
  if (w.call.wanted == Wanted::gradients) {
    if (anchors) absorb(w, half, from, b);
    return;
  }
  for (int64_t k = 0; half.neg.sum && k < half.copies * half.others; ++k) {
    int64_t c = k % half.others;
    int64_t at = k / half.others * half.size() + half.at(half.cut.set(b), c, half.cut.begin(b));
    clear(half.neg.sum + at, n, 0.0), clear(half.neg.largest + at, n, w.bounded ? T(0) : T(-INFINITY));
    if (!w.keys) continue;
    clear(half.pos.sum + at, n, 0.0), clear(half.pos.largest + at, n, T(-INFINITY));
    clear(half.total + at, n, 0.0), clear(half.slope + at, n, 0.0);
  }
}

// Adds the other copies of the sums of n rows to the first copy.
template <typename T>
void merge_copies(const Half<T>& half, bool keys, int64_t at, int64_t n) {
  for (int64_t copy = 1; copy < half.copies; ++copy)
    for (int64_t i = at; i < at + n; ++i) {
      int64_t from = copy * half.size() + i;
      merge(half.neg.largest[i], half.neg.sum[i], half.neg.largest[from], half.neg.sum[from]);
      if (!keys) continue;
      merge(half.pos.largest[i], half.pos.sum[i], half.pos.largest[from], half.pos.sum[from]);
      half.total[i] += half.total[from], half.slope[i] += half.slope[from];
    }
}

// Writes the columns' mean, weighted by exp(S - neg), for the rows of block b.
template <typename T>
void write_mean(const Sheet<T>& w, int64_t b) {
  const Half<T>& half = w.rows;
  for (int64_t r = 0; r < half.cut.rows(b); ++r) {
    int64_t i = half.cut.begin(b) + r;
    T *mean = w.call.mean + (w.g * half.cut.N + i) * w.in.D, largest = half.neg.largest[i];
    double total = half.neg.sum[i];
    for (int64_t copy = 1; copy < half.copies; ++copy)
      merge(largest, total, half.neg.largest[copy * half.size() + i], half.neg.sum[copy * half.size() + i]);
    for (int64_t d = 0; d < w.in.D; ++d) mean[d] = 0;
    for (int64_t copy = 0; copy < half.copies; ++copy) {
      int64_t at = copy * half.size() + i;
      if (half.neg.sum[at] == 0) continue;
      const T* sum = half.gradient(b, copy) + r * half.ldz;
      double factor = exp(double(half.neg.largest[at]) - double(largest)) / total;
      for (int64_t d = 0; d < w.in.D; ++d) mean[d] += T(sum[d] * factor);
    }
  }
}

template <typename T>
void write_sums(const Sheet<T>& w, int64_t b, int64_t c) {
  const Half<T>& half = w.rows;
  const RectangleCall<T>& out = w.call;
  int64_t a = half.cut.set(b), n = half.cut.rows(b), at = half.at(a, c, half.cut.begin(b));
  merge_copies(half, w.keys, at, n);
  for (int64_t r = 0; r < n; r += lanes<double>) {
    auto read = [&](const auto* x) { return widen(x + at + r, n - r); };
    Vec<double> neg = log(read(half.neg.sum)) + read(half.neg.largest), pos = {};
    if (w.keys) pos = log(read(half.pos.sum)) + read(half.pos.largest);
    for (int64_t l = 0; l < smaller(lanes<double>, n - r); ++l) {
      int64_t i = half.cut.begin(b) + r + l, to = half.source(w.g, a, c, i);
      if (out.wanted == Wanted::pairs) {
        out.sums[to] = half.total[at + r + l], out.slope[to] = half.slope[at + r + l];
        continue;
      }
      out.neg[to] = neg[l];
      if (!w.keys) continue;
      const Match& m = w.match[i];
      double count = w.exists(a, c) ? double(m.end - m.begin - (a == c && holds(m, m.own))) : 0;
      out.count[to] = count, out.pos_lse[to] = pos[l];
      out.spread[to] = count > 1 ? pos[l] - half.total[at + r + l] / count : 0;
    }
  }
}

template <typename T>
void write_gradients(const Sheet<T>& w, const Half<T>& half, const Gradient<T>* to, bool along, int64_t b) {
  int64_t a = half.cut.set(b), n = half.cut.rows(b);
  T* d = half.gradient(b, 0);
  for (int64_t copy = 1; copy < half.copies; ++copy) {
    const T* from = half.gradient(b, copy);
    for (int64_t k = 0; k < n * half.ldz; ++k) d[k] += from[k];
  }
  for (int64_t r = 0; r < n; ++r) {
    int64_t at = half.row(b) + r, i = half.original(half.cut.begin(b) + r);
    T product = write_row(to[a], w.g, i, w.in.D, w.unit / w.in.tau, w.in.normalize, half.norms[at],
                          half.z + at * half.ldz, d + r * half.ldz);
    if (along) w.call.along[(w.g * half.cut.sets + a) * half.cut.N + i] = product;
  }
}

template <typename T>
void open_task(void* work, int64_t b, int64_t thread) {
  const Sheet<T>& w = *(const Sheet<T>*)work;
  if (b < w.rows.cut.all()) {
    open(w, w.rows, w.in.rows, w.call.of_rows, w.by_rows, b);
    if (w.in.symmetric && !w.in.cross) meet(w, b, b, 0, 0, thread);
  } else {
    open(w, w.columns, w.in.columns, w.call.of_columns, w.by_columns, b - w.rows.cut.all());
  }
}

template <typename T>
void close_task(void* work, int64_t b, int64_t) {
  const Sheet<T>& w = *(const Sheet<T>*)work;
  bool gradients = w.call.wanted == Wanted::gradients;
  if (b >= w.rows.cut.all()) {
    if (gradients && w.columns.d) write_gradients(w, w.columns, w.call.d_columns, !w.rows.d, b - w.rows.cut.all());
    return;
  }
  if (gradients) {
    if (w.rows.d) write_gradients(w, w.rows, w.call.d_rows, true, b);
    return;
  }
  if (w.call.mean) write_mean(w, b);
  for (int64_t c = 0; c < w.rows.others; ++c) write_sums(w, b, c);
}

// Computes a pair of blocks, one of each side; `tournament_task` does so if the rows are the columns. A task waits
// until its blocks have completed their earlier pairs.
template <typename T>
void meet_task(void* work, int64_t task, int64_t thread) {
  const Sheet<T>& w = *(const Sheet<T>*)work;
  const Meetings& m = w.meetings;
  int64_t round = task / m.places(), place = task % m.places(), copy = place / m.few, one = place % m.few;
  int64_t nth = (one + round) % m.rounds, other = copy * m.segment + nth;
  int64_t *of_one = (m.rows_few ? w.rows : w.columns).stage + place,
          *of_other = (m.rows_few ? w.columns : w.rows).stage + other;
  wait_for(of_one, round);
  if (nth < m.segment && other < m.many) {
    wait_for(of_other, round);
    m.rows_few ? meet(w, one, other, copy, 0, thread) : meet(w, other, one, 0, copy, thread);
    reach(of_other, m.next_round(round, one), w.alone);
  }
  reach(of_one, round + 1, w.alone);
}

template <typename T>
void tournament_task(void* work, int64_t task, int64_t thread) {
  const Sheet<T>& w = *(const Sheet<T>*)work;
  int64_t round = task / w.tournament.places(), *stage = w.rows.stage;
  Pair pair = w.tournament.pair(round, task % w.tournament.places());
  wait_for(stage + pair.left, round);
  if (pair.right >= 0) {
    wait_for(stage + pair.right, round);
    meet(w, pair.left, pair.right, 0, 0, thread);
    reach(stage + pair.right, round + 1, w.alone);
  }
  reach(stage + pair.left, round + 1, w.alone);
}

template <typename T>
void run_sheet(Sheet<T>& w, const Executor& executor) {
  const Meetings& m = w.meetings;
  const Anchors &of_rows = w.call.of_rows, &of_columns = w.call.of_columns;
  double top = unit(of_rows, w.g * w.rows.size(), w.rows.size(), 0);
  top = unit(of_columns, w.g * w.columns.size(), w.columns.size(), top);
  w.unit = top > 1e-300 && top < 1e300 ? ldexp(1, ilogb(top)) : 1;
  w.of_positives = reaches_positives(of_rows, w.g * w.rows.size(), w.rows.size()) ||
                   reaches_positives(of_columns, w.g * w.columns.size(), w.columns.size());
  if (w.call.pos) clear(w.call.pos + w.g * w.rows.size(), w.rows.size(), 0.0);
  clear(w.rows.stage, w.rows.copies * w.rows.cut.all(), int64_t(0));
  clear(w.columns.stage, w.columns.copies * w.columns.cut.all(), int64_t(0));
  if (!w.in.symmetric)
    for (int64_t b = 0; b < m.many; ++b) (m.rows_few ? w.columns : w.rows).stage[b] = m.first_round(b % m.segment);

  int64_t blocks = w.rows.cut.all() + (w.in.symmetric ? 0 : w.columns.cut.all());
  executor.run(blocks, open_task<T>, &w);
  if (w.in.symmetric && w.rows.cut.all() > 0)
    executor.run(w.tournament.rounds() * w.tournament.places(), tournament_task<T>, &w);
  if (!w.in.symmetric) executor.run(m.rounds * m.places(), meet_task<T>, &w);
  executor.run(blocks, close_task<T>, &w);
}

INLINE double rectangle_work(const RectangleInput& in) {
  double rows = double(in.rows.sets * in.rows.N), columns = double(in.columns.sets * in.columns.N);
  return (rows * columns + 64 * (rows + columns)) * double(in.D);  // as in group_work
}

// As for whole Gram matrices: many groups by one thread each, few large ones by all threads.
INLINE bool sheet_by_sheet(const RectangleInput& in, int64_t threads) {
  return in.G < 2 * threads && rectangle_work(in) > 1e6;
}

template <typename T>
struct SheetCall {
  const RectangleInput& in;
  const RectangleCall<T>& call;
  char* memory;
  int64_t sheet_size, patch_size, slots;  // slots: how many groups have memory at once
};

template <typename T>
SheetCall<T> sizes(const RectangleInput& in, const RectangleCall<T>& call, T* memory, int64_t threads) {
  Carver sheet{nullptr}, patch{nullptr};
  Sheet<T> w = make_sheet(in, call, 0, sheet);
  Patch<T>(patch, w.rows.cut, w.columns.cut, in.D);
  int64_t slots = in.keep ? in.G : sheet_by_sheet(in, threads) ? 1 : threads;
  return {in, call, (char*)memory, sheet.used, patch.used, slots};
}

template <typename T>
int64_t rectangle_workspace(const RectangleInput& in, const RectangleCall<T>& call, int64_t threads) {
  SheetCall<T> s = sizes<T>(in, call, nullptr, threads);
  return (s.slots * s.sheet_size + threads * s.patch_size) / int64_t(sizeof(T));
}

template <typename T>
void rectangle_group(const SheetCall<T>& s, int64_t g, int64_t thread, const Executor& executor) {
  Carver memory{s.memory + (s.in.keep ? g : thread) * s.sheet_size};
  Sheet<T> w = make_sheet(s.in, s.call, g, memory);
  w.patches = s.memory + s.slots * s.sheet_size + thread * s.patch_size, w.patch_size = s.patch_size;
  w.alone = executor.threads == 1;
  run_sheet(w, executor);
}

template <typename T>
void rectangle(const RectangleInput& in, const RectangleCall<T>& call, T* memory, const Executor& executor) {
  SheetCall<T> s = sizes(in, call, memory, executor.threads);
  Executor used = double(in.G) * rectangle_work(in) < executor.least ? Executor{serially, 1} : executor;
  if (sheet_by_sheet(in, executor.threads)) {
    for (int64_t g = 0; g < in.G; ++g) rectangle_group(s, g, 0, used);
    return;
  }
  auto one = [](void* argument, int64_t g, int64_t thread) {
    rectangle_group(*(SheetCall<T>*)argument, g, thread, Executor{serially, 1});
  };
  used.run(in.G, one, &s);
}

template <typename T>
void labelled_terms(const LabelledTerms<T>& w) {
  for (int64_t i = 0; i < w.n; i += lanes<double>) {
    int64_t n = w.n - i;
    Vec<double> count = widen(w.count + i, n), excess = widen(w.neg + i, n) - widen(w.pos_lse + i, n);
    Vec<double> term = softplus(excess), g = w.scale * sigmoid(excess), g_spread = {};
    if (w.spread) {
      term = count == 0 ? Vec<double>{} : term + widen(w.spread + i, n);
      g = count == 0 ? Vec<double>{} : g;
      g_spread = count == 0 ? g_spread : splat(w.scale);
    }
    narrow(w.terms + i, term, n);
    if (!w.g_neg) continue;
    narrow(w.g_neg + i, g, n), narrow(w.g_pos_lse + i, -g, n), narrow(w.g_spread + i, g_spread, n);
  }
}

}  // namespace
}  // namespace tclr
