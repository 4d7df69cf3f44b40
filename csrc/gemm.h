// The kernel of core/gemm.h on all of torch's threads, where it is faster than what torch would take.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "core/gemm.h"
#include "tensors.h"
#include "threads.h"

namespace panther {

inline constexpr int64_t kRows = 48, kColumns = 16;  // of C that a thread takes at a time

// Lanes are for rows, or for columns: of many rows the more there are, the less is lost at their end.
inline bool has_lanes_of_columns(const core::Gemm& p) { return p.m >= 512; }

inline void run(const core::Gemm& given) {
  const core::Gemm p = has_lanes_of_columns(given) ? given.transposed() : given;
  const bool shares_rows = p.m >= 4 * kRows && p.m >= p.n;
  const int64_t unit = shares_rows ? kRows : kColumns, whole = shares_rows ? p.m : p.n;
  const int64_t work = std::max<int64_t>(1, unit * (shares_rows ? p.n : p.m) * p.k);
  torch::stable::parallel_for(0, (whole + unit - 1) / unit, std::max<int64_t>(1, kGrain / work),
                              [&](int64_t first, int64_t last) {
                                const int64_t begin = first * unit, end = std::min(whole, last * unit);
                                core::gemm(shares_rows ? p.rows(begin, end) : p.columns(begin, end));
                              });
}

// Whether torch's own product of so many rows is slower. At 16 rows of 384 to 4096 numbers the kernel is three times as
// fast as MKL with AVX2 and from 32 rows on 2.3 times, at 0.95 of what the processor can; MKL with AVX-512 does the
// same at many rows.
inline bool runs_in_gemm(int64_t rows) {
  const bool can = core::instruction_set_in_use().load() == core::InstructionSet::avx512;
  return can && rows > 0 && (core::mkl_keeps_to_avx2() || rows <= 32);
}

// The most rows of float32 that run in the kernel of core/thin_linear.h. Before torch's own product: `few`, and more of
// them where the rank is large. Before core/gemm.h, which takes sixteen rows at a time: measured with AVX-512, one
// thread, ranks of 64 to 512.
inline int64_t few_rows_of(int64_t rank, int64_t few) {
  constexpr int64_t kFewer = 20;
  if (runs_in_gemm(kFewer + 1)) return kFewer;
  return rank < 192 ? few : 32;
}

// The same for numbers that are widened as they are read: above, widening them once costs less. Measured the same way.
inline int64_t few_whole_rows(int64_t before_torch) {
  constexpr int64_t kFewer = 28;
  return runs_in_gemm(kFewer + 1) ? kFewer : before_torch;
}

inline bool is_float(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Float; }

// x (rows, in) as the kernel takes it: rows at any distance, where they are not those of more dimensions.
inline core::Strided strided(const Tensor& matrix) {
  return {numbers<float>(matrix), matrix.stride(0), matrix.stride(1)};
}

// The first dimensions of x as one. `kept` holds what the result points into.
inline core::Strided strided_rows(const Tensor& x, Tensor& kept) {
  kept = x.dim() == 2 ? x : packed(x);
  if (x.dim() == 2) return strided(kept);
  return {numbers<float>(kept), x.size(x.dim() - 1), 1};
}

// F.linear of float32 into y (rows, out), whose rows are `y_row` numbers apart.
inline void linear_into(const core::Strided& x, int64_t rows, const Tensor& weight, const std::optional<Tensor>& bias,
                        float* y, int64_t y_row) {
  const Tensor offset = bias ? packed(*bias) : Tensor();
  run({x, strided(weight), bias ? numbers<float>(offset) : nullptr, false, y, y_row, 1, rows, weight.size(0),
       weight.size(1)});
}

// F.linear of tensors that fit together.
inline Tensor fast_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t in = weight.size(1), rows = in ? x.numel() / in : 0;
  const bool is_all_float = is_float(x) && is_float(weight) && (!bias || is_float(*bias));
  if (!is_all_float || x.dim() < 2 || !runs_in_gemm(rows)) return linear(x, weight, bias);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = weight.size(0);
  Tensor kept;
  const core::Strided from = strided_rows(x, kept);
  const Tensor y = torch::stable::new_empty(x, shape);
  linear_into(from, rows, weight, bias, static_cast<float*>(y.mutable_data_ptr()), weight.size(0));
  return y;
}

}  // namespace panther
