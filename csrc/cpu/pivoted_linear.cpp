// panther::pivoted_linear on the CPU: two products of which one lacks an identity, and channels put back in order.
//
// Few rows of float32 run in the kernels that gemm.h takes for them, which read and write between the channels of the
// pivots and of the others, so that nothing is put together afterwards. Bytes moved: those of R * (in + out - R)
// numbers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "gemm.h"
#include "tensors.h"
#include "threads.h"

namespace {

using namespace panther;
using panther::core::Plain;

// Up to here the kernel is faster than torch's products: more rows than in low_rank_linear.cpp where the rank is small,
// since those also leave their results to be put together. At 12 rows 1.2 to 1.5 times as fast, AVX-512, one thread.
constexpr int64_t kFewRows = 12;  // before torch's own, as there

struct Inputs {
  const Tensor& x;
  const Tensor& down;
  const Tensor& up;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& order;

  int64_t in() const { return x.size(x.dim() - 1); }
  int64_t rank() const { return down.size(0); }
  bool has_rows() const { return down.size(1) == in(); }
  int64_t out() const { return up.size(0) + (has_rows() ? rank() : 0); }
};

bool shapes_fit(const Inputs& p) {
  if (p.x.dim() < 1 || p.down.dim() != 2 || p.up.dim() != 2) return false;
  if (p.rank() < 1 || p.rank() != p.up.size(1)) return false;
  if (!p.has_rows() && p.in() != p.down.size(1) + p.rank()) return false;
  if (p.bias && (p.bias->dim() != 1 || p.bias->size(0) != p.out())) return false;
  return !p.order || (p.order->dim() == 1 && p.order->size(0) == (p.has_rows() ? p.out() : p.in()));
}

// Refuses in the words of panther/ops/pivoted_linear.py.
void check(const Inputs& p) {
  if (!shapes_fit(p)) {
    const auto text = [](const std::optional<Tensor>& tensor) { return tensor ? shape_text(*tensor) : "None"; };
    throw std::invalid_argument(
        "pivoted_linear: expected the shapes x (..., in), down (R, in), up (out - R, R), bias (out) or None, order "
        "(out) or None; or down (R, in - R), up (out, R), bias (out) or None, order (in) or None; got " +
        shape_text(p.x) + ", " + shape_text(p.down) + ", " + shape_text(p.up) + ", " + text(p.bias) + ", " +
        text(p.order));
  }
  const ScalarType dtype = p.x.scalar_type();
  const bool is_one =
      p.down.scalar_type() == dtype && p.up.scalar_type() == dtype && (!p.bias || p.bias->scalar_type() == dtype);
  if (!is_floating(p.x) || !is_one || (p.order && p.order->scalar_type() != ScalarType::Int)) {
    throw std::invalid_argument(
        "pivoted_linear: expected one floating-point dtype for x, down, up, bias, and int32 for order; got " +
        dtype_text(p.x) + ", " + dtype_text(p.down) + ", " + dtype_text(p.up) +
        (p.bias ? ", " + dtype_text(*p.bias) : "") + (p.order ? ", " + dtype_text(*p.order) : ""));
  }
}

// An order may come from a file: one that points outside would read past the end of a tensor.
void check_order(const Tensor& order) {
  const int64_t size = order.size(0);
  const int32_t* from = numbers<int32_t>(order);
  if (!std::all_of(from, from + size, [&](int32_t place) { return place >= 0 && place < size; })) {
    throw std::out_of_range("pivoted_linear: order points outside of its " + std::to_string(size) + " channels");
  }
}

// y[row][i] = x[row][order[i]].
void gather(const float* x, const Tensor& order, int64_t rows, float* y) {
  const int64_t size = order.size(0);
  const int32_t* from = numbers<int32_t>(order);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < size; ++i) y[row * size + i] = x[row * size + from[i]];
  }
}

