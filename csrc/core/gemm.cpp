#include "core/gemm.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "core/panels.h"
#include "core/thin_linear.h"
#include "core/vectors.h"

namespace panther::core {

// The twin without intrinsics.
static void gemm_scalar(const Gemm& p) {
  for (int64_t i = 0; i < p.m; ++i) {
    for (int64_t j = 0; j < p.n; ++j) {
      float sum = 0;
      for (int64_t r = 0; r < p.k; ++r) sum += *p.a.at(i, r) * *p.b.at(j, r);
      if (p.bias) sum += p.bias[p.bias_is_of_rows ? i : j];
      p.c[i * p.c_row + j * p.c_column] = sum;
    }
  }
}

#if PANTHER_HAS_AVX

namespace avx2 {

// The most columns at once: more than eight rows of B whose lengths are a power of two do not stay in the first cache.
constexpr int most_columns(int registers) { return registers == 1 ? 8 : registers == 2 ? 6 : 4; }

// Eight rows of eight numbers become eight columns.
PANTHER_AVX2 inline void transpose(__m256 (&rows)[8]) {
  __m256 pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
  }
  for (int c = 0; c < 4; ++c) {
    rows[c] = _mm256_permute2f128_ps(fours[c], fours[c + 4], 0x20);
    rows[c + 4] = _mm256_permute2f128_ps(fours[c], fours[c + 4], 0x31);
  }
}

// The first `Count` numbers.
template <int Count>
PANTHER_AVX2 __attribute__((always_inline)) inline void store_some(float* c, bool adds, __m128 sums) {
  if constexpr (Count == 4) {
    _mm_storeu_ps(c, adds ? _mm_add_ps(sums, _mm_loadu_ps(c)) : sums);
  } else if constexpr (Count == 2) {
    double two;  // floats
    std::memcpy(&two, c, sizeof(two));
    const __m128 added = adds ? _mm_add_ps(sums, _mm_castpd_ps(_mm_set_sd(two))) : sums;
    two = _mm_cvtsd_f64(_mm_castps_pd(added));
    std::memcpy(c, &two, sizeof(two));
  } else {
    _mm_store_ss(c, adds ? _mm_add_ss(sums, _mm_load_ss(c)) : sums);
  }
}

// Eight rows of `Columns` numbers each, from registers that hold columns.
template <int Columns>
PANTHER_AVX2 __attribute__((always_inline)) inline void store_rows(const Block& to, const __m256* sums, int64_t j) {
  constexpr int kCount = Columns < 4 ? Columns : 4;
  const __m256 none = _mm256_setzero_ps();
  const __m256 second = Columns > 1 ? sums[1] : none, third = Columns > 2 ? sums[2] : none,
               fourth = Columns > 3 ? sums[3] : none;
  const __m256 low = _mm256_unpacklo_ps(sums[0], second), low_too = _mm256_unpacklo_ps(third, fourth);
  const __m256 high = _mm256_unpackhi_ps(sums[0], second), high_too = _mm256_unpackhi_ps(third, fourth);
  const __m256 rows[4] = {_mm256_shuffle_ps(low, low_too, 0x44), _mm256_shuffle_ps(low, low_too, 0xEE),
                          _mm256_shuffle_ps(high, high_too, 0x44), _mm256_shuffle_ps(high, high_too, 0xEE)};
  float* c = to.c + j;
  for (int64_t lane = 0; lane < kLanes && lane < to.count; ++lane) {
    const __m256 row = rows[lane % 4];
    store_some<kCount>(c + lane * to.row, to.adds,
                       lane < 4 ? _mm256_castps256_ps128(row) : _mm256_extractf128_ps(row, 1));
  }
  if constexpr (Columns > 4) store_rows<Columns - 4>(to, sums + 4, j + 4);
}

// Adds the products of the next 8 * Registers numbers of a panel with one number each of `Columns` rows of B: those at
// `at` of rows that are `row` apart, of which every third one has a pointer.
template <int Registers, int Columns, class Pointers>
PANTHER_AVX2 __attribute__((always_inline)) inline void add_products(const float* panel, const Pointers& numbers,
                                                                     int64_t row, int64_t at,
                                                                     __m256 (&sums)[Registers][Columns]) {
  __m256 values[Registers];
  PANTHER_UNROLL for (int v = 0; v < Registers; ++v) values[v] = _mm256_loadu_ps(panel + v * kLanes);
  PANTHER_UNROLL for (int s = 0; s < Columns; ++s) {
    const __m256 number = _mm256_broadcast_ss(numbers[s / 3] + (s % 3 * row + at));
    PANTHER_UNROLL for (int v = 0; v < Registers; ++v) accumulate(sums[v][s], values[v], number);
  }
}

// The sums of the products of a panel of 8 * Registers rows with the first `Columns` rows of B. Four numbers of each
// row are read before pointers move on: beside another thread on the same core what is issued is what this costs.
template <int Registers, int Columns, bool>
PANTHER_AVX2 __attribute__((always_inline)) inline void add_panel(const float* panel, const Strided& b, int64_t depth,
                                                                  bool is_first, __m256 (&sums)[Registers][Columns]) {
  PANTHER_UNROLL for (int s = 0; s < Columns; ++s) {
    PANTHER_UNROLL for (int v = 0; v < Registers; ++v) sums[v][s] = _mm256_setzero_ps();
  }
  constexpr int kPointers = (Columns + 2) / 3;  // an address can add a step or two to each: that many stay in registers
  constexpr int64_t kWidth = kLanes * Registers, kFour = 4, kLine = 16;
  const float* numbers[kPointers];
  for (int q = 0; q < kPointers; ++q) numbers[q] = b.at(3 * q, 0);
  // With one register of rows of A, reading B is what this costs, and the next rows of B are asked for: 1.1 to 1.3
  // times as fast; so they are while the first panel reads B, which may come from memory: 1.1 to 1.7 times as fast for
  // 20 to 64 rows of A. Rows a multiple of 1024 numbers apart would push each other out of the first cache.
  const bool fetches = (Registers == 1 || is_first) && b.row % 1024 != 0;
  int64_t r = 0;
  for (; b.column == 1 && depth - r >= kFour; r += kFour, panel += kFour * kWidth) {
    if (fetches && r % kLine == 0) {
      for (int s = 0; s < Columns; ++s) __builtin_prefetch(numbers[s / 3] + (s % 3 + Columns) * b.row);
    }
    PANTHER_UNROLL for (int64_t t = 0; t < kFour; ++t) add_products(panel + t * kWidth, numbers, b.row, t, sums);
    for (const float*& of_three : numbers) of_three += kFour;
  }
  for (; r < depth; ++r, panel += kWidth) {
    add_products(panel, numbers, b.row, 0, sums);
    for (const float*& of_three : numbers) of_three += b.column;
  }
}

#define PANTHER_VECTOR PANTHER_AVX2
#define PANTHER_EACH PANTHER_UNROLL
#include "core/gemm_block.h"
#undef PANTHER_EACH
#undef PANTHER_VECTOR

}  // namespace avx2

