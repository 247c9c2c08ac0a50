// Serves the calls of kernels.cpp to another process, for a processor that is emulated: requests on the standard input,
// results on the standard output, each value as it lies in memory. Ends with the input.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

extern "C" int64_t gram(const int64_t* sizes, const int64_t* flags, const void* const* data, const int64_t* strides,
                        double tau, void** blocks, void** dz, void* zdz, void* memory);
extern "C" void local_local(int64_t V, int64_t N, const double* pos, double scale, double* loss, double* g_pos);

namespace {

struct Block {
  void* data;
  size_t size;

  explicit Block(size_t size) : data(std::aligned_alloc(64, (size + 127) / 64 * 64)), size(size) {}
  Block(const Block&) = delete;
  Block(Block&& other) : data(other.data), size(other.size) { other.data = nullptr; }
  ~Block() { std::free(data); }
  bool read() { return std::fread(data, 1, size, stdin) == size; }
  void write() const { std::fwrite(data, 1, size, stdout); }
};

// sizes and flags as `gram` takes them, the temperature, and which of neg, pos and their gradients follow the sets
struct Request {
  int64_t sizes[6], flags[5];
  double tau;
  int64_t given[5];
};

void serve(const Request& r, Block& kept) {
  int64_t G = r.sizes[0], V = r.sizes[1], N = r.sizes[2], D = r.sizes[3];
  bool backward = r.flags[4];
  size_t element = r.flags[0] == 0 ? 8 : r.flags[0] == 1 ? 4 : 2, wide = r.flags[0] == 0 ? 8 : 4;
  std::vector<Block> sets, blocks, gradients;
  std::vector<const void*> data;
  std::vector<int64_t> strides;
  for (int64_t a = 0; a < V; ++a) {
    sets.emplace_back(G * N * D * element).read();
    data.push_back(sets.back().data);
    strides.insert(strides.end(), {N * D, D, 1});
  }
  std::vector<void*> pointers, dz;
  for (int k = 0; k < (backward ? 5 : 3); ++k) {
    blocks.emplace_back(G * V * V * N * wide);
    if (backward && r.given[k]) blocks.back().read();
    pointers.push_back(backward && !r.given[k] ? nullptr : blocks.back().data);
  }
  if (backward)
    for (int64_t a = 0; a < V; ++a) dz.push_back(gradients.emplace_back(G * N * D * wide).data);
  Block zdz(G * V * N * wide);
  auto run = [&](void* memory) {
    return gram(r.sizes, r.flags, data.data(), strides.data(), r.tau, pointers.data(), dz.data(), zdz.data, memory);
  };
  bool keep = r.flags[3];
  if (!(keep && backward)) {
    std::free(kept.data);
    kept.data = std::aligned_alloc(64, (size_t(run(nullptr)) * wide + 127) / 64 * 64);
  }
  run(kept.data);
  for (Block& block : backward ? gradients : blocks) block.write();
  if (backward) zdz.write();
}

void serve_local_local(int64_t V, int64_t N, double scale) {
  Block pos(V * V * N * sizeof(double)), loss(V * N * sizeof(double)), gradient(V * V * N * sizeof(double));
  pos.read();
  local_local(V, N, (double*)pos.data, scale, (double*)loss.data, (double*)gradient.data);
  loss.write(), gradient.write();
}

}  // namespace

int main() {
  Block kept(0);
  for (Request request; std::fread(&request, sizeof request, 1, stdin) == 1; std::fflush(stdout))
    if (request.sizes[0] < 0)
      serve_local_local(request.sizes[1], request.sizes[2], request.tau);
    else
      serve(request, kept);
}
