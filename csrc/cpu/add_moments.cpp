// panther::add_moments on the CPU: adds rows, and their products with themselves, to sums.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <vector>

#include "core/moments.h"
#include "core/vectors.h"
#include "tensors.h"
#include "threads.h"

namespace {

using namespace panther;

constexpr int64_t kRoom = 1 << 20;     // numbers that are packed at once, at most, where a block is not more
constexpr int64_t kMostPacked = 1024;  // rows, since the sums of their products are floats

// Refuses in the words of panther/ops/add_moments.py.
void check(const Tensor& sums, const std::optional<Tensor>& products, const Tensor& x,
           const std::optional<Tensor>& counts, const std::optional<Tensor>& shift) {
  const auto list = [&](const auto& text) {
    const auto or_none = [&](const std::optional<Tensor>& some) { return some ? text(*some) : std::string("None"); };
    return text(sums) + ", " + or_none(products) + ", " + text(x) + ", " + or_none(counts) + ", " + or_none(shift);
  };
  const auto is_of = [](const std::optional<Tensor>& some, int64_t size) {
    return !some || (some->dim() == 1 && some->size(0) == size);
  };
  const bool fits =
      x.dim() == 2 && sums.dim() == 1 && sums.size(0) == x.size(1) && is_of(counts, x.size(0)) &&
      is_of(shift, x.size(1)) &&
      (!products || (products->dim() == 2 && products->size(0) == x.size(1) && products->size(1) == x.size(1)));
  if (!fits) {
    throw std::invalid_argument(
        "add_moments: expected the shapes sums (n), products (n, n) or None, x (rows, n), counts (rows) or None, shift "
        "(n) or None; got " +
        list(shape_text));
  }
  const auto is = [](const Tensor& some, ScalarType dtype) { return some.scalar_type() == dtype; };
  if (!is(sums, ScalarType::Double) || !is(x, ScalarType::Float) ||
      (products && !is(*products, ScalarType::Float) && !is(*products, ScalarType::Double)) ||
      (counts && !is(*counts, ScalarType::Bool)) || (shift && !is(*shift, ScalarType::Float))) {
    throw std::invalid_argument(
        "add_moments: expected float64 for sums, float32 or float64 for products, float32 for x and shift, bool for "
        "counts; got " +
        list(dtype_text));
  }
}

std::vector<int64_t> chosen_of(const Tensor& counts) {
  const bool* is_there = numbers<bool>(counts);
  std::vector<int64_t> chosen;
  chosen.reserve(counts.size(0));
  for (int64_t r = 0; r < counts.size(0); ++r) {
    if (is_there[r]) chosen.push_back(r);
  }
  return chosen;
}

template <class Sum>
void add_all(const core::Rows& rows, double* sums, Sum* products) {
  const core::MomentsShape shape = core::moments_shape();
  const int64_t n = rows.n, size = shape.block_size(n), pairs = shape.pairs(n);
  const int64_t at_once =
      std::min({shape.blocks(rows.count), std::max<int64_t>(1, kRoom / size), kMostPacked / shape.depth});
  const auto room = core::lines_of(at_once * size);
  float* packed = room[0].numbers;
  std::vector<float> of_blocks(at_once * n);
  for (int64_t first = 0; first < rows.count; first += at_once * shape.depth) {
    const int64_t blocks = std::min(at_once, shape.blocks(rows.count - first));
    torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, kGrain / size), [&](int64_t from, int64_t to) {
      for (int64_t b = from; b < to; ++b) {
        core::pack_block(rows, first + b * shape.depth, packed + b * size, of_blocks.data() + b * n);
      }
    });
    const int64_t count = std::min(rows.count - first, blocks * shape.depth), work = shape.width * shape.width * count;
    torch::stable::parallel_for(0, pairs, std::max<int64_t>(1, kGrain / work), [&](int64_t from, int64_t to) {
      core::add_products(packed, count, n, from, to, products);
    });
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t i = 0; i < n; ++i) sums[i] += of_blocks[b * n + i];
    }
  }
}

void add_moments(Tensor sums, std::optional<Tensor> products, const Tensor& x, const std::optional<Tensor>& counts,
                 const std::optional<Tensor>& shift) {
  check(sums, products, x, counts, shift);
  const bool is_dense = x.size(1) < 2 || x.stride(1) == 1;
  const Tensor from = is_dense ? x : packed(x), total = packed(sums);
  const Tensor offset = shift ? packed(*shift) : Tensor(), flags = counts ? packed(*counts) : Tensor();
  const std::vector<int64_t> chosen = counts ? chosen_of(flags) : std::vector<int64_t>();
  const core::Rows rows{numbers<float>(from),
                        from.stride(0),
                        counts ? chosen.data() : nullptr,
                        shift ? numbers<float>(offset) : nullptr,
                        counts ? static_cast<int64_t>(chosen.size()) : x.size(0),
                        x.size(1)};
  if (rows.count == 0 || rows.n == 0) return;
  double* added_to = static_cast<double*>(total.mutable_data_ptr());
  if (products) {
    const Tensor all = packed(*products);
    if (all.scalar_type() == ScalarType::Float) {
      add_all(rows, added_to, static_cast<float*>(all.mutable_data_ptr()));
    } else {
      add_all(rows, added_to, static_cast<double*>(all.mutable_data_ptr()));
    }
    if (!products->is_contiguous()) torch::stable::copy_(*products, all);
  } else {
    torch::stable::parallel_for(0, rows.n, std::max<int64_t>(64, kGrain / rows.count),
                                [&](int64_t first, int64_t last) { core::add_sums(rows, first, last, added_to); });
  }
  if (!sums.is_contiguous()) torch::stable::copy_(sums, total);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panther, CPU, library) { library.impl("add_moments", TORCH_BOX(&add_moments)); }