namespace avx512 {

// A single register of rows needs more sums to hide the latency of an addition.
constexpr int most_columns(int registers) { return registers == 1 ? 16 : 8; }

// The numbers c, c + 4, c + 8, c + 12 of each four of some rows side by side, in fours[i + c] of the rows from i on.
template <int Rows>
PANTHER_AVX512 __attribute__((always_inline)) inline void transpose_fours(const __m512 (&rows)[Rows],
                                                                          __m512 (&fours)[Rows]) {
  __m512 pairs[Rows];
  for (int i = 0; i < Rows; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < Rows; i += 4) {
    fours[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
    fours[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
  }
}

// Sixteen rows of sixteen numbers become sixteen columns.
PANTHER_AVX512 inline void transpose(__m512 (&rows)[16]) {
  __m512 fours[16];
  transpose_fours(rows, fours);
  for (int c = 0; c < 4; ++c) {
    const __m512 low = _mm512_shuffle_f32x4(fours[c], fours[c + 4], 0x88);
    const __m512 high = _mm512_shuffle_f32x4(fours[c + 8], fours[c + 12], 0x88);
    const __m512 low_odd = _mm512_shuffle_f32x4(fours[c], fours[c + 4], 0xDD);
    const __m512 high_odd = _mm512_shuffle_f32x4(fours[c + 8], fours[c + 12], 0xDD);
    rows[c] = _mm512_shuffle_f32x4(low, high, 0x88);
    rows[c + 8] = _mm512_shuffle_f32x4(low, high, 0xDD);
    rows[c + 4] = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
    rows[c + 12] = _mm512_shuffle_f32x4(low_odd, high_odd, 0xDD);
  }
}

// Sixteen rows of up to sixteen numbers each, from registers that hold columns.
template <int Columns>
PANTHER_AVX512 __attribute__((always_inline)) inline void store_rows(const Block& to, const __m512* sums, int64_t j) {
  const Mask there = first_lanes(Columns);
  float* c = to.c + j;
  __m512 rows[Columns > 8 ? 16 : 8];
  for (int s = 0; s < (Columns > 8 ? 16 : 8); ++s) rows[s] = s < Columns ? sums[s] : _mm512_setzero_ps();
  if constexpr (Columns > 8) {
    transpose(rows);
    for (int64_t lane = 0; lane < std::min(to.count, kLanes); ++lane, c += to.row) {
      store_masked(c, to.adds ? add(rows[lane], load_masked(c, there)) : rows[lane], there);
    }
    return;
  }
  __m512 fours[Columns > 8 ? 16 : 8];
  transpose_fours(rows, fours);
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int r = 0; r < 4; ++r) {
    const __m512d first = _mm512_castps_pd(fours[r]), second = _mm512_castps_pd(fours[r + 4]);
    const __m512 of_two[2] = {_mm512_castpd_ps(_mm512_permutex2var_pd(first, low, second)),
                              _mm512_castpd_ps(_mm512_permutex2var_pd(first, high, second))};
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int64_t lane = quarter * 4 + r;
      if (lane >= to.count) break;
      __m256 row =
          quarter % 2 ? _mm512_extractf32x8_ps(of_two[quarter / 2], 1) : _mm512_castps512_ps256(of_two[quarter / 2]);
      float* at = c + lane * to.row;
      const __mmask8 some = static_cast<__mmask8>(there);
      if (to.adds) row = _mm256_add_ps(row, _mm256_maskz_loadu_ps(some, at));
      _mm256_mask_storeu_ps(at, some, row);
    }
  }
}

// The sums of the products of a panel of 16 * Registers rows with the first `Columns` rows of B. Of the last register
// the second half may be left out, which is half the work where the processor adds up a register in two steps.
template <int Registers, int Columns, bool IsHalf>
PANTHER_AVX512 __attribute__((always_inline)) inline void add_panel(const float* panel, const Strided& b, int64_t depth,
                                                                    bool, __m512 (&sums)[Registers][Columns]) {
  constexpr int kWhole = IsHalf ? Registers - 1 : Registers;
  __m256 halves[Columns];
  for (auto& of_register : sums) {
    for (__m512& sum : of_register) sum = _mm512_setzero_ps();
  }
  for (__m256& half : halves) half = _mm256_setzero_ps();
  const float* numbers = b.numbers;
  for (int64_t r = 0; r < depth; ++r, panel += kLanes * Registers, numbers += b.column) {
    if (r % kLanes == 0) {  // the next rows of B are asked for: with few of A, reading them is what this costs
      for (int s = 0; s < Columns; ++s) __builtin_prefetch(numbers + (s + Columns) * b.row);
    }
    __m512 values[Registers];
    for (int v = 0; v < kWhole; ++v) values[v] = _mm512_loadu_ps(panel + v * kLanes);
    const __m256 last = IsHalf ? _mm256_loadu_ps(panel + kWhole * kLanes) : _mm256_setzero_ps();
    for (int s = 0; s < Columns; ++s) {
      const __m512 number = _mm512_set1_ps(numbers[s * b.row]);
      for (int v = 0; v < kWhole; ++v) sums[v][s] = _mm512_fmadd_ps(values[v], number, sums[v][s]);
      if (IsHalf) halves[s] = _mm256_fmadd_ps(last, _mm512_castps512_ps256(number), halves[s]);
    }
  }
  for (int s = 0; IsHalf && s < Columns; ++s) sums[kWhole][s] = _mm512_zextps256_ps512(halves[s]);
}

#define PANTHER_VECTOR PANTHER_AVX512
#define PANTHER_EACH
#include "core/gemm_block.h"
#undef PANTHER_EACH
#undef PANTHER_VECTOR

}  // namespace avx512

