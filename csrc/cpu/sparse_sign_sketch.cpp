// panther::sparse_sign_sketch on the CPU: adds the sparse-sign sketch of the rows of x to `sketch`.
#include "core/sparse_sign_sketch.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "tensors.h"

namespace {

using namespace panther;

constexpr int64_t kMostNonzeros = 8;

// Additions that a thread gets at least: below, waking it costs more than it saves.
constexpr int64_t kGrain = 131072;

[[noreturn]] void refuse(const std::string& wanted, const std::string& got) {
  throw std::invalid_argument("sparse_sign_sketch: expected " + wanted + "; got " + got);
}

// Refuses in the words of panther/ops/sparse_sign_sketch.py.
void check(const Tensor& sketch, const Tensor& x, int64_t first_row, int64_t nonzeros) {
  if (sketch.dim() != 2 || x.dim() != 2 || sketch.size(1) != x.size(1)) {
    refuse("the shapes sketch (l, n), x (rows, n)", shape_text(sketch) + ", " + shape_text(x));
  }
  const ScalarType dtype = x.scalar_type();
  if (sketch.scalar_type() != dtype || (dtype != ScalarType::Float && dtype != ScalarType::Double)) {
    refuse("float32 or float64 for both sketch and x", dtype_text(sketch) + ", " + dtype_text(x));
  }
  if (first_row < 0) refuse("first_row of at least 0", std::to_string(first_row));
  if (nonzeros < 1 || nonzeros > std::min(kMostNonzeros, sketch.size(0))) {
    refuse("nonzeros of at least 1 and at most " + std::to_string(kMostNonzeros) + " and the " +
               std::to_string(sketch.size(0)) + " rows of sketch",
           std::to_string(nonzeros));
  }
}

// All contiguous.
template <class Number>
void add(const Tensor& sketch, const Tensor& x, int64_t first_row, int64_t seed, int64_t nonzeros) {
  const int64_t rows = x.size(0), n = x.size(1);
  const auto entries = core::entries<Number>(rows, first_row, sketch.size(0), static_cast<uint64_t>(seed), nonzeros);
  const core::SparseSignSketch<Number> p{
      numbers<Number>(x), entries.data(), static_cast<Number*>(sketch.mutable_data_ptr()), rows, n, nonzeros};
  const int64_t work = std::max<int64_t>(1, rows * nonzeros);
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, kGrain / work),
                              [&](int64_t first, int64_t last) { core::sparse_sign_sketch(p, first, last); });
}

void sparse_sign_sketch(Tensor sketch, const Tensor& x, int64_t first_row, int64_t seed, int64_t nonzeros) {
  check(sketch, x, first_row, nonzeros);
  const Tensor sums = packed(sketch);
  const auto add_all = x.scalar_type() == ScalarType::Float ? add<float> : add<double>;
  add_all(sums, packed(x), first_row, seed, nonzeros);
  if (!sketch.is_contiguous()) torch::stable::copy_(sketch, sums);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panther, CPU, library) { library.impl("sparse_sign_sketch", TORCH_BOX(&sparse_sign_sketch)); }
