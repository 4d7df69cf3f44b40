// panther::low_rank_linear on the CPU: y = (x down^T) up^T + bias.
//
// Few rows of float32 or bfloat16 run in the kernel of core/thin_linear.h; the rest is two products of torch's
// own. Bytes moved by the kernel: those of R * (in + out) numbers, each factor once, plus x, y and rows * R floats
// between.
#include "low_rank_linear.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "core/thin_linear.h"

namespace {

using namespace panther;
using panther::core::BFloat16;

// Above this a product is bound by arithmetic and no longer by reading the weights, and torch's own can be faster.
// Speed of the kernel over torch's, geometric mean of twenty layers read again and again, 1 and 2 threads
// (benchmarks/ops.py): float32 1.4 and 1.8 at 1 row, 1.7 and 2.2 at 6, 1.2 and 1.6 at 12 (0.97 at worst), 1.1 and 1.4
// at 16 (0.69 at worst). bfloat16 2.3 and 3.0 at 1 row, 2.2 and 2.9 at 2 (1.0 at worst), at 4 slower than torch's own
// in layers 4,096 wide.
constexpr int64_t kFewRows = 12;
constexpr int64_t kFewBFloat16Rows = 2;

// Multiply-adds that a thread gets at least: below, waking it costs more than it saves. Where idle threads sleep
// (OMP_WAIT_POLICY=PASSIVE), a quarter of this left a single row at 0.6 of torch's speed, and this at 1.0.
constexpr int64_t kGrain = 131072;

template <class W>
void run(const panther::core::ThinLinear<W>& product) {
  const int64_t work = std::max<int64_t>(1, product.rows * product.in);
  torch::stable::parallel_for(0, product.out, std::max<int64_t>(1, kGrain / work),
                              [&](int64_t first, int64_t last) { panther::core::thin_linear(product, first, last); });
}

// x (rows, in) -> y (rows, out), all contiguous. The rows * R numbers between the products stay in the cache.
template <class W>
void few_rows(const Inputs& inputs, const float* x, const float* bias, int64_t rows, float* y) {
  std::unique_ptr<float[]> inner(new float[rows * inputs.rank()]);
  run<W>({x, numbers<W>(inputs.down), nullptr, inner.get(), rows, inputs.in(), inputs.rank()});
  run<W>({inner.get(), numbers<W>(inputs.up), bias, y, rows, inputs.rank(), inputs.out()});
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
  const int64_t most = is_bfloat16 ? kFewBFloat16Rows : x.scalar_type() == ScalarType::Float ? kFewRows : 0;
  if (rows < 1 || rows > most) return linear(linear(x, down, {}), up, bias);

  const Tensor y = new_output(inputs);
  const Tensor packed_x = packed(x), packed_down = packed(down), packed_up = packed(up);
  const std::optional<Tensor> packed_bias = bias ? std::optional<Tensor>(packed(*bias)) : std::nullopt;
  const Inputs contiguous{packed_x, packed_down, packed_up, packed_bias};
  (is_bfloat16 ? few_bfloat16_rows : few_float_rows)(contiguous, rows, y.mutable_data_ptr());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panther, CPU, library) { library.impl("low_rank_linear", TORCH_BOX(&low_rank_linear)); }
