// How the numbers of a matrix (out, in) are stored: `value` is one of them as a float, and the vector kernels read
// `numbers` from `at` on, to the end of a group at most, and multiply them by its `scale` where they have one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace panther::core {

// The upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

inline float widened(float value) { return value; }
inline float widened(int8_t value) { return value; }

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

// Numbers as they are: float, BFloat16, or whole ones.
template <class T>
struct Plain {
  static constexpr bool kHasScales = false;
  using Number = T;
  const T* numbers;
  int64_t in;

  int64_t at(int64_t column, int64_t k) const { return column * in + k; }
  int64_t group_end(int64_t) const { return in; }
  float value(int64_t column, int64_t k) const { return widened(numbers[at(column, k)]); }
};

// Two whole numbers of four bits, -8 to 7, the first one in the low half; each is stored plus eight.
struct Nibbles {
  uint8_t bits;
};

// log2 of how many numbers of a row one element holds, and number k of those that start at an element.
template <class T>
inline constexpr int kHeldShift = 0;
template <>
inline constexpr int kHeldShift<Nibbles> = 1;

template <class T>
inline float widened(const T* numbers, int64_t k) {
  return widened(numbers[k]);
}

inline float widened(const Nibbles* numbers, int64_t k) { return ((numbers[k >> 1].bits >> (k & 1) * 4) & 15) - 8; }

// Whole numbers, each times the scale of its group: 2^shift neighbours in a row of w, or all of them. A row starts with
// an element, so that the last one may be half full.
template <class T>
struct Whole {
  static constexpr bool kHasScales = true;
  using Number = T;
  const T* numbers;
  int64_t in;
  const float* scales;  // (out, groups)
  int64_t groups;
  int shift;

  int64_t at(int64_t column, int64_t k) const {
    return column * ((in + (1 << kHeldShift<T>)-1) >> kHeldShift<T>)+(k >> kHeldShift<T>);
  }
  int64_t group_end(int64_t k) const { return std::min(in, ((k >> shift) + 1) << shift); }
  float scale(int64_t column, int64_t k) const { return scales[column * groups + (k >> shift)]; }
  float value(int64_t column, int64_t k) const { return widened(numbers + at(column, 0), k) * scale(column, k); }
};

using Int8 = Whole<int8_t>;
using Int4 = Whole<Nibbles>;

}  // namespace panther::core
