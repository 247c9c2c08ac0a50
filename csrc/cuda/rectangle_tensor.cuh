// Some rows against some columns on tensor cores, if there are many of them; see rectangle.cuh and tensor.cuh. A tile
// has 64 rows of one set and 64 columns of one set. The sums of pairs are always computed by rectangle.cuh.
#pragma once
#include "rectangle.cuh"
#include "tensor.cuh"

namespace tclr {
namespace {

// The rows for `for_each_tile`. The passing tiles of all sets of a group are numbered consecutively, and Block.a is
// this number.
struct TwoSides {
  const Rectangle<float>& p;
  const Packed &z, &passing_z;

  constexpr Cut rows() const { return {p.resident.N, tensor_tile}; }
  constexpr Cut columns() const { return {p.passing.N, tensor_tile}; }
  constexpr size_t shared() const { return sizeof(uint32_t) * tensor_tile * (z.chunks() > 1 ? 4 : 3) * ldc; }

  TCLR_METHOD const Packed& packed() const { return z; }
  TCLR_METHOD int64_t passing_blocks() const { return 1; }
  TCLR_METHOD Span<uint32_t> resident(const Block& b) const {
    return {z.words + p.resident.row({b.g, b.a, rows().begin(b.index)}) * z.ldw, rows().of(b.index)};
  }
  TCLR_METHOD Span<uint32_t> passing(const Block& b) const {
    Block J = tile_of(b);
    return {passing_z.words + p.passing.row({J.g, J.a, columns().begin(J.index)}) * z.ldw, columns().of(J.index)};
  }
  // The set of a passing tile, and its index in the set.
  TCLR_METHOD Block tile_of(const Block& b) const {
    auto number = uint32_t(b.a), tiles = uint32_t(columns().tiles());
    return {b.g, number / tiles, number % tiles};
  }
  // The range of tiles with which set a is compared: all, or those of one half of the sets.
  constexpr int64_t half() const { return (p.passing.V + 1) / 2 * columns().tiles(); }
  constexpr int64_t first(int64_t a) const { return p.resident.cross && a < (p.resident.V + 1) / 2 ? half() : 0; }
  constexpr int64_t last(int64_t a) const {
    return p.resident.cross && a >= (p.resident.V + 1) / 2 ? half() : p.passing.V * columns().tiles();
  }
  // In a tile, a row and a column have the same index if column + apart = row. `touch`: whether the tile has such
  // pairs.
  TCLR_METHOD int64_t apart(const Block& I, const Block& J) const {
    return columns().begin(J.index) - rows().begin(I.index) - p.offset;
  }
  TCLR_METHOD bool touch(const Block& I, const Block& J) const {
    int64_t by = apart(I, J);
    return p.offset != no_index && by > -tensor_tile && by < tensor_tile;
  }
};

// ---- sums

constexpr uint32_t all_entries = 0xffffffff;  // a bit for each of a lane's entries

template <bool keyed>
struct RectangleSums {
  const Rectangle<float>& p;
  const TwoSides& sides;
  Block I;
  int64_t* keys;  // those of the columns, in shared memory
  float inverse_tau;
  Lane lane;
  Anchor<float, keyed> anchors[2];
  int64_t key = -1;

