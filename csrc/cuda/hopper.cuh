// The operation and its gradient for many unit rows of half precision on Hopper (sm_90a), by products of warpgroups.
//
//   rows      z = x / |x| as float16, in blocks of 128 rows, each in the chunks of wgmma.h; padded with zeros
//   sums      sum_j exp S[(a,i),(c,j)] over j != i, and pos; a tile of S is added to the sums of its rows and columns
//   logs      neg
//   factors   alpha = g_neg exp(-neg), and the weights of the positives, divided by the unit of the group (`unit`)
//   gradient  dz_(a,i) = sum_(c,j) exp S (alpha_i + alpha_j) z_j, divided by the unit of the group / tau
//
// The kernels sum exp S itself, which cannot overflow since |S| <= 1 / tau <= `limit`. If the temperature is on the
// device, the kernels of tensor.cuh are launched as well, and those whose range does not contain it return at once.
//
// A thread block has two warpgroups that compute, each for 64 rows of a tile, and a third one, whose first thread
// copies rows to shared memory, as far ahead as there is room. A block computes several pieces of work, one after
// another.
#pragma once
#include "calls.cuh"
#include "wgmma.h"

namespace tclr {
namespace hopper {
namespace {

constexpr int most_features = 256, most_blocks_per_super = 16;
constexpr size_t shared_limit = 227 << 10;
constexpr double limit = 60;  // the largest 1 / tau for which exp S and its sums cannot overflow
constexpr float log2e = 1.4426950408889634f;

// The sizes that all launches need.
struct Layout {
  int G, V, N, blocks, chunks;  // blocks of 128 rows of a set; chunks of 64 features
  bool cross;
  Scalar tau;
  uint16_t* z;  // [G, V, blocks, chunks, 128, 64]

  constexpr int padded() const { return blocks * chunk_rows; }
  constexpr int half() const { return (V + 1) / 2; }
  constexpr bool exists(int a, int c) const { return !cross || (a < half()) != (c < half()); }
  constexpr int block_bytes() const { return chunks * chunk_bytes; }
  // [G, V, V, padded]
  constexpr int64_t at(int g, int a, int c) const { return ((int64_t(g) * V + a) * V + c) * padded(); }
  TCLR_METHOD float inverse_tau() const { return float(1 / value_of(tau)); }
  TCLR_METHOD bool serves() const { return 1 / value_of(tau) <= limit; }
  TCLR_METHOD const uint16_t* rows(int g, int set, int block) const {
    return z + (int64_t(g * V + set) * blocks + block) * (block_bytes() / 2);
  }
};

// A slot in a ring buffer in shared memory, and the phase of its barrier.
struct Ring {
  int slots, slot = 0, phase;

  TCLR_METHOD Ring(int slots, int phase) : slots(slots), phase(phase) {}
  TCLR_METHOD void next() {
    if (++slot == slots) slot = 0, phase ^= 1;
  }
};

// ---- rows

// Eight features of a row. The lanes that share a row are neighbours in a warp.
struct Eight {
  float x[8];
};

// Whether eight features of a row can be loaded or stored together, as 16 bytes.
TCLR_DEVICE bool together(const void* data, int64_t first, int64_t step, int64_t D) {
  return step == 1 && D % 8 == 0 && (reinterpret_cast<uint64_t>(data) + first * 2) % 16 == 0;
}

TCLR_DEVICE float from_half(Dtype dtype, uint16_t h) { return dtype == Dtype::bf16 ? from_bf16(h) : from_f16(h); }

TCLR_DEVICE Eight eight_of(const Source& x, int d, int D) {
  Eight e{};
  auto* from = static_cast<const uint16_t*>(x.data) + x.first;
  if (d >= D) return e;
  if (together(x.data, x.first, x.step, D)) {
    uint4 words = *reinterpret_cast<const uint4*>(from + d);
    for (int k = 0; k < 4; ++k) {
      uint32_t word = k == 0 ? words.x : k == 1 ? words.y : k == 2 ? words.z : words.w;
      e.x[2 * k] = from_half(x.dtype, uint16_t(word)), e.x[2 * k + 1] = from_half(x.dtype, uint16_t(word >> 16));
    }
  } else {
    for (int k = 0; k < 8 && d + k < D; ++k) e.x[k] = from_half(x.dtype, from[(d + k) * x.step]);
  }
  return e;
}

// Combines the values of `lanes` neighbouring lanes. All of them get the same result.
template <typename T, typename Join>
TCLR_DEVICE T over_lanes(T x, int lanes, Join join) {
  for (int step = lanes / 2; step > 0; step /= 2) x = join(x, of_other_lane(x, step));
  return x;
}

// The same as norm_of in rows.cuh.
TCLR_DEVICE Norm<float> norm_of(const Eight& e, int lanes) {
  float largest = 0, scale = 1, inverse = 1, squares = 0;
  for (float x : e.x) largest = fabsf(x) > largest || x != x ? fabsf(x) : largest;
  largest = over_lanes(largest, lanes, [](float x, float y) { return y > x || y != y ? y : x; });
  if (largest > 0 && largest * 0 == 0) {
    int exponent = ilogbf(largest);
    exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;  // keeps scale and inverse finite and normal
    scale = ldexpf(1.0f, exponent), inverse = ldexpf(1.0f, -exponent);
  }
  for (float x : e.x) squares += x * inverse * (x * inverse);
  squares = over_lanes(squares, lanes, [](float x, float y) { return x + y; });
  return {scale, largest * 0 == 0 ? sqrtf(squares) : NAN};
}

TCLR_DEVICE void make_unit(Eight& e, const Norm<float>& norm) {
  float inverse_scale = 1 / norm.scale, inverse = norm.rest == 0 ? 0 : 1 / norm.rest;
  for (float& x : e.x) x = x * inverse_scale * inverse;
}

struct RowsCall {
  Call<float> c;
  Layout l;
  int parts;  // the number of parts of dz, if these kernels computed it

