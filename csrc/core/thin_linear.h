// y = x w^T + bias for few rows of x: reads every number of w once, which is what such a product costs.
//
// Notation: x (rows, in), w (out, in), bias (out) or null, y (rows, out); row-major, w and bias contiguous. How the
// numbers of w are stored is in core/weights.h; they are widened when they are read, and everything else is float.
// Where `factors` (out) are not null, sums are multiplied by them before the bias is added.
// A call fills the columns [first, last) of y, so that threads share the columns.
//
// With one set of instructions each dot product is summed in the same order whatever the columns of a call, the rows
// beside it and the block it falls into. So the number of threads changes no bit, and a row's result does not depend on
// its batch.
#pragma once

#include <cstdint>

#include "core/weights.h"

namespace panther::core {

template <class W>
struct ThinLinear {
  const float* x;
  W w;
  const float* bias;
  float* y;
  int64_t rows;
  int64_t in;
  int64_t out;
  int64_t x_stride;  // from a row to the next one
  int64_t y_stride;
  const float* factors = nullptr;
};

template <class W>
void thin_linear(const ThinLinear<W>& p, int64_t first, int64_t last);

// The rows [first, last) of w as floats, one after another.
template <class W>
void widen(const W& w, int64_t first, int64_t last, float* wide);

}  // namespace panther::core
