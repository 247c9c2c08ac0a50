// The operation and its gradient on tensor cores, for many rows. The formulas are those of gram.cuh, whose code also
// computes norms, coefficients and all that is done row by row.
//
//   rows      half precision: unit rows as float16 (11 bits), other rows in their own dtype; float32: as TF32
//   sums      a thread block has 64 rows, and compares them with a set: S in registers, (largest, sum) of every row
//   gradient  S again; W replaces it in registers, and is the left operand of the product with the columns
//
// A warp has 16 of a block's rows. Rows are copied in chunks of 64 words, during the arithmetic on the previous chunk.
#pragma once
#include "gram.cuh"
#include "warp.h"

namespace tclr {
namespace {

constexpr int tensor_tile = 64;  // rows and columns of a tile of S
constexpr int chunk = 64;        // words of a row that are in shared memory at a time
constexpr int ldc = chunk + 4;   // row stride there, so that rows begin in different banks
template <typename E>
constexpr int in_word = 4 / sizeof(typename E::Element);

// Rows in the format that tensor cores read.
struct Packed {
  uint32_t* words;  // [G, V, N, ldw], padded with zeros
  int64_t ldw;

  constexpr int chunks() const { return int((ldw + chunk - 1) / chunk); }
};

struct TensorTiles {
  Problem problem;
  Packed z;

  template <typename T>
  constexpr TensorTiles(const Gram<T>& p, const Packed& z) : problem(p.V, p.N, p.cross, tensor_tile, 1), z(z) {}
  // The range of sets with which set a is compared.
  constexpr int64_t first(int64_t a) const { return problem.cross && a < problem.half() ? problem.half() : 0; }
  constexpr int64_t last(int64_t a) const { return problem.cross && a >= problem.half() ? problem.half() : problem.V; }
  constexpr size_t shared() const {
    int stages = z.chunks() > 1 ? 4 : 3;
    return sizeof(uint32_t) * tensor_tile * (stages * ldc + 2);
  }
};

using TileOfS = float[tensor_tile / 8][4];

// The positions of a lane's entries in a tile: S[n][e] is in row `row(e)` and column `column(n, e)`.
struct Lane {
  int warp, g, t;

  TCLR_METHOD Lane() : warp(threadIdx.x / 32), g(threadIdx.x % 32 / 4), t(threadIdx.x % 4) {}
  TCLR_METHOD int row(int e) const { return warp * 16 + e / 2 * 8 + g; }
  TCLR_METHOD int column(int n, int e) const { return n * 8 + t * 2 + e % 2; }
  // Whether this lane has the diagonal entries of its rows.
  TCLR_METHOD bool on_diagonal() const { return g / 2 == t; }
  // Sets the columns from `count` on to a value.
  TCLR_METHOD void put(TileOfS& S, int64_t count, float value) const {
    if (count == tensor_tile) return;
    for (int n = 0; n < tensor_tile / 8; ++n)
      for (int e = 0; e < 4; ++e)
        if (column(n, e) >= count) S[n][e] = value;
  }
};

TCLR_DEVICE void copy_chunk(const uint32_t* from, int64_t ldw, int64_t rows, int words, uint32_t* to) {
  int w = threadIdx.x % 16 * 4;
  for (int r = threadIdx.x / 16; r < tensor_tile && w < words; r += threads / 16)
    copy_async(to + r * ldc + w, from + (r < rows ? r * ldw + w : 0), r < rows);
}

// Adds the products of two chunks of rows to S.
template <typename E>
TCLR_DEVICE void add_products(TileOfS& S, const uint32_t* rows, const uint32_t* columns, int words) {
  int lane = threadIdx.x % 32;
  rows += (threadIdx.x / 32 * 16 + lane % 16) * ldc + lane / 16 * 4;
  columns += (lane / 16 * 8 + lane % 8) * ldc + lane / 8 % 2 * 4;
  for (int k = 0; k < words; k += 8) {
    uint32_t left[4], right[4];
    load_matrices(left, rows + k);
    for (int n = 0; n < tensor_tile / 8; n += 2) {
      load_matrices(right, columns + n * 8 * ldc + k);
      multiply_add<E>(S[n], left, right[0], right[1]);
      multiply_add<E>(S[n + 1], left, right[2], right[3]);
    }
  }
}

// The rows for `for_each_tile` if the rows of a thread block (resident) and the columns (passing) are of the same sets.
struct SameSets {
  const TensorTiles& tiles;
  const Gram<float>& p;

