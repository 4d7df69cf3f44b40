// The Walsh-Hadamard transform of rows, in Sylvester's order, orthonormal.
//
// Notation: x and y (rows, n), row-major and contiguous, n a power of two. A call does the rows [first, last), so that
// threads share the rows. Bytes moved: each row is read and written once where it fits the nearest cache, and once more
// for each two halvings above that.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/instruction_set.h"

#if PANTHER_HAS_AVX
#include <immintrin.h>
#endif

namespace panther::core {

// Numbers of a block that is finished in the nearest cache: 16 kB of floats.
inline constexpr int64_t kHadamardBlock = 4096;

template <class Number>
struct Hadamard {
  const Number* x;
  Number* y;
  int64_t n;
};

// Sums and differences of numbers `half` apart.
template <class Number>
PANTHER_INLINE void halve(Number* y, int64_t n, int64_t half) {
  for (int64_t start = 0; start < n; start += 2 * half) {
    Number* __restrict a = y + start;
    Number* __restrict b = a + half;
    for (int64_t i = 0; i < half; ++i) {
      const Number sum = a[i] + b[i], difference = a[i] - b[i];
      a[i] = sum;
      b[i] = difference;
    }
  }
}

// Two halvings at once, the second of numbers `quarter` apart: half of the reading and writing.
template <class Number>
PANTHER_INLINE void quarter(Number* y, int64_t n, int64_t quarter) {
  for (int64_t start = 0; start < n; start += 4 * quarter) {
    Number* __restrict a = y + start;
    Number* __restrict b = a + quarter;
    Number* __restrict c = b + quarter;
    Number* __restrict d = c + quarter;
    for (int64_t i = 0; i < quarter; ++i) {
      const Number ac = a[i] + c[i], bd = b[i] + d[i], a_c = a[i] - c[i], b_d = b[i] - d[i];
      a[i] = ac + bd;
      b[i] = ac - bd;
      c[i] = a_c + b_d;
      d[i] = a_c - b_d;
    }
  }
}

// The last three halvings, of eight neighbours at a time.
struct Eights {
  template <class Number>
  PANTHER_INLINE void operator()(Number* y, int64_t n) const {
    quarter(y, n, int64_t{2});
    halve(y, n, int64_t{1});
  }
};

// Every halving of y, of which `width` numbers at a time belong together, down to parts of `smallest`.
template <class Number>
PANTHER_INLINE void halvings(Number* y, int64_t n, int64_t width, int64_t smallest) {
  for (; width >= 4 * smallest; width /= 4) quarter(y, n, width / 4);
  if (width > smallest) halve(y, n, width / 2);
}

// The plain loops, which are compiled once for every processor and once for AVX2.
template <class Number, class LastHalvings>
PANTHER_INLINE void transform_rows(const Hadamard<Number>& p, int64_t first, int64_t last, const LastHalvings& eights) {
  const auto scale = static_cast<Number>(1 / std::sqrt(static_cast<double>(p.n)));
  const int64_t block = p.n < kHadamardBlock ? p.n : kHadamardBlock;
  for (int64_t row = first; row < last; ++row) {
    const Number* __restrict x = p.x + row * p.n;
    Number* __restrict y = p.y + row * p.n;
    for (int64_t i = 0; i < p.n; ++i) y[i] = scale * x[i];
    halvings(y, p.n, p.n, block);
    for (int64_t start = 0; start < p.n; start += block) {
      halvings(y + start, block, block, block < 8 ? int64_t{1} : int64_t{8});
      if (block >= 8) eights(y + start, block);
    }
  }
}

template <class Number>
void hadamard_scalar(const Hadamard<Number>& p, int64_t first, int64_t last) {
  transform_rows(p, first, last, Eights{});
}

#if PANTHER_HAS_AVX
// The same sums and differences in one register, which the compiler does not find.
struct EightFloats {
  PANTHER_AVX2 void operator()(float* y, int64_t n) const {
    const __m256 upper = _mm256_setr_ps(0, 0, 0, 0, -0.f, -0.f, -0.f, -0.f);
    const __m256 pairs = _mm256_setr_ps(0, 0, -0.f, -0.f, 0, 0, -0.f, -0.f);
    const __m256 odd = _mm256_setr_ps(0, -0.f, 0, -0.f, 0, -0.f, 0, -0.f);
    for (int64_t start = 0; start < n; start += 8) {
      __m256 v = _mm256_loadu_ps(y + start);
      v = _mm256_add_ps(_mm256_permute2f128_ps(v, v, 1), _mm256_xor_ps(v, upper));
      v = _mm256_add_ps(_mm256_permute_ps(v, 0x4E), _mm256_xor_ps(v, pairs));
      v = _mm256_add_ps(_mm256_permute_ps(v, 0xB1), _mm256_xor_ps(v, odd));
      _mm256_storeu_ps(y + start, v);
    }
  }
};

template <class Number>
PANTHER_AVX2 void hadamard_avx2(const Hadamard<Number>& p, int64_t first, int64_t last) {
  if constexpr (std::is_same_v<Number, float>) {
    transform_rows(p, first, last, EightFloats{});
  } else {
    transform_rows(p, first, last, Eights{});
  }
}
#endif

template <class Number>
void hadamard(const Hadamard<Number>& p, int64_t first, int64_t last) {
#if PANTHER_HAS_AVX
  if (instruction_set_in_use().load(std::memory_order_relaxed) != InstructionSet::scalar) {
    return hadamard_avx2(p, first, last);
  }
#endif
  hadamard_scalar(p, first, last);
}

}  // namespace panther::core
