#include "core/thin_linear.h"

#include <algorithm>
#include <type_traits>

#include "core/vectors.h"

namespace panther::core {

// The twin without intrinsics: what every other processor runs, and what the vector kernels are tested against.
template <class W>
void thin_linear_scalar(const ThinLinear<W>& p, int64_t first, int64_t last) {
  constexpr int64_t kSums = 8;  // side by side, so that no addition waits for the one before
  const int64_t whole = p.in - p.in % kSums;
  for (int64_t column = first; column < last; ++column) {
    for (int64_t row = 0; row < p.rows; ++row) {
      const float* x = p.x + row * p.x_stride;
      float partial[kSums] = {};
      for (int64_t k = 0; k < whole; k += kSums) {
        for (int64_t s = 0; s < kSums; ++s) partial[s] += x[k + s] * p.w.value(column, k + s);
      }
      float sum = ((partial[0] + partial[1]) + (partial[2] + partial[3])) +
                  ((partial[4] + partial[5]) + (partial[6] + partial[7]));
      for (int64_t k = whole; k < p.in; ++k) sum += x[k] * p.w.value(column, k);
      if (p.factors) sum *= p.factors[column];
      p.y[row * p.y_stride + column] = p.bias ? sum + p.bias[column] : sum;
    }
  }
}

// What AVX-512 and NEON share: 24 sums, the weights of a block's columns and one value.
namespace thirty_two_registers {

constexpr int most_rows(int) { return 6; }
constexpr int width(int rows, int columns) { return columns == 8 && rows > 3 ? 4 : columns; }
inline constexpr int kStrip = 8;
template <class T>
constexpr int most_rows_of_groups() {
  return 2;
}
// The most rows of x for which whole numbers are widened where they are multiplied: above, a strip of w is widened
// once, which pays where it then stays in the nearest cache. Measured on an Intel processor with 48 KB of that, 8 to 32
// rows of 96 to 4096 numbers: from 768 on 1.2 to 2 times as fast with one scale a row, 1.1 to 1.8 times with groups
// of 32.
template <class W>
constexpr int64_t most_rows_read_as_stored(int64_t in) {
  if (in < 768) return most_rows(kStrip);
  return !W::kHasScales ? 32 : in < 1536 ? 12 : 28;
}
template <class W>
constexpr int64_t long_row() {
  return std::is_same_v<W, Plain<float>> ? 3072 : INT64_MAX;
}

}  // namespace thirty_two_registers

#if PANTHER_HAS_AVX

namespace avx2 {

// Sixteen registers: twelve sums, the weights of a block's columns and one value.
constexpr int most_rows(int columns) { return columns % 12 == 0 || columns == 1 ? 4 : 3; }
constexpr int width(int rows, int columns) { return columns % 12 ? columns : rows == 4 ? 3 : 4; }
inline constexpr int kStrip = 12;
template <class T>
constexpr int most_rows_of_groups() {
  return kHeldShift<T> > 0 ? 4 : 2;
}

// As above. Where rows of w are long, a strip leaves the nearest cache, and widening it twice costs less; with no
// scales to read it always does.
template <class W>
constexpr int64_t most_rows_read_as_stored(int64_t in) {
  if (!W::kHasScales) return 40;
  const int64_t long_row = kHeldShift<typename W::Number> > 0 ? 1024 : 512;
  return (in < long_row ? 1 : 2) * most_rows(kStrip);
}

// From how many numbers a row on a single row of x takes four rows of w at a time, and not eight: so many streams from
// memory are more than the processor follows. Bytes without scales are multiplied faster than they come.
template <class W>
constexpr int64_t long_row() {
  return std::is_same_v<W, Plain<int8_t>> ? 192 : std::is_same_v<W, Plain<float>> ? 3072 : INT64_MAX;
}

#define PANTHER_VECTOR PANTHER_AVX2
#include "core/thin_linear_block.h"
#undef PANTHER_VECTOR

}  // namespace avx2

namespace avx512 {

using namespace thirty_two_registers;

#define PANTHER_VECTOR PANTHER_AVX512
#include "core/thin_linear_block.h"
#undef PANTHER_VECTOR

}  // namespace avx512

#elif PANTHER_HAS_NEON

namespace neon {

using namespace thirty_two_registers;

#define PANTHER_VECTOR
#include "core/thin_linear_block.h"
#undef PANTHER_VECTOR

}  // namespace neon

#endif

// In the instructions that are in use, if there are some.
template <class W>
static bool vector_thin_linear([[maybe_unused]] const ThinLinear<W>& p, [[maybe_unused]] int64_t first,
                               [[maybe_unused]] int64_t last) {
  const InstructionSet set = instruction_set_in_use().load(std::memory_order_relaxed);
#if PANTHER_HAS_AVX
  if (set == InstructionSet::avx512) avx512::thin_linear(p, first, last);
  if (set == InstructionSet::avx2) avx2::thin_linear(p, first, last);
#elif PANTHER_HAS_NEON
  if (set == InstructionSet::neon) neon::thin_linear(p, first, last);
#endif
  return set != InstructionSet::scalar;
}

// Whole numbers with one scale a row are multiplied by it once, when they are summed up.
static bool vector_thin_linear(const ThinLinear<Int8>& p, int64_t first, int64_t last) {
  if (p.w.groups != 1) return vector_thin_linear<Int8>(p, first, last);
  const Plain<int8_t> numbers{p.w.numbers, p.w.in};
  return vector_thin_linear<Plain<int8_t>>(
      {p.x, numbers, p.bias, p.y, p.rows, p.in, p.out, p.x_stride, p.y_stride, p.w.scales}, first, last);
}

template <class W>
void thin_linear(const ThinLinear<W>& p, int64_t first, int64_t last) {
  if (vector_thin_linear(p, first, last)) return;
  thin_linear_scalar(p, first, last);
}

template <class W>
void widen(const W& w, int64_t first, int64_t last, float* wide) {
#if PANTHER_HAS_AVX
  const InstructionSet set = instruction_set_in_use().load(std::memory_order_relaxed);
  if (set == InstructionSet::avx512) return avx512::widen_rows(w, first, last, 0, w.in, wide);
  if (set == InstructionSet::avx2) return avx2::widen_rows(w, first, last, 0, w.in, wide);
#elif PANTHER_HAS_NEON
  const InstructionSet set = instruction_set_in_use().load(std::memory_order_relaxed);
  if (set == InstructionSet::neon) return neon::widen_rows(w, first, last, 0, w.in, wide);
#endif
  for (int64_t column = first; column < last; ++column, wide += w.in) {
    for (int64_t k = 0; k < w.in; ++k) wide[k] = w.value(column, k);
  }
}

template void thin_linear(const ThinLinear<Plain<float>>&, int64_t, int64_t);
template void thin_linear(const ThinLinear<Plain<BFloat16>>&, int64_t, int64_t);
template void thin_linear(const ThinLinear<Int8>&, int64_t, int64_t);
template void thin_linear(const ThinLinear<Int4>&, int64_t, int64_t);

template void widen(const Plain<BFloat16>&, int64_t, int64_t, float*);
template void widen(const Int8&, int64_t, int64_t, float*);
template void widen(const Int4&, int64_t, int64_t, float*);

}  // namespace panther::core