  TCLR_METHOD void begin(const Block& b) {
    if (!keyed) return;
    Block J = sides.tile_of(b);
    int r = threadIdx.x;
    key = r < sides.columns().of(J.index) ? key_of(p.passing_keys, J.g, sides.columns().begin(J.index) + r) : -1;
  }
  // Handles the candidates that are not negatives, and sets them to -inf in S.
  TCLR_METHOD void take_others(const Block& J, TileOfS& S) {
    bool touch = sides.touch(I, J);
    if (!touch && !keyed) return;
    int apart = touch ? int(sides.apart(I, J)) : 2 * tensor_tile;
    uint32_t others = 0, positives = 0;  // bits as in all_entries
#pragma unroll
    for (int n = 0; n < tensor_tile / 8; ++n)
      for (int e = 0; e < 4; ++e) {
        const auto& anchor = anchors[e / 2];
        int column = lane.column(n, e);
        bool same_index = column + apart == lane.row(e) && anchor.valid;
        bool same_key = keyed && anchor.same_key(keys[column]);
        if (same_index) anchor.take_same_index(S[n][e]);
        others |= uint32_t(same_index || same_key) << (4 * n + e);
        positives |= uint32_t(same_key && !(same_index && anchor.a == anchor.c)) << (4 * n + e);
      }
    if constexpr (keyed)
      if (positives) add_positives<0>(S, positives), add_positives<1>(S, positives);
#pragma unroll
    for (int n = 0; n < tensor_tile / 8; ++n)
      for (int e = 0; e < 4; ++e)
        if (others >> (4 * n + e) & 1) S[n][e] = -INFINITY;
  }
  template <int h>
  TCLR_METHOD void add_positives(const TileOfS& S, uint32_t positives) {
    float sum = 0;
    int count = 0;
#pragma unroll
    for (int n = 0; n < tensor_tile / 8; ++n)
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        bool is = positives >> (4 * n + e) & 1;
        sum += is ? S[n][e] : 0, count += is;
      }
    Sums<float>& of = anchors[h].sums;
    of.positives.merge(of_tile<h>(S, positives)), of.sum += sum, of.count += count;
  }
  TCLR_METHOD void use_products(const Block& b, TileOfS& S) {
    Block J = sides.tile_of(b);
    if (keyed) {
      if (threadIdx.x < tensor_tile) keys[threadIdx.x] = key;
      __syncthreads();
    }
    for (auto& row : S)
      for (float& s : row) s *= inverse_tau;
    take_others(J, S);
    lane.put(S, sides.columns().of(J.index), -INFINITY);
    negatives_of(anchors[0].sums).merge(of_tile<0>(S, all_entries));
    negatives_of(anchors[1].sums).merge(of_tile<1>(S, all_entries));
  }
  template <int h>
  TCLR_METHOD Exponentials<float> of_tile(const TileOfS& S, uint32_t entries) const {
    auto value = [&](int n, int e) { return entries >> (4 * n + e) & 1 ? S[n][e] : -INFINITY; };
    float top = lowest<float>, sum = 0;
    for (int n = 0; n < tensor_tile / 8; ++n)
      for (int e = 2 * h; e < 2 * h + 2; ++e) top = value(n, e) > top ? value(n, e) : top;
    float offset = top < INFINITY ? top : 0;
    for (int n = 0; n < tensor_tile / 8; ++n)
      for (int e = 2 * h; e < 2 * h + 2; ++e) sum += exponential(value(n, e) - offset);
    return {top, sum};
  }
  TCLR_METHOD void add_product(TileOfS&, const uint32_t*, int) {}
};

// The sums of one tile of resident rows with one part of one passing set.
template <typename E, bool keyed>
TCLR_DEVICE void rectangle_sums_on_tensor_cores(const Rectangle<float>& p, const TwoSides& sides, int64_t block) {
  int64_t C = p.passing.V, part = block % p.parts, c = block / p.parts % C, rest = block / p.parts / C;
  int64_t index = rest % sides.rows().tiles(), set = rest / sides.rows().tiles();
  Block I{set / p.resident.V, set % p.resident.V, index};
  Lane lane;
  auto anchor = [&](int h) -> Anchor<float, keyed> {
    int row = lane.row(2 * h);
    bool valid = row < sides.rows().of(index);
    return {p, I.g, I.a, c, sides.rows().begin(index) + (valid ? row : 0), valid};
  };
  auto* keys = reinterpret_cast<int64_t*>(shared_memory<char>() + sides.shared());
  RectangleSums<keyed> work{p, sides, I, keys, float(1 / value_of(p.resident.tau)), lane, {anchor(0), anchor(1)}};
  int64_t tiles = p.exists(I.a, c) ? sides.columns().tiles() : 0, first = c * sides.columns().tiles();
  for_each_tile<E>(sides, I, first + part_begin(part, tiles, p.parts), first + part_begin(part + 1, tiles, p.parts), -1,
                   work);
  auto* to = reinterpret_cast<SumsOf<float, keyed>*>(p.sums) + part * p.anchor_count();
#pragma unroll
  for (int h = 0; h < 2; ++h) join<4>(work.anchors[h].sums, work.anchors[h].valid, to + work.anchors[h].at());
}

// ---- sums, and the mean of the columns

// If a row is one chunk, this adds up the columns with weights exp(S - shift), together with the weights. The shift
// depends on the row's largest S. For float16 it is lower, so that small weights are not subnormal.
template <typename E>
struct RectangleMean {
  static constexpr float below = std::is_same_v<E, Half> ? 9 : 0;

  const TwoSides& sides;
  float inverse_tau;
  Lane lane;
  float largest[2] = {lowest<float>, lowest<float>};  // of each row, the same in its four lanes
  Exponentials<float> sums[2];                        // of this lane, with the shift as their `largest`
  ChunkSum<E> weighted;