  constexpr int lanes() const { return l.chunks == 1 ? 8 : l.chunks == 2 ? 16 : 32; }
  constexpr int64_t blocks(int rows_per_set) const {
    return (c.count * l.G * rows_per_set * lanes() + threads - 1) / threads;
  }
};

// The row of a thread, if sets have `rows_per_set` rows, and the first of its eight features.
struct RowOf {
  int k, g, i, d;
  bool valid;

  TCLR_METHOD RowOf(const RowsCall& r, int rows_per_set) {
    unsigned thread = blockIdx.x * threads + threadIdx.x, lanes = r.lanes(), row = thread / lanes;
    unsigned set = row / unsigned(rows_per_set);
    i = int(row % unsigned(rows_per_set)), k = int(set / unsigned(r.l.G)), g = int(set % unsigned(r.l.G));
    d = int(thread % lanes) * 8, valid = k < r.c.count;
  }
  TCLR_METHOD Source source(const Call<float>& c) const {
    const Rows& from = c.sets[valid ? k : 0].rows;
    return {from.data, c.dtype, valid ? g * from.stride_g + i * from.stride_n : 0, from.stride_d};
  }
};

TCLR_KERNEL read_blocks(TCLR_ARGUMENT RowsCall r) {
  const Call<float>& c = r.c;
  const Layout& l = r.l;
  for (int64_t g = int64_t(blockIdx.x) * threads + threadIdx.x; c.p.largest && g < l.G; g += gridDim.x * threads)
    c.p.largest[g] = 0;
  RowOf row(r, l.padded());
  bool there = row.valid && row.i < l.N;
  Eight e = eight_of(row.source(c), row.d, there ? int(c.p.D) : 0);
  Norm<float> norm = norm_of(e, r.lanes());
  int a = int(c.first) + row.k;
  if (there && row.d == 0) c.p.norms[(int64_t(row.g) * l.V + a) * l.N + row.i] = norm;
  if (!row.valid || row.d >= l.chunks * chunk_features) return;
  make_unit(e, norm);
  int part = row.d / 8 % 8 ^ row.i % 8;
  auto* to = const_cast<uint16_t*>(l.rows(row.g, a, row.i / chunk_rows)) + row.d / chunk_features * (chunk_bytes / 2) +
             row.i % chunk_rows * chunk_features + part * 8;
  auto word = [&](int q) { return pair<Half>(e.x[q], e.x[q + 1]); };
  *reinterpret_cast<uint4*>(to) = make_uint4(word(0), word(2), word(4), word(6));
}

TCLR_KERNEL write_blocks(TCLR_ARGUMENT RowsCall r) {
  const Call<float>& c = r.c;
  const Gram<float>& p = c.p;
  RowOf row(r, r.l.N);
  int D = row.valid ? int(p.D) : 0, d = row.d;
  int64_t place = row.valid ? (row.g * p.V + c.first + row.k) * p.N + row.i : 0;
  Norm<float> norm = p.norms[place];
  Eight z = eight_of(row.source(c), d, D);
  make_unit(z, norm);
  float dz[8] = {};
  int parts = r.l.serves() ? r.parts : 1;
  for (int part = 0; part < parts; ++part) {
    const float* from = p.dz + (part * p.rows() + place) * p.ldz + d;
    for (int q = 0; q < 8 && d + q < D; q += 4) {
      float4 y = *reinterpret_cast<const float4*>(from + q);
      dz[q] += y.x, dz[q + 1] += y.y, dz[q + 2] += y.z, dz[q + 3] += y.w;
    }
  }
  double along = 0, factor = unit(p, row.valid ? row.g : 0) / value_of(p.tau);
  for (int q = 0; q < 8; ++q)
    if (d + q < D) along += double(z.x[q]) * dz[q];
  along = over_lanes(along, r.lanes(), [](double a, double b) { return a + b; });
  if (!row.valid) return;
  double scale = norm.rest == 0 ? 0 : factor / norm.rest / norm.scale;
  auto* to = static_cast<uint16_t*>(c.sets[row.k].gradient);
  int64_t first = (row.g * p.N + row.i) * p.D;
  auto value = [&](int q) {
    float x =
        norm.rest == 0 ? 0 : float((dz[q] - z.x[q] * along) * scale);  // 0 for a row of zeros, even if dz is infinite
    return uint32_t(c.dtype == Dtype::bf16 ? to_bf16(x) : to_f16(x));
  };
  if (together(to, first, 1, D)) {
    auto word = [&](int q) { return value(q) | value(q + 1) << 16; };
    if (d < D) *reinterpret_cast<uint4*>(to + first + d) = make_uint4(word(0), word(2), word(4), word(6));
  } else {
    for (int q = 0; q < 8 && d + q < D; ++q) to[first + d + q] = uint16_t(value(q));
  }
  if (d == 0) c.zdz[place] = float(norm.rest == 0 ? 0 : along * factor);
}

// ---- sums

struct Sums {
  Layout l;
  float *sums, *neg, *pos;  // sums: [G, supers + 1, V, padded]; neg, pos: [G, V, V, N]
  int supers, supers_per_set, blocks_per_super, pairs, panels, slots;

