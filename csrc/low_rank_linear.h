// What low_rank_linear shares between devices: its inputs, what it refuses, and the product that torch has itself.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace panther {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Inputs {
  const Tensor& x;
  const Tensor& down;
  const Tensor& up;
  const std::optional<Tensor>& bias;

  int64_t rank() const { return down.size(0); }
  int64_t in() const { return down.size(1); }
  int64_t out() const { return up.size(0); }

  template <class Claim>
  bool all(const Claim& claim) const {
    return claim(x) && claim(down) && claim(up) && (!bias || claim(*bias));
  }

  // A list for an error message: what `text` says of each tensor.
  template <class Text>
  std::string list(const Text& text, bool with_none) const {
    std::string joined = text(x) + ", " + text(down) + ", " + text(up);
    if (bias) return joined + ", " + text(*bias);
    return with_none ? joined + ", None" : joined;
  }
};

inline bool shapes_fit(const Inputs& inputs) {
  if (inputs.x.dim() < 1 || inputs.down.dim() != 2 || inputs.up.dim() != 2) return false;
  if (inputs.bias && (inputs.bias->dim() != 1 || inputs.bias->size(0) != inputs.out())) return false;
  return inputs.x.size(inputs.x.dim() - 1) == inputs.in() && inputs.rank() == inputs.up.size(1);
}

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ")";
  return text.str();
}

inline std::string dtype_text(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return torch::headeronly::toString(tensor.scalar_type());
  }
}

// Refuses in the words of panther/ops/low_rank_linear.py.
inline void check(const Inputs& inputs) {
  if (!shapes_fit(inputs)) {
    throw std::invalid_argument(
        "low_rank_linear: expected the shapes x (..., in), down (R, in), up (out, R), bias (out) or None; got " +
        inputs.list(shape_text, true));
  }
  const ScalarType dtype = inputs.x.scalar_type();
  if (!inputs.all([&](const Tensor& tensor) { return tensor.scalar_type() == dtype; })) {
    throw std::invalid_argument("low_rank_linear: expected one dtype for x, down, up, bias; got " +
                                inputs.list(dtype_text, false));
  }
}

inline Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <class W>
const W* numbers(const Tensor& tensor) {
  return static_cast<const W*>(tensor.const_data_ptr());
}

// The tensor itself where it is contiguous, which costs less than asking torch.
inline Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// An empty y (..., out) for x (..., in).
inline Tensor new_output(const Inputs& inputs) {
  std::vector<int64_t> shape(inputs.x.sizes().begin(), inputs.x.sizes().end());
  shape.back() = inputs.out();
  return torch::stable::new_empty(inputs.x, shape);
}

}  // namespace panther