  TCLR_METHOD void begin(const Block&) {}
  TCLR_METHOD void use_products(const Block& b, TileOfS& S) {
    for (auto& row : S)
      for (float& s : row) s *= inverse_tau;
    lane.put(S, sides.columns().of(sides.tile_of(b).index), -INFINITY);
    for (int h = 0; h < 2; ++h) {
      float top = largest[h];
      for (int n = 0; n < tensor_tile / 8; ++n)
        for (int e = 2 * h; e < 2 * h + 2; ++e) top = S[n][e] > top ? S[n][e] : top;
      for (int bits = 1; bits < 4; bits *= 2) {
        float other = of_other_lane(top, bits);
        top = other > top ? other : top;
      }
      float shift = top < INFINITY ? top - below : 0, factor = exponential(sums[h].largest - shift), sum = 0;
      for (int n = 0; n < tensor_tile / 8; ++n)
        for (int e = 2 * h; e < 2 * h + 2; ++e) sum += S[n][e] = exponential(S[n][e] - shift);
      for (auto& x : weighted.sum) x[2 * h] *= factor, x[2 * h + 1] *= factor;
      largest[h] = top, sums[h] = {shift, sums[h].sum * factor + sum};
    }
  }
  TCLR_METHOD void add_product(TileOfS& W, const uint32_t* columns, int words) { weighted.add(W, columns, words); }
};

// The sums of one tile of resident rows with one part of the only passing set, and the weighted sum of the columns.
template <typename E>
TCLR_DEVICE void rectangle_mean_on_tensor_cores(const Rectangle<float>& p, const TwoSides& sides, int64_t block) {
  const Gram<float>& R = p.resident;
  int64_t part = block % p.parts, index = block / p.parts % sides.rows().tiles();
  Block I{block / p.parts / sides.rows().tiles(), 0, index};
  RectangleMean<E> work{sides, float(1 / value_of(R.tau))};
  int64_t tiles = sides.columns().tiles();
  for_each_tile<E>(sides, I, part_begin(part, tiles, p.parts), part_begin(part + 1, tiles, p.parts), 0, work);
  int64_t first = R.row({I.g, 0, sides.rows().begin(index)}), rows = sides.rows().of(index);
  auto* to = reinterpret_cast<Exponentials<float>*>(p.sums) + part * p.anchor_count() + first;
  for (int h = 0; h < 2; ++h) {
    int row = work.lane.row(2 * h);
    join<4>(work.sums[h], row < rows, to + (row < rows ? row : 0));
  }
  work.weighted.write(rows, R.ldz, R.ldz, R.dz + (part * R.rows() + first) * R.ldz);
}

// Writes one value of the mean, from all parts.
TCLR_DEVICE void join_mean(const Rectangle<float>& p, int64_t k) {
  const Gram<float>& R = p.resident;
  int64_t row = k / R.D, rows = R.rows();
  if (row >= rows) return;
  auto* sums = reinterpret_cast<const Exponentials<float>*>(p.sums) + row;
  Exponentials<float> all = sums[0];
  for (int64_t part = 1; part < p.parts; ++part) all.merge(sums[part * rows]);
  float mean = 0;
  for (int64_t part = 0; part < p.parts; ++part)
    mean += exp(sums[part * rows].largest - all.largest) * R.dz[(part * rows + row) * R.ldz + k % R.D];
  p.mean[k] = mean / all.sum;
}

// ---- gradient

enum Weighed { of_resident = 1, of_passing = 2 };  // the sides whose rows are anchors

template <bool keyed>
struct Coefficients {  // those of one anchor with one set
  Negative<float> negative;
};

template <>
struct Coefficients<true> {
  Negative<float> negative;
  Positive<float> positive;
  int64_t key = -1;
};

template <typename E, bool keyed, int weighed>
struct RectangleGradient {
  const Rectangle<float>& p;
  const TwoSides& sides;
  Block I;
  Coefficients<keyed>* shared;  // those of the columns
  float inverse_tau;
  double inverse_unit;
  Lane lane;
  int64_t set = -1;  // the current passing set
  Coefficients<keyed> own[2], column;
  ChunkSum<E> dz;

