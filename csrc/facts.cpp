// How the library was built, for `python -m tclr_kernels.info`. This is a C function, because an extension module would
// need one build for each version of Python.
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

// libstdc++ reads this variable of glibc 2.32 to see whether reference counts need atomic operations. With a variable
// of its own, which says that there are threads, the library also works with an older glibc.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

// Returns JSON: the compiler, the PyTorch whose headers were used, the instruction-set levels, and the level in use, or
// the reason why there is none.
extern "C" __attribute__((visibility("default"))) const char* tclr_kernels_facts() {
  static const std::string text = facts();
  return text.c_str();
}
