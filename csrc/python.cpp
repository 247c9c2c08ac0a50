// Build facts, for `python -m tclr_kernels.info`. Importing the module also registers the operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/api/include/torch/version.h>

#include <string>
#include <vector>

#include "cpu/gram.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

pybind11::dict build_facts() {
  pybind11::dict facts;
  std::vector<std::string> levels;
  for (int i = 0; i < tclr::level_count(); ++i) levels.push_back(tclr::level(i).name);
  facts["compiler"] = compiler();
  facts["isa_levels"] = levels;
  facts["isa"] = tclr::level_in_use().name;
  facts["torch"] = TORCH_VERSION;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_facts", &build_facts, "What this extension was built with, and the instruction set in use.");
}
