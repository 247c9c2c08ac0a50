// The CPU kernels alone, without torch, for `kernels.py`: compiled in seconds, with sanitizers, other vector widths or
// planted bugs.
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "busy_cores.h"
#include "cpu/gram.h"
#include "keys.h"

namespace tclr {
namespace {
int64_t thread_count, slow_thread, hesitation = 200;  // microseconds

// Threads of its own; the slow one, if there is one, takes the first task, and hesitates before each of its tasks,
// while the others run ahead.
void run(int64_t n, Task task, void* argument) {
  std::atomic<int64_t> next = 0;
  auto work = [&](int64_t thread) {
    while (slow_thread >= 0 && slow_thread < thread_count && thread != slow_thread && next == 0)
      std::this_thread::yield();
    for (int64_t i = next++; i < n; i = next++) {
      if (thread == slow_thread) std::this_thread::sleep_for(std::chrono::microseconds(hesitation));
      task(argument, i, thread);
    }
  };
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < thread_count; ++thread) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
}

template <typename T>
int64_t call(const Kernels<T>& kernels, const GramInput& in, bool backward, void** blocks, void** dz, void* zdz,
             void* memory) {
  int64_t size = kernels.workspace(in, thread_count, backward);
  if (memory == nullptr) return size;
  T** b = (T**)blocks;
  Executor executor{run, thread_count, 0};
  if (backward) {
    Gradient<T> gradients[64];
    for (int64_t a = 0; a < in.V; ++a) gradients[a] = {(T*)dz[a], in.N * in.D, in.D, false};
    kernels.backward(in, {b[0], b[1], b[2], b[3], b[4], gradients, (T*)zdz}, (T*)memory, executor);
  } else {
    kernels.forward(in, {b[0], b[1], b[2]}, (T*)memory, executor);
  }
  return size;
}

// blocks: the operation's outputs, float64; or negatives, sums, slope; or for each side the nine of Anchors. others:
// the mean; or the gradients of each set of the rows and of the columns, and the last output.
template <typename T>
int64_t call(const Kernels<T>& kernels, const RectangleInput& in, Wanted wanted, double** blocks, void** others,
             void* memory) {
  RectangleCall<T> c{wanted};
  std::vector<Gradient<T>> gradients;
  if (wanted == Wanted::blocks) {
    c.neg = blocks[0], c.pos = blocks[1], c.pos_lse = blocks[2], c.spread = blocks[3], c.count = blocks[4];
    c.mean = (T*)others[0];
  } else if (wanted == Wanted::pairs) {
    c.negatives = blocks[0], c.sums = blocks[1], c.slope = blocks[2];
  } else {
    auto anchors = [](double** b) { return Anchors{b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7], b[8]}; };
    c.of_rows = anchors(blocks), c.of_columns = anchors(blocks + 9);
    int64_t A = in.rows.sets, C = in.columns.sets;
    for (int64_t a = 0; a < A + C; ++a)
      gradients.push_back({(T*)others[a], (a < A ? in.rows.N : in.columns.N) * in.D, in.D, false});
    c.d_rows = others[0] ? gradients.data() : nullptr, c.d_columns = others[A] ? gradients.data() + A : nullptr;
    c.along = (T*)others[A + C];
  }
  int64_t size = kernels.rectangle_workspace(in, c, thread_count);
  if (memory != nullptr) kernels.rectangle(in, c, (T*)memory, Executor{run, thread_count, 0});
  return size;
}
}  // namespace
}  // namespace tclr

