// panther::quantised_conv on the CPU: a convolution, without groups, with a weight of eight or four bits, or of
// bfloat16.
//
// Few windows are copied side by side for the kernel of core/thin_linear.h; more run in that of core/conv.h where that
// is faster, and else in torch's own convolution with the weight widened a tile at a time. Bytes moved: those of the
// weight and its scales once for all windows that are packed together, or of a widened copy where that is small, and of
// the windows.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "conv.h"
#include "quantised.h"
#include "tensors.h"

namespace {

using namespace panther;

struct Inputs {
  const ConvShape& shape;
  const Tensor& given;  // x, maybe without a batch
  const Tensor& x;
  const Quantised weight;
  const std::optional<Tensor>& bias;

  template <class Text>
  std::string list(const Text& text, const char* none) const {
    const std::string joined = text(given) + ", " + text(weight.values) + ", " + text(weight.scales);
    return joined + (bias ? ", " + text(*bias) : none);
  }
};

// Refuses in the words of panther/ops/quantised_conv.py.
void check(const Inputs& p) {
  const bool fits = p.weight.scales_fit() && p.weight.rows() > 0 &&
                    p.weight.values.size(1) == p.weight.values_in_a_row() &&
                    (!p.bias || (p.bias->dim() == 1 && p.bias->size(0) == p.weight.rows()));
  if (!fits) {
    throw std::invalid_argument(
        "quantised_conv: expected the shapes x (batch, channels, *size) or (channels, *size), values (out, in) of int8 "
        "or int16 or (out, ceil(in / 2)) of uint8 with in = channels times the numbers of kernel_size, scales (out, "
        "groups), bias (out) or None, one group a row or one for 32, 64 or 128 numbers, and none with int16; got " +
        p.list(shape_text, ", None") + " and " + sizes_text(p.shape.kernel_size));
  }
  const ScalarType dtype = p.x.scalar_type(), stored = p.weight.values.scalar_type();
  const bool is_stored = stored == ScalarType::Char || stored == ScalarType::Byte || stored == ScalarType::Short;
  const bool is_one =
      is_floating(p.x) && p.weight.scales.scalar_type() == dtype && (!p.bias || p.bias->scalar_type() == dtype);
  if (!is_stored || !is_one) {
    throw std::invalid_argument(
        "quantised_conv: expected int8, uint8 or int16 values, and one floating-point dtype for x, scales, bias; "
        "got " +
        p.list(dtype_text, ""));
  }
}

// Room for a result of this size, in the layout of a part of it.
Tensor wider(const Tensor& part, const Sizes& size) {
  if (part.is_contiguous() || part.stride(1) != 1) return torch::stable::new_empty(part, size);
  Sizes last = size;
  last.erase(last.begin() + 1);
  last.push_back(size[1]);
  Tensor y = torch::stable::new_empty(part, last);
  for (int64_t axis = part.dim() - 1; axis > 1; --axis) y = torch::stable::transpose(y, axis - 1, axis);
  return y;
}

// In torch's own convolution, kTile numbers of the weight at a time.
Tensor tiled_conv(const Inputs& p) {
  const bool is_double = p.x.scalar_type() == ScalarType::Double;
  const Quantised weight{packed(p.weight.values), is_double ? packed(p.weight.scales) : as_float(p.weight.scales),
                         p.weight.columns};
  const int64_t out = weight.rows(), most = std::max<int64_t>(1, kTile / std::max<int64_t>(1, weight.columns));
  Sizes tile_size{0, p.x.size(1)};
  tile_size.insert(tile_size.end(), p.shape.kernel_size.begin(), p.shape.kernel_size.end());
  Tensor y;
  for (int64_t first = 0; first < out || first == 0; first += most) {
    tile_size[0] = std::min(most, out - first);
    const Tensor tile = is_double ? widened_tile<double>(p.x, weight, first, tile_size, ScalarType::Double)
                                  : widened_tile<float>(p.x, weight, first, tile_size, ScalarType::Float);
    if (tile_size[0] == out) return torch_conv(p.shape, tile, p.bias);
    std::optional<Tensor> part;
    if (p.bias) part = torch::stable::narrow(const_cast<Tensor&>(*p.bias), 0, first, tile_size[0]);
    const Tensor found = torch_conv(p.shape, tile, part);
    if (first == 0) y = wider(found, p.shape.result_size(out));
    Tensor place = torch::stable::narrow(y, 1, first, tile_size[0]);
    torch::stable::copy_(place, found);
  }
  return y;
}

void many_windows(const ConvShape& shape, const Tensor& x, const Quantised& weight, const float* bias, float* y) {
  const int64_t out = weight.rows();
  if (out * weight.columns <= kTile && shape.windows() > core::most_windows()) {  // widened once for all parts
    const Tensor tile = widened_tile<float>(x, weight, 0, {out, weight.columns}, ScalarType::Float);
    conv_of_many(shape, x, core::Plain<float>{numbers<float>(tile), weight.columns}, bias, out, y);
  } else {
    with_weights(weight, [&](const auto& w) { conv_of_many(shape, x, w, bias, out, y); });
  }
}

Tensor own_conv(const Inputs& p, bool is_few) {
  const Quantised weight{packed(p.weight.values), as_float(p.weight.scales), p.weight.columns};
  const Tensor x = as_float(p.x), bias = p.bias ? as_float(*p.bias) : Tensor();
  const float* added = p.bias ? numbers<float>(bias) : nullptr;
  const Tensor y = torch::stable::new_empty(x, p.shape.result_size(weight.rows()));
  float* to = static_cast<float*>(y.mutable_data_ptr());
  if (is_few) {
    conv_of_few(p.shape, x, weight.rows(), to,
                [&](const float* rows, int64_t count, float* found) { few_rows(rows, weight, added, found, count); });
  } else {
    many_windows(p.shape, x, weight, added, to);
  }
  return rounded_like(p.x, y);
}

Tensor batched_conv(const Inputs& p) {
  const int64_t out = p.weight.rows();
  const ScalarType dtype = p.x.scalar_type();
  const bool is_own = dtype != ScalarType::Double && has_default_strides(p.x) && p.shape.has_numbers();
  if (is_own && p.shape.windows() <= few_windows()) return own_conv(p, true);
  const bool is_small = out * p.weight.columns <= kTile;  // so that torch's own takes the weight as a whole
  const bool pays = has_own_conv() && !(is_small && torch_is_fast(p.shape, out));
  const bool is_float = dtype == ScalarType::Float;  // other types of many windows are faster in torch's own
  if (is_own && (is_float ? pays : has_own_conv() && p.shape.windows() <= kFewWindows)) return own_conv(p, false);
  return tiled_conv(p);
}

Tensor quantised_conv(const Tensor& given, const Tensor& values, const Tensor& scales,
                      const std::optional<Tensor>& bias, Sizes kernel_size, Sizes stride, Sizes padding,
                      Sizes dilation) {
  const Tensor x = batched(given, kernel_size.size());
  const ConvShape shape{x, kernel_size, stride, padding, dilation};
  shape.check("quantised_conv", given);
  const Inputs p{shape, given, x, {values, scales, shape.depth()}, bias};
  check(p);
  return like_given(batched_conv(p), given);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panther, CPU, library) { library.impl("quantised_conv", TORCH_BOX(&quantised_conv)); }
