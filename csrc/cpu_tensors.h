// What the linear ops share on the CPU: torch's own product, and the kernel on all threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>

#include "core/thin_linear.h"
#include "tensor_text.h"

namespace panther::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Multiply-adds that a thread gets at least: below, waking it costs more than it saves. Where idle threads sleep
// (OMP_WAIT_POLICY=PASSIVE), a quarter of this left a single row at 0.6 of torch's speed, and this at 1.0.
constexpr int64_t kGrain = 131072;

inline Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <class W>
void run(const core::ThinLinear<W>& product) {
  const int64_t work = std::max<int64_t>(1, product.rows * product.in);
  torch::stable::parallel_for(0, product.out, std::max<int64_t>(1, kGrain / work),
                              [&](int64_t first, int64_t last) { core::thin_linear(product, first, last); });
}

template <class T>
const T* numbers(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// The tensor itself where it is contiguous, which costs less than asking torch.
inline Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace panther::cpu
