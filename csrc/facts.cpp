// Build facts, for `python -m tclr_kernels.info`, by a C function: a Python module would serve one Python version.
#include <torch/headeronly/version.h>

#include <exception>
#include <string>

#include "cpu/gram.h"

namespace {

#if defined(__clang__)
constexpr const char* compiler = "clang " __clang_version__;
#else
constexpr const char* compiler = "gcc " __VERSION__;
#endif

std::string quoted(const std::string& text) {
  std::string escaped;
  for (char c : text) escaped += c == '"' || c == '\\' ? std::string("\\") + c : std::string(1, c);
  return '"' + escaped + '"';
}

std::string torch_version() {
  return std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR) + "." +
         std::to_string(TORCH_VERSION_PATCH);
}

std::string facts() {
  std::string levels;
  for (int i = 0; i < tclr::level_count(); ++i) levels += (i ? ", " : "") + quoted(tclr::level(i).name);
  std::string text = "{\"compiler\": " + quoted(compiler) + ", \"torch\": " + quoted(torch_version()) +
                     ", \"isa_levels\": [" + levels + "]";
  try {
    return text + ", \"isa\": " + quoted(tclr::level_in_use().name) + "}";
  } catch (const std::exception& error) {
    return text + ", \"error\": " + quoted(error.what()) + "}";
  }
}

}  // namespace

// libstdc++ reads this variable of glibc 2.32 before it counts a reference. With one of its own, which says that there
// are threads, the library loads beside an older glibc too.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

// JSON: the compiler, the PyTorch whose headers were used, the instruction sets, and the one in use or why there is
// none.
extern "C" __attribute__((visibility("default"))) const char* tclr_kernels_facts() {
  static const std::string text = facts();
  return text.c_str();
}
