// The CPU kernels alone, without torch, for `kernels.py`: compiled in seconds, with sanitizers, other vector widths or
// planted bugs.
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "cpu/gram.h"

namespace tclr {
namespace {
int64_t thread_count, slow_thread;

// Threads of its own; the slow one hesitates before each of its tasks, while the others run ahead.
void run(int64_t n, Task task, void* argument) {
  std::atomic<int64_t> next = 0;
  auto work = [&](int64_t thread) {
    for (int64_t i = next++; i < n; i = next++) {
      if (thread == slow_thread) std::this_thread::sleep_for(std::chrono::microseconds(200));
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
  Executor executor{run, thread_count};
  if (backward) {
    Gradient<T> gradients[64];
    for (int64_t a = 0; a < in.V; ++a) gradients[a] = {(T*)dz[a], in.N * in.D, in.D, false};
    kernels.backward(in, {b[0], b[1], b[2], b[3], b[4], gradients, (T*)zdz}, (T*)memory, executor);
  } else {
    kernels.forward(in, {b[0], b[1], b[2]}, (T*)memory, executor);
  }
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

// float64: V, N of pos; loss: [V, N]; g_pos: [V, V, N]
extern "C" void local_local(int64_t V, int64_t N, const double* pos, double scale, double* loss, double* g_pos) {
  using namespace tclr;
  thread_count = 1, slow_thread = -1;
  portable_level.f64.local_local(V, N, pos, scale, loss, g_pos, Executor{run, 1});
}
