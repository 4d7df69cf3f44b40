// panther::hadamard on the CPU: the orthonormal Walsh-Hadamard transform of the last dimension.
#include "core/hadamard.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <stdexcept>

#include "tensors.h"

namespace {

using namespace panther;

// Numbers that a thread gets at least: below, waking it costs more than it saves.
constexpr int64_t kGrain = 32768;

bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

// Refuses in the words of panther/ops/hadamard.py.
void check(const Tensor& x) {
  const int64_t n = x.dim() ? x.size(x.dim() - 1) : 0;
  if (n < 1 || (n & (n - 1))) {
    throw std::invalid_argument("hadamard: expected the shape x (..., n) with n a power of two; got " +
                                panther::shape_text(x));
  }
  if (!is_floating(x.scalar_type())) {
    throw std::invalid_argument("hadamard: expected float32, float64, bfloat16 or float16; got " +
                                panther::dtype_text(x));
  }
}

template <class Number>
void transform(const Tensor& x, const Tensor& y) {
  const int64_t n = x.size(x.dim() - 1);
  const panther::core::Hadamard<Number> p{static_cast<const Number*>(x.const_data_ptr()),
                                          static_cast<Number*>(y.mutable_data_ptr()), n};
  torch::stable::parallel_for(0, x.numel() / n, std::max<int64_t>(1, kGrain / n),
                              [&](int64_t first, int64_t last) { panther::core::hadamard(p, first, last); });
}

Tensor hadamard(const Tensor& x) {
  check(x);
  const ScalarType dtype = x.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) {
    return torch::stable::to(hadamard(torch::stable::to(x, ScalarType::Float)), dtype);
  }
  const Tensor packed = torch::stable::contiguous(x);
  const Tensor y = torch::stable::new_empty(packed, packed.sizes());
  (dtype == ScalarType::Float ? transform<float> : transform<double>)(packed, y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panther, CPU, library) { library.impl("hadamard", TORCH_BOX(&hadamard)); }
