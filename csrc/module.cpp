// panther._C: loading it registers the compiled kernels with torch's dispatcher. Its functions see no tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "conv.h"
#include "core/instruction_set.h"

namespace {

namespace py = pybind11;
using namespace panther::core;
using panther::Sizes;

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

bool torch_convolves(const Sizes& x, int64_t out, const Sizes& kernel_size, const Sizes& stride, const Sizes& padding,
                     const Sizes& dilation) {
  const panther::TensorSizes given{x};
  const panther::ConvOf<panther::TensorSizes> shape{given, kernel_size, stride, padding, dilation};
  if (!shape.fits() || !panther::runs_here(shape, out)) return shape.fits();
  // Of fewer multiplications the visit to an op takes more than its kernel gains: measured on Zen 3.
  constexpr int64_t kSmall = 1 << 21;
  const bool is_small = shape.windows() * shape.depth() < kSmall / std::max<int64_t>(1, out);
  return panther::uses(InstructionSet::avx2) && panther::torch_multiplies(shape) && is_small;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled kernels of panther.";
  module.def("build_info", &build_info, "How the kernels were built, and the instructions they use here.");
  module.def("set_instruction_set", &set_instruction_set, py::arg("name"),
             "Make the kernels use one of build_info()['instruction_sets']; gives the one used before.\n\n"
             "Raises: ValueError when this processor does not have it.");
  module.def("torch_convolves", &torch_convolves, py::arg("x"), py::arg("out"), py::arg("kernel_size"),
             py::arg("stride"), py::arg("padding"), py::arg("dilation"),
             "Whether float32 inputs of these sizes, with a batch, are torch's rather than panther::conv's, its call "
             "included; no where windows do not fit.");
}
