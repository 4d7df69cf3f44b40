// y = x w^T + bias for few rows of x: reads every number of w once, which is what such a product costs.
//
// Notation: x (rows, in), w (out, in), bias (out) or null, y (rows, out); all row-major and contiguous.
// A call fills the columns [first, last) of y, so that threads share the columns.
//
// Each dot product is summed in the same order whatever the columns of a call, the rows beside it and the
// block it falls into. So the number of threads changes no bit, and a row's result does not depend on its batch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/instruction_set.h"

#if PANTHER_HAS_AVX2
#include <immintrin.h>
#endif

namespace panther::core {

struct ThinLinear {
  const float* x;
  const float* w;
  const float* bias;
  float* y;
  int64_t rows;
  int64_t in;
  int64_t out;
};

// Numbers summed side by side in one dot product: the width of an AVX2 register.
inline constexpr int64_t kLanes = 8;

// A dot product from the sum of its whole registers: the last in % 8 products and the bias are added.
inline float finish(const ThinLinear& p, float sum, int64_t row, int64_t column) {
  const float* x = p.x + row * p.in;
  const float* w = p.w + column * p.in;
  for (int64_t k = p.in - p.in % kLanes; k < p.in; ++k) sum += x[k] * w[k];
  return p.bias ? sum + p.bias[column] : sum;
}

// The twin without intrinsics: what every other processor runs, and what the AVX2 kernel is tested against.
inline void thin_linear_scalar(const ThinLinear& p, int64_t first, int64_t last) {
  const int64_t whole = p.in - p.in % kLanes;
  for (int64_t column = first; column < last; ++column) {
    const float* w = p.w + column * p.in;
    for (int64_t row = 0; row < p.rows; ++row) {
      const float* x = p.x + row * p.in;
      float partial[kLanes] = {};
      for (int64_t k = 0; k < whole; k += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) partial[lane] += x[k + lane] * w[k + lane];
      }
      const float sum = ((partial[0] + partial[1]) + (partial[2] + partial[3])) +
                        ((partial[4] + partial[5]) + (partial[6] + partial[7]));
      p.y[row * p.out + column] = finish(p, sum, row, column);
    }
  }
}

#if PANTHER_HAS_AVX2

// The sums of the lanes of a, b, c and d.
PANTHER_AVX2 inline __m128 sum_lanes(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

// A block of `Rows` rows of x times `Columns` rows of w, held in Rows * Columns registers of the sixteen.
template <int Rows, int Columns>
PANTHER_AVX2 inline void avx2_block(const ThinLinear& p, int64_t row, int64_t column) {
  const float* x = p.x + row * p.in;
  const float* w = p.w + column * p.in;
  const int64_t whole = p.in - p.in % kLanes;
  constexpr int kSums = Rows * Columns;
  __m256 sums[(kSums + 3) / 4 * 4];  // whole groups of four, for sum_lanes
  for (__m256& sum : sums) sum = _mm256_setzero_ps();
  for (int64_t k = 0; k < whole; k += kLanes) {
    __m256 weights[Columns];
    for (int j = 0; j < Columns; ++j) weights[j] = _mm256_loadu_ps(w + j * p.in + k);
    for (int i = 0; i < Rows; ++i) {
      const __m256 values = _mm256_loadu_ps(x + i * p.in + k);
      for (int j = 0; j < Columns; ++j) {
        sums[i * Columns + j] = _mm256_fmadd_ps(values, weights[j], sums[i * Columns + j]);
      }
    }
  }
  float dots[sizeof(sums) / sizeof(__m256)];
  for (int s = 0; s < kSums; s += 4) {
    _mm_storeu_ps(dots + s, sum_lanes(sums[s], sums[s + 1], sums[s + 2], sums[s + 3]));
  }
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < Columns; ++j) {
      p.y[(row + i) * p.out + column + j] = finish(p, dots[i * Columns + j], row + i, column + j);
    }
  }
}

// The rows of x from `row` on, in blocks of at most `Rows`; the weights stay in the first cache between the blocks.
template <int Rows, int Columns>
PANTHER_AVX2 inline void avx2_rows(const ThinLinear& p, int64_t row, int64_t column) {
  for (; p.rows - row >= Rows; row += Rows) avx2_block<Rows, Columns>(p, row, column);
  if constexpr (Rows > 1) avx2_rows<Rows - 1, Columns>(p, row, column);
}

// With few rows of x, four rows of w at a time hide the latency of an addition. With more, two do: 6 * 2 sums, two
// weights and one value take fifteen of the sixteen registers.
PANTHER_AVX2 inline void thin_linear_avx2(const ThinLinear& p, int64_t first, int64_t last) {
  int64_t column = first;
  if (p.rows <= 3) {
    for (; last - column >= 4; column += 4) avx2_rows<3, 4>(p, 0, column);
  }
  for (; last - column >= 2; column += 2) avx2_rows<6, 2>(p, 0, column);
  if (column < last) avx2_rows<6, 1>(p, 0, column);
}

#endif

inline void thin_linear(const ThinLinear& p, int64_t first, int64_t last) {
#if PANTHER_HAS_AVX2
  if (instruction_set_in_use().load(std::memory_order_relaxed) == InstructionSet::avx2) {
    return thin_linear_avx2(p, first, last);
  }
#endif
  thin_linear_scalar(p, first, last);
}

}  // namespace panther::core
