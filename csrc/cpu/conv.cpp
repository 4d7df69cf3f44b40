// panther::conv on the CPU: a convolution without groups, in core/conv.h where that is faster than torch.
#include "conv.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "gemm.h"
#include "tensors.h"
#include "threads.h"

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
  const int64_t out = weight.size(0);
  const bool is_plain = x.scalar_type() == ScalarType::Float && has_default_strides(x) && has_default_strides(weight);
  const bool is_few = is_plain && shape.has_numbers() && shape.windows() <= few_windows();
  const bool is_own = is_few || (is_plain && has_own_conv() && shape.has_numbers() && !torch_is_fast(shape, out));
  if (!is_own) return like_given(torch_conv(shape, weight, bias), given);
  const Tensor offset = bias ? packed(*bias) : Tensor();
  const core::Plain<float> w{numbers<float>(weight), shape.depth()};
  const float* added = bias ? numbers<float>(offset) : nullptr;
  const Tensor y = torch::stable::new_empty(x, shape.result_size(out));
  float* to = static_cast<float*>(y.mutable_data_ptr());
  if (is_few) {
    conv_of_few(shape, x, out, to, [&](const float* rows, int64_t count, float* found) {
      run_few({rows, w, added, found, count, w.in, out, w.in, out});
    });
  } else {
    conv_of_many(shape, x, w, added, out, to);
  }
  return like_given(y, given);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panther, CPU, library) { library.impl("conv", TORCH_BOX(&conv)); }
