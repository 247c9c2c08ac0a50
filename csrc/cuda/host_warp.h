// The instructions of warp.h on the host. Lanes write their operands to shared places, and wait for each other before
// they read those of the other lanes.
#pragma once
#include <type_traits>

namespace tclr {

namespace host {

struct Posted {  // the operands of a lane, for the other lanes of its warp
  uint32_t words[6];
};

inline std::vector<Posted> posted[2] = {std::vector<Posted>(most_threads), std::vector<Posted>(most_threads)};

struct Copy {
  uint32_t* to;
  const uint32_t* from;

  void run() const {
    for (int k = 0; k < 4; ++k) to[k] = from ? from[k] : 0;
  }
};

// The groups of asynchronous operations of a thread. They run when the thread waits for them. The last group is open.
template <typename Work>
struct Groups {
  std::vector<std::vector<Work>> all{1};

  void add(const Work& work) { all.back().push_back(work); }
  void end() { all.emplace_back(); }
  template <typename F>
  void run_all_but(size_t count, F run) {
    for (size_t k = 0; k + 1 + count < all.size(); ++k)
      for (const Work& work : all[k]) run(work);
  }
  void forget_all_but(size_t count) {
    if (all.size() > count + 1) all.erase(all.begin(), all.end() - count - 1);
  }
};

inline std::vector<Groups<Copy>> groups(most_threads);

// The operands of all lanes of this warp. Two buffers suffice, since no lane can be two exchanges ahead of another.
inline const Posted* exchange(const Posted& mine) {
  std::vector<Posted>& place = posted[of_warps[threadIdx.x / 32].phase];
  place[threadIdx.x] = mine;
  __syncwarp();
  return &place[threadIdx.x / 32 * 32];
}

inline uint32_t half_of(const Posted& row, int k) { return row.words[k / 2] >> 16 * (k % 2) & 0xffff; }

template <typename E>
float value(uint32_t word, int k) {
  if constexpr (std::is_same_v<E, Tf32>) return bits_as<float>(word & ~0x1fffu);
  auto half = uint16_t(word >> 16 * k);
  return std::is_same_v<E, Half> ? from_f16(half) : from_bf16(half);
}

}  // namespace host

TCLR_DEVICE void load_matrices(uint32_t (&x)[4], const uint32_t* row) {
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const host::Posted* rows = host::exchange({row[0], row[1], row[2], row[3]});
  for (int m = 0; m < 4; ++m) x[m] = rows[8 * m + g].words[t];
}

TCLR_DEVICE void load_transposed(uint32_t (&x)[4], const uint32_t* row) {
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const host::Posted* rows = host::exchange({row[0], row[1], row[2], row[3]});
  for (int m = 0; m < 4; ++m)
    x[m] = host::half_of(rows[8 * m + 2 * t], g) | host::half_of(rows[8 * m + 2 * t + 1], g) << 16;
}

template <typename E>
void multiply_add(float (&result)[4], const uint32_t (&left)[4], uint32_t right_low, uint32_t right_high) {
  constexpr int in_word = 4 / sizeof(typename E::Element);
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const host::Posted* lanes = host::exchange({left[0], left[1], left[2], left[3], right_low, right_high});
  for (int e = 0; e < 4; ++e)
    for (int w = 0; w < 8; ++w) {
      uint32_t a = lanes[4 * g + w % 4].words[w / 4 * 2 + e / 2];
      uint32_t b = lanes[4 * (2 * t + e % 2) + w % 4].words[4 + w / 4];
      for (int k = 0; k < in_word; ++k) result[e] += host::value<E>(a, k) * host::value<E>(b, k);
    }
}

template <typename E>
uint32_t pair(float low, float high) {
  return E::of(low) | E::of(high) << 16;
}

template <typename T>
T of_other_lane(T x, int bits) {
  host::Posted mine{};
  std::memcpy(mine.words, &x, sizeof x);
  std::memcpy(&x, host::exchange(mine)[(threadIdx.x % 32) ^ bits].words, sizeof x);
  return x;
}

TCLR_DEVICE float exp2_of(float x) { return std::exp2(x); }

TCLR_DEVICE float exponential(float x) { return exp2_of(x * 1.44269504f); }

TCLR_DEVICE float logarithm(float x) { return std::log(x); }

// The copy is done as late as possible, or at once if threads run downwards.
TCLR_DEVICE void copy_async(uint32_t* to, const uint32_t* from, bool there) {
  host::Copy copy{to, there ? from : nullptr};
  host::downwards ? copy.run() : host::groups[threadIdx.x].add(copy);
}

TCLR_DEVICE void end_group() { host::groups[threadIdx.x].end(); }

TCLR_DEVICE void wait_for_groups() {
  auto& groups = host::groups[threadIdx.x];
  groups.run_all_but(1, [](const host::Copy& copy) { copy.run(); });
  groups.forget_all_but(1);
}

TCLR_DEVICE void wait_for_copies() {
  auto& groups = host::groups[threadIdx.x];
  end_group();
  groups.run_all_but(0, [](const host::Copy& copy) { copy.run(); });
  groups.forget_all_but(0);
}

}  // namespace tclr