  // The index of the first row of a set in `sums`, for its sum over the candidates in a super-block. With
  // super = supers, the sum is over the blocks of the row's own super-block that precede the block of the row.
  constexpr int64_t slot(int g, int super, int set) const {
    return ((int64_t(g) * (supers + 1) + super) * l.V + set) * l.padded();
  }
};

// A super-block is several consecutive blocks of a set. A piece of work is a pair of super-blocks: the tiles of blocks
// i of set a and blocks j of set c; if both are the same super-block, only those with i <= j.
struct Piece {
  const Sums& s;
  int number, g, p, q, a, c, first_i, last_i, first_j, last_j;
  bool valid;

  TCLR_METHOD explicit Piece(const Sums& s) : s(s), number(blockIdx.x) { open(); }
  TCLR_METHOD void next() {
    number += gridDim.x;
    open();
  }
  TCLR_METHOD bool take(int pair) {
    if (s.l.cross) {
      int left = s.l.half() * s.supers_per_set;
      p = pair % left, q = left + pair / left;
      return true;
    }
    // arranged in a ring, each super-block is paired with itself and with the half of the others that follow it
    int one = pair % s.supers, step = pair / s.supers, other = (one + step) % s.supers;
    p = one < other ? one : other, q = one < other ? other : one;
    return step * 2 != s.supers || one < step;
  }
  TCLR_METHOD void open() {
    for (valid = false; number < s.l.G * s.pairs; number += gridDim.x)
      if ((valid = take(number % s.pairs))) break;
    g = number / s.pairs, a = p / s.supers_per_set, c = q / s.supers_per_set;
    first_i = p % s.supers_per_set * s.blocks_per_super, first_j = q % s.supers_per_set * s.blocks_per_super;
    last_i = min(first_i + s.blocks_per_super, s.l.blocks), last_j = min(first_j + s.blocks_per_super, s.l.blocks);
  }
  TCLR_METHOD int end_i(int j) const { return p == q ? j + 1 : last_i; }
};

// The use of shared memory: `panels` whole blocks j, and a ring buffer for blocks i, either whole or chunk by chunk.
template <int chunks>
struct SumsTiles {
  static constexpr int units = chunks <= 2 ? 1 : chunks, unit_chunks = chunks / units;
  static constexpr int unit_bytes = unit_chunks * chunk_bytes;
  static constexpr bool ahead = chunks <= 3;  // with more features, the rows of the next tile do not fit
  static constexpr int row_sums = most_blocks_per_super * chunk_rows, column_sums = 8 * chunk_rows;
  static constexpr size_t rest = (row_sums + 2 * column_sums) * sizeof(float) + 512;