#endif

void gemm(const Gemm& p) {
#if PANTHER_HAS_AVX
  const InstructionSet set = instruction_set_in_use().load();
  if (set == InstructionSet::avx512) return avx512::gemm(p);
  if (set == InstructionSet::avx2) return avx2::gemm(p);
#endif
  gemm_scalar(p);
}

template <class W>
void widened_gemm(Gemm p, const W& w, int64_t from, bool is_a) {
#if PANTHER_HAS_AVX
  const InstructionSet set = instruction_set_in_use().load();
  if (set == InstructionSet::avx512) return avx512::widened_gemm(p, w, from, is_a);
  if (set == InstructionSet::avx2) return avx2::widened_gemm(p, w, from, is_a);
#endif
  const int64_t rows = is_a ? p.m : p.n;
  const std::unique_ptr<float[]> wide(new float[rows * p.k]);
  widen(w, from, from + rows, wide.get());
  (is_a ? p.a : p.b) = Strided{wide.get(), p.k, 1};
  gemm_scalar(p);
}

template void widened_gemm(Gemm, const Plain<BFloat16>&, int64_t, bool);
template void widened_gemm(Gemm, const Int8&, int64_t, bool);
template void widened_gemm(Gemm, const Int4&, int64_t, bool);

}  // namespace panther::core
