#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "gram.h"

namespace tclr {

namespace {
const Level* const levels[] = {
    &portable_level,
#if defined(__x86_64__)
    &avx2_level,
    &avx512_level,
#endif
};

const Level& choose() {
  const char* name = std::getenv("TCLR_KERNELS_ISA");
  for (int i = level_count(); i-- > 0;) {
    bool named = name != nullptr && std::strcmp(name, level(i).name) == 0;
    if (level_runs_here(i) && (named || name == nullptr || *name == '\0')) return level(i);
    if (named) throw std::runtime_error("TCLR_KERNELS_ISA: found " + std::string(name) + ", which this machine lacks");
  }
  std::string names;
  for (int i = 0; i < level_count(); ++i) names += std::string(i ? ", " : "") + level(i).name;
  throw std::runtime_error("TCLR_KERNELS_ISA: found " + std::string(name) + ", wanted one of " + names);
}
}  // namespace

int level_count() { return sizeof(levels) / sizeof(levels[0]); }
const Level& level(int i) { return *levels[i]; }

bool level_runs_here(int i) {
#if defined(__x86_64__)
  if (levels[i] == &avx2_level) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (levels[i] == &avx512_level)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#endif
  return i == 0;
}

const Level& level_in_use() {
  static const Level& chosen = choose();
  return chosen;
}

}  // namespace tclr
