// What the ops with quantised matrices share: which scales fit, and the product with a matrix that is widened, a tile
// at a time, for core/gemm.h or torch's own. Bytes moved: those of the matrix and its scales, and of a tile that stays
// in the caches.
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "core/gemm.h"
#include "core/instruction_set.h"
#include "core/thin_linear.h"
#include "core/weights.h"
#include "gemm.h"
#include "tensors.h"
#include "threads.h"

namespace panther {

inline constexpr int64_t kTile = 1 << 20;  // numbers that are widened at a time

// log2 of the numbers that share a scale, 62 for all of a row; -1 where so many scales fit no group size.
inline int group_shift(int64_t columns, int64_t groups) {
  if (groups == 1) return 62;
  for (const int shift : {5, 6, 7}) {
    if (groups == (columns + (int64_t{1} << shift) - 1) >> shift) return shift;
  }
  return -1;
}

// A matrix (rows, columns): int8 values, or uint8 ones that hold two numbers of four bits; and scales (rows, groups).
// Or int16 values, which are the bits of bfloat16 numbers, and no scales (rows, 0).
struct Quantised {
  Tensor values;
  Tensor scales;
  int64_t columns;

  int64_t rows() const { return values.size(0); }
  bool has_four_bits() const { return values.scalar_type() == ScalarType::Byte; }
  bool is_bfloat16() const { return values.scalar_type() == ScalarType::Short; }
  int64_t values_in_a_row() const { return has_four_bits() ? (columns + 1) / 2 : columns; }

  bool scales_fit() const {
    if (values.dim() != 2 || scales.dim() != 2 || scales.size(0) != rows()) return false;
    return is_bfloat16() ? scales.size(1) == 0 : group_shift(columns, scales.size(1)) >= 0;
  }
};

inline Tensor as_float(const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Float) return packed(tensor);
  Tensor wide = torch::stable::new_empty(tensor, tensor.sizes().vec(), ScalarType::Float);
  torch::stable::copy_(wide, tensor);
  return wide;
}

// Of a contiguous matrix with scales of float.
template <class T>
core::Whole<T> weights(const Quantised& matrix) {
  const int64_t groups = matrix.scales.size(1);
  return {numbers<T>(matrix.values), matrix.columns, numbers<float>(matrix.scales), groups,
          group_shift(matrix.columns, groups)};
}

inline core::Plain<core::BFloat16> bfloat16_weights(const Quantised& matrix) {
  return {static_cast<const core::BFloat16*>(matrix.values.const_data_ptr()), matrix.columns};
}

// `use` of the matrix as the kernels read it.
template <class Use>
void with_weights(const Quantised& matrix, const Use& use) {
  if (matrix.has_four_bits()) return use(weights<core::Nibbles>(matrix));
  if (matrix.is_bfloat16()) return use(bfloat16_weights(matrix));
  use(weights<int8_t>(matrix));
}

template <class T>
void widen_bfloat16(const Quantised& matrix, int64_t first, int64_t last, T* wide) {
  const core::BFloat16* values = bfloat16_weights(matrix).numbers;
  std::transform(values + first * matrix.columns, values + last * matrix.columns, wide,
                 [](core::BFloat16 value) { return static_cast<T>(core::widened(value)); });
}

inline void widen(const Quantised& matrix, int64_t first, int64_t last, float* wide) {
  if (matrix.is_bfloat16()) return widen_bfloat16(matrix, first, last, wide);
  if (matrix.has_four_bits()) {
    core::widen(weights<core::Nibbles>(matrix), first, last, wide);
  } else {
    core::widen(weights<int8_t>(matrix), first, last, wide);
  }
}

// In double, where the scales are: float would round them.
template <class T>
void widen_in_double(const Quantised& matrix, int64_t first, int64_t last, double* wide) {
  const int64_t columns = matrix.columns, groups = matrix.scales.size(1);
  const int shift = group_shift(columns, groups);
  for (int64_t row = first; row < last; ++row, wide += columns) {
    const T* values = numbers<T>(matrix.values) + row * matrix.values_in_a_row();
    const double* scales = numbers<double>(matrix.scales) + row * groups;
    for (int64_t k = 0; k < columns; ++k) wide[k] = core::widened(values, k) * scales[k >> shift];
  }
}