  static size_t plan(Sums& s) {
    s.panels = 2;
    size_t room = shared_limit - rest - s.panels * chunks * chunk_bytes;
    s.slots = int(room / unit_bytes < 12 ? room / unit_bytes : 12);
    return rest + s.panels * chunks * chunk_bytes + s.slots * unit_bytes;
  }
};

// Adds exp S of a thread's part of a tile to the sums of its two rows and 32 columns.
template <bool masked, bool columns>
TCLR_DEVICE void add_tile(const float (&S)[64], float scale, float (&column)[32], float (&row)[2], int i0, int j0,
                          int N, bool diagonal) {
#pragma unroll
  for (int n = 0; n < 16; ++n) {
    float e[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      e[k] = exp2_of(S[n * 4 + k] * scale);
      int i = i0 + k / 2 * 8, j = j0 + n * 8 + k % 2;
      if (masked && (i >= N || j >= N || (diagonal && i == j))) e[k] = 0;
    }
    row[0] += e[0] + e[1], row[1] += e[2] + e[3];
    if (columns) column[2 * n] += e[0] + e[2], column[2 * n + 1] += e[1] + e[3];
  }
}

// Adds up x[k] of two lanes in the lower lane, and x[k + half] of both in the upper lane.
template <int half>
TCLR_DEVICE void add_halves(float (&x)[32], bool upper, int lanes) {
#pragma unroll
  for (int k = 0; k < half; ++k) {
    float mine = upper ? x[k + half] : x[k], theirs = upper ? x[k] : x[k + half];
    x[k] = mine + of_other_lane(theirs, lanes);
  }
}

template <int chunks>
TCLR_WARPGROUP_KERNEL sum_blocks(TCLR_ARGUMENT Sums s) {
#ifdef TCLR_WARPGROUPS
  using Tiles = SumsTiles<chunks>;
  constexpr int block_bytes = chunks * chunk_bytes;
  TCLR_SWIZZLED_MEMORY(memory);
  const Layout& l = s.l;
  if (!l.serves()) return;
  unsigned char *panels = memory, *ring = panels + s.panels * block_bytes;
  auto* row_sums = reinterpret_cast<float*>(ring + s.slots * Tiles::unit_bytes);
  float* column_sums = row_sums + Tiles::row_sums;
  auto* full = reinterpret_cast<uint64_t*>(column_sums + 2 * Tiles::column_sums);
  uint64_t *free = full + s.slots, *panel_full = free + s.slots, *panel_free = panel_full + s.panels;
  if (threadIdx.x == 0) {
    for (int k = 0; k < s.slots; ++k) start_barrier(full + k, 1), start_barrier(free + k, computing / 32);
    for (int k = 0; k < s.panels; ++k) start_barrier(panel_full + k, 1), start_barrier(panel_free + k, computing / 32);
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x >= computing) {
    give_registers<40>();
    if (threadIdx.x != computing) return;
    Ring slot(s.slots, 1), panel(s.panels, 1);
    auto copy = [](unsigned char* to, const uint16_t* from, int bytes, uint64_t* barrier) {
      expect(barrier, bytes);
      copy_bulk(to, from, bytes, barrier);
    };
    for (Piece w(s); w.valid; w.next())
      for (int j = w.first_j; j < w.last_j; ++j) {
        wait(panel_free + panel.slot, panel.phase);
        copy(panels + panel.slot * block_bytes, l.rows(w.g, w.c, j), block_bytes, panel_full + panel.slot);
        panel.next();
        for (int i = w.first_i; i < w.end_i(j); ++i)
          for (int u = 0; u < Tiles::units; ++u, slot.next()) {
            wait(free + slot.slot, slot.phase);
            copy(ring + slot.slot * Tiles::unit_bytes, l.rows(w.g, w.a, i) + u * (Tiles::unit_bytes / 2),
                 Tiles::unit_bytes, full + slot.slot);
          }
      }
    return;
  }
  take_registers<232>();
  Ring slot(s.slots, 0), done(s.slots, 0), panel(s.panels, 0);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
  const int i_local = warp * 16 + lane / 4, j_local = lane % 4 * 2;
  const float inverse_tau = l.inverse_tau(), scale = inverse_tau * log2e;
  const uint64_t lefts = rows_of(shared_address(ring) + group * (chunk_bytes / 2));
  const uint64_t rights = rows_of(shared_address(panels));
  const bool ragged = l.N % chunk_rows != 0;
  float S[64], T[64], column[32];
  int strip = 0;
  for (Piece w(s); w.valid; w.next())
    for (int j = w.first_j; j < w.last_j; ++j) {
      const int end = w.end_i(j);
      const uint64_t right = rights + panel.slot * (block_bytes >> 4);
      auto multiply = [&](float (&tile)[64]) {
#pragma unroll
        for (int u = 0; u < Tiles::units; ++u, slot.next()) {
          wait(full + slot.slot, slot.phase);
          const uint64_t left = lefts + slot.slot * (Tiles::unit_bytes >> 4);
          begin_products();
#pragma unroll
          for (int k = 0; k < Tiles::unit_chunks; ++k)
#pragma unroll
            for (int h = 0; h < 4; ++h)
              multiply_rows(tile, left + k * next_chunk + 2 * h,
                            right + (u * Tiles::unit_chunks + k) * next_chunk + 2 * h, u + k + h > 0);
        }
        end_products();
      };
      auto put_positives = [&](const float (&tile)[64], int i0) {
        float* to = s.pos + ((int64_t(w.g) * l.V + w.a) * l.V + w.c) * l.N + i0;
        float* back = s.pos + ((int64_t(w.g) * l.V + w.c) * l.V + w.a) * l.N + i0;
#pragma unroll
        for (int n = 0; n < 16; ++n)
#pragma unroll
          for (int k = 0; k < 4; ++k)
            if (n * 8 + j_local + k % 2 == i_local + k / 2 * 8 && i0 + k / 2 * 8 < l.N)
              to[k / 2 * 8] = back[k / 2 * 8] = tile[n * 4 + k] * inverse_tau;
      };
      auto finish = [&](const float (&tile)[64], int i) {
#pragma unroll
        for (int u = 0; u < Tiles::units; ++u, done.next())
          if (lane == 0) arrive(free + done.slot);
        const bool diagonal = i == j;
        const int i0 = i * chunk_rows + i_local, j0 = j * chunk_rows + j_local;
        float row[2] = {};
        if (diagonal && w.a != w.c) put_positives(tile, i0);
        if (diagonal && w.p == w.q)  // rows and columns are the same block: only the rows' sums are needed
          add_tile<true, false>(tile, scale, column, row, i0, j0, l.N, true);
        else if (diagonal || (ragged && (i + 1 == l.blocks || j + 1 == l.blocks)))
          add_tile<true, true>(tile, scale, column, row, i0, j0, l.N, diagonal);
        else
          add_tile<false, true>(tile, scale, column, row, i0, j0, l.N, false);
        for (float& x : row) {
          x += of_other_lane(x, 1);
          x += of_other_lane(x, 2);
        }
        if (lane % 4 != 0) return;
        float* to = row_sums + (i - w.first_i) * chunk_rows + i_local;
        const bool first = w.p == w.q ? diagonal : j == w.first_j;
        to[0] = first ? row[0] : to[0] + row[0], to[8] = first ? row[1] : to[8] + row[1];
      };
#pragma unroll
      for (float& x : column) x = 0;
      wait(panel_full + panel.slot, panel.phase);
      int i = w.first_i;
      if (Tiles::ahead) {
        // The products of the next tile run during the exponentials of this tile. S and T alternate in unrolled code,
        // since ptxas would serialise the products if the two branches of a step were merged.
        auto finish_last = [&](const float (&tile)[64]) {
          wait_for_products<0>();
          finish(tile, i);
        };
        auto step = [&](const float (&now)[64], float (&next)[64]) {
          multiply(next);
          wait_for_products<1>();
          finish(now, i++);
        };
        multiply(S);
        for (;;) {
          if (i + 1 == end) {
            finish_last(S);
            break;
          }
          step(S, T);
          if (i + 1 == end) {
            finish_last(T);
            break;
          }
          step(T, S);
        }
      } else {
        for (; i < end; ++i) {
          multiply(S);
          wait_for_products<0>();
          finish(S, i);
        }
      }
      if (lane == 0) arrive(panel_free + panel.slot);
      panel.next();

      // eight lanes share 32 columns; each of them gets the sums of four
      float* of_warps = column_sums + strip++ % 2 * Tiles::column_sums;
      const int octet = lane / 4;
      add_halves<16>(column, octet & 4, 16), add_halves<8>(column, octet & 2, 8), add_halves<4>(column, octet & 1, 4);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        int which = octet * 4 + k;
        of_warps[warp * chunk_rows + which / 2 * 8 + j_local + which % 2] = column[k];
      }
      sync_first<computing>();
      if (threadIdx.x < chunk_rows) {
        float all = 0;
#pragma unroll
        for (int k = 0; k < computing / 32; ++k) all += of_warps[k * chunk_rows + threadIdx.x];
        s.sums[s.slot(w.g, w.p == w.q ? s.supers : w.p, w.c) + j * chunk_rows + threadIdx.x] = all;
      }
      if (j + 1 == w.last_j && lane % 4 == 0) {
        float* to = s.sums + s.slot(w.g, w.q, w.a) + w.first_i * chunk_rows;
        for (int k = i_local; k < (w.last_i - w.first_i) * chunk_rows; k += chunk_rows)
          to[k] = row_sums[k], to[k + 8] = row_sums[k + 8];
      }
    }
#endif
}

TCLR_KERNEL take_logs(TCLR_ARGUMENT Sums s) {
  const Layout& l = s.l;
  if (!l.serves()) return;
  int64_t at = int64_t(blockIdx.x) * threads + threadIdx.x, set = at / l.N;
  int i = int(at % l.N), c = int(set % l.V), a = int(set / l.V % l.V), g = int(set / l.V / l.V);
  if (g >= l.G) return;
  bool exists = l.exists(a, c);
  double total = 0;
  for (int x = c * s.supers_per_set; exists && x < (c + 1) * s.supers_per_set; ++x)
    total += s.sums[s.slot(g, x, a) + i];
  if (exists && a == c) total += s.sums[s.slot(g, s.supers, a) + i];
  s.neg[at] = float(log(total));
  if (!exists || a == c) s.pos[at] = 0;
}

// ---- gradient

struct Factors {
  Layout l;
  Gram<float> p;
  float *alpha, *positive;  // [G, V, V, padded], zeros for padded rows and in blocks that do not exist
};

TCLR_KERNEL make_factors(TCLR_ARGUMENT Factors f) {
  const Layout& l = f.l;
  const Gram<float>& p = f.p;
  if (!l.serves()) return;
  int64_t at = int64_t(blockIdx.x) * threads + threadIdx.x, set = at / l.padded();
  int i = int(at % l.padded()), c = int(set % l.V), a = int(set / l.V % l.V), g = int(set / l.V / l.V);
  if (g >= l.G) return;
  float alpha = 0, positive = 0;
  if (i < l.N && l.exists(a, c)) {
    int64_t there = p.at(g, a, c, i), back = p.at(g, c, a, i);
    double inverse_unit = 1 / unit(p, g), of_neg = p.g_neg[there];
    if (of_neg != 0) alpha = float(of_neg * inverse_unit * exp(-double(p.neg[there])));
    if (a != c) positive = float((p.g_pos[there] + p.g_pos[back]) * inverse_unit);
  }
  f.alpha[at] = alpha, f.positive[at] = positive;
}

struct Gradient {
  Layout l;
  const float *alpha, *positive;
  float* dz;  // [parts, G, V, N, ldz]
  int64_t ldz;
  int parts, stages;
};

// A piece of work: one block of rows of a set, and one part of the blocks with which it is compared.
struct Part {
  const Gradient& s;
  int number, index, part, a, g, first_set, first, last;

