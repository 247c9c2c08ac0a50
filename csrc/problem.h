// Sizes, index predicates and the order of the work: plain arithmetic, shared by every kernel.
//
// A group has V sets of N rows. Each set is cut into row blocks; a block pair is one tile of the Gram matrix.
//   self:  each block against itself, then all against all in a round-robin tournament
//   cross: blocks of the first half of the sets against blocks of the second half, which has no more of them
// In a round, each block is paired with at most one other block. So the pairs of a round touch disjoint rows and may be
// computed at once, and each row still receives its contributions in the order of the rounds.
#pragma once
#include <cstdint>

namespace tclr {

struct Pair {
  int64_t left, right;  // blocks; right < 0: the left one has no partner in this round
};

struct Problem {
  int64_t V, N;
  bool cross;
  int64_t block;   // rows of a block; the last one of a set may have fewer
  int64_t blocks;  // blocks of a set

  constexpr Problem(int64_t V, int64_t N, bool cross, int64_t largest, int64_t multiple)
      : V(V), N(N), cross(cross), block(shares(N, largest, multiple)), blocks((N + block - 1) / block) {}

  // The rows of a block, at most `largest` and a multiple of `multiple`, and about the same in each block of a set.
  static constexpr int64_t shares(int64_t N, int64_t largest, int64_t multiple) {
    int64_t count = (N + largest - 1) / largest, even = (N + count - 1) / count;
    return (even + multiple - 1) / multiple * multiple;
  }

  constexpr int64_t half() const { return (V + 1) / 2; }
  constexpr bool exists(int64_t a, int64_t c) const { return !cross || (a < half()) != (c < half()); }
  int64_t at(int64_t a, int64_t c, int64_t i) const { return (a * V + c) * N + i; }  // into [V, V, N]

  int64_t set(int64_t b) const { return b / blocks; }
  constexpr int64_t begin(int64_t b) const { return b % blocks * block; }  // first row within its set
  constexpr int64_t rows(int64_t b) const {
    int64_t rest = N - begin(b);
    return rest < block ? rest : block;
  }

  int64_t left_blocks() const { return half() * blocks; }
  int64_t right_blocks() const { return (V - half()) * blocks; }
  int64_t players() const { return (V * blocks + 1) / 2 * 2; }  // blocks of the tournament, made even by a bye

  int64_t rounds() const { return cross ? left_blocks() : players() - 1; }
  int64_t places() const { return cross ? left_blocks() : players() / 2; }
  Pair pair(int64_t round, int64_t place) const {
    if (cross) {
      int64_t right = (place + round) % rounds();
      return {place, right < right_blocks() ? left_blocks() + right : -1};
    }
    int64_t one = place == 0 ? rounds() : (round + place) % rounds();
    int64_t other = (round - place + rounds()) % rounds();
    int64_t low = one < other ? one : other, high = one < other ? other : one;
    return {low, high < V * blocks ? high : -1};
  }
};

}  // namespace tclr
