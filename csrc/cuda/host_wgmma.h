// The instructions of wgmma.h on the host. Products are computed as late as possible, when a thread waits for them, and
// copies are done after all threads have run, the newest first. If threads run downwards, both are done at once.
#pragma once
#include <algorithm>

#define TCLR_WARPGROUPS
#define TCLR_WARPGROUP_KERNEL static void
#define TCLR_SWIZZLED_MEMORY(name) unsigned char* name = host::shared

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
using std::min;

namespace tclr {

static_assert(sizeof(host::Barrier) == sizeof(uint64_t));

TCLR_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - host::shared);
}

template <int count>
void sync_first() {
  if (host::of_first.arrivals != count) host::of_first = host::Barrier(count);
  host::meet(host::of_first);
}

TCLR_DEVICE host::Barrier& barrier_at(uint64_t* b) {
  auto* barrier = reinterpret_cast<host::Barrier*>(b);
  if (barrier->started != host::Barrier::start) std::fprintf(stderr, "no barrier was started there\n"), std::abort();
  return *barrier;
}

TCLR_DEVICE void start_barrier(uint64_t* b, int arrivals) { new (b) host::Barrier(arrivals); }

TCLR_DEVICE void publish_barriers() {}

TCLR_DEVICE void arrive(uint64_t* b) { barrier_at(b).arrive(); }

TCLR_DEVICE void expect(uint64_t* b, int bytes) {
  barrier_at(b).bytes += bytes;
  barrier_at(b).arrive();
}

TCLR_DEVICE void wait(uint64_t* b, int phase) {
  if (barrier_at(b).phase == uint32_t(phase)) host::wait(&barrier_at(b), phase);
}

TCLR_DEVICE void copy_bulk(void* to, const void* from, int bytes, uint64_t* b) {
  auto land = [=] {
    std::memcpy(to, from, bytes);
    barrier_at(b).take(bytes);
  };
  host::downwards ? land() : host::copies.push_back(land);
}

template <int count>
void take_registers() {}

template <int count>
void give_registers() {}

namespace host {

// A thread's part of a product: d has rows g and g + 8 of its warp's 16 rows, and two of every eight columns. The left
// operand is in the `fragments` of the warp's lanes, or in shared memory if they are null.
struct Product {
  float* d;
  int columns;
  const uint32_t* fragments;
  uint64_t left, right;
  bool more;
};

inline std::vector<Groups<Product>> products(most_threads);

// The float16 at `bytes` bytes and `row` rows of 128 bytes after the start of a descriptor.
inline float entry(uint64_t descriptor, int row, int bytes) {
  uint32_t between_chunks = (descriptor >> 16 & 0x3fff) << 4, eight_rows = (descriptor >> 32 & 0x3fff) << 4;
  uint32_t at = (descriptor & 0x3fff) << 4;
  at += bytes / 128 * between_chunks + row / 8 * eight_rows + row % 8 * 128 + bytes % 128;
  uint16_t half;
  std::memcpy(&half, shared + (at ^ (at >> 7 & 7) << 4), sizeof half);
  return from_f16(half);
}

inline void run(const Product& p, size_t group, size_t index) {
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, first = threadIdx.x / 32 % 4 * 16 + g;
  float left[2][16];
  for (int k = 0; k < 16; ++k) {
    const Product& owner = products[threadIdx.x - t + k / 2 % 4].all[group][index];
    for (int h = 0; h < 2; ++h)
      left[h][k] =
          p.fragments ? value<Half>(owner.fragments[k / 8 * 2 + h], k % 2) : entry(p.left, first + 8 * h, 2 * k);
  }
  for (int n = 0; n < p.columns; ++n) {
    int column = n / 2 * 8 + 2 * t + n % 2;
    float sums[2] = {};
    for (int k = 0; k < 16; ++k) {
      float right = p.fragments ? entry(p.right, k, 2 * column) : entry(p.right, column, 2 * k);
      sums[0] += left[0][k] * right, sums[1] += left[1][k] * right;
    }
    for (int h = 0; h < 2; ++h) {
      float& d = p.d[n / 2 * 4 + n % 2 + 2 * h];
      d = p.more ? d + sums[h] : sums[h];
    }
  }
}

// Lanes read each other's fragments, so all lanes of a warp wait for each other before and after.
inline void run_products_but(size_t count) {
  auto& mine = products[threadIdx.x];
  __syncwarp();
  for (size_t group = 0; group + 1 + count < mine.all.size(); ++group)
    for (size_t k = 0; k < mine.all[group].size(); ++k) run(mine.all[group][k], group, k);
  __syncwarp();
  mine.forget_all_but(count);
}

}  // namespace host

TCLR_DEVICE void begin_products() {}

TCLR_DEVICE void end_products() {
  host::products[threadIdx.x].end();
  if (host::downwards) host::run_products_but(0);
}

// The other threads run first, since they may run at this point.
template <int count>
void wait_for_products() {
  host::give_turn();
  host::run_products_but(count);
}

template <int size>
void multiply_rows(float (&d)[size], uint64_t a, uint64_t b, bool more) {
  host::products[threadIdx.x].add({d, size / 2, nullptr, a, b, more});
}

template <int size>
void multiply_columns(float (&d)[size], const uint32_t* a, uint64_t b) {
  host::products[threadIdx.x].add({d, size / 2, a, 0, b, true});
}

}  // namespace tclr
