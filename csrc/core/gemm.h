// C = A B^T + bias in float32 for any strides: what thin_linear.h is for few rows, for many.
//
// Notation: A (m, k), B (n, k), bias (n) or null, C (m, n). The rows of A go into the lanes of registers: they are
// packed into panels of 16, 32 or 48 rows, which stay in a near cache, and each number of B is read once for a panel
// and given to all its lanes. A block of eight columns of C by 48 rows is in 24 registers while it is summed up.
//
// Each number of C is summed in the same order whatever the part of C that a call fills and the rows beside it, so that
// the number of threads changes no bit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "core/thin_linear.h"

namespace panther::core {

// A matrix in memory, of any strides.
struct Strided {
  const float* numbers;
  int64_t row;     // from a row to the next one
  int64_t column;  // from a column to the next one

  const float* at(int64_t i, int64_t j) const { return numbers + i * row + j * column; }
};

struct Gemm {
  Strided a;
  Strided b;
  const float* bias;  // of the columns of C, or of its rows
  bool bias_is_of_rows;
  float* c;
  int64_t c_row;
  int64_t c_column;
  int64_t m;
  int64_t n;
  int64_t k;

  // The rows [first, last) of C alone, or its columns.
  Gemm rows(int64_t first, int64_t last) const {
    Gemm part = *this;
    part.a.numbers = a.at(first, 0);
    part.c = c + first * c_row;
    part.m = last - first;
    if (bias && bias_is_of_rows) part.bias = bias + first;
    return part;
  }

  Gemm columns(int64_t first, int64_t last) const { return transposed().rows(first, last).transposed(); }

  // C^T = B A^T.
  Gemm transposed() const { return {b, a, bias, !bias_is_of_rows, c, c_column, c_row, n, m, k}; }
};

// The twin without intrinsics.
inline void gemm_scalar(const Gemm& p) {
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

namespace avx512 {

inline constexpr int64_t kDepth = 512;         // of A and B are multiplied at a time
inline constexpr int64_t kPanel = 3 * kLanes;  // the most rows of A side by side
inline constexpr int64_t kPackedRows = 192;    // whose panels of that depth stay in the second cache
inline constexpr int64_t kMostPacked = 256;    // the most that `Panels` takes

// As first_lanes, of any number.
PANTHER_AVX512 inline __mmask16 up_to(int64_t count) { return first_lanes(std::clamp<int64_t>(count, 0, kLanes)); }

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

// Sixteen rows of A, of which `count` are there, as lanes: packed[r * width + lane] = A[lane][r].
PANTHER_AVX512 inline void pack_lanes(const Strided& a, int64_t count, int64_t depth, int64_t width, float* packed) {
  if (a.row == 1) {
    const __mmask16 lanes = up_to(count);
    for (int64_t r = 0; r < depth; ++r) {
      _mm512_storeu_ps(packed + r * width, _mm512_maskz_loadu_ps(lanes, a.at(0, r)));
    }
    return;
  }
  if (a.column != 1) {
    for (int64_t r = 0; r < depth; ++r) {
      for (int64_t lane = 0; lane < kLanes; ++lane) packed[r * width + lane] = lane < count ? *a.at(lane, r) : 0.0f;
    }
    return;
  }
  for (int64_t r = 0; r < depth; r += kLanes) {
    const __mmask16 there = up_to(depth - r);
    __m512 rows[16];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      rows[lane] = lane < count ? _mm512_maskz_loadu_ps(there, a.at(lane, r)) : _mm512_setzero_ps();
    }
    transpose(rows);
    for (int64_t s = 0; s < kLanes && r + s < depth; ++s) _mm512_storeu_ps(packed + (r + s) * width, rows[s]);
  }
}

// What a block does with its sums: `columns` columns of C by `count` rows, from c on. Where rows follow each other,
// there may be a gap in C behind the next `near` ones, and behind every `each` from there on.
struct Block {
  float* c;
  int64_t row;
  int64_t column;
  int64_t count;
  const float* of_rows;     // what is added, or null
  const float* of_columns;  // the same
  bool adds;                // to what is in C
  int64_t gap = 0;          // numbers
  int64_t near = 0;
  int64_t each = 0;  // at least a register of them

  // From a later row on.
  Block from(int64_t later) const {
    Block part = *this;
    part.c += later * row;
    part.count -= later;
    if (of_rows) part.of_rows += later;
    if (gap != 0) {
      const int64_t gaps = later < near ? 0 : 1 + (later - near) / each;
      part.c += gaps * gap;
      part.near += gaps * each - later;
    }
    return part;
  }
};

// Sums leave the registers inside of `panel_block`: they must not go through memory to get here.
PANTHER_AVX512 __attribute__((always_inline)) inline void store_lanes(float* c, bool adds, __mmask16 lanes,
                                                                      __m512 sum) {
  if (adds) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, c));
  _mm512_mask_storeu_ps(c, lanes, sum);
}

