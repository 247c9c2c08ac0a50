// Some rows against some columns, as tclr_kernels/general.py defines it, and the gradient, without tensor cores.
//
// In each step, one side is `resident`: a thread block keeps some of its rows. The rows of the other side are
// `passing`. They are divided into parts, which different thread blocks compute, so that few resident rows fill the
// device, too.
//
//   sums      of every resident row with every passing set: one for each part, merged in the order of the parts
//   gradient  of every resident row: one for each part, added in the order of the parts when the rows are written
//
// Packing rows and writing their gradients concerns one side only, and is done by the steps of gram.cuh.
#pragma once
#include <type_traits>

#include "gram.cuh"

namespace tclr {
namespace {

using cuda::Anchors;
using cuda::Keys;

constexpr int64_t no_index = INT64_MIN / 2;  // an offset with which no two rows have the same index

template <typename T>
struct Sums;

template <typename T>
struct Rectangle {
  Gram<T> resident, passing;
  Keys keys, passing_keys;
  Anchors anchors, passing_anchors;  // with the rows of this side as anchors
  int64_t offset;                    // the passing row i + offset has the index of the resident row i
  bool pairs;                        // computes the sum of softplus(negatives - S) over the positives, or its gradient
  int64_t parts;                     // of the passing rows of one set (sums), or of all passing rows (gradient)
  double *neg, *pos, *pos_lse, *spread, *count;  // outputs
  double *pair_sums, *slope;                     // outputs if `pairs`
  T* mean;                                       // output [G, n, D]
  Sums<T>* sums;                                 // [parts, G, A, C, n]; without keys, Exponentials<T> instead

  constexpr int64_t anchor_count() const { return resident.rows() * passing.V; }
  constexpr int64_t at(int64_t g, int64_t a, int64_t c, int64_t i) const {
    return ((g * resident.V + a) * passing.V + c) * resident.N + i;
  }
  constexpr int64_t passing_at(int64_t g, int64_t c, int64_t a, int64_t j) const {
    return ((g * passing.V + c) * resident.V + a) * passing.N + j;
  }
  // Whether set a of the resident rows is compared with set c of the passing rows.
  constexpr bool exists(int64_t a, int64_t c) const {
    return !resident.cross || (a < (resident.V + 1) / 2) != (c < (passing.V + 1) / 2);
  }
};

// The division of rows into tiles.
struct Cut {
  int64_t rows;
  int size;

  constexpr int64_t tiles() const { return (rows + size - 1) / size; }
  constexpr int64_t begin(int64_t t) const { return t * size; }
  constexpr int64_t of(int64_t t) const { return rows - begin(t) < size ? rows - begin(t) : size; }
};

// The first tile of a part, if `tiles` tiles are divided into `parts` parts.
constexpr int64_t part_begin(int64_t part, int64_t tiles, int64_t parts) { return part * tiles / parts; }

TCLR_DEVICE int64_t key_of(const Keys& keys, int64_t g, int64_t i) {
  return keys.data[g * keys.stride_g + i * keys.stride_n];
}

// A tile of the rows of a group. It may have rows of several sets.
template <typename T>
TCLR_DEVICE Span<T> span(const Gram<T>& side, int64_t g, const Cut& cut, int64_t t) {
  return {side.z + (g * side.V * side.N + cut.begin(t)) * side.ldz, cut.of(t), side.ldz};
}

// ---- sums

template <typename T>
struct Exponentials {
  T largest = lowest<T>, sum = 0;  // sum * exp(largest)

  TCLR_METHOD void add(T s) { add_exponential(largest, sum, s); }
  TCLR_METHOD void merge(const Exponentials& x) {
    T top = x.largest > largest ? x.largest : largest, offset = top < INFINITY ? top : 0;
    sum = sum * exp(largest - offset) + x.sum * exp(x.largest - offset), largest = top;
  }
  TCLR_METHOD double log_sum() const { return double(largest) + log(double(sum)); }
};

// The sums over an anchor's candidates.
template <typename T>
struct Sums {
  Exponentials<T> negatives, positives;
  double sum = 0, slope = 0;  // sums over the positives: of S, or for pairs of softplus and of its derivative
  int64_t count = 0;