  TCLR_METHOD const Packed& packed() const { return tiles.z; }
  TCLR_METHOD int64_t passing_blocks() const { return tiles.problem.blocks; }
  TCLR_METHOD Span<uint32_t> passing(const Block& b) const {
    const uint32_t* rows = tiles.z.words + p.row({b.g, b.a, tiles.problem.begin(b.index)}) * tiles.z.ldw;
    return {rows, tiles.problem.rows(b.index)};
  }
  TCLR_METHOD Span<uint32_t> resident(const Block& b) const { return passing(b); }
};

// Computes all tiles of the rows I with the sets first .. last. For each of them it calls work.begin(J); then
// work.use_products(J, S), where S has <z_i, z_j> and may be changed; and then work.add_product(S, columns, words). If
// panel >= 0, this chunk of the columns is in shared memory during the last call.
template <typename E, typename Tiles, typename Work>
TCLR_DEVICE void for_each_tile(const Tiles& tiles, const Block& I, int64_t first, int64_t last, int panel, Work& work) {
  const Packed& z = tiles.packed();
  auto* shared = shared_memory<uint32_t>();
  int chunks = z.chunks(), parts = chunks + (panel >= 0 && chunks > 1);
  auto stage = [&](int of, int step) {
    return shared + (of + (of < 2 || chunks > 1 ? step % 2 : 0)) * tensor_tile * ldc;
  };
  auto width = [&](int k) { return int(z.ldw) - k * chunk < chunk ? int(z.ldw) - k * chunk : chunk; };
  auto copy = [&](const Span<uint32_t>& from, int k, uint32_t* to) {
    copy_chunk(from.z + k * chunk, z.ldw, from.rows, width(k), to);
  };

  struct Step {
    Block J;
    int part, count;
  };
  auto next = [&](Step& s) {
    ++s.count;
    if (++s.part < parts) return;
    s.part = 0;
    if (++s.J.index < tiles.passing_blocks()) return;
    s.J.index = 0, ++s.J.a;
  };
  Step ahead{{I.g, first, 0}, 0, 0};
  auto fetch = [&] {
    if (ahead.J.a < last) {
      copy(tiles.passing(ahead.J), ahead.part < chunks ? ahead.part : panel, stage(0, ahead.count));
      if (ahead.part < chunks && (chunks > 1 || ahead.count == 0))
        copy(tiles.resident(I), ahead.part, stage(2, ahead.count));
    }
    end_group();
    next(ahead);
  };
  TileOfS S;
  fetch();
  for (Step s = {{I.g, first, 0}, 0, 0}; s.J.a < last; next(s)) {
    fetch();
    wait_for_groups();
    __syncthreads();
    const uint32_t* columns = stage(0, s.count);
    if (s.part == 0) {
      for (auto& row : S)
        for (float& x : row) x = 0;
      work.begin(s.J);
    }
    if (s.part < chunks) add_products<E>(S, stage(2, s.count), columns, width(s.part));
    if (s.part == chunks - 1) work.use_products(s.J, S);
    if (s.part == parts - 1) work.add_product(S, columns, width(chunks > 1 ? panel : 0));
    __syncthreads();
  }
}

// ---- sums

struct TensorSums {
  const Gram<float>& p;
  const Problem& problem;
  Block I;
  Lane lane;
  float inverse_tau, largest[2] = {lowest<float>, lowest<float>}, sum[2] = {};

  TCLR_METHOD int64_t at(int64_t c, int e) const { return p.at(I.g, I.a, c, problem.begin(I.index) + lane.row(e)); }
  TCLR_METHOD bool valid(int e) const { return lane.row(e) < problem.rows(I.index); }
  TCLR_METHOD void begin(const Block&) {}
  // Stores the positives, and excludes them from the sums.
  TCLR_METHOD void take_same(const Block& J, TileOfS& S) {
    float same[2];
    for (int n = 0; n < tensor_tile / 8; ++n)
      for (int e = 0; e < 4; ++e)
        if (lane.column(n, e) == lane.row(e)) same[e / 2] = S[n][e], S[n][e] = -INFINITY;
    for (int e = 0; e < 4; e += 2)
      if (lane.on_diagonal() && valid(e) && J.a != I.a) p.pos[at(J.a, e)] = same[e / 2];
  }
  TCLR_METHOD void add_product(TileOfS&, const uint32_t*, int) {}