PANTHER_AVX512 __attribute__((always_inline)) inline void store_column(const Block& to, __m512 sum, int64_t j) {
  const __mmask16 lanes = up_to(to.count);
  float* c = to.c + j * to.column;
  if (to.gap == 0 || to.near >= kLanes) return store_lanes(c, to.adds, lanes, sum);
  const __mmask16 near = up_to(to.near);
  store_lanes(c, to.adds, lanes & near, sum);
  store_lanes(c + to.gap, to.adds, lanes & static_cast<__mmask16>(~near), sum);
}

// Sixteen rows of up to sixteen numbers each, from registers that hold columns.
template <int Columns>
PANTHER_AVX512 __attribute__((always_inline)) inline void store_rows(const Block& to, const __m512* sums, int64_t j) {
  const __mmask16 there = up_to(Columns);
  float* c = to.c + j;
  __m512 rows[Columns > 8 ? 16 : 8];
  for (int s = 0; s < (Columns > 8 ? 16 : 8); ++s) rows[s] = s < Columns ? sums[s] : _mm512_setzero_ps();
  if constexpr (Columns > 8) {
    transpose(rows);
    for (int64_t lane = 0; lane < std::min(to.count, kLanes); ++lane, c += to.row) {
      store_lanes(c, to.adds, there, rows[lane]);
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

template <int Columns>
PANTHER_AVX512 __attribute__((always_inline)) inline void store_block(const Block& to, __m512 (&sums)[Columns],
                                                                      int64_t j) {
  for (int s = 0; s < Columns; ++s) {
    if (to.of_rows) sums[s] = _mm512_add_ps(sums[s], _mm512_maskz_loadu_ps(up_to(to.count), to.of_rows));
    if (to.of_columns) sums[s] = _mm512_add_ps(sums[s], _mm512_set1_ps(to.of_columns[j + s]));
  }
  if (to.row == 1) {
    for (int s = 0; s < Columns; ++s) store_column(to, sums[s], j + s);
  } else if (to.column == 1) {
    store_rows<Columns>(to, sums, j);
  } else {
    for (int s = 0; s < Columns; ++s) {
      float lanes[kLanes];
      _mm512_storeu_ps(lanes, sums[s]);
      for (int64_t lane = 0; lane < std::min(to.count, kLanes); ++lane) {
        float& c = to.c[lane * to.row + (j + s) * to.column];
        c = to.adds ? c + lanes[lane] : lanes[lane];
      }
    }
  }
}

// A panel of 16 * Registers rows times `Columns` rows of B. Of the last register the second half may be left out, which
// is half the work where the processor adds up a register in two steps.
template <int Registers, int Columns, bool IsHalf>
PANTHER_AVX512 __attribute__((noinline)) void panel_block(const float* panel, const Strided& b, int64_t depth,
                                                          const Block& to, int64_t j) {
  constexpr int kWhole = IsHalf ? Registers - 1 : Registers;
  __m512 sums[Registers][Columns];
  __m256 halves[Columns];
  for (auto& of_register : sums) {
    for (__m512& sum : of_register) sum = _mm512_setzero_ps();
  }
  for (__m256& half : halves) half = _mm256_setzero_ps();
  const float* numbers = b.at(j, 0);
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
  for (int v = 0; v < Registers; ++v) {
    if (v * kLanes < to.count) store_block<Columns>(to.from(v * kLanes), sums[v], j);
  }
}

// Fewer columns than `Columns`, in blocks of half as many, a quarter and so on.
template <int Registers, int Columns>
PANTHER_AVX512 inline void last_columns(const float* panel, const Strided& b, int64_t depth, const Block& to,
                                        int64_t first, int64_t last) {
  if constexpr (Columns > 1) {
    constexpr int kHalf = Columns / 2;
    if (last - first >= kHalf) {
      panel_block<Registers, kHalf, false>(panel, b, depth, to, first);
      first += kHalf;
    }
    last_columns<Registers, kHalf>(panel, b, depth, to, first, last);
  }
}

// The most columns at once: a single register of rows needs more sums to hide the latency of an addition.
constexpr int most_columns(int registers) { return registers == 1 ? 16 : 8; }

template <int Registers>
PANTHER_AVX512 inline void panel_columns(const float* panel, const Strided& b, int64_t depth, const Block& to,
                                         int64_t first, int64_t last) {
  constexpr int kMost = most_columns(Registers);
  const bool is_half = to.count <= Registers * kLanes - kLanes / 2;
  for (; last - first >= kMost; first += kMost) {
    if (is_half) {
      panel_block<Registers, kMost, true>(panel, b, depth, to, first);
    } else {
      panel_block<Registers, kMost, false>(panel, b, depth, to, first);
    }
  }
  last_columns<Registers, kMost>(panel, b, depth, to, first, last);
}

// How up to kMostPacked rows are packed: in panels of one to three registers, of about the same size.
struct Panels {
  int64_t registers;
  int64_t count;
  int64_t starts[kMostPacked / kPanel + 2] = {0};  // in registers

  explicit Panels(int64_t rows) : registers((rows + kLanes - 1) / kLanes), count((registers + 2) / 3) {
    for (int64_t q = 0; q < count; ++q) starts[q + 1] = registers * (q + 1) / count;
  }

  int64_t panel_of(int64_t v) const { return std::upper_bound(starts, starts + count + 1, v) - starts - 1; }
  // Numbers of the panel that register v is in, for each of its columns.
  int64_t width_at(int64_t v) const {
    const int64_t q = panel_of(v);
    return (starts[q + 1] - starts[q]) * kLanes;
  }
  // Where the first number of register v lies.
  int64_t place(int64_t v, int64_t depth) const {
    const int64_t q = panel_of(v);
    return starts[q] * kLanes * depth + (v - starts[q]) * kLanes;
  }
};

// Packed rows times the rows [first, last) of B, which `to` has columns for from its first one on.
PANTHER_AVX512 inline void panels_times(const Panels& panels, const float* packed, const Strided& b, int64_t depth,
                                        const Block& to, int64_t first, int64_t last) {
  for (int64_t q = 0; q < panels.count; ++q) {
    const int64_t row = panels.starts[q] * kLanes, width = panels.starts[q + 1] - panels.starts[q];
    const float* panel = packed + row * depth;
    const Block part = to.from(row);
    if (width == 3) panel_columns<3>(panel, b, depth, part, first, last);
    if (width == 2) panel_columns<2>(panel, b, depth, part, first, last);
    if (width == 1) panel_columns<1>(panel, b, depth, part, first, last);
  }
}

// Rows [i, i + rows) of A and `depth` of their numbers, packed, times all of B, sixteen rows of it after the others.
PANTHER_AVX512 inline void packed_rows(const Gemm& p, int64_t i, int64_t rows, int64_t r, int64_t depth,
                                       float* packed) {
  const Panels panels(rows);
  for (int64_t v = 0; v < panels.registers; ++v) {
    const Strided some{p.a.at(i + v * kLanes, r), p.a.row, p.a.column};
    pack_lanes(some, rows - v * kLanes, depth, panels.width_at(v), packed + panels.place(v, depth));
  }
  const Strided b{p.b.at(0, r), p.b.row, p.b.column};
  const float* bias = r + depth == p.k ? p.bias : nullptr;
  const Block to{p.c + i * p.c_row,
                 p.c_row,
                 p.c_column,
                 rows,
                 bias && p.bias_is_of_rows ? bias + i : nullptr,
                 bias && !p.bias_is_of_rows ? bias : nullptr,
                 r > 0};
  constexpr int64_t kColumns = most_columns(1);
  for (int64_t j = 0; j < p.n; j += kColumns) {
    panels_times(panels, packed, b, depth, to, j, std::min(p.n, j + kColumns));
  }
}

PANTHER_AVX512 inline void gemm(const Gemm& p) {
  const std::unique_ptr<float[]> packed(new float[(std::min(p.m, kPackedRows) + kLanes) * std::min(p.k, kDepth)]);
  for (int64_t r = 0; r < p.k || r == 0; r += kDepth) {
    const int64_t depth = std::min(kDepth, p.k - r);
    for (int64_t i = 0; i < p.m; i += kPackedRows) {
      packed_rows(p, i, std::min(kPackedRows, p.m - i), r, depth, packed.get());
    }
  }
}

}  // namespace avx512

#endif

inline void gemm(const Gemm& p) {
#if PANTHER_HAS_AVX
  if (instruction_set_in_use().load() == InstructionSet::avx512) return avx512::gemm(p);
#endif
  gemm_scalar(p);
}

}  // namespace panther::core
