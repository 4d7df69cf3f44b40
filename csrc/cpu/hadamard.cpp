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

// Refuses in the words of panther/ops/hadamard.py.
void check(const Tensor& x) {
  const int64_t n = x.dim() ? x.size(x.dim() - 1) : 0;
  if (n < 1 || (n & (n - 1))) {
    throw std::invalid_argument("hadamard: expected the shape x (..., n) with n a power of two; got " + shape_text(x));
  }
  if (!is_floating(x)) {
    throw std::invalid_argument("hadamard: expected float32, float64, bfloat16 or float16; got " + dtype_text(x));
  }
}

template <class Number>
void transform(const Tensor& x, const Tensor& y) {
  const int64_t n = x.size(x.dim() - 1);
  const core::Hadamard<Number> p{numbers<Number>(x), static_cast<Number*>(y.mutable_data_ptr()), n};
  torch::stable::parallel_for(0, x.numel() / n, std::max<int64_t>(1, kGrain / n),
                              [&](int64_t first, int64_t last) { core::hadamard(p, first, last); });
}

Tensor hadamard(const Tensor& x) {
  check(x);
  const ScalarType dtype = x.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) {
    return torch::stable::to(hadamard(torch::stable::to(x, ScalarType::Float)), dtype);
  }
  const Tensor rows = packed(x);
  const Tensor y = torch::stable::new_empty(rows, rows.sizes());
  (dtype == ScalarType::Float ? transform<float> : transform<double>)(rows, y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panther, CPU, library) { library.impl("hadamard", TORCH_BOX(&hadamard)); }