void few_rows(const Inputs& p, int64_t rows, float* y) {
  const int64_t in = p.in(), rank = p.rank(), out = p.out();
  const float* x = numbers<float>(p.x);
  const float* bias = p.bias ? numbers<float>(*p.bias) : nullptr;
  const Plain<float> down{numbers<float>(p.down), p.down.size(1)}, up{numbers<float>(p.up), rank};
  if (p.has_rows()) {
    std::unique_ptr<float[]> stored(p.order ? new float[rows * out] : nullptr);
    float* all = p.order ? stored.get() : y;
    run_few({x, down, bias, all, rows, in, rank, in, out});
    run_few({all, up, bias ? bias + rank : nullptr, all + rank, rows, rank, out - rank, out, out});
    if (p.order) gather(all, *p.order, rows, y);
    return;
  }
  std::unique_ptr<float[]> ordered(p.order ? new float[rows * in] : nullptr);
  if (p.order) gather(x, *p.order, rows, ordered.get());
  const float* all = p.order ? ordered.get() : x;
  std::unique_ptr<float[]> inner(new float[rows * rank]);
  run_few({all + rank, down, nullptr, inner.get(), rows, in - rank, rank, in, rank});
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < rank; ++i) inner[row * rank + i] += all[row * in + i];
  }
  run_few({inner.get(), up, bias, y, rows, rank, out, rank, out});
}

Tensor index_select(const Tensor& x, const Tensor& index) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(x.dim() - 1),
                                    torch::stable::detail::from(index)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Some channels of a tensor, which share its memory.
Tensor channels(Tensor tensor, int64_t first, int64_t count) {
  return torch::stable::narrow(tensor, tensor.dim() - 1, first, count);
}

// y[row] = (pivots[row], others[row])[order]. Bits: an unsigned number of the size of the floating-point ones.
template <class Bits>
void put_together(const Tensor& pivots, const Tensor& others, const std::optional<Tensor>& order, const Tensor& y) {
  const int64_t rank = pivots.size(pivots.dim() - 1), rest = others.size(others.dim() - 1), out = rank + rest;
  const Bits *first = numbers<Bits>(pivots), *second = numbers<Bits>(others);
  const int32_t* from = order ? numbers<int32_t>(*order) : nullptr;
  Bits* to = static_cast<Bits*>(y.mutable_data_ptr());
  const int64_t rows = y.numel() / out;
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / out), [&](int64_t begin, int64_t end) {
    std::unique_ptr<Bits[]> stored(from ? new Bits[out] : nullptr);
    for (int64_t row = begin; row < end; ++row) {
      Bits* both = from ? stored.get() : to + row * out;
      std::copy_n(first + row * rank, rank, both);
      std::copy_n(second + row * rest, rest, both + rank);
      if (from) std::transform(from, from + out, to + row * out, [&](int32_t place) { return both[place]; });
    }
  });
}

Tensor many_rows(const Inputs& p, const std::vector<int64_t>& shape) {
  const int64_t rank = p.rank();
  if (!p.has_rows()) {
    const Tensor x = p.order ? index_select(p.x, *p.order) : p.x;
    const Tensor inner = fast_linear(channels(x, rank, p.in() - rank), p.down, {});
    return fast_linear(torch::stable::subtract(inner, channels(x, 0, rank), -1.0), p.up, p.bias);
  }
  std::optional<Tensor> first, second;
  if (p.bias) {
    first = channels(*p.bias, 0, rank);
    second = channels(*p.bias, rank, p.out() - rank);
  }
  const Tensor pivots = packed(fast_linear(p.x, p.down, first)), others = packed(fast_linear(pivots, p.up, second));
  const Tensor y = torch::stable::new_empty(p.x, shape);
  switch (y.element_size()) {
    case 2: put_together<uint16_t>(pivots, others, p.order, y); break;
    case 4: put_together<uint32_t>(pivots, others, p.order, y); break;
    default: put_together<uint64_t>(pivots, others, p.order, y);
  }
  return y;
}

Tensor pivoted_linear(const Tensor& x, const Tensor& down, const Tensor& up, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& given_order) {
  const std::optional<Tensor> order = given_order ? std::optional<Tensor>(packed(*given_order)) : std::nullopt;
  const Inputs inputs{x, down, up, bias, order};
  check(inputs);
  if (order) check_order(*order);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = inputs.out();
  const int64_t rows = inputs.in() ? x.numel() / inputs.in() : 0;
  if (rows < 1 || rows > few_rows_of(inputs.rank(), kFewRows) || x.scalar_type() != ScalarType::Float)
    return many_rows(inputs, shape);
  const Tensor packed_x = packed(x), packed_down = packed(down), packed_up = packed(up);
  const std::optional<Tensor> packed_bias = bias ? std::optional<Tensor>(packed(*bias)) : std::nullopt;
  const Tensor y = torch::stable::new_empty(x, shape);
  few_rows({packed_x, packed_down, packed_up, packed_bias, order}, rows, static_cast<float*>(y.mutable_data_ptr()));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panther, CPU, library) { library.impl("pivoted_linear", TORCH_BOX(&pivoted_linear)); }
