// panther::low_rank_linear_int8 on the CPU: y = (x down^T) up^T + bias with factors of eight bits.
//
// Few rows run in the kernel of core/thin_linear.h, which widens each number when it reads it. For more rows the
// factors are widened a tile at a time, for torch's own products. Bytes moved: R * (in + out) of factors, and their
// scales.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensors.h"
#include "threads.h"

namespace {

using namespace panther;
using panther::core::Int8;

constexpr int64_t kFewRows = 48;    // above, widening the factors once costs less than widening them for each few rows
constexpr int64_t kTile = 1 << 20;  // numbers that are widened at a time

// One factor (rows, columns) and its scales (rows, groups), contiguous.
struct Factor {
  Tensor values;
  Tensor scales;

  int64_t rows() const { return values.size(0); }
  int64_t columns() const { return values.size(1); }
};

// log2 of the numbers that share a scale, 62 for all of a row; -1 where so many scales fit no group size.
int group_shift(int64_t columns, int64_t groups) {
  if (groups == 1) return 62;
  for (const int shift : {5, 6, 7}) {
    if (groups == (columns + (int64_t{1} << shift) - 1) >> shift) return shift;
  }
  return -1;
}

struct Inputs {
  const Tensor& x;
  const Factor down;
  const Factor up;
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

bool fits(const Factor& factor) {
  return factor.values.dim() == 2 && factor.scales.dim() == 2 && factor.scales.size(0) == factor.rows() &&
         group_shift(factor.columns(), factor.scales.size(1)) >= 0;
}

bool shapes_fit(const Inputs& p) {
  if (p.x.dim() < 1 || !fits(p.down) || !fits(p.up)) return false;
  if (p.bias && (p.bias->dim() != 1 || p.bias->size(0) != p.up.rows())) return false;
  return p.x.size(p.x.dim() - 1) == p.down.columns() && p.down.rows() == p.up.columns();
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

Tensor as_float(const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Float) return packed(tensor);
  Tensor wide = torch::stable::new_empty(tensor, tensor.sizes().vec(), ScalarType::Float);
  torch::stable::copy_(wide, tensor);
  return wide;
}

Int8 weights(const Factor& factor) {
  const int64_t groups = factor.scales.size(1);
  return {numbers<int8_t>(factor.values), factor.columns(), numbers<float>(factor.scales), groups,
          group_shift(factor.columns(), groups)};
}

Tensor few_rows(const Inputs& p, int64_t rows, const std::vector<int64_t>& shape) {
  const Factor down{packed(p.down.values), as_float(p.down.scales)}, up{packed(p.up.values), as_float(p.up.scales)};
  const Tensor x = as_float(p.x);
  const std::optional<Tensor> bias = p.bias ? std::optional<Tensor>(as_float(*p.bias)) : std::nullopt;
  const Tensor y = torch::stable::new_empty(x, shape);
  std::unique_ptr<float[]> inner(new float[rows * down.rows()]);
  const int64_t in = down.columns(), rank = down.rows(), out = up.rows();
  run<Int8>({numbers<float>(x), weights(down), nullptr, inner.get(), rows, in, rank, in, rank});
  run<Int8>({inner.get(), weights(up), bias ? numbers<float>(*bias) : nullptr,
             static_cast<float*>(y.mutable_data_ptr()), rows, rank, out, rank, out});
  if (p.x.scalar_type() == ScalarType::Float) return y;
  Tensor rounded = torch::stable::new_empty(p.x, shape);
  torch::stable::copy_(rounded, y);
  return rounded;
}

// values * scales for some rows of a factor, in the dtype T of the scales.
template <class T>
void widen(const Factor& factor, int64_t first, int64_t count, T* wide) {
  const int64_t columns = factor.columns(), groups = factor.scales.size(1);
  const int shift = group_shift(columns, groups);
  const int8_t* values = numbers<int8_t>(factor.values) + first * columns;
  const T* scales = numbers<T>(factor.scales) + first * groups;
  torch::stable::parallel_for(
      0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns)), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          for (int64_t k = 0; k < columns; ++k) {
            wide[row * columns + k] = values[row * columns + k] * scales[row * groups + (k >> shift)];
          }
        }
      });
}

// x (rows, columns) -> (rows, out), through a tile of the factor's rows at a time.
Tensor tiled_linear(const Tensor& x, const Factor& given, const std::optional<Tensor>& bias) {
  const bool is_double = x.scalar_type() == ScalarType::Double;
  const Factor factor{packed(given.values), is_double ? packed(given.scales) : as_float(given.scales)};
  const int64_t out = factor.rows(), most = std::max<int64_t>(1, kTile / std::max<int64_t>(1, factor.columns()));
  Tensor y;
  for (int64_t first = 0; first < out || first == 0; first += most) {
    const int64_t count = std::min(most, out - first);
    const ScalarType dtype = is_double ? ScalarType::Double : ScalarType::Float;
    Tensor tile = torch::stable::new_empty(x, {count, factor.columns()}, dtype);
    if (is_double) {
      widen(factor, first, count, static_cast<double*>(tile.mutable_data_ptr()));
    } else {
      widen(factor, first, count, static_cast<float*>(tile.mutable_data_ptr()));
    }
    if (dtype != x.scalar_type()) {
      const Tensor wide = tile;
      tile = torch::stable::new_empty(x, {count, factor.columns()});
      torch::stable::copy_(tile, wide);
    }
    std::optional<Tensor> part;
    if (bias) part = torch::stable::narrow(const_cast<Tensor&>(*bias), 0, first, count);
    const Tensor found = linear(x, tile, part);
    if (count == out) return found;
    if (first == 0) {
      std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
      shape.back() = out;
      y = torch::stable::new_empty(x, shape);
    }
    Tensor place = torch::stable::narrow(y, y.dim() - 1, first, count);
    torch::stable::copy_(place, found);
  }
  return y;
}

Tensor low_rank_linear_int8(const Tensor& x, const Tensor& down, const Tensor& down_scales, const Tensor& up,
                            const Tensor& up_scales, const std::optional<Tensor>& bias) {
  const Inputs inputs{x, {down, down_scales}, {up, up_scales}, bias};
  check(inputs);
  const int64_t rows = down.size(1) ? x.numel() / down.size(1) : 0;
  if (rows < 1 || rows > kFewRows || x.scalar_type() == ScalarType::Double) {
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
