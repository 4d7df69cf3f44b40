// What low_rank_linear shares between devices: its inputs, and what it refuses.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensors.h"

namespace panther {

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

// An empty y (..., out) for x (..., in).
inline Tensor new_output(const Inputs& inputs) {
  std::vector<int64_t> shape(inputs.x.sizes().begin(), inputs.x.sizes().end());
  shape.back() = inputs.out();
  return torch::stable::new_empty(inputs.x, shape);
}

}  // namespace panther
