// panther::quantised_linear on the CPU: y = x W^T + bias with a W of eight or four bits, or of bfloat16.
//
// Few rows run in the kernel of core/thin_linear.h, which widens the numbers as it reads them; more of them with W
// widened a tile at a time (quantised.h). Bytes moved: in * out, or half of them for four bits, and the scales.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "quantised.h"
#include "tensors.h"

namespace {

using namespace panther;

// The most rows that run in the kernel: above, torch's own products are as fast though they need W widened. Measured
// with AVX-512 and one thread, the same weights read again and again. Without vector instructions torch is faster.
constexpr int64_t kFewRows = 128;  // before torch's own; gemm.h says how many before core/gemm.h
constexpr int64_t kFewScalarRows = 1;

int64_t few_rows_of(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Double) return 0;
  const bool is_scalar = core::instruction_set_in_use().load() == core::InstructionSet::scalar;
  return is_scalar ? kFewScalarRows : few_whole_rows(x, kFewRows);
}

struct Inputs {
  const Tensor& x;
  const Quantised weight;
  const std::optional<Tensor>& bias;

  template <class Text>
  std::string list(const Text& text, const char* none) const {
    const std::string joined = text(x) + ", " + text(weight.values) + ", " + text(weight.scales);
    return joined + (bias ? ", " + text(*bias) : none);
  }
};

bool shapes_fit(const Inputs& p) {
  if (p.x.dim() < 1 || !p.weight.scales_fit() || p.weight.values.size(1) != p.weight.values_in_a_row()) return false;
  return !p.bias || (p.bias->dim() == 1 && p.bias->size(0) == p.weight.rows());
}

bool dtypes_fit(const Inputs& p) {
  const ScalarType dtype = p.x.scalar_type(), stored = p.weight.values.scalar_type();
  const bool is_stored = stored == ScalarType::Char || stored == ScalarType::Byte || stored == ScalarType::Short;
  return is_floating(p.x) && is_stored && p.weight.scales.scalar_type() == dtype &&
         (!p.bias || p.bias->scalar_type() == dtype);
}

// Refuses in the words of panther/ops/quantised_linear.py.
void check(const Inputs& p) {
  if (!shapes_fit(p)) {
    throw std::invalid_argument(
        "quantised_linear: expected the shapes x (..., in), values (out, in) of int8 or (out, ceil(in / 2)) of uint8, "
        "scales (out, groups), bias (out) or None, one group a row or one for 32, 64 or 128 numbers, and with values "
        "(out, in) of int16, the bits of bfloat16, no groups; got " +
        p.list(shape_text, ", None"));
  }
  if (!dtypes_fit(p)) {
    throw std::invalid_argument(
        "quantised_linear: expected int8, uint8 or int16 values, and one floating-point dtype for x, scales, bias; "
        "got " +
        p.list(dtype_text, ""));
  }
}

Tensor few_rows(const Inputs& p, int64_t rows) {
  const Quantised weight{packed(p.weight.values), as_float(p.weight.scales), p.weight.columns};
  const Tensor x = as_float(p.x);
  const Tensor bias = p.bias ? as_float(*p.bias) : Tensor();
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = weight.rows();
  const Tensor y = torch::stable::new_empty(x, shape);
  panther::few_rows(numbers<float>(x), weight, p.bias ? numbers<float>(bias) : nullptr,
                    static_cast<float*>(y.mutable_data_ptr()), rows);
  return rounded_like(p.x, y);
}

Tensor quantised_linear(const Tensor& x, const Tensor& values, const Tensor& scales,
                        const std::optional<Tensor>& bias) {
  const int64_t in = x.dim() ? x.size(x.dim() - 1) : 0;
  const Inputs inputs{x, {values, scales, in}, bias};
  check(inputs);
  const int64_t rows = in ? x.numel() / in : 0;
  if (rows < 1 || rows > few_rows_of(x)) {
    return tiled_linear(x, inputs.weight, bias);
  }
  return few_rows(inputs, rows);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panther, CPU, library) { library.impl("quantised_linear", TORCH_BOX(&quantised_linear)); }