  TCLR_METHOD explicit Part(const Gradient& s) : s(s), number(blockIdx.x) { open(); }
  TCLR_METHOD bool valid() const { return number < s.l.G * s.l.V * s.l.blocks * s.parts; }
  TCLR_METHOD void next() {
    number += gridDim.x;
    open();
  }
  TCLR_METHOD void open() {
    const Layout& l = s.l;
    int set = number / l.blocks / s.parts;
    index = number % l.blocks, part = number / l.blocks % s.parts;
    a = set % l.V, g = set / l.V;
    first_set = l.cross && a < l.half() ? l.half() : 0;
    int all = ((l.cross && a >= l.half() ? l.half() : l.V) - first_set) * l.blocks;
    first = int(int64_t(part) * all / s.parts), last = int(int64_t(part + 1) * all / s.parts);
  }
};

template <int chunks>
struct GradientTiles {
  static constexpr int columns = chunks <= 2 ? 128 : 64, halves = chunk_rows / columns;  // columns of S at a time
  static constexpr int block_bytes = chunks * chunk_bytes, stage_bytes = block_bytes + chunk_rows * sizeof(float);

  static size_t plan(Gradient& s) {
    size_t room = (shared_limit - 512 - block_bytes) / stage_bytes;
    s.stages = int(room < 6 ? room : 6);
    return block_bytes + s.stages * stage_bytes + 512;
  }
};

template <int chunks>
TCLR_WARPGROUP_KERNEL add_blocks(TCLR_ARGUMENT Gradient s) {
#ifdef TCLR_WARPGROUPS
  using Tiles = GradientTiles<chunks>;
  constexpr int columns = Tiles::columns, halves = Tiles::halves, block_bytes = Tiles::block_bytes;
  constexpr int features = chunks * chunk_features;
  TCLR_SWIZZLED_MEMORY(memory);
  const Layout& l = s.l;
  if (!l.serves()) return;
  unsigned char *own = memory, *ring = own + block_bytes;
  auto* alphas = reinterpret_cast<float*>(ring + s.stages * block_bytes);
  auto* full = reinterpret_cast<uint64_t*>(alphas + s.stages * chunk_rows);
  uint64_t *free = full + s.stages, *own_full = free + s.stages, *own_free = own_full + 1;
  if (threadIdx.x == 0) {
    for (int k = 0; k < s.stages; ++k) start_barrier(full + k, 1), start_barrier(free + k, computing / 32);
    start_barrier(own_full, 1), start_barrier(own_free, computing / 32);
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x >= computing) {
    give_registers<40>();
    if (threadIdx.x != computing) return;
    Ring stage(s.stages, 1), mine(1, 1);
    for (Part w(s); w.valid(); w.next(), mine.next()) {
      wait(own_free, mine.phase);
      expect(own_full, block_bytes);
      copy_bulk(own, l.rows(w.g, w.a, w.index), block_bytes, own_full);
      int c = w.first_set + w.first / l.blocks, j = w.first % l.blocks;
      for (int t = w.first; t < w.last; ++t, stage.next()) {
        uint64_t* barrier = full + stage.slot;
        wait(free + stage.slot, stage.phase);
        expect(barrier, Tiles::stage_bytes);
        copy_bulk(ring + stage.slot * block_bytes, l.rows(w.g, c, j), block_bytes, barrier);
        copy_bulk(alphas + stage.slot * chunk_rows, s.alpha + l.at(w.g, c, w.a) + j * chunk_rows,
                  chunk_rows * sizeof(float), barrier);
        if (++j == l.blocks) j = 0, ++c;
      }
    }
    return;
  }
  take_registers<232>();
  Ring stage(s.stages, 0), done(s.stages, 0), mine(1, 0);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4, i_local = warp * 16 + lane / 4;
  const float scale = l.inverse_tau() * log2e;
  const uint64_t left = rows_of(shared_address(own) + group * (chunk_bytes / 2));
  for (Part w(s); w.valid(); w.next(), mine.next()) {
    float dz[features / 2], S[columns / 2], alpha[2];
    uint32_t W[columns / 4];  // the weights, as the left operand of their product with the columns
    int c = w.first_set + w.first / l.blocks, j = w.first % l.blocks;
    auto place = [&](int slot, int h) { return shared_address(ring + slot * block_bytes) + h * columns * 128; };
    auto take_alpha = [&] {
      const float* from = s.alpha + l.at(w.g, w.a, c) + w.index * chunk_rows + i_local;
      alpha[0] = from[0], alpha[1] = from[8];
    };
    auto multiply = [&](uint32_t rows) {
      const uint64_t right = rows_of(rows);
      begin_products();
#pragma unroll
      for (int k = 0; k < chunks; ++k)
#pragma unroll
        for (int x = 0; x < 4; ++x)
          multiply_rows(S, left + k * next_chunk + 2 * x, right + k * next_chunk + 2 * x, k + x > 0);
      end_products();
    };
    auto add = [&](uint32_t rows) {
      begin_products();
#pragma unroll
      for (int x = 0; x < columns / 16; ++x) multiply_columns(dz, W + 4 * x, columns_of(rows + x * 16 * 128));
      end_products();
    };
    auto weigh = [&](int h) {
      const float* theirs = alphas + stage.slot * chunk_rows + h * columns + lane % 4 * 2;
      auto weight = [&](int at, float both) { return exp2_of(S[at] * scale) * both; };
      if (j != w.index) {
#pragma unroll
        for (int n = 0; n < columns / 8; ++n) {
          float2 y = *reinterpret_cast<const float2*>(theirs + n * 8);
          S[n * 4] = weight(n * 4, alpha[0] + y.x), S[n * 4 + 1] = weight(n * 4 + 1, alpha[0] + y.y);
          S[n * 4 + 2] = weight(n * 4 + 2, alpha[1] + y.x), S[n * 4 + 3] = weight(n * 4 + 3, alpha[1] + y.y);
        }
      } else {  // if a row has no positive, `positive` is 0
        const float* same = s.positive + l.at(w.g, w.a, c) + w.index * chunk_rows + i_local;
        const float positive[2] = {same[0], same[8]};
#pragma unroll
        for (int n = 0; n < columns / 8; ++n)
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            S[n * 4 + k] = weight(n * 4 + k, alpha[k / 2] + theirs[n * 8 + k % 2]);
            if (h * columns + n * 8 + lane % 4 * 2 + k % 2 == i_local + k / 2 * 8) S[n * 4 + k] = positive[k / 2];
          }
      }
    };
    auto pack = [&] {
#pragma unroll
      for (int k = 0; k < columns / 4; ++k) W[k] = pair<Half>(S[2 * k], S[2 * k + 1]);
    };
    auto release = [&] {
      if (lane == 0) arrive(free + done.slot);
      done.next();
    };
#pragma unroll
    for (float& x : dz) x = 0;
    take_alpha();
    wait(own_full, mine.phase);
    wait(full + stage.slot, stage.phase);
    uint32_t before = place(stage.slot, 0);
    multiply(before);
    wait_for_products<0>();
    weigh(0);
    pack();
    const int steps = (w.last - w.first) * halves;
    for (int t = 1; t < steps; ++t) {  // W z of the previous tile runs during the exponentials of this one
      const int h = t % halves;
      if (h == 0) {
        stage.next();
        if (++j == l.blocks) {
          j = 0, ++c;
          take_alpha();
        }
        wait(full + stage.slot, stage.phase);
      }
      const uint32_t rows = place(stage.slot, h);
      multiply(rows);
      add(before);
      wait_for_products<1>();
      weigh(h);
      wait_for_products<0>();
      if (h == 0) release();
      pack();
      before = rows;
    }
    stage.next();
    if (lane == 0) arrive(own_free);
    add(before);
    wait_for_products<0>();
    release();
    const int64_t rows = int64_t(l.G) * l.V * l.N;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = w.index * chunk_rows + i_local + 8 * k;
      if (i >= l.N) continue;
      float* to = s.dz + (w.part * rows + (int64_t(w.g) * l.V + w.a) * l.N + i) * s.ldz;
#pragma unroll
      for (int n = 0; n < features / 8; ++n)
        if (int d = n * 8 + lane % 4 * 2; d < s.ldz)
          *reinterpret_cast<float2*>(to + d) = make_float2(dz[n * 4 + 2 * k], dz[n * 4 + 2 * k + 1]);
    }
  }
#endif
}

