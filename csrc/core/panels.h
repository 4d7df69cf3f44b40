// What core/gemm.cpp and core/conv.cpp share: some rows of A are packed into panels of one to three registers each, as
// lanes, and a panel is multiplied with a few rows of B at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/gemm.h"
#include "core/vectors.h"

namespace panther::core {

#if PANTHER_HAS_AVX

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
  int64_t each = 0;       // at least a register of them
  bool is_first = false;  // to read these rows of B, which may have to come from memory

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

namespace avx2 {

inline constexpr int64_t kDepth = 512;        // of A and B are multiplied at a time
inline constexpr int64_t kMostRegisters = 3;  // of rows of A side by side
inline constexpr int64_t kPackedRows = 192;   // whose panels of that depth stay in the second cache
inline constexpr int64_t kMostPacked = 256;   // the most that `Panels` takes
inline constexpr int64_t kTogether = 24;      // rows of B that stay in a near cache
inline constexpr bool kHasHalves = false;
inline constexpr bool kFetchesRows = true;  // of A while others are packed

// Of how many panels so many registers are: of two each, and three where one is left.
constexpr int64_t panels_of(int64_t registers) { return registers < 2 ? registers : registers / 2; }

#define PANTHER_VECTOR PANTHER_AVX2
#include "core/panels_block.h"
#undef PANTHER_VECTOR

}  // namespace avx2

namespace avx512 {

inline constexpr int64_t kDepth = 512;  // as above
inline constexpr int64_t kMostRegisters = 3;
inline constexpr int64_t kPackedRows = 192;
inline constexpr int64_t kMostPacked = 256;
inline constexpr int64_t kTogether = 16;
inline constexpr bool kHasHalves = true;
inline constexpr bool kFetchesRows = false;  // not measured

constexpr int64_t panels_of(int64_t registers) { return (registers + 2) / 3; }

#define PANTHER_VECTOR PANTHER_AVX512
#include "core/panels_block.h"
#undef PANTHER_VECTOR

}  // namespace avx512

#endif

}  // namespace panther::core
