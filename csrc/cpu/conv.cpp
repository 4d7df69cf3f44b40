// panther::conv on the CPU: a convolution without groups, in core/conv.h where that is faster than torch.
#include "conv.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "tensors.h"

namespace {

using namespace panther;

// Refuses in the words of panther/ops/conv.py.
void check(const Tensor& x, int64_t in, const Tensor& weight, const std::optional<Tensor>& bias) {
  const auto list = [&](const auto& text, const char* none) {
    return text(x) + ", " + text(weight) + (bias ? ", " + text(*bias) : none);
  };
  const bool fits =
      weight.size(1) == in && weight.size(0) > 0 && (!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)));
  if (!fits) {
    throw std::invalid_argument(
        "conv: expected the shapes x (batch, in, *size) or (in, *size), weight (out, in, *kernel_size), bias (out) or "
        "None; got " +
        list(shape_text, ", None"));
  }
  const ScalarType dtype = x.scalar_type();
  if (!is_floating(x) || weight.scalar_type() != dtype || (bias && bias->scalar_type() != dtype)) {
    throw std::invalid_argument("conv: expected one floating-point dtype for x, weight, bias; got " +
                                list(dtype_text, ""));
  }
}

Tensor conv(const Tensor& given, const Tensor& weight, const std::optional<Tensor>& bias, Sizes stride, Sizes padding,
            Sizes dilation) {
  Sizes kernel_size(weight.sizes().begin(), weight.sizes().end());
  kernel_size.erase(kernel_size.begin(), kernel_size.begin() + std::min<size_t>(2, kernel_size.size()));
  const Tensor x = batched(given, kernel_size.size());
  const ConvShape shape{x, kernel_size, stride, padding, dilation};
  shape.check("conv", given);
  check(given, x.size(1), weight, bias);
  return like_given(fast_conv(shape, weight, bias), given);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panther, CPU, library) { library.impl("conv", TORCH_BOX(&conv)); }