// ---- launches

// Launches a thread block for each multiprocessor, or fewer if there are fewer pieces of work.
template <typename A>
const char* launch_on_all(void (*kernel)(A), int64_t pieces, size_t shared, Stream stream, const A& argument) {
  int64_t blocks = pieces < processors() ? pieces : processors();
  return launch(kernel, blocks, shared, stream, argument, all_threads);
}

// Chooses the size of super-blocks with the least time of the busiest multiprocessor, in tiles. The overheads of a
// strip (0.8) and of a piece (0.5) are estimates.
void arrange_supers(Sums& s) {
  double least = 0;
  int64_t all = processors();
  for (int size = 1; size <= most_blocks_per_super; ++size) {
    int per_set = (s.l.blocks + size - 1) / size, supers = s.l.V * per_set, left = s.l.half() * per_set;
    int64_t pieces = s.l.G * (s.l.cross ? int64_t(left) * (supers - left) : int64_t(supers) * (supers + 1) / 2);
    double cost = double((pieces + all - 1) / all) * (size * size + 0.8 * size + 0.5);
    if (size > 1 && cost >= least) continue;
    least = cost, s.blocks_per_super = size, s.supers_per_set = per_set, s.supers = supers;
    s.pairs = s.l.cross ? left * (supers - left) : supers * (supers / 2 + 1);
  }
}

