// What a warp computes of y = x w^T + bias for few rows of x: the arithmetic of the CUDA kernel. Any C++ compiler takes
// this file, so that it is tested without a GPU.
//
// Notation: x (rows, in), w (out, in), bias (out) or null, y (rows, out); all row-major and contiguous. X, W and Y are
// what the numbers of x, of w and bias, and of y are stored as: float, or what converts to and from it. All sums are
// float, in the same order whatever the rows of a call, so that a row's result does not depend on its batch.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define PANTHER_HOST_DEVICE __host__ __device__
#else
#define PANTHER_HOST_DEVICE
#endif

namespace panther::warp {

template <class X, class W, class Y>
struct ThinLinear {
  const X* x;
  const W* w;
  const W* bias;
  Y* y;
  int64_t rows;
  int64_t in;
  int64_t out;
};

inline constexpr int kLanes = 32;  // of a warp

// Above this torch's own products are used. A tile of the tensor cores has 16 rows, so that for fewer they compute rows
// that nobody asked for. Where the kernel ends to be the faster one has not been measured.
inline constexpr int kMostRows = 16;

// Columns of y that one warp computes side by side. x comes from the nearest cache, which is several times as fast as
// the memory that w comes from: for each number of w, at most four of x are read.
PANTHER_HOST_DEVICE constexpr int columns_at_once(int rows) { return rows <= 4 ? 1 : rows / 4; }

// Numbers that are loaded with one instruction, where it is of 16 bytes.
template <class T, int Count>
struct alignas(sizeof(T) * Count) Pack {
  T numbers[Count];
};

// How many numbers of w to load at once: 16 bytes of them where each row of x and w starts at a multiple of the load.
template <class X, class W, class Y>
int numbers_at_once(const ThinLinear<X, W, Y>& p) {
  constexpr int kCount = 16 / sizeof(W);
  const bool starts_fit = reinterpret_cast<uintptr_t>(p.x) % sizeof(Pack<X, kCount>) == 0 &&
                          reinterpret_cast<uintptr_t>(p.w) % sizeof(Pack<W, kCount>) == 0;
  return starts_fit && p.in % kCount == 0 ? kCount : 1;
}

// What one lane of a warp adds up for `Rows` rows from the first on, and for the warp's columns from `column` on. The
// sum of this over the lanes is x w^T. Rows and columns past the last one repeat it.
template <int Rows, int Count, class X, class W, class Y>
PANTHER_HOST_DEVICE void add_up(const ThinLinear<X, W, Y>& p, int64_t column, int lane,
                                float (&sums)[Rows][columns_at_once(Rows)]) {
  constexpr int kColumns = columns_at_once(Rows);
  for (int64_t k = lane * Count; k < p.in; k += kLanes * Count) {
    Pack<W, Count> weights[kColumns];
    for (int j = 0; j < kColumns; ++j) {
      const int64_t row_of_w = column + j < p.out ? column + j : p.out - 1;
      weights[j] = *reinterpret_cast<const Pack<W, Count>*>(p.w + row_of_w * p.in + k);
    }
    for (int i = 0; i < Rows; ++i) {
      const int64_t row = i < p.rows ? i : p.rows - 1;
      const Pack<X, Count> values = *reinterpret_cast<const Pack<X, Count>*>(p.x + row * p.in + k);
      for (int j = 0; j < kColumns; ++j) {
        for (int c = 0; c < Count; ++c) {
          const float value = values.numbers[c], weight = weights[j].numbers[c];
          sums[i][j] = fmaf(value, weight, sums[i][j]);
        }
      }
    }
  }
}

// Puts a finished sum where it belongs; there is no place for those of repeated rows and columns.
template <class X, class W, class Y>
PANTHER_HOST_DEVICE void store(const ThinLinear<X, W, Y>& p, int64_t row, int64_t column, float sum) {
  if (row >= p.rows || column >= p.out) return;
  p.y[row * p.out + column] = p.bias ? sum + static_cast<float>(p.bias[column]) : sum;
}

}  // namespace panther::warp
