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
#elif PANTHER_HAS_NEON
#include <arm_neon.h>
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

// A block of `Rows` rows of x times `Columns` rows of w, all of whose sums are in registers: twelve at most, beside the
// weights and one value. Four sums leave together: those of a row, or of a column.
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
  const float* bias = is_whole && p.bias ? p.bias + column : nullptr;  // else `finish` adds it, after the last products
  float* y = p.y + row * p.out + column;
  if constexpr (Columns % 4 == 0) {
    for (int i = 0; i < Rows; ++i) {
      for (int j = 0; j < Columns; j += 4) {
        const __m128 dots = sum_lanes(sums[i][j], sums[i][j + 1], sums[i][j + 2], sums[i][j + 3]);
        _mm_storeu_ps(y + i * p.out + j, bias ? _mm_add_ps(dots, _mm_loadu_ps(bias + j)) : dots);
      }
    }
  } else {
    for (int j = 0; j < Columns; ++j) {
      for (int i = 0; i < Rows; i += 4) {
        float dots[4];
        _mm_storeu_ps(dots, sum_lanes(sums[i][j], sums[i + 1 < Rows ? i + 1 : i][j], sums[i + 2 < Rows ? i + 2 : i][j],
                                      sums[i + 3 < Rows ? i + 3 : i][j]));
        for (int s = 0; s < 4 && i + s < Rows; ++s) y[(i + s) * p.out + j] = bias ? dots[s] + bias[j] : dots[s];
      }
    }
  }
  if (!is_whole) {
    for (int i = 0; i < Rows; ++i) {
      for (int j = 0; j < Columns; ++j) y[i * p.out + j] = finish(p, y[i * p.out + j], row + i, column + j);
    }
  }
}

// `Rows` rows of x times `Columns` rows of w, in blocks of twelve sums where there are so many.
template <int Rows, int Columns, class W>
PANTHER_AVX2 inline void avx2_blocks(const ThinLinear<W>& p, int64_t row, int64_t column) {
  constexpr int kWidth = Columns % 12 == 0 ? (Rows == 4 ? 3 : 4) : Columns;
  for (int j = 0; j < Columns; j += kWidth) avx2_block<Rows, kWidth>(p, row, column + j);
}

// All rows of x times some rows of w, which stay in the nearest caches meanwhile: four at a time, three where that
// leaves no single one.
template <int Columns, class W>
PANTHER_AVX2 inline void avx2_rows(const ThinLinear<W>& p, int64_t column) {
  constexpr int kMost = Columns % 12 == 0 || Columns == 1 ? 4 : 3;  // 4 x 4 sums would not fit
  int64_t row = 0;
  while (row < p.rows) {
    const int64_t left = p.rows - row;
    const int64_t count = left <= kMost ? left : (left % kMost == 0 || left >= 2 * kMost ? kMost : (left + 1) / 2);
    switch (count) {
      case 4:
        if constexpr (kMost == 4) avx2_blocks<4, Columns>(p, row, column);
        break;
      case 3: avx2_blocks<3, Columns>(p, row, column); break;
      case 2: avx2_blocks<2, Columns>(p, row, column); break;
      default: avx2_blocks<1, Columns>(p, row, column);
    }
    row += count;
  }
}

// A single row needs eight rows of w at a time to hide the latency of an addition.
template <class W>
PANTHER_AVX2 inline void thin_linear_avx2(const ThinLinear<W>& p, int64_t first, int64_t last) {
  int64_t column = first;
  if (p.rows == 1) {
    for (; last - column >= 8; column += 8) avx2_block<1, 8>(p, 0, column);
  } else {
    for (; last - column >= 12; column += 12) avx2_rows<12>(p, column);
  }
  for (; last - column >= 4; column += 4) avx2_rows<4>(p, column);
  for (; column < last; ++column) avx2_rows<1>(p, column);
}

#endif

#if PANTHER_HAS_NEON

struct Eight {
  float32x4_t low, high;
};

inline Eight eight(const float* numbers) { return {vld1q_f32(numbers), vld1q_f32(numbers + 4)}; }

inline Eight eight(const BFloat16* numbers) {
  const uint16x8_t halves = vld1q_u16(&numbers->bits);
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16)),
          vreinterpretq_f32_u32(vshll_high_n_u16(halves, 16))};
}

// A block of `Rows` rows of x times `Columns` rows of w, all of whose sums are in registers: 16 at most, beside two
// registers for each of the weights and for one value.
template <int Rows, int Columns, class W>
inline void neon_block(const ThinLinear<W>& p, int64_t row, int64_t column) {
  const float* x = p.x + row * p.in;
  const W* w = p.w + column * p.in;
  float32x4_t sums[Rows][Columns];
  for (auto& of_row : sums) {
    for (float32x4_t& sum : of_row) sum = vdupq_n_f32(0);
  }
  for (int64_t k = 0; k < p.in - p.in % kLanes; k += kLanes) {
    Eight weights[Columns];
    for (int j = 0; j < Columns; ++j) weights[j] = eight(w + j * p.in + k);
    for (int i = 0; i < Rows; ++i) {
      const Eight values = eight(x + i * p.in + k);
      for (int j = 0; j < Columns; ++j) {
        sums[i][j] = vfmaq_f32(vfmaq_f32(sums[i][j], values.low, weights[j].low), values.high, weights[j].high);
      }
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < Columns; ++j) {
      p.y[(row + i) * p.out + column + j] = finish(p, vaddvq_f32(sums[i][j]), row + i, column + j);
    }
  }
}

// All rows of x times some rows of w, which stay in the nearest caches meanwhile.
template <int Columns, class W>
inline void neon_rows(const ThinLinear<W>& p, int64_t column) {
  int64_t row = 0;
  for (; p.rows - row >= 4; row += 4) neon_block<4, Columns>(p, row, column);
  switch (p.rows - row) {
    case 3: return neon_block<3, Columns>(p, row, column);
    case 2: return neon_block<2, Columns>(p, row, column);
    case 1: return neon_block<1, Columns>(p, row, column);
  }
}

// A single row needs eight rows of w at a time to hide the latency of an addition.
template <class W>
inline void thin_linear_neon(const ThinLinear<W>& p, int64_t first, int64_t last) {
  int64_t column = first;
  if (p.rows == 1) {
    for (; last - column >= 8; column += 8) neon_block<1, 8>(p, 0, column);
  }
  for (; last - column >= 4; column += 4) neon_rows<4>(p, column);
  for (; column < last; ++column) neon_rows<1>(p, column);
}

#endif

template <class W>
inline void thin_linear(const ThinLinear<W>& p, int64_t first, int64_t last) {
#if PANTHER_HAS_AVX2
  if (instruction_set_in_use().load(std::memory_order_relaxed) == InstructionSet::avx2) {
    return thin_linear_avx2(p, first, last);
  }
#elif PANTHER_HAS_NEON
  if (instruction_set_in_use().load(std::memory_order_relaxed) == InstructionSet::neon) {
    return thin_linear_neon(p, first, last);
  }
#endif
  thin_linear_scalar(p, first, last);
}

}  // namespace panther::core