// The number of parts of a block's work, at most eight, with the least time of the busiest multiprocessor. No part may
// be empty, since a thread block would wait for its first rows forever.
int parts_of_blocks(const Layout& l) {
  int64_t blocks = int64_t(l.G) * l.V * l.blocks, all = processors();
  int64_t most = int64_t(l.cross ? l.V - l.half() : l.V) * l.blocks;
  int best = 1;
  double least = 0;
  for (int parts = 1; parts <= 8 && parts <= most; ++parts) {
    double cost = double((blocks * parts + all - 1) / all) * (double(most) / parts + 1.5);
    if (parts == 1 || cost < 0.95 * least) best = parts, least = cost;
  }
  return best;
}

// All arguments of a call: the problem as in calls.cuh, and the layout of these kernels.
struct Arrangement {
  Call<float> c;
  Layout l;
  Sums sums;
  Factors factors;
  Gradient gradient;

  Arrangement(const GramCall& call, bool backward, Arena& arena) : c{}, l{}, sums{}, factors{}, gradient{} {
    c.p = describe<float>(call.G, call.V, call.N, call.D, call.normalize, call.cross, call.tau);
    if (call.tau.data) OnTensorCores<Half>::describe(c, arena);  // for temperatures below 1 / limit
    c.p.boost = 8192, c.p.parts = 1, c.above = limit;
    l.G = int(call.G), l.V = int(call.V), l.N = int(call.N), l.cross = call.cross, l.tau = call.tau;
    l.blocks = int((call.N + chunk_rows - 1) / chunk_rows);
    l.chunks = int((call.D + chunk_features - 1) / chunk_features);
    arena.take(l.z, call.G * call.V * l.blocks * (l.block_bytes() / 2));
    arena.take(c.p.norms, c.p.rows());
    int64_t padded = call.G * call.V * call.V * l.padded();
    sums.l = factors.l = gradient.l = l;
    if (backward) {
      gradient.parts = parts_of_blocks(l), gradient.ldz = c.p.ldz;
      arena.take(c.p.dz, gradient.parts * c.p.rows() * c.p.ldz);
      arena.take(c.p.largest, c.p.G);
      arena.take(factors.alpha, padded), arena.take(factors.positive, padded);
      gradient.alpha = factors.alpha, gradient.positive = factors.positive, gradient.dz = c.p.dz;
    } else {
      arrange_supers(sums);
      arena.take(sums.sums, int64_t(l.G) * (sums.supers + 1) * l.V * l.padded());
    }
    take_coefficients(c.p, backward, arena);
  }
};

