// C = A B^T + bias in float32 for any strides: what thin_linear.h is for few rows, for many.
//
// Notation: A (m, k), B (n, k), bias (n) or null, C (m, n). The rows of A go into the lanes of registers: they are
// packed into panels of one to three registers, which stay in a near cache, and each number of B is read once for a
// panel and given to all its lanes. With AVX-512 a block of eight columns of C by 48 rows is in 24 registers while it
// is summed up, with AVX2 one of six columns by 16 rows in twelve.
//
// Each number of C is summed in the same order whatever the part of C that a call fills and the rows beside it, so that
// the number of threads changes no bit.
#pragma once

#include <cstdint>

#include "core/weights.h"

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

void gemm(const Gemm& p);

// The same with rows of w from `from` on for B, or for A, a few of which are widened at a time.
template <class W>
void widened_gemm(Gemm p, const W& w, int64_t from, bool is_a);

}  // namespace panther::core
