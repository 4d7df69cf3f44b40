// panther::low_rank_linear on the CPU: y = (x down^T) up^T + bias.
//
// Few rows of float32 or bfloat16 run in the kernel of core/thin_linear.h, or in that of core/gemm.h; the rest is two
// products, in core/gemm.h where gemm.h says that it is faster, else torch's own. Bytes moved by the kernel: those of R
// * (in + out) numbers, each factor once, plus x, y and rows * R floats between.
#include "low_rank_linear.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "gemm.h"
#include "threads.h"

namespace {

using namespace panther;
using panther::core::BFloat16;
using panther::core::Plain;

// Above these a product is bound by arithmetic and no longer by reading the weights, and torch's own can be faster; so
// it is for fewer rows where the rank is small, since the second product then sums up few numbers at a time. Measured
// with benchmarks/ops.py, AVX-512, twenty layers read again and again, 1 and 2 threads.
constexpr int64_t kFewRows = 8;  // before torch's own; gemm.h says how many before core/gemm.h

// Torch multiplies bfloat16 faster than the kernel where the processor has instructions for it, but begins slowly.
int64_t most_bfloat16_rows(const Inputs& inputs) { return inputs.in() + inputs.out() <= 2048 ? 12 : 8; }

// The most rows that run in the kernel.
int64_t few_rows_of(const Inputs& inputs) {
  switch (inputs.x.scalar_type()) {
    case ScalarType::Float: return panther::few_rows_of(inputs.rank(), kFewRows);
    case ScalarType::BFloat16: return most_bfloat16_rows(inputs);
    default: return 0;
  }
}

// x (rows, in) -> y (rows, out), all contiguous. The rows * R numbers between the products stay in the cache.
template <class T>
void few_rows(const Inputs& inputs, const float* x, const float* bias, int64_t rows, float* y) {
  const int64_t in = inputs.in(), rank = inputs.rank(), out = inputs.out();
  const Plain<T> down{numbers<T>(inputs.down), in}, up{numbers<T>(inputs.up), rank};
  std::unique_ptr<float[]> inner(new float[rows * rank]);
  const core::ThinLinear<Plain<T>> first{x, down, nullptr, inner.get(), rows, in, rank, in, rank},
      second{inner.get(), up, bias, y, rows, rank, out, rank, out};
  if constexpr (std::is_same_v<T, float>) {
    run_few(first);
    run_few(second);
  } else {
    run(first);
    run(second);
  }
}

void few_float_rows(const Inputs& inputs, int64_t rows, void* y) {
  const float* bias = inputs.bias ? numbers<float>(*inputs.bias) : nullptr;
  few_rows<float>(inputs, numbers<float>(inputs.x), bias, rows, static_cast<float*>(y));
}

std::vector<float> widened(const Tensor& tensor) {
  const BFloat16* values = numbers<BFloat16>(tensor);
  std::vector<float> wide(tensor.numel());
  std::transform(values, values + wide.size(), wide.begin(),
                 [](BFloat16 value) { return panther::core::widened(value); });
  return wide;
}

// All that is not a factor is float on the way, and rounded once, at the end.
void few_bfloat16_rows(const Inputs& inputs, int64_t rows, void* y) {
  const std::vector<float> x = widened(inputs.x);
  const std::vector<float> bias = inputs.bias ? widened(*inputs.bias) : std::vector<float>();
  std::vector<float> wide(rows * inputs.out());
  few_rows<BFloat16>(inputs, x.data(), inputs.bias ? bias.data() : nullptr, rows, wide.data());
  std::transform(wide.begin(), wide.end(), static_cast<BFloat16*>(y), panther::core::to_bfloat16);
}

Tensor low_rank_linear(const Tensor& x, const Tensor& down, const Tensor& up, const std::optional<Tensor>& bias) {
  const Inputs inputs{x, down, up, bias};
  check(inputs);
  const int64_t rows = inputs.in() ? x.numel() / inputs.in() : 0;
  const bool is_bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  if (rows < 1 || rows > few_rows_of(inputs)) return fast_linear(fast_linear(x, down, {}), up, bias);

  const Tensor y = new_output(inputs);
  const Tensor packed_x = packed(x), packed_down = packed(down), packed_up = packed(up);
  const std::optional<Tensor> packed_bias = bias ? std::optional<Tensor>(packed(*bias)) : std::nullopt;
  const Inputs contiguous{packed_x, packed_down, packed_up, packed_bias};
  (is_bfloat16 ? few_bfloat16_rows : few_float_rows)(contiguous, rows, y.mutable_data_ptr());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panther, CPU, library) { library.impl("low_rank_linear", TORCH_BOX(&low_rank_linear)); }