// Whether these kernels can compute this call on the current device.
bool serves(const GramCall& call) {
#ifdef TCLR_HOPPER
  bool half = call.dtype == Dtype::f16 || call.dtype == Dtype::bf16;
  bool sizes = call.V > int(call.cross) && call.N >= tensor_tile && call.D >= chunk_features && call.D <= most_features;
  // so that the number of a thread and an index of [G, V, V, N] fit 32 bits
  bool few = call.G * call.V * (call.V > 32 ? call.V : 32) * (call.N + chunk_rows) < int64_t(1) << 31;
  bool bounded = call.tau.data || 1 / call.tau.value <= limit;
  return half && call.normalize && sizes && few && bounded && on_hopper();
#else
  return false;
#endif
}

// Calls f with the number of chunks as a compile-time constant.
template <typename F>
const char* with_chunks(int chunks, F f) {
  using std::integral_constant;
  if (chunks == 1) return f(integral_constant<int, 1>());
  if (chunks == 2) return f(integral_constant<int, 2>());
  if (chunks == 3) return f(integral_constant<int, 3>());
  return f(integral_constant<int, 4>());
}

const char* over_rows(RowsCall r, const GramCall& call, int rows_per_set, void (*kernel)(RowsCall), Stream stream) {
  Call<float>& c = r.c;
  for (c.first = 0; c.first < call.V; c.first += most_sets) {
    c.count = call.V - c.first < most_sets ? call.V - c.first : most_sets;
    for (int64_t k = 0; k < c.count; ++k) c.sets[k] = call.sets[c.first + k];
    if (const char* error = launch(kernel, r.blocks(rows_per_set), 0, stream, r)) return error;
  }
  return nullptr;
}

const char* sum(Sums& s, Stream stream) {
  const char* error = with_chunks(s.l.chunks, [&](auto chunks) {
    size_t shared = SumsTiles<chunks>::plan(s);
    return launch_on_all(sum_blocks<chunks>, int64_t(s.l.G) * s.pairs, shared, stream, s);
  });
  int64_t rows = int64_t(s.l.G) * s.l.V * s.l.V * s.l.N;
  if (!error) error = launch(take_logs, (rows + threads - 1) / threads, 0, stream, s);
  return error;
}

const char* add_gradient(const Factors& f, Gradient& s, Stream stream) {
  const Layout& l = s.l;
  int64_t rows = int64_t(l.G) * l.V * l.V * l.padded();
  const char* error = launch(make_factors, (rows + threads - 1) / threads, 0, stream, f);
  if (error) return error;
  return with_chunks(l.chunks, [&](auto chunks) {
    size_t shared = GradientTiles<chunks>::plan(s);
    return launch_on_all(add_blocks<chunks>, int64_t(l.G) * l.V * l.blocks * s.parts, shared, stream, s);
  });
}

}  // namespace
}  // namespace hopper
}  // namespace tclr