  TCLR_METHOD void add_positive(T s) { positives.add(s), sum += s, ++count; }
  TCLR_METHOD void add_pair(double t) { sum += softplus(t), slope += sigmoid(t); }
  TCLR_METHOD void merge(const Sums& x) {
    negatives.merge(x.negatives), positives.merge(x.positives);
    sum += x.sum, slope += x.slope, count += x.count;
  }
};

template <typename T, bool keyed>
using SumsOf = std::conditional_t<keyed, Sums<T>, Exponentials<T>>;

template <typename T>
TCLR_DEVICE Exponentials<T>& negatives_of(Exponentials<T>& x) {
  return x;
}

template <typename T>
TCLR_DEVICE Exponentials<T>& negatives_of(Sums<T>& x) {
  return x.negatives;
}

// Merges the sums of `sharing` consecutive threads, which have the same anchor. The first of them writes the result, if
// the anchor exists.
template <int sharing, typename S>
TCLR_DEVICE void join(S mine, bool valid, S* to) {
  S* shared = shared_memory<S>();
  __syncthreads();
  shared[threadIdx.x] = mine;
  __syncthreads();
  if (threadIdx.x % sharing != 0 || !valid) return;
  for (int k = 1; k < sharing; ++k) mine.merge(shared[threadIdx.x + k]);
  *to = mine;
}

// An anchor, and its sums over candidates of set c.
template <typename T, bool keyed>
struct Anchor {
  const Rectangle<T>& p;
  int64_t g, a, c, i;
  bool valid;  // whether this row exists
  int64_t key = -1;
  double negatives = 0;  // if `pairs`
  SumsOf<T, keyed> sums{};

