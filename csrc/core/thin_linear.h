// y = x w^T + bias for few rows of x: reads every number of w once, which is what such a product costs.
//
// Notation: x (rows, in), w (out, in), bias (out) or null, y (rows, out); all row-major and contiguous. W is what the
// numbers of w are stored as, float or BFloat16; they are widened when they are read, and everything else is float.
// A call fills the columns [first, last) of y, so that threads share the columns.
//
// Each dot product is summed in the same order whatever the columns of a call, the rows beside it and the
// block it falls into. So the number of threads changes no bit, and a row's result does not depend on its batch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/instruction_set.h"

#if PANTHER_HAS_AVX2
#include <immintrin.h>
#endif

namespace panther::core {

// The upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

inline float widened(float value) { return value; }

inline float widened(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

// Rounded to the nearest, ties to even; NaN stays NaN.
inline BFloat16 to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <class W>
struct ThinLinear {
  const float* x;
  const W* w;
  const float* bias;
  float* y;
  int64_t rows;
  int64_t in;
  int64_t out;
};

// Numbers summed side by side in one dot product: the width of an AVX2 register.
inline constexpr int64_t kLanes = 8;

// A dot product from the sum of its whole registers: the last in % 8 products and the bias are added.
template <class W>
inline float finish(const ThinLinear<W>& p, float sum, int64_t row, int64_t column) {
  const float* x = p.x + row * p.in;
  const W* w = p.w + column * p.in;
  for (int64_t k = p.in - p.in % kLanes; k < p.in; ++k) sum += x[k] * widened(w[k]);
  return p.bias ? sum + p.bias[column] : sum;
}

// The twin without intrinsics: what every other processor runs, and what the AVX2 kernel is tested against.
template <class W>
inline void thin_linear_scalar(const ThinLinear<W>& p, int64_t first, int64_t last) {
  const int64_t whole = p.in - p.in % kLanes;
  for (int64_t column = first; column < last; ++column) {
    const W* w = p.w + column * p.in;
    for (int64_t row = 0; row < p.rows; ++row) {
      const float* x = p.x + row * p.in;
      float partial[kLanes] = {};
      for (int64_t k = 0; k < whole; k += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) partial[lane] += x[k + lane] * widened(w[k + lane]);
      }
      const float sum = ((partial[0] + partial[1]) + (partial[2] + partial[3])) +
                        ((partial[4] + partial[5]) + (partial[6] + partial[7]));
      p.y[row * p.out + column] = finish(p, sum, row, column);
    }
  }
}

#if PANTHER_HAS_AVX2

PANTHER_AVX2 inline __m256 eight(const float* numbers) { return _mm256_loadu_ps(numbers); }

PANTHER_AVX2 inline __m256 eight(const BFloat16* numbers) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// The sums of the lanes of a, b, c and d.
PANTHER_AVX2 inline __m128 sum_lanes(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

// A block of `Rows` rows of x times `Columns` rows of w, all of whose sums are in registers: at most twelve, beside four
// weights. The sums of four columns of a row leave together.
template <int Rows, int Columns, class W>
PANTHER_AVX2 inline void avx2_block(const ThinLinear<W>& p, int64_t row, int64_t column) {
  const float* x = p.x + row * p.in;
  const W* w = p.w + column * p.in;
  const int64_t whole = p.in - p.in % kLanes;
  __m256 sums[Rows][Columns];
  for (auto& of_row : sums) {
    for (__m256& sum : of_row) sum = _mm256_setzero_ps();
  }
  for (int64_t k = 0; k < whole; k += kLanes) {
    __m256 weights[Columns];
    for (int j = 0; j < Columns; ++j) weights[j] = eight(w + j * p.in + k);
    for (int i = 0; i < Rows; ++i) {
      const __m256 values = _mm256_loadu_ps(x + i * p.in + k);
      for (int j = 0; j < Columns; ++j) sums[i][j] = _mm256_fmadd_ps(values, weights[j], sums[i][j]);
    }
  }
  const bool is_whole = whole == p.in;
  for (int i = 0; i < Rows; ++i) {
    float* y = p.y + (row + i) * p.out + column;
    if constexpr (Columns % 4 == 0) {
      for (int j = 0; j < Columns; j += 4) {
        const __m128 dots = sum_lanes(sums[i][j], sums[i][j + 1], sums[i][j + 2], sums[i][j + 3]);
        const bool adds_bias = is_whole && p.bias;
        _mm_storeu_ps(y + j, adds_bias ? _mm_add_ps(dots, _mm_loadu_ps(p.bias + column + j)) : dots);
      }
    } else {
      static_assert(Columns == 1);
      y[0] = _mm_cvtss_f32(sum_lanes(sums[i][0], sums[i][0], sums[i][0], sums[i][0]));
      if (is_whole && p.bias) y[0] += p.bias[column];
    }
    if (!is_whole) {
      for (int j = 0; j < Columns; ++j) y[j] = finish(p, y[j], row + i, column + j);
    }
  }
}

// All rows of x times some rows of w, which stay in the nearest caches between the blocks. Three rows at a time, but no
// block of one where two of two do.
template <int Columns, class W>
PANTHER_AVX2 inline void avx2_rows(const ThinLinear<W>& p, int64_t column) {
  int64_t row = 0, left = p.rows;
  for (; left == 3 || left > 4; left -= 3, row += 3) avx2_block<3, Columns>(p, row, column);
  for (; left >= 2; left -= 2, row += 2) avx2_block<2, Columns>(p, row, column);
  if (left) avx2_block<1, Columns>(p, row, column);
}

// A single row needs eight rows of w at a time to hide the latency of an addition.
template <class W>
PANTHER_AVX2 inline void thin_linear_avx2(const ThinLinear<W>& p, int64_t first, int64_t last) {
  int64_t column = first;
  if (p.rows == 1) {
    for (; last - column >= 8; column += 8) avx2_block<1, 8>(p, 0, column);
  }
  for (; last - column >= 4; column += 4) avx2_rows<4>(p, column);
  for (; column < last; ++column) avx2_rows<1>(p, column);
}

#endif

template <class W>
inline void thin_linear(const ThinLinear<W>& p, int64_t first, int64_t last) {
#if PANTHER_HAS_AVX2
  if (instruction_set_in_use().load(std::memory_order_relaxed) == InstructionSet::avx2) {
    return thin_linear_avx2(p, first, last);
  }
#endif
  thin_linear_scalar(p, first, last);
}

}  // namespace panther::core
