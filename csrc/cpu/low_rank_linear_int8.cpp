// panther::low_rank_linear_int8 on the CPU: y = (x down^T) up^T + bias with factors of eight bits.
//
// Few rows run in the kernel of core/thin_linear.h, which widens the numbers as it reads them. For more rows the
// factors are widened a tile at a time (quantised.h). Bytes moved: R * (in + out) of factors, and their
// scales.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "quantised.h"
#include "tensors.h"

namespace {

using namespace panther;

constexpr int64_t kFewRows = 48;  // before torch's own product; gemm.h says how many before core/gemm.h

struct Inputs {
  const Tensor& x;
  const Quantised down;
  const Quantised up;
  const std::optional<Tensor>& bias;

  std::vector<const Tensor*> all() const {
    std::vector<const Tensor*> tensors{&x, &down.values, &down.scales, &up.values, &up.scales};
    if (bias) tensors.push_back(&*bias);
    return tensors;
  }

  template <class Text>
  std::string list(const Text& text, const char* none) const {
    std::string joined;
    for (const Tensor* tensor : all()) joined += (joined.empty() ? "" : ", ") + text(*tensor);
    return bias ? joined : joined + none;
  }
};

bool shapes_fit(const Inputs& p) {
  if (p.x.dim() < 1 || !p.down.scales_fit() || !p.up.scales_fit()) return false;
  if (p.bias && (p.bias->dim() != 1 || p.bias->size(0) != p.up.rows())) return false;
  return p.x.size(p.x.dim() - 1) == p.down.columns && p.down.rows() == p.up.columns;
}

bool dtypes_fit(const Inputs& p) {
  const ScalarType dtype = p.x.scalar_type();
  const auto is_int8 = [](const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Char; };
  const auto is_like_x = [&](const Tensor& tensor) { return tensor.scalar_type() == dtype; };
  return is_floating(p.x) && is_int8(p.down.values) && is_int8(p.up.values) && is_like_x(p.down.scales) &&
         is_like_x(p.up.scales) && (!p.bias || is_like_x(*p.bias));
}

// Refuses in the words of panther/ops/low_rank_linear_int8.py.
void check(const Inputs& p) {
  if (!shapes_fit(p)) {
    throw std::invalid_argument(
        "low_rank_linear_int8: expected the shapes x (..., in), down (R, in), its scales (R, groups), up (out, R), its "
        "scales (out, groups), bias (out) or None, one group a row or one for 32, 64 or 128 numbers; got " +
        p.list(shape_text, ", None"));
  }
  if (!dtypes_fit(p)) {
    throw std::invalid_argument(
        "low_rank_linear_int8: expected int8 factors, and one floating-point dtype for x, scales, bias; got " +
        p.list(dtype_text, ""));
  }
}

Tensor few_rows(const Inputs& p, int64_t rows, const std::vector<int64_t>& shape) {
  const Quantised down{packed(p.down.values), as_float(p.down.scales), p.down.columns};
  const Quantised up{packed(p.up.values), as_float(p.up.scales), p.up.columns};
  const Tensor x = as_float(p.x);
  const Tensor bias = p.bias ? as_float(*p.bias) : Tensor();
  const Tensor y = torch::stable::new_empty(x, shape);
  std::unique_ptr<float[]> inner(new float[rows * down.rows()]);
  panther::few_rows(numbers<float>(x), down, nullptr, inner.get(), rows);
  panther::few_rows(inner.get(), up, p.bias ? numbers<float>(bias) : nullptr, static_cast<float*>(y.mutable_data_ptr()),
                    rows);
  return rounded_like(p.x, y);
}

int64_t columns_of(const Tensor& values) { return values.dim() == 2 ? values.size(1) : 0; }

Tensor low_rank_linear_int8(const Tensor& x, const Tensor& down, const Tensor& down_scales, const Tensor& up,
                            const Tensor& up_scales, const std::optional<Tensor>& bias) {
  const Inputs inputs{x, {down, down_scales, columns_of(down)}, {up, up_scales, columns_of(up)}, bias};
  check(inputs);
  const int64_t rows = down.size(1) ? x.numel() / down.size(1) : 0;
  if (rows < 1 || rows > few_whole_rows(x, kFewRows) || x.scalar_type() == ScalarType::Double) {
    return tiled_linear(tiled_linear(x, inputs.down, {}), inputs.up, bias);
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = up.size(0);
  return few_rows(inputs, rows, shape);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panther, CPU, library) {
  library.impl("low_rank_linear_int8", TORCH_BOX(&low_rank_linear_int8));
}