inline void widen(const Quantised& matrix, int64_t first, int64_t last, double* wide) {
  if (matrix.is_bfloat16()) return widen_bfloat16(matrix, first, last, wide);
  (matrix.has_four_bits() ? widen_in_double<core::Nibbles> : widen_in_double<int8_t>)(matrix, first, last, wide);
}

// Rows of a contiguous matrix from `first` on, as torch's own product takes them beside x. size: how many, and a row's.
template <class T>
Tensor widened_tile(const Tensor& x, const Quantised& matrix, int64_t first, const std::vector<int64_t>& size,
                    ScalarType dtype) {
  const int64_t count = size[0], columns = matrix.columns;
  Tensor tile = torch::stable::new_empty(x, size, dtype);
  T* wide = static_cast<T*>(tile.mutable_data_ptr());
  torch::stable::parallel_for(
      0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns)),
      [&](int64_t begin, int64_t end) { widen(matrix, first + begin, first + end, wide + begin * columns); });
  if (dtype == x.scalar_type()) return tile;
  Tensor rounded = torch::stable::new_empty(x, size);
  torch::stable::copy_(rounded, tile);
  return rounded;
}

// x (rows, columns) -> y (rows, out), contiguous, in core/gemm.h: each thread widens some rows of the weight as it
// reads them. From kWeightsInLanes rows on these are in the lanes, so that each number is widened once; with AVX2 as
// soon as they are fewer than those of x: 1.05 to 1.15 times as fast for 48 to 96 of them, measured on Zen 3.
inline constexpr int64_t kWeightsInLanes = 192;

inline bool has_lanes_of_weights(int64_t rows, int64_t out) {
  return rows >= kWeightsInLanes || (uses(core::InstructionSet::avx2) && out % 8 == 0 && rows >= out);
}

template <class W>
void run_widened(const float* x, const W& w, const float* bias, float* y, int64_t rows, int64_t out) {
  const core::Gemm p{{x, w.in, 1}, {nullptr, 0, 0}, bias, false, y, out, 1, rows, out, w.in};
  const bool in_lanes = has_lanes_of_weights(rows, out);
  // A matrix of few rows does not give threads like shares: each widens all of it, for some rows of x.
  const bool shares_rows = out < 96 && rows >= out && !uses(core::InstructionSet::avx2);
  const int64_t whole = shares_rows ? rows : out, unit = unit_of(!shares_rows && in_lanes, whole);
  const int64_t work = std::max<int64_t>(1, unit * (shares_rows ? out : rows) * w.in);
  torch::stable::parallel_for(0, (whole + unit - 1) / unit, std::max<int64_t>(1, kGrain / work),
                              [&](int64_t first, int64_t last) {
                                const int64_t begin = first * unit, end = std::min(whole, last * unit);
                                const core::Gemm part = shares_rows ? p.rows(begin, end) : p.columns(begin, end);
                                const int64_t from = shares_rows ? 0 : begin;
                                core::widened_gemm(in_lanes ? part.transposed() : part, w, from, in_lanes);
                              });
}

// Whether that is faster than core/thin_linear.h, which widens groups of numbers once for every few rows, and others as
// it reads them. Measured on Zen 3, one thread, 32 to 4096 numbers of x and 48 to 3072 of y a row; with AVX-512 on an
// Intel processor, 96 to 4096 of x, where it is so for short rows only, as they nearly fill registers.
template <class W>
bool fills_widened_lanes(const W& w, int64_t rows, int64_t out) {
  if (!runs_in_gemm(rows)) return false;
  if (!uses(core::InstructionSet::avx2)) {
    const bool nearly_fills = rows >= 22 || rows == 15 || rows == 16;
    return core::is_made_by_intel() && (w.in <= 96 ? rows >= 12 : w.in <= 192 && nearly_fills);
  }
  if constexpr (!W::kHasScales) {
    return rows > 28 && w.in <= 512;
  } else if (std::is_same_v<W, core::Int8> && w.groups == 1) {
    return rows >= (w.in <= 96 ? 12 : w.in <= 192 ? 14 : w.in <= 512 ? 22 : w.in <= 1024 ? 30 : 41);
  } else {
    return rows == 16 || rows >= (w.in <= 128 || out > 192 ? 14 : 20);
  }
}

