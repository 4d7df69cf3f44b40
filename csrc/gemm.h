// The kernel of core/gemm.h on all of torch's threads, where it is faster than what torch would take.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "core/gemm.h"
#include "core/instruction_set.h"
#include "core/thin_linear.h"
#include "tensors.h"
#include "threads.h"

namespace panther {

inline bool uses(core::InstructionSet set) { return core::instruction_set_in_use().load() == set; }

// Of how many of `whole` rows or columns of C a thread takes a multiple: a register of them, so that threads have like
// shares of a small product; of many rows with AVX-512 as many registers as are multiplied together.
inline int64_t unit_of(bool of_rows, int64_t whole) {
  return uses(core::InstructionSet::avx2) ? 8 : of_rows && whole >= 480 ? 48 : 16;
}

// Whether lanes are for columns of C, which are stored as they are, and not for rows: 1.02 to 1.1 times as fast for
// many rows, 0.8 to 0.9 for 16 to 64. With AVX2, where packing weighs more, it is 1.0 to 1.2 times as fast (1.7 for 16
// columns) as soon as columns are fewer than rows: measured on Zen 3, 20 to 512 rows of 48 to 3072 numbers.
inline bool has_lanes_of_columns(const core::Gemm& p) {
  if (!uses(core::InstructionSet::avx2)) return p.m >= 512;
  const bool fills_registers = p.n % 8 == 0 || p.n >= 48;
  return p.m >= (fills_registers ? std::min<int64_t>(p.n, 256) : 192);
}

inline void run(const core::Gemm& given) {
  const core::Gemm p = has_lanes_of_columns(given) ? given.transposed() : given;
  const bool has_few_columns = p.n <= 128 && !uses(core::InstructionSet::avx2);
  const bool shares_rows = p.m >= p.n && (p.m >= 192 || has_few_columns);
  const int64_t whole = shares_rows ? p.m : p.n, unit = unit_of(shares_rows, whole);
  const int64_t work = std::max<int64_t>(1, unit * (shares_rows ? p.n : p.m) * p.k);
  torch::stable::parallel_for(0, (whole + unit - 1) / unit, std::max<int64_t>(1, kGrain / work),
                              [&](int64_t first, int64_t last) {
                                const int64_t begin = first * unit, end = std::min(whole, last * unit);
                                core::gemm(shares_rows ? p.rows(begin, end) : p.columns(begin, end));
                              });
}

// Whether torch's own product of so many rows is slower. Beside MKL with AVX2 the kernel with AVX-512 is twice as fast
// at 16 rows of 384 to 4096 numbers and 2.1 to 2.5 times from 32 on, one thread. With AVX2, on Zen 3, it is 1.3 times
// as fast at 32 rows (1.6 where weights come from memory), 1.1 at 128, 1.01 at 256, 0.92 to 1.04 from 512 on; with two
// threads 1.27 at 128 rows. MKL with AVX-512 on an Intel processor (one with AMX), one thread, 384 to 4096 numbers: 1.2
// to 2 times as fast at 32 rows, 1.0 to 1.3 at 128, 0.93 to 1.16 at 256, 0.84 to 1.19 at 512.
inline bool runs_in_gemm(int64_t rows) {
  const bool has_avx2 = uses(core::InstructionSet::avx2);
  if (rows < 1 || !(has_avx2 || uses(core::InstructionSet::avx512))) return false;
  if (core::is_made_by_intel()) return rows <= (has_avx2 ? 32 : 256);
  return !has_avx2 || rows <= 512;
}

inline bool is_float(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Float; }

// Whether core/gemm.h is faster than core/thin_linear.h: where rows nearly fill a register and each number of y is the
// sum of few products, since the latter has to add up the lanes of each. Measured on Zen 4, one thread, 384 and 1536
// numbers of y a row, from caches and from memory; where AVX-512 is twice as fast, lanes weigh more. Registers of AVX2
// take eight rows: measured on Zen 3 for 14 layers of 48 to 4096 numbers of x a row; from memory, which it reads
// sooner, core/gemm.h is 1.1 to 1.5 times as fast from 12 rows on, from caches it is as fast there. For few numbers a
// row it would be so from six rows on, but up to eleven no row's result depends on how many there are.
inline bool fills_lanes(int64_t rows, int64_t in, int64_t out) {
  if (uses(core::InstructionSet::avx2)) return rows >= 12 && out >= 8;
  return rows <= 16 && ((rows >= 12 && in <= 192) || (rows >= 15 && in <= 320));
}

// Few rows times a weight of float32, in the faster one of these.
inline void run_few(const core::ThinLinear<core::Plain<float>>& p) {
  if (!fills_lanes(p.rows, p.in, p.out) || !runs_in_gemm(p.rows)) return run(p);
  const core::Strided x{p.x, p.x_stride, 1}, w{p.w.numbers, p.w.in, 1};
  run(core::Gemm{x, w, p.bias, false, p.y, p.y_stride, 1, p.rows, p.out, p.in});
}

// The most rows of float32 for which both products of a layer run in these, one after the other in one room. Before
// torch's own product: `few`, and more of them where the rank is large. Before core/gemm.h: measured with one thread,
// ranks of 64 to 512 with AVX-512, weights of 96 to 3072 numbers a row with AVX2.
inline int64_t few_rows_of(int64_t rank, int64_t few) {
  const int64_t fewer = uses(core::InstructionSet::avx2) ? 19 : 20;
  if (runs_in_gemm(fewer + 1)) return fewer;
  return rank < 192 ? few : 32;
}

// The same for numbers that are widened as they are read: above, widening them once costs less. Measured the same way;
// with AVX2 quantised.h has more of it.
// Other types than float32 would be rounded on the way to torch's own product.
inline int64_t few_whole_rows(const Tensor& x, int64_t before_torch) {
  const int64_t fewer = uses(core::InstructionSet::avx2) ? 40 : 28;
  return is_float(x) && runs_in_gemm(before_torch + 1) ? fewer : before_torch;
}

inline constexpr int64_t kFewDenseRows = 8;  // as for layers of small rank

inline core::Strided strided(const Tensor& matrix) {
  return {numbers<float>(matrix), matrix.stride(0), matrix.stride(1)};
}

// F.linear of tensors that fit together. What is not contiguous is copied for few rows, so that strides change no bit.
inline Tensor fast_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t in = weight.size(1), out = weight.size(0), rows = in ? x.numel() / in : 0;
  const bool is_all_float = is_float(x) && is_float(weight) && (!bias || is_float(*bias));
  const bool is_thin = rows <= few_rows_of(0, kFewDenseRows);
  const bool is_narrow = uses(core::InstructionSet::avx2) && out < 8;  // torch is up to three times as fast
  if (!is_all_float || rows < 1 || !(is_thin || (runs_in_gemm(rows) && !is_narrow))) return linear(x, weight, bias);
  const bool keeps_strides = x.dim() == 2 && !is_thin;
  const Tensor from = keeps_strides ? x : packed(x), w = is_thin ? packed(weight) : weight;
  const Tensor offset = bias ? packed(*bias) : Tensor();
  const float* added = bias ? numbers<float>(offset) : nullptr;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out;
  const Tensor y = torch::stable::new_empty(x, shape);
  float* to = static_cast<float*>(y.mutable_data_ptr());
  if (is_thin) {
    run_few({numbers<float>(from), {numbers<float>(w), in}, added, to, rows, in, out, in, out});
  } else {
    const core::Strided some = keeps_strides ? strided(from) : core::Strided{numbers<float>(from), in, 1};
    run({some, strided(w), added, false, to, out, 1, rows, out, in});
  }
  return y;
}

}  // namespace panther