  TCLR_METHOD Anchor(const Rectangle<T>& p, int64_t g, int64_t a, int64_t c, int64_t i, bool valid)
      : p(p), g(g), a(a), c(c), i(i), valid(valid) {
    if (!keyed || !valid) return;
    key = key_of(p.keys, g, i);
    if (p.pairs) negatives = p.anchors.negatives[at()];
  }
  TCLR_METHOD int64_t at() const { return p.at(g, a, c, i); }
  TCLR_METHOD bool same_index(int64_t j) const { return valid && j == i + p.offset; }
  TCLR_METHOD bool same_key(int64_t of_candidate) const { return keyed && key >= 0 && key == of_candidate; }
  TCLR_METHOD void take_same_index(T s) const {
    if (a != c && p.pos) p.pos[at()] = s;
  }
  TCLR_METHOD void take_same_key(int64_t j, T s) {
    if constexpr (keyed) {
      if (a == c && same_index(j)) return;
      p.pairs ? sums.add_pair(negatives - double(s)) : sums.add_positive(s);
    }
  }
};

// The sums of one tile of resident rows with one part of one passing set.
template <typename T, bool keyed>
TCLR_DEVICE void rectangle_sums(const Rectangle<T>& p, int64_t block) {
  const Gram<T>&R = p.resident, &Z = p.passing;
  Cut rows{R.V * R.N, tile}, columns{Z.N, tile};
  int64_t part = block % p.parts, c = block / p.parts % Z.V, rest = block / p.parts / Z.V;
  int64_t index = rest % rows.tiles(), g = rest / rows.tiles();
  Tile<T> t(R.ldz);
  T inverse_tau = T(1 / value_of(R.tau));
  int r = threadIdx.x / per_row;
  bool valid = r < rows.of(index);
  int64_t row = rows.begin(index) + (valid ? r : 0), last = rows.begin(index) + rows.of(index) - 1;
  Anchor<T, keyed> anchor(p, g, row / R.N, c, row % R.N, valid);
  bool exists = valid && p.exists(anchor.a, c);
  bool any = p.exists(rows.begin(index) / R.N, c) || p.exists(last / R.N, c);
  int64_t from = part_begin(part, columns.tiles(), p.parts), end = part_begin(part + 1, columns.tiles(), p.parts);
  for (int64_t b = from; b < end && any; ++b) {
    Span<T> I = span(R, g, rows, index), J{Z.z + Z.row({g, c, columns.begin(b)}) * Z.ldz, columns.of(b), Z.ldz};
    scores(R, I, J, t, b > from, inverse_tau, [](int, int, T s) { return s; });
    for (int k = threadIdx.x % per_row; k < J.rows && exists; k += per_row) {
      int64_t j = columns.begin(b) + k;
      T s = t.S[r * lds + k];
      bool same_index = anchor.same_index(j), same_key = false;
      if (keyed) same_key = anchor.same_key(key_of(p.passing_keys, g, j));
      if (same_index) anchor.take_same_index(s);
      if (same_key)
        anchor.take_same_key(j, s);
      else if (!same_index && !(keyed && p.pairs))
        negatives_of(anchor.sums).add(s);
    }
  }
  auto* to = reinterpret_cast<SumsOf<T, keyed>*>(p.sums) + part * p.anchor_count();
  join<per_row>(anchor.sums, valid, to + anchor.at());
}

// The outputs with index k, for one anchor with one set.
template <typename T, bool keyed>
TCLR_DEVICE void finish_sums(const Rectangle<T>& p, int64_t k) {
  int64_t count = p.anchor_count();
  if (k >= count) return;
  auto* parts = reinterpret_cast<const SumsOf<T, keyed>*>(p.sums) + k;
  SumsOf<T, keyed> all = parts[0];
  for (int64_t part = 1; part < p.parts; ++part) all.merge(parts[part * count]);
  if constexpr (keyed) {
    if (p.slope) p.slope[k] = all.slope;
    if (p.pair_sums) p.pair_sums[k] = all.sum;
    if (p.pairs) return;
    p.pos_lse[k] = all.positives.log_sum(), p.count[k] = double(all.count);
    double spread = p.pos_lse[k] - all.sum / double(all.count);
    p.spread[k] = all.count > 1 ? spread : all.sum - all.sum;
  }
  p.neg[k] = negatives_of(all).log_sum();
  int64_t c = k / p.resident.N % p.passing.V, a = k / p.resident.N / p.passing.V % p.resident.V;
  if (p.offset == no_index || a == c || !p.exists(a, c)) p.pos[k] = 0;
}

// ---- coefficients

// The size of the coefficients of resident anchor k. Those of pairs include their sigmoids, since the coefficients of
// confident pairs are below float's range for any upstream gradient.
template <typename T>
TCLR_DEVICE double largest_of(const Rectangle<T>& p, int64_t a, int64_t c, int64_t k) {
  const Anchors& x = p.anchors;
  if (!p.exists(a, c)) return 0;
  double top = 0;
  auto note = [&](double size) {
    if (size > top && size < INFINITY) top = size;
  };
  if (p.pairs) {
    note(fabs(x.g_pairs[k]) * p.slope[k]);
  } else {
    if (x.neg[k] > -INFINITY) note(fabs(x.g_neg[k]));
    if (a != c && p.offset != no_index) note(fabs(x.g_pos[k]));
    if (x.count && x.count[k] > 0) note(fabs(x.g_pos_lse[k]));
    if (x.count && x.count[k] > 1) note(fabs(x.g_spread[k]));
  }
  return top;
}

template <typename T>
TCLR_DEVICE void note_largest(const Rectangle<T>& p, int64_t k) {
  const Gram<T>& R = p.resident;
  bool valid = k < p.anchor_count();
  int64_t c = k / R.N % p.passing.V, a = k / R.N / p.passing.V % R.V, g = k / R.N / p.passing.V / R.V;
  note_largest(R, g, valid, valid ? largest_of(p, a, c, k) : 0.0);
}

// ---- gradient

// The weight of a negative, divided by the unit of the group: g exp(S - shift).
template <typename T>
struct Negative {
  T g = 0, shift = INFINITY;

  Negative() = default;
  TCLR_METHOD Negative(const Anchors& x, int64_t at, double inverse_unit) {
    if (!x.neg || x.neg[at] == -INFINITY) return;
    g = T((x.g_neg ? x.g_neg[at] : 1) * inverse_unit);
    if (g != 0) shift = T(x.neg[at]);
  }
};

// The weight of a positive: g exp(S - shift) + g_spread (exp(S - shift) - share). For pairs, it is
// g exp(g_spread) sigmoid(shift - S), where g is only a sign, since g_pairs / unit may be outside of float's range.
template <typename T>
struct Positive {
  T g = 0, g_spread = 0, shift = INFINITY, share = 0;