// x (rows, columns) -> y (rows, out), contiguous.
inline void few_rows(const float* x, const Quantised& matrix, const float* bias, float* y, int64_t rows) {
  const int64_t in = matrix.columns, out = matrix.rows();
  with_weights(matrix, [&](const auto& w) {
    using W = std::decay_t<decltype(w)>;
    if (fills_widened_lanes(w, rows, out)) return run_widened(x, w, bias, y, rows, out);
    run(core::ThinLinear<W>{x, w, bias, y, rows, in, out, in, out});
  });
}

// Whether more rows than few run there. A matrix of floats may leave many of them to torch (see runs_in_gemm), but a
// product that has to be widened first is as fast here.
inline bool widens_as_it_reads(const Tensor& x, int64_t rows) {
  const bool is_slower = uses(core::InstructionSet::avx2) && core::is_made_by_intel();
  return is_float(x) && runs_in_gemm(is_slower ? rows : std::min<int64_t>(rows, 1));
}

inline Tensor widened_linear(const Tensor& given, const Quantised& weight, const std::optional<Tensor>& bias) {
  const Quantised matrix{packed(weight.values), as_float(weight.scales), weight.columns};
  const Tensor x = packed(given), offset = bias ? packed(*bias) : Tensor();
  const int64_t out = matrix.rows(), rows = x.numel() / matrix.columns;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out;
  const Tensor y = torch::stable::new_empty(x, shape);
  const float *from = numbers<float>(x), *added = bias ? numbers<float>(offset) : nullptr;
  float* to = static_cast<float*>(y.mutable_data_ptr());
  with_weights(matrix, [&](const auto& w) { run_widened(from, w, added, to, rows, out); });
  return y;
}

// x (..., columns) -> (..., rows).
inline Tensor tiled_linear(const Tensor& x, const Quantised& given, const std::optional<Tensor>& bias) {
  if (given.columns > 0 && widens_as_it_reads(x, x.numel() / given.columns)) return widened_linear(x, given, bias);
  const bool is_double = x.scalar_type() == ScalarType::Double;
  const Quantised matrix{packed(given.values), is_double ? packed(given.scales) : as_float(given.scales),
                         given.columns};
  const int64_t out = matrix.rows(), most = std::max<int64_t>(1, kTile / std::max<int64_t>(1, matrix.columns));
  Tensor y;
  for (int64_t first = 0; first < out || first == 0; first += most) {
    const int64_t count = std::min(most, out - first);
    const Tensor tile = is_double ? widened_tile<double>(x, matrix, first, {count, matrix.columns}, ScalarType::Double)
                                  : widened_tile<float>(x, matrix, first, {count, matrix.columns}, ScalarType::Float);
    std::optional<Tensor> part;
    if (bias) part = torch::stable::narrow(const_cast<Tensor&>(*bias), 0, first, count);
    const Tensor found = fast_linear(x, tile, part);
    if (count == out) return found;
    if (first == 0) {
      std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
      shape.back() = out;
      y = torch::stable::new_empty(x, shape);
    }
    Tensor place = torch::stable::narrow(y, y.dim() - 1, first, count);
    torch::stable::copy_(place, found);
  }
  return y;
}

// y of float in the dtype of x.
inline Tensor rounded_like(const Tensor& x, const Tensor& y) {
  if (x.scalar_type() == ScalarType::Float) return y;
  Tensor rounded = torch::stable::new_empty(x, y.sizes().vec());
  torch::stable::copy_(rounded, y);
  return rounded;
}

}  // namespace panther
