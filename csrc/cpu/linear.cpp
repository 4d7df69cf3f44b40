// panther::linear on the CPU: y = x W^T + bias, in core/gemm.h where that is faster than torch.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <stdexcept>

#include "gemm.h"

namespace {

using namespace panther;

// Refuses in the words of panther/ops/linear.py.
void check(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const auto list = [&](const auto& text, const char* none) {
    return text(x) + ", " + text(weight) + (bias ? ", " + text(*bias) : none);
  };
  const bool fits = x.dim() >= 1 && weight.dim() == 2 && x.size(x.dim() - 1) == weight.size(1) &&
                    (!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)));
  if (!fits) {
    throw std::invalid_argument("linear: expected the shapes x (..., in), weight (out, in), bias (out) or None; got " +
                                list(shape_text, ", None"));
  }
  const ScalarType dtype = x.scalar_type();
  if (!is_floating(x) || weight.scalar_type() != dtype || (bias && bias->scalar_type() != dtype)) {
    throw std::invalid_argument("linear: expected one floating-point dtype for x, weight, bias; got " +
                                list(dtype_text, ""));
  }
}

Tensor checked_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check(x, weight, bias);
  return fast_linear(x, weight, bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panther, CPU, library) { library.impl("linear", TORCH_BOX(&checked_linear)); }
