// sketch += Omega x, where a column of Omega has `nonzeros` entries: each row of x is added to a few of the sketch's.
//
// Notation: x (rows, n), sketch (size, n), both row-major and contiguous. A call fills the columns [first, last), so
// that threads share the columns, and adds the rows in their order: neither the number of threads nor the batching of
// the rows changes a bit. Bytes moved: x once, and each row of the sketch that is added to, twice.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/instruction_set.h"
#include "core/philox.h"

namespace panther::core {

// One entry of Omega: the row of the sketch, and the factor.
template <class Number>
struct Entry {
  int64_t target;
  Number scale;
};

// The entries of all rows, `nonzeros` each. The sketch is cut into `nonzeros` parts, one for each: the upper bits of a
// random word choose the row of its part, the lowest bit the sign.
template <class Number>
std::vector<Entry<Number>> entries(int64_t rows, int64_t first_row, int64_t size, uint64_t seed, int64_t nonzeros) {
  const auto scale = static_cast<Number>(1 / std::sqrt(static_cast<double>(nonzeros)));
  const std::array<uint32_t, 2> key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  std::vector<Entry<Number>> found(rows * nonzeros);
  for (int64_t i = 0; i < rows; ++i) {
    const auto row = static_cast<uint64_t>(first_row + i);
    std::array<uint32_t, 4> words;
    for (int64_t part = 0; part < nonzeros; ++part) {
      if (part % 4 == 0) {
        words = philox({static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), static_cast<uint32_t>(part / 4)},
                       key);
      }
      const int64_t start = part * size / nonzeros, end = (part + 1) * size / nonzeros;
      const uint64_t word = words[part % 4];
      found[i * nonzeros + part] = {start + static_cast<int64_t>(word * static_cast<uint64_t>(end - start) >> 32),
                                    word & 1 ? -scale : scale};
    }
  }
  return found;
}

template <class Number>
struct SparseSignSketch {
  const Number* x;
  const Entry<Number>* entries;
  Number* sketch;
  int64_t rows;
  int64_t n;
  int64_t nonzeros;
};

// The plain loop, which is compiled once for every processor and once for AVX2.
template <class Number>
PANTHER_INLINE void add_columns(const SparseSignSketch<Number>& p, int64_t first, int64_t last) {
  for (int64_t row = 0; row < p.rows; ++row) {
    const Number* __restrict x = p.x + row * p.n;
    for (int64_t j = 0; j < p.nonzeros; ++j) {
      const Entry<Number>& entry = p.entries[row * p.nonzeros + j];
      Number* __restrict target = p.sketch + entry.target * p.n;
      for (int64_t column = first; column < last; ++column) target[column] += entry.scale * x[column];
    }
  }
}

template <class Number>
void sparse_sign_sketch_scalar(const SparseSignSketch<Number>& p, int64_t first, int64_t last) {
  add_columns(p, first, last);
}

#if PANTHER_HAS_AVX
template <class Number>
PANTHER_AVX2 void sparse_sign_sketch_avx2(const SparseSignSketch<Number>& p, int64_t first, int64_t last) {
  add_columns(p, first, last);
}
#endif

template <class Number>
void sparse_sign_sketch(const SparseSignSketch<Number>& p, int64_t first, int64_t last) {
#if PANTHER_HAS_AVX
  if (instruction_set_in_use().load(std::memory_order_relaxed) != InstructionSet::scalar) {
    return sparse_sign_sketch_avx2(p, first, last);
  }
#endif
  sparse_sign_sketch_scalar(p, first, last);
}

}  // namespace panther::core