  Positive() = default;
  TCLR_METHOD Positive(const Anchors& x, int64_t at, double inverse_unit) {
    if (x.g_pairs) {
      double size = x.g_pairs[at] * inverse_unit;
      if (size == 0) return;
      g = T(size > 0 ? -1 : size < 0 ? 1 : size), g_spread = T(log(fabs(size))), shift = T(x.negatives[at]);
    } else if (x.pos_lse && x.count[at] > 0) {
      g = T(x.g_pos_lse[at] * inverse_unit), share = T(1 / x.count[at]);
      if (x.count[at] > 1) g_spread = T(x.g_spread[at] * inverse_unit);
      if (g != 0 || g_spread != 0) shift = T(x.pos_lse[at]);
    }
  }
  TCLR_METHOD T weight(T s, bool pairs) const {
    if (pairs) {
      T t = shift - s;
      return g == 0 ? 0 : g * exp(g_spread + (t < 0 ? t : 0)) / (1 + exp(t < 0 ? t : -t));
    }
    T e = exp(s - shift);
    return g * e + g_spread * (e - share);
  }
};

// The weight of the candidate with the same index in another set, in addition to its weight as a positive.
TCLR_DEVICE double g_pos_of(const Anchors& x, int64_t at) { return x.g_pos ? x.g_pos[at] : 0; }

// The weight of one entry, from the anchors of both sides.
template <typename T, bool keyed>
TCLR_DEVICE T weight(const Rectangle<T>& p, const Place& row, const Place& column, T s, double inverse_unit) {
  bool same_index = column.i == row.i + p.offset, same_key = false;
  if (!p.exists(row.a, column.a) || (same_index && row.a == column.a)) return 0;
  if (keyed) {
    int64_t key = key_of(p.keys, row.g, row.i);
    same_key = key >= 0 && key == key_of(p.passing_keys, row.g, column.i);
  }
  T sum = 0;
  auto add = [&](const Anchors& x, int64_t at) {
    if (same_key) {
      sum += Positive<T>(x, at, inverse_unit).weight(s, p.pairs);
    } else if (!same_index) {
      Negative<T> w(x, at, inverse_unit);
      sum += w.g == 0 ? 0 : w.g * exp(s - w.shift);
    }
    if (same_index) sum += T(g_pos_of(x, at) * inverse_unit);
  };
  add(p.anchors, p.at(row.g, row.a, column.a, row.i));
  add(p.passing_anchors, p.passing_at(row.g, column.a, row.a, column.i));
  return sum;
}

// One panel of features of the gradient of one tile of resident rows, summed over one part of the passing rows, and
// divided by `unit` / tau.
template <typename T, bool keyed>
TCLR_DEVICE void rectangle_gradient(const Rectangle<T>& p, int64_t block) {
  const Gram<T>&R = p.resident, &Z = p.passing;
  Cut rows{R.V * R.N, tile}, columns{Z.V * Z.N, tile};
  int64_t first = block % R.panels() * panel<T>, rest = block / R.panels();
  int64_t part = rest % p.parts, index = rest / p.parts % rows.tiles(), g = rest / p.parts / rows.tiles();
  Tile<T> t(R.ldz);
  T inverse_tau = T(1 / value_of(R.tau));
  double inverse_unit = 1 / unit(R, g);
  PanelSum<T> dz(Tile<T>::width(R.ldz - first));
  auto place = [&](const Gram<T>& side, int64_t row) -> Place {
    auto flat = uint32_t(row), N = uint32_t(side.N);
    return {g, flat / N, flat % N};
  };
  Span<T> I = span(R, g, rows, index);
  int64_t from = part_begin(part, columns.tiles(), p.parts), end = part_begin(part + 1, columns.tiles(), p.parts);
  for (int64_t b = from; b < end; ++b) {
    Span<T> J = span(Z, g, columns, b);
    scores(R, I, J, t, b > from, inverse_tau, [&](int r, int j, T s) -> T {
      if (r >= I.rows || j >= J.rows) return 0;
      Place row = place(R, rows.begin(index) + r), column = place(Z, columns.begin(b) + j);
      return weight<T, keyed>(p, row, column, s, inverse_unit);
    });
    if (R.panels() > 1) {
      load(J, first, dz.width, t.columns, t.ldp);
      wait_for_copies();
      __syncthreads();
    }
    dz.add(t, I.rows, J.rows);
    __syncthreads();
  }
  int64_t row = (part * R.G + g) * R.V * R.N + rows.begin(index);
  dz.write(I.rows, R.ldz, R.dz + row * R.ldz + first);
}

// Writes one value of the columns' mean.
template <typename T>
TCLR_DEVICE void write_mean(const Rectangle<T>& p, int64_t k) {
  const Gram<T>& R = p.resident;
  int64_t row = k / R.D;
  if (row < R.rows()) p.mean[k] = T(sum_of_parts(R, R.place(row)).at(k % R.D));
}

}  // namespace
}  // namespace tclr