  TCLR_METHOD void use_products(const Block& J, TileOfS& S) {
    for (auto& row : S)
      for (float& s : row) s *= inverse_tau;
    if (I.index == J.index) take_same(J, S);
    lane.put(S, problem.rows(J.index), -INFINITY);
    for (int h = 0; h < 2; ++h) {
      float top = largest[h];
      for (int n = 0; n < tensor_tile / 8; ++n)
        for (int e = 2 * h; e < 2 * h + 2; ++e) top = S[n][e] > top ? S[n][e] : top;
      float offset = top < INFINITY ? top : 0, more = 0;
      for (int n = 0; n < tensor_tile / 8; ++n)
        for (int e = 2 * h; e < 2 * h + 2; ++e) more += exponential(S[n][e] - offset);
      sum[h] = sum[h] * exponential(largest[h] - offset) + more, largest[h] = top;
    }
  }
};

// neg and pos of one block of rows with one set.
template <typename E>
TCLR_DEVICE void tensor_sums(const Gram<float>& p, const Packed& z, int64_t block) {
  TensorTiles tiles(p, z);
  const Problem& problem = tiles.problem;
  int64_t c = block % p.V, index = block / p.V % problem.blocks, set = block / (p.V * problem.blocks);
  TensorSums work{p, problem, {set / p.V, set % p.V, index}, {}, float(1 / value_of(p.tau))};
  bool exists = problem.exists(work.I.a, c);
  if (!exists || c == work.I.a)
    for (int e = 0; e < 4; e += 2)
      if (work.valid(e) && work.lane.t == 0) p.pos[work.at(c, e)] = 0;
  for_each_tile<E>(SameSets{tiles, p}, work.I, c, exists ? c + 1 : c, -1, work);
  for (int h = 0; h < 2; ++h) {  // four lanes share a row
    float top = over_row(work.largest[h], 4, [](float x, float y) { return y > x ? y : x; });
    float offset = top < INFINITY ? top : 0;
    float all = sum_over_row(work.sum[h] * exponential(work.largest[h] - offset), 4);
    if (work.valid(2 * h) && work.lane.t == 0) p.neg[work.at(c, 2 * h)] = offset + log(all);
  }
}

// ---- gradient

struct Coefficient {  // of an anchor with a set; its weights are W = g exp(S - shift)
  float g = 0, shift = INFINITY;
};

// A lane's part of one chunk of a gradient.
template <typename E>
struct ChunkSum {
  static constexpr int features = chunk * in_word<E>;
  Lane lane;
  float sum[features / 8][4] = {};

  // Adds W z, where z is a chunk of the columns.
  TCLR_METHOD void add(TileOfS& W, const uint32_t* columns, int words) {
    int l = threadIdx.x % 32;
    if constexpr (in_word<E> == 2) {
      columns += l % 16 * ldc + l / 16 * 4;
#pragma unroll
      for (int k = 0; k < tensor_tile / 8; k += 2) {
        uint32_t right[4], left[4] = {pair<E>(W[k][0], W[k][1]), pair<E>(W[k][2], W[k][3]),
                                      pair<E>(W[k + 1][0], W[k + 1][1]), pair<E>(W[k + 1][2], W[k + 1][3])};
        for (int n = 0; n < features / 8; n += 2) {
          if (n * 4 >= words) continue;
          load_transposed(right, columns + k * 8 * ldc + n * 4);
          multiply_add<E>(sum[n], left, right[0], right[1]);
          multiply_add<E>(sum[n + 1], left, right[2], right[3]);
        }
      }
    } else {
      // A lane has columns 2 t and 2 t + 1 of W, but the product takes its entries as columns t and t + 4. So the rows
      // of z are read in the same order: 0, 2, 4, 6, 1, 3, 5, 7.
      columns += lane.t * 2 * ldc + lane.g;
#pragma unroll
      for (int k = 0; k < tensor_tile / 8; ++k) {
        uint32_t left[4] = {E::of(W[k][0]), E::of(W[k][2]), E::of(W[k][1]), E::of(W[k][3])};
        for (int n = 0; n < features / 8; ++n)
          if (n * 8 < words)
            multiply_add<E>(sum[n], left, columns[k * 8 * ldc + n * 8], columns[(k * 8 + 1) * ldc + n * 8]);
      }
    }
  }
  // Writes `size` features of `rows` rows. dz: the first of them.
  TCLR_METHOD void write(int64_t rows, int64_t ldz, int64_t size, float* dz) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int row = lane.row(2 * h);
      float* to = dz + row * ldz;
      if (row < rows)
        for (int n = 0; n < features / 8; ++n)
          for (int e = 2 * h; e < 2 * h + 2; ++e)
            if (int d = lane.column(n, e); d < size) to[d] = sum[n][e];
    }
  }
};

