// panther::low_rank_conv on the CPU: a convolution without groups to a few channels, and one of single places from
// there.
//
// Few windows are copied side by side for the kernels of few rows. More of them stay in a near cache from one
// convolution to the next in core/conv.h; panther/ops/low_rank_conv.py knows where two of torch's own are faster with
// AVX2, and with AVX-512 it is where the first one would be torch's. Other types than float32 and other layouts run in
// two. Bytes moved: those of the weights for each few hundred windows, the input as often as windows overlap, and the
// output once.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "conv.h"
#include "tensors.h"

namespace {

using namespace panther;

// Refuses in the words of panther/ops/low_rank_conv.py.
void check(const Tensor& x, int64_t in, const Tensor& down, const Tensor& up, const std::optional<Tensor>& bias) {
  const auto list = [&](const auto& text, const char* none) {
    return text(x) + ", " + text(down) + ", " + text(up) + (bias ? ", " + text(*bias) : none);
  };
  bool fits = down.size(1) == in && down.size(0) > 0 && up.dim() == down.dim() && up.size(1) == down.size(0) &&
              up.size(0) > 0 && (!bias || (bias->dim() == 1 && bias->size(0) == up.size(0)));
  for (int64_t axis = 2; fits && axis < up.dim(); ++axis) fits = up.size(axis) == 1;
  if (!fits) {
    throw std::invalid_argument(
        "low_rank_conv: expected the shapes x (batch, in, *size) or (in, *size), down (R, in, *kernel_size), up (out, "
        "R, 1, ...), bias (out) or None; got " +
        list(shape_text, ", None"));
  }
  const ScalarType dtype = x.scalar_type();
  if (!is_floating(x) || down.scalar_type() != dtype || up.scalar_type() != dtype ||
      (bias && bias->scalar_type() != dtype)) {
    throw std::invalid_argument("low_rank_conv: expected one floating-point dtype for x, down, up, bias; got " +
                                list(dtype_text, ""));
  }
}

// One after the other.
Tensor two_convs(const ConvShape& shape, const Tensor& down, const Tensor& up, const std::optional<Tensor>& bias) {
  const Tensor inner = fast_conv(shape, down, std::nullopt);
  const Sizes ones(shape.kernel_size.size(), 1), zeros(2 * ones.size(), 0);
  return fast_conv(ConvShape{inner, ones, ones, zeros, ones}, up, bias);
}

Tensor one_conv(const ConvShape& shape, const Tensor& down, const Tensor& up, const std::optional<Tensor>& bias) {
  const int64_t rank = down.size(0), out = up.size(0), depth = shape.depth();
  const Tensor offset = bias ? packed(*bias) : Tensor();
  const core::Plain<float> first{numbers<float>(down), depth}, second{numbers<float>(up), rank};
  const float* added = bias ? numbers<float>(offset) : nullptr;
  const Tensor y = torch::stable::new_empty(shape.x, shape.result_size(out));
  float* to = static_cast<float*>(y.mutable_data_ptr());
  if (shape.windows() <= few_windows()) {
    conv_of_few(shape, shape.x, out, to, [&](const float* rows, int64_t count, float* found) {
      const std::unique_ptr<float[]> inner(new float[count * rank]);
      run_few({rows, first, nullptr, inner.get(), count, depth, rank, depth, rank});
      run_few({inner.get(), second, added, found, count, rank, out, rank, out});
    });
  } else {
    conv_of_many(shape, shape.x, first, added, out, to,
                 [&](const core::Conv<core::Plain<float>>& whole) { run_chain(whole, second); });
  }
  return y;
}

Tensor low_rank_conv(const Tensor& given, const Tensor& down, const Tensor& up, const std::optional<Tensor>& bias,
                     Sizes stride, Sizes padding, Sizes dilation) {
  Sizes kernel_size(down.sizes().begin(), down.sizes().end());
  kernel_size.erase(kernel_size.begin(), kernel_size.begin() + std::min<size_t>(2, kernel_size.size()));
  const Tensor x = batched(given, kernel_size.size());
  const ConvShape shape{x, kernel_size, stride, padding, dilation};
  shape.check("low_rank_conv", given);
  check(given, x.size(1), down, up, bias);
  const bool is_plain = x.scalar_type() == ScalarType::Float && has_default_strides(x) && has_default_strides(down) &&
                        has_default_strides(up) && shape.has_numbers();
  const bool is_left_to_torch = uses(core::InstructionSet::avx512) && torch_is_fast_with_avx512(shape, down.size(0));
  const bool is_one = is_plain && (shape.windows() <= few_windows() || (has_own_conv() && !is_left_to_torch));
  return like_given((is_one ? one_conv : two_convs)(shape, down, up, bias), given);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panther, CPU, library) { library.impl("low_rank_conv", TORCH_BOX(&low_rank_conv)); }