// sizes: G, V, N, D, threads, slow thread or -1; flags: dtype, normalize, cross, keep, backward; strides: 3 a set.
// Returns the elements of workspace; without `memory` it does nothing else.
extern "C" int64_t gram(const int64_t* sizes, const int64_t* flags, const void* const* data, const int64_t* strides,
                        double tau, void** blocks, void** dz, void* zdz, void* memory) {
  using namespace tclr;
  Rows sets[64];
  for (int64_t a = 0; a < sizes[1]; ++a) sets[a] = {data[a], strides[3 * a], strides[3 * a + 1], strides[3 * a + 2]};
  GramInput in{sizes[0],        sizes[1], sizes[2],      sizes[3],      sets,
               Dtype(flags[0]), tau,      flags[1] != 0, flags[2] != 0, flags[3] != 0};
  thread_count = sizes[4], slow_thread = sizes[5];
  if (in.dtype == Dtype::f64) return call(portable_level.f64, in, flags[4], blocks, dz, zdz, memory);
  return call(portable_level.f32, in, flags[4], blocks, dz, zdz, memory);
}

// sizes: G, A, n, C, K, D, first, threads, slow thread or -1; flags: dtype, normalize, cross, symmetric, what is
// wanted; data and strides: the rows' sets, then the columns'; keys: of both, contiguous, or null. As `gram` for the
// rest.
extern "C" int64_t rectangle(const int64_t* sizes, const int64_t* flags, const void* const* data,
                             const int64_t* strides, double tau, const int64_t* row_keys, const int64_t* column_keys,
                             double** blocks, void** others, void* memory) {
  using namespace tclr;
  int64_t G = sizes[0], A = sizes[1], n = sizes[2], C = sizes[3], K = sizes[4], first = sizes[6];
  std::vector<Rows> sets;
  for (int64_t a = 0; a < A + C; ++a) sets.push_back({data[a], strides[3 * a], strides[3 * a + 1], strides[3 * a + 2]});
  std::vector<int64_t> row_order(G * n), column_order(G * K), place(K);
  std::vector<Match> match(G * n, {0, 0, -1});
  bool keys = row_keys != nullptr;
  for (int64_t g = 0; g < G; ++g) {
    int64_t *of_rows = row_order.data() + g * n, *of_columns = column_order.data() + g * K;
    Match* found = match.data() + g * n;
    if (keys) {
      sort_by_key({row_keys + g * n, 1}, n, of_rows), sort_by_key({column_keys + g * K, 1}, K, of_columns);
      match_keys({row_keys + g * n, 1}, of_rows, n, {column_keys + g * K, 1}, of_columns, K, found);
    }
    if (first >= 0)
      match_index(first, keys ? of_rows : nullptr, n, keys ? of_columns : nullptr, K, place.data(), found);
  }
  RectangleInput in{G,
                    sizes[5],
                    {A, n, sets.data(), row_order.data()},
                    {C, K, sets.data() + A, column_order.data()},
                    flags[3] != 0,
                    keys,
                    keys || first >= 0 ? match.data() : nullptr,
                    Dtype(flags[0]),
                    tau,
                    flags[1] != 0,
                    flags[2] != 0};
  thread_count = sizes[7], slow_thread = sizes[8];
  auto wanted = Wanted(flags[4]);
  if (in.dtype == Dtype::f64) return call(portable_level.f64, in, wanted, blocks, others, memory);
  return call(portable_level.f32, in, wanted, blocks, others, memory);
}

// float64: V, N of pos; loss: [V, N]; g_pos: [V, V, N]
extern "C" void local_local(int64_t V, int64_t N, const double* pos, double scale, double* loss, double* g_pos) {
  using namespace tclr;
  thread_count = 1, slow_thread = -1;
  portable_level.f64.local_local(V, N, pos, scale, loss, g_pos, Executor{run, 1});
}

extern "C" void hesitate(int64_t microseconds) { tclr::hesitation = microseconds; }

// What a new BusyCores says after each of n parallel regions of so many seconds, of which the calling thread computed
// all but `lost`.
extern "C" void busy_cores(int64_t n, const double* seconds, const double* lost, double* least) {
  tclr::BusyCores busy_cores;
  for (int64_t k = 0; k < n; ++k) {
    if (seconds[k] > 0) busy_cores.observe(seconds[k], seconds[k] - lost[k]);
    least[k] = busy_cores.least_work();
  }
}
