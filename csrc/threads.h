// The kernel of core/thin_linear.h on all of torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "core/thin_linear.h"

namespace panther {

// Multiply-adds that a thread gets at least: below, waking it costs more than it saves. Where idle threads sleep
// (OMP_WAIT_POLICY=PASSIVE), a quarter of this left a single row at 0.6 of torch's speed, and this at 1.0.
inline constexpr int64_t kGrain = 131072;

template <class W>
void run(const core::ThinLinear<W>& product) {
  const int64_t work = std::max<int64_t>(1, product.rows * product.in);
  torch::stable::parallel_for(0, product.out, std::max<int64_t>(1, kGrain / work),
                              [&](int64_t first, int64_t last) { core::thin_linear(product, first, last); });
}

}  // namespace panther