  TCLR_METHOD static Coefficients<keyed> coefficients(const Anchors& x, int64_t at, double inverse_unit,
                                                      const Keys& keys, int64_t g, int64_t i, bool weighs) {
    Coefficients<keyed> found;
    if (weighs) found.negative = Negative<float>(x, at, inverse_unit);
    if constexpr (keyed) {
      if (weighs) found.positive = Positive<float>(x, at, inverse_unit);
      found.key = key_of(keys, g, i);
    }
    return found;
  }
  TCLR_METHOD void begin(const Block& b) {
    Block J = sides.tile_of(b);
    int r = threadIdx.x;
    int64_t i = sides.rows().begin(I.index), j = sides.columns().begin(J.index) + r;
    column = {};
    if (r < sides.columns().of(J.index) && (keyed || weighed & of_passing))
      column = coefficients(p.passing_anchors, p.passing_at(I.g, J.a, I.a, j), inverse_unit, p.passing_keys, I.g, j,
                            weighed & of_passing);
    if (J.a == set || !(keyed || weighed & of_resident)) return;
    set = J.a;
    for (int h = 0; h < 2; ++h) {
      int row = lane.row(2 * h);
      own[h] = {};
      if (row < sides.rows().of(I.index))
        own[h] = coefficients(p.anchors, p.at(I.g, I.a, J.a, i + row), inverse_unit, p.keys, I.g, i + row,
                              weighed & of_resident);
    }
  }
  TCLR_METHOD float of_same_index(const Block& J, int64_t i) const {
    double g = 0;
    if (weighed & of_resident) g += g_pos_of(p.anchors, p.at(I.g, I.a, J.a, i));
    if (weighed & of_passing) g += g_pos_of(p.passing_anchors, p.passing_at(I.g, J.a, I.a, i + p.offset));
    return float(g * inverse_unit);
  }
  TCLR_METHOD bool same_key(int n, int e) const {
    if constexpr (keyed) return own[e / 2].key >= 0 && own[e / 2].key == shared[lane.column(n, e)].key;
    return false;
  }
  // The weight of one entry, from the anchor on one side.
  TCLR_METHOD static float weight(const Coefficients<keyed>& x, float s, bool same_key) {
    float g = x.negative.g, shift = x.negative.shift;
    if constexpr (keyed)
      if (same_key) g = x.positive.g, shift = x.positive.shift;
    float e = exponential(s - shift), w = g * e;
    if constexpr (keyed)
      if (same_key) w += x.positive.g_spread * (e - x.positive.share);
    return w;
  }

  TCLR_METHOD void use_products(const Block& b, TileOfS& S) {
    Block J = sides.tile_of(b);
    if (keyed || weighed & of_passing) {
      if (threadIdx.x < tensor_tile) shared[threadIdx.x] = column;
      __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < tensor_tile / 8; ++n)
      for (int e = 0; e < 4; ++e) {
        float s = S[n][e] * inverse_tau, sum = 0;
        bool positive = same_key(n, e);
        if (weighed & of_resident) sum += weight(own[e / 2], s, positive);
        if (weighed & of_passing) sum += weight(shared[lane.column(n, e)], s, positive);
        S[n][e] = sum;
      }
    lane.put(S, sides.columns().of(J.index), 0);
    if (!sides.touch(I, J)) return;
    int apart = int(sides.apart(I, J));
    for (int n = 0; n < tensor_tile / 8; ++n)
      for (int e = 0; e < 4; ++e) {
        int row = lane.row(e), column = lane.column(n, e);
        // if the columns are a range of the rows' index, a row may have no column, and then no upstream gradient
        if (column + apart != row || row >= sides.rows().of(I.index) || column >= sides.columns().of(J.index)) continue;
        S[n][e] = I.a == J.a ? 0 : (same_key(n, e) ? S[n][e] : 0) + of_same_index(J, sides.rows().begin(I.index) + row);
      }
  }
  TCLR_METHOD void add_product(TileOfS& W, const uint32_t* columns, int words) { dz.add(W, columns, words); }
};

// One chunk of the gradient of one tile of resident rows, summed over one part of the passing tiles.
template <typename E, bool keyed, int weighed>
TCLR_DEVICE void rectangle_gradient_on_tensor_cores(const Rectangle<float>& p, const TwoSides& sides, int64_t block) {
  const Gram<float>& R = p.resident;
  int panel = int(block % sides.z.chunks());
  int64_t rest = block / sides.z.chunks(), part = rest % p.parts, index = rest / p.parts % sides.rows().tiles();
  int64_t set = rest / p.parts / sides.rows().tiles(), a = set % R.V, g = set / R.V;
  int64_t first = sides.first(a), tiles = sides.last(a) - first;
  auto* shared = reinterpret_cast<Coefficients<keyed>*>(shared_memory<char>() + sides.shared());
  RectangleGradient<E, keyed, weighed> work{
      p, sides, {g, a, index}, shared, float(1 / value_of(R.tau)), 1 / unit(R, g)};
  for_each_tile<E>(sides, work.I, first + part_begin(part, tiles, p.parts),
                   first + part_begin(part + 1, tiles, p.parts), panel, work);
  int64_t row = part * R.rows() + R.row({g, a, sides.rows().begin(index)}), from = panel * work.dz.features;
  int64_t size = R.ldz - from < work.dz.features ? R.ldz - from : work.dz.features;
  work.dz.write(sides.rows().of(index), R.ldz, size, R.dz + row * R.ldz + from);
}

}  // namespace
}  // namespace tclr
