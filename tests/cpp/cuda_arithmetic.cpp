// Runs the arithmetic of the CUDA kernel on the CPU, lane by lane as the kernel of csrc/cuda/low_rank_linear.cu does:
// for sizes at the edges, each result is near the exact sum, and a row's bits do not depend on the rows beside it.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

#include "check.h"
#include "core/warp_thin_linear.h"

namespace {

using namespace panther::warp;
using check::Buffer;
using check::require;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// The sum that every lane has after the exchanges between them.
float sum_of_lanes(const float* of_lanes) {
  float sums[kLanes];
  std::memcpy(sums, of_lanes, sizeof(sums));
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    for (int lane = 0; lane < distance; ++lane) sums[lane] += sums[lane + distance];
  }
  return sums[0];
}

template <int Rows, int Count, class X, class W, class Y>
void run_warps(const ThinLinear<X, W, Y>& p) {
  constexpr int kColumns = columns_at_once(Rows);
  for (int64_t column = 0; column < p.out; column += kColumns) {
    float sums[kLanes][Rows][kColumns] = {};
    for (int lane = 0; lane < kLanes; ++lane) add_up<Rows, Count>(p, column, lane, sums[lane]);
    for (int i = 0; i < Rows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        float of_lanes[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) of_lanes[lane] = sums[lane][i][j];
        store(p, i, column + j, sum_of_lanes(of_lanes));
      }
    }
  }
}

template <int Rows, class X, class W, class Y>
void run(const ThinLinear<X, W, Y>& p) {
  numbers_at_once(p) == 1 ? run_warps<Rows, 1>(p) : run_warps<Rows, 16 / sizeof(W)>(p);
}

// What rounding to Y adds, relative to the result.
template <class Y>
constexpr double rounding() {
  return sizeof(Y) == 4 ? 0 : std::is_same_v<Y, Half> ? 1.0 / (1 << 11) : 1.0 / (1 << 8);
}

template <int Rows, class X, class W, class Y>
void check_product(int64_t rows, int64_t in, int64_t out, bool is_aligned, bool has_bias) {
  const Buffer<X> x(rows * in, is_aligned);
  const Buffer<W> w(out * in, is_aligned), bias(out, is_aligned);
  const Buffer<Y> y(rows * out, is_aligned), first(out, is_aligned);
  for (int64_t i = 0; i < rows * in; ++i) x.data()[i] = check::random_number();
  for (int64_t i = 0; i < out * in; ++i) w.data()[i] = check::random_number();
  for (int64_t i = 0; i < out; ++i) bias.data()[i] = check::random_number();

  ThinLinear<X, W, Y> product{x.data(), w.data(), has_bias ? bias.data() : nullptr, y.data(), rows, in, out};
  require(is_aligned || numbers_at_once(product) == 1, "only aligned numbers are loaded together");
  run<Rows>(product);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < out; ++j) {
      check::Exact exact;
      for (int64_t k = 0; k < in; ++k) exact.add(double{x.data()[i * in + k]} * w.data()[j * in + k]);
      if (has_bias) exact.add(bias.data()[j]);
      require(exact.is_near(y.data()[i * out + j], rounding<Y>()), "a product is near the exact one");
    }
  }
  product.rows = 1;
  product.y = first.data();
  run<1>(product);
  require(std::memcmp(y.data(), first.data(), out * sizeof(Y)) == 0,
          "a row's bits do not depend on the rows beside it");
}

template <int Rows, class X, class W, class Y>
void check_rows(int64_t least) {
  for (int64_t rows = least; rows <= Rows; ++rows) {
    for (int64_t in : {0, 1, 8, 33, 264, 520}) {
      for (int64_t out : {1, 3, 4, 5}) {
        for (bool is_aligned : {true, false}) {
          for (bool has_bias : {true, false}) check_product<Rows, X, W, Y>(rows, in, out, is_aligned, has_bias);
        }
      }
    }
  }
}

template <class X, class W, class Y>
void check_products() {
  check_rows<1, X, W, Y>(1);
  check_rows<4, X, W, Y>(2);
  check_rows<8, X, W, Y>(5);
  check_rows<kMostRows, X, W, Y>(9);
}

}  // namespace

int main() {
  check_products<float, float, float>();
  check_products<BFloat16, BFloat16, float>();
  check_products<float, BFloat16, BFloat16>();
  check_products<Half, Half, float>();
  check_products<float, Half, Half>();
}