template <typename E>
struct TensorGradient {
  const Gram<float>& p;
  const Problem& problem;
  Block I;
  Coefficient* shared;  // those of the columns
  float inverse_tau;
  double inverse_unit;
  Lane lane;
  Coefficient own[2], column;
  ChunkSum<E> dz;

  TCLR_METHOD Coefficient coefficient(int64_t g, int64_t a, int64_t c, int64_t i) const {
    int64_t at = p.at(g, a, c, i);
    Coefficient x{float(p.g_neg[at] * inverse_unit), p.neg[at]};
    if (x.g == 0) x.shift = INFINITY;  // neg may be -inf here
    return x;
  }
  TCLR_METHOD void begin(const Block& J) {
    int r = threadIdx.x;
    column = r < problem.rows(J.index) ? coefficient(J.g, J.a, I.a, problem.begin(J.index) + r) : Coefficient{};
    for (int h = 0; h < 2 && J.index == 0; ++h) {
      int row = lane.row(2 * h);
      own[h] = row < problem.rows(I.index) ? coefficient(I.g, I.a, J.a, problem.begin(I.index) + row) : Coefficient{};
    }
  }
  // The weight of a row's positive.
  TCLR_METHOD float of_same(const Block& J, int row) const {
    if (J.a == I.a || row >= problem.rows(I.index)) return 0;
    int64_t i = problem.begin(I.index) + row;
    return float((p.g_pos[p.at(I.g, I.a, J.a, i)] + p.g_pos[p.at(I.g, J.a, I.a, i)]) * inverse_unit);
  }

  // Replaces S by W + W^T.
  TCLR_METHOD void use_products(const Block& J, TileOfS& S) {
    if (threadIdx.x < tensor_tile) shared[threadIdx.x] = column;
    __syncthreads();
#pragma unroll
    for (int n = 0; n < tensor_tile / 8; ++n)
      for (int e = 0; e < 4; ++e) {
        const Coefficient &x = own[e / 2], &y = shared[lane.column(n, e)];
        float s = S[n][e] * inverse_tau;
        S[n][e] = x.g * exponential(s - x.shift) + y.g * exponential(s - y.shift);
      }
    lane.put(S, problem.rows(J.index), 0);
    if (I.index != J.index) return;
    float same[2] = {of_same(J, lane.row(0)), of_same(J, lane.row(2))};
    for (int n = 0; n < tensor_tile / 8; ++n)
      for (int e = 0; e < 4; ++e)
        if (lane.column(n, e) == lane.row(e)) S[n][e] = same[e / 2];
  }
  TCLR_METHOD void add_product(TileOfS& W, const uint32_t* columns, int words) { dz.add(W, columns, words); }
};

// One chunk of the gradient of one block of rows, summed over one part of the sets, as in gram.cuh.
template <typename E>
TCLR_DEVICE void tensor_gradient(const Gram<float>& p, const Packed& z, int64_t block) {
  TensorTiles tiles(p, z);
  const Problem& problem = tiles.problem;
  int panel = int(block % z.chunks());
  int64_t rest = block / z.chunks(), part = rest % p.parts, index = rest / p.parts % problem.blocks;
  int64_t set = rest / p.parts / problem.blocks, a = set % p.V;
  int64_t first = tiles.first(a), sets = tiles.last(a) - first;
  auto* coefficients = reinterpret_cast<Coefficient*>(shared_memory<char>() + tiles.shared()) - tensor_tile;
  TensorGradient<E> work{
      p, problem, {set / p.V, a, index}, coefficients, float(1 / value_of(p.tau)), 1 / unit(p, set / p.V)};
  for_each_tile<E>(SameSets{tiles, p}, work.I, first + part * sets / p.parts, first + (part + 1) * sets / p.parts,
                   panel, work);
  int64_t row = part * p.rows() + p.row({work.I.g, a, problem.begin(index)}), from = panel * work.dz.features;
  int64_t size = p.ldz - from < work.dz.features ? p.ldz - from : work.dz.features;
  work.dz.write(problem.rows(index), p.ldz, size, p.dz + row * p.ldz + from);
}

}  // namespace
}  // namespace tclr
