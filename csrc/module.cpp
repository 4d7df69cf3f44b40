// panther._C: loading it registers the compiled kernels with torch's dispatcher. Its functions see no tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "core/instruction_set.h"

namespace {

namespace py = pybind11;
using namespace panther::core;

py::dict build_info() {
  py::dict info;
#if defined(__VERSION__)
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["instruction_set"] = name_of(instruction_set_in_use());
  py::list names;
  for (const InstructionSet set : instruction_sets()) names.append(name_of(set));
  info["instruction_sets"] = names;
  info["mkl_keeps_to_avx2"] = mkl_keeps_to_avx2();
  return info;
}

std::string set_instruction_set(const std::string& name) {
  return name_of(instruction_set_in_use().exchange(instruction_set_named(name)));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled kernels of panther.";
  module.def("build_info", &build_info, "How the kernels were built, and the instructions they use here.");
  module.def("set_instruction_set", &set_instruction_set, py::arg("name"),
             "Make the kernels use one of build_info()['instruction_sets']; gives the one used before.\n\n"
             "Raises: ValueError when this processor does not have it.");
}
