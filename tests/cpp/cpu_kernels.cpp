// Runs the kernels of csrc/core over sizes at the edges, in every instruction set of this processor: each result is
// near what it should be, and the same bits however the columns are shared.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "check.h"
#include "core/conv.h"
#include "core/gemm.h"
#include "core/hadamard.h"
#include "core/moments.h"
#include "core/sparse_sign_sketch.h"
#include "core/thin_linear.h"

namespace {

using namespace panther::core;
using check::Buffer;
using check::Exact;
using check::require;

float narrowed(float value, float) { return value; }
BFloat16 narrowed(float value, BFloat16) { return to_bfloat16(value); }

template <class T>
class PlainMatrix {
 public:
  PlainMatrix(int64_t out, int64_t in, bool is_aligned) : numbers_(out * in, is_aligned), in_(in) {
    for (int64_t i = 0; i < out * in; ++i) numbers_.data()[i] = narrowed(check::random_number(), T{});
  }
  Plain<T> weights() const { return {numbers_.data(), in_}; }

 private:
  Buffer<T> numbers_;
  int64_t in_;
};

void fill(int8_t& element) { element = static_cast<int8_t>(127 * check::random_number()); }

// Any two numbers, so that the last half of an odd row is no zero.
void fill(Nibbles& element) { element.bits = static_cast<uint8_t>(static_cast<int>(255 * check::random_number())); }

template <class T, int Shift>
class WholeMatrix {
 public:
  WholeMatrix(int64_t out, int64_t in, bool is_aligned)
      : groups_(std::max<int64_t>(1, (in + (int64_t{1} << Shift) - 1) >> Shift)),
        in_(in),
        size_(out * ((in + (1 << kHeldShift<T>)-1) >> kHeldShift<T>)),
        numbers_(size_, is_aligned),
        scales_(out * groups_, is_aligned) {
    for (int64_t i = 0; i < size_; ++i) fill(numbers_.data()[i]);
    for (int64_t i = 0; i < out * groups_; ++i) scales_.data()[i] = check::random_number();
  }
  Whole<T> weights() const { return {numbers_.data(), in_, scales_.data(), groups_, Shift}; }

 private:
  int64_t groups_, in_, size_;
  Buffer<T> numbers_;
  Buffer<float> scales_;
};

// What a number is worth; the product with its scale may be rounded in more places than one.
template <class T>
double exactly(const Plain<T>& w, int64_t column, int64_t k) {
  return w.value(column, k);
}

template <class T>
double exactly(const Whole<T>& w, int64_t column, int64_t k) {
  return double{widened(w.numbers + w.at(column, 0), k)} * w.scale(column, k);
}

// x and y lie between other channels, as where pivots are beside them.
template <class Matrix>
void check_product(int64_t rows, int64_t in, int64_t out, bool is_aligned, bool has_bias) {
  const int64_t x_stride = in + (is_aligned ? 0 : 3), y_stride = out + (is_aligned ? 0 : 2);
  const int64_t x_size = (rows - 1) * x_stride + in, y_size = (rows - 1) * y_stride + out;
  const Buffer<float> x(x_size, is_aligned), bias(out, is_aligned), y(y_size, is_aligned), again(y_size, true);
  const Matrix matrix(out, in, is_aligned);
  const auto w = matrix.weights();
  for (int64_t i = 0; i < x_size; ++i) x.data()[i] = check::random_number();
  for (int64_t i = 0; i < out; ++i) bias.data()[i] = check::random_number();
  std::fill_n(y.data(), y_size, 7.0f);
  std::fill_n(again.data(), y_size, 7.0f);

  ThinLinear<decltype(matrix.weights())> product{
      x.data(), w, has_bias ? bias.data() : nullptr, y.data(), rows, in, out, x_stride, y_stride};
  thin_linear(product, 0, out);
  product.y = again.data();
  for (int64_t first = 0; first < out; first += 5) thin_linear(product, first, std::min(first + 5, out));

  require(std::memcmp(y.data(), again.data(), y_size * sizeof(float)) == 0, "sharing the columns changes no bit");
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < out; ++j) {
      check::Exact exact;
      for (int64_t k = 0; k < in; ++k) exact.add(x.data()[i * x_stride + k] * exactly(w, j, k));
      if (has_bias) exact.add(bias.data()[j]);
      require(exact.is_near(y.data()[i * y_stride + j]), "a product is near the exact one");
    }
    for (int64_t j = out; j < y_stride && i + 1 < rows; ++j) {
      require(y.data()[i * y_stride + j] == 7.0f, "what lies between the rows of y stays as it was");
    }
  }
}

template <class Matrix>
void check_products() {
  for (int64_t rows = 1; rows <= 13; ++rows) {
    for (int64_t in : {0, 1, 7, 8, 9, 16, 31, 72}) {
      for (int64_t out : {1, 2, 3, 4, 5, 8, 11, 12, 13, 25}) {
        for (bool is_aligned : {true, false}) {
          for (bool has_bias : {true, false}) check_product<Matrix>(rows, in, out, is_aligned, has_bias);
        }
      }
    }
  }
  for (int64_t rows : {1, 5, 9, 42}) {  // long rows are read in another order
    for (int64_t in : {197, 600, 1100, 4300}) check_product<Matrix>(rows, in, 25, false, true);
  }
}

// What sums are multiplied by before the bias is added: a power of two, which rounds nothing.
void check_factors() {
  constexpr int64_t kIn = 77, kOut = 25;
  const PlainMatrix<float> matrix(kOut, kIn, false);
  for (int64_t rows : {1, 3, 5, 13}) {
    const Buffer<float> x(rows * kIn, false), y(rows * kOut, false), plain(rows * kOut, false), factors(kOut, false),
        bias(kOut, false);
    for (int64_t i = 0; i < rows * kIn; ++i) x.data()[i] = check::random_number();
    for (int64_t j = 0; j < kOut; ++j) {
      factors.data()[j] = std::ldexp(1.0f, static_cast<int>(j % 7) - 3);
      bias.data()[j] = check::random_number();
    }
    ThinLinear<Plain<float>> p{x.data(), matrix.weights(), nullptr, plain.data(), rows, kIn, kOut, kIn, kOut};
    thin_linear(p, 0, kOut);
    p.y = y.data();
    p.bias = bias.data();
    p.factors = factors.data();
    thin_linear(p, 0, kOut);
    for (int64_t i = 0; i < rows * kOut; ++i) {
      const int64_t j = i % kOut;
      require(y.data()[i] == plain.data()[i] * factors.data()[j] + bias.data()[j], "factors come before the bias");
    }
  }
}

// Beside floats the results have the bits of the product with widened rows.
template <class Matrix>
void check_widened_gemms() {
  for (int64_t rows : {1, 17, 40}) {
    for (int64_t in : {1, 40, 700}) {
      for (int64_t out : {1, 23, 50, 230}) {
        const Matrix matrix(out, in, out % 2 == 0);
        const Buffer<float> x(rows * in, true), y(rows * out, false), wide(out * in, true), again(rows * out, true),
            bias(out, true);
        for (int64_t i = 0; i < rows * in; ++i) x.data()[i] = check::random_number();
        for (int64_t i = 0; i < out; ++i) bias.data()[i] = check::random_number();
        widen(matrix.weights(), 0, out, wide.data());
        const Strided a{x.data(), in, 1}, b{wide.data(), in, 1};
        gemm({a, b, bias.data(), false, again.data(), out, 1, rows, out, in});
        const Gemm whole{a, {nullptr, 0, 0}, bias.data(), false, y.data(), out, 1, rows, out, in};
        for (int64_t first = 0; first < out; first += 30) {
          widened_gemm(whole.columns(first, std::min(first + 30, out)), matrix.weights(), first, false);
        }
        const Buffer<float> turned(rows * out, true);
        for (int64_t first = 0; first < out; first += 210) {
          const Gemm part = whole.columns(first, std::min(first + 210, out)).transposed();
          Gemm there = part;
          there.c = turned.data() + first;
          widened_gemm(there, matrix.weights(), first, true);
        }
        for (int64_t i = 0; i < rows * out; ++i) {
          require(y.data()[i] == again.data()[i], "a product that widens as it reads is that of the widened rows");
          require(turned.data()[i] == again.data()[i], "the same where they are in the lanes");
        }
      }
    }
  }
}

enum class Layout { rows, columns, neither };  // whose numbers lie side by side

// A matrix in a buffer of its own.
class StridedMatrix {
 public:
  StridedMatrix(int64_t rows, int64_t columns, Layout layout, bool is_aligned)
      : row_(layout == Layout::columns ? 1
             : layout == Layout::rows  ? columns + !is_aligned
                                       : 2 * columns + 1),
        column_(layout == Layout::rows      ? 1
                : layout == Layout::columns ? rows + !is_aligned
                                            : 2),
        size_(rows && columns ? (rows - 1) * row_ + (columns - 1) * column_ + 1 : 0),
        numbers_(size_, is_aligned) {
    for (int64_t i = 0; i < size_; ++i) numbers_.data()[i] = check::random_number();
  }
  Strided strided() const { return {numbers_.data(), row_, column_}; }
  float* data() const { return numbers_.data(); }
  int64_t row() const { return row_; }
  int64_t column() const { return column_; }
  int64_t size() const { return size_; }
  float at(int64_t i, int64_t j) const { return *strided().at(i, j); }

 private:
  int64_t row_, column_, size_;
  Buffer<float> numbers_;
};

struct Layouts {
  Layout a, b, c;
};

void check_gemm(int64_t m, int64_t n, int64_t k, const Layouts& of, bool is_aligned, int bias_kind) {
  const StridedMatrix a(m, k, of.a, is_aligned), b(n, k, of.b, is_aligned), c(m, n, of.c, is_aligned),
      again(m, n, of.c, true);
  const Buffer<float> bias(std::max(m, n), is_aligned);
  for (int64_t i = 0; i < std::max(m, n); ++i) bias.data()[i] = check::random_number();
  const bool of_rows = bias_kind == 2;
  const Gemm product{
      a.strided(), b.strided(), bias_kind ? bias.data() : nullptr, of_rows, c.data(), c.row(), c.column(), m, n, k};
  gemm(product);
  Gemm shared = product;
  shared.c = again.data();
  shared.c_row = again.row();
  shared.c_column = again.column();
  for (int64_t first = 0; first < n; first += 20) {
    const Gemm part = shared.columns(first, std::min(first + 20, n));
    for (int64_t row = 0; row < m; row += 33) gemm(part.rows(row, std::min(row + 33, m)).transposed());
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      check::Exact exact;
      for (int64_t r = 0; r < k; ++r) exact.add(double{a.at(i, r)} * b.at(j, r));
      if (bias_kind) exact.add(bias.data()[of_rows ? i : j]);
      require(exact.is_near(c.at(i, j)), "a product of any strides is near the exact one");
      require(c.at(i, j) == again.at(i, j), "sharing rows and columns changes no bit");
    }
  }
}

void check_gemms() {
  int count = 0;
  for (int64_t m : {1, 8, 15, 16, 17, 24, 33, 48, 49, 97}) {
    for (int64_t n : {1, 5, 6, 7, 8, 9, 16, 23}) {
      for (int64_t k : {0, 1, 15, 16, 17, 40}) {
        for (Layout a : {Layout::rows, Layout::columns, Layout::neither}) {
          for (Layout c : {Layout::rows, Layout::columns, Layout::neither}) {
            const Layout b = std::array{Layout::rows, Layout::columns, Layout::neither}[count % 3];
            check_gemm(m, n, k, {a, b, c}, count % 2 == 0, count / 2 % 3);
            ++count;
          }
        }
      }
    }
  }
  check_gemm(200, 19, 1100, {Layout::rows, Layout::columns, Layout::rows}, false, 1);  // more than is packed at once
  check_gemm(397, 5, 513, {Layout::columns, Layout::rows, Layout::columns}, true, 2);
}

// Windows of `size` numbers along two axes, some of which reach over the edges of x.
struct Picture {
  int64_t samples, channels, height, width, kernel, stride, padding;

  int64_t across(int64_t size) const { return (size + 2 * padding - kernel) / stride + 1; }
};

// The same windows through `first`, whose rows are what is between, and a second matrix; `y` of the first is not used.
void check_chain(const Conv<Plain<float>>& first, int64_t out, int64_t at_once, bool is_aligned) {
  const int64_t rank = first.out, positions = first.x.positions, depth = first.x.depth, size = first.samples * out;
  const PlainMatrix<float> up(out, rank, is_aligned);
  const Buffer<float> y(size * positions, is_aligned), again(size * positions, true), bias(out, is_aligned),
      windows(positions * depth, is_aligned);
  for (int64_t i = 0; i < out; ++i) bias.data()[i] = check::random_number();
  LowRankConv chain{first, up.weights(), at_once};
  chain.down.bias = first.bias ? bias.data() : nullptr;
  chain.down.out = out;
  chain.down.y_sample = out * positions;
  chain.down.y = {y.data(), positions, positions};
  low_rank_conv(chain, 0, parts_of(chain));
  chain.down.y.numbers = again.data();
  chain.windows = 32;
  for (int64_t part = 0; part < parts_of(chain); ++part) low_rank_conv(chain, part, part + 1);
  require(std::memcmp(y.data(), again.data(), size * positions * sizeof(float)) == 0,
          "how many windows of a chain are packed together changes no bit");
  for (int64_t sample = 0; sample < first.samples; ++sample) {
    unfold(chain.down.sample(sample).x, 0, positions, windows.data());
    for (int64_t i = 0; i < positions; ++i) {
      std::vector<double> inner(rank, 0.0), sizes(rank, 0.0);
      for (int64_t r = 0; r < rank; ++r) {
        for (int64_t k = 0; k < depth; ++k) {
          const double product = double{windows.data()[i * depth + k]} * first.w.value(r, k);
          inner[r] += product;
          sizes[r] += std::fabs(product);
        }
      }
      for (int64_t o = 0; o < out; ++o) {
        double sum = chain.down.bias ? chain.down.bias[o] : 0, absolute = std::fabs(sum);
        for (int64_t r = 0; r < rank; ++r) {
          sum += inner[r] * up.weights().value(o, r);
          absolute += sizes[r] * std::fabs(up.weights().value(o, r));
        }
        const double roundings = static_cast<double>(depth + rank + 2) * std::numeric_limits<float>::epsilon();
        require(std::fabs(y.data()[(sample * out + o) * positions + i] - sum) <= roundings * absolute,
                "a chain is near the exact one");
      }
    }
  }
}

template <class Matrix>
void check_conv(const Picture& of, int64_t out, bool is_aligned, bool has_bias) {
  const int64_t rows = of.across(of.height), columns = of.across(of.width), positions = rows * columns;
  const int64_t taps = of.kernel * of.kernel, depth = of.channels * taps, plane = of.height * of.width;
  std::vector<int64_t> offsets;
  std::vector<int32_t> shifts(2 * taps, 0);
  for (int64_t k = 0; k < depth; ++k) {
    offsets.push_back(k / taps * plane + k % taps / of.kernel * of.width + k % of.kernel);
  }
  for (int64_t tap = 0; tap < taps; ++tap) shifts.push_back(static_cast<int32_t>(tap / of.kernel));
  for (int64_t tap = 0; tap < taps; ++tap) shifts.push_back(static_cast<int32_t>(tap % of.kernel));

  const int64_t x_sample = of.channels * plane, y_sample = out * positions;
  const Buffer<float> x(of.samples * x_sample, is_aligned), bias(out, is_aligned), y(of.samples * y_sample, is_aligned),
      again(of.samples * y_sample, true), windows(positions * depth, is_aligned);
  for (int64_t i = 0; i < of.samples * x_sample; ++i) x.data()[i] = check::random_number();
  for (int64_t i = 0; i < out; ++i) bias.data()[i] = check::random_number();
  const Matrix matrix(out, depth, is_aligned);
  Windows all{};
  all.numbers = x.data();
  const auto axis = [&](int64_t count, int64_t apart, int64_t size) {
    return Axis{count, apart, static_cast<int32_t>(-of.padding), static_cast<int32_t>(of.stride),
                static_cast<int32_t>(of.padding > 0 ? size : 0)};
  };
  all.axes[2] = axis(rows, of.stride * of.width, of.height);
  all.axes[3] = axis(columns, of.stride, of.width);
  all.start = -of.padding * (of.width + 1);
  all.offsets = offsets.data();
  all.shifts = shifts.data();
  all.positions = positions;
  all.depth = depth;
  all.taps = taps;
  const Results results{y.data(), positions, positions};
  Conv<decltype(matrix.weights())> whole{
      all, matrix.weights(), has_bias ? bias.data() : nullptr, results, out, of.samples, x_sample, y_sample};
  conv(whole, 0, parts_of(whole));
  whole.y.numbers = again.data();
  const auto is_same = [&] { return std::memcmp(y.data(), again.data(), of.samples * y_sample * sizeof(float)) == 0; };
  for (int64_t part = 0; part < parts_of(whole); ++part) conv(whole, part, part + 1);
  require(is_same(), "sharing a convolution changes no bit");
  std::fill_n(again.data(), of.samples * y_sample, 0.0f);
  const int64_t of_out = parts_of(out, kChannels);
  for (int64_t part = 0; part < of_out; ++part) conv_channels(whole, part, part + 1);
  require(is_same(), "sharing channels changes no bit");

  if (positions >= 16) {
    Conv<decltype(matrix.weights())> joined = whole;
    joined.x.axes[0] = {of.samples, x_sample, 0, 0, 0};
    joined.x.positions = of.samples * positions;
    joined.y = {again.data(), positions, positions, (out - 1) * positions};
    joined.samples = 1;
    std::fill_n(again.data(), of.samples * y_sample, 0.0f);
    conv(joined, 0, parts_of(joined));
    require(is_same(), "joining samples changes no bit");
  }

  if constexpr (std::is_same_v<Matrix, PlainMatrix<float>>)
    check_chain(whole, 1 + (out * 7 + rows) % 60, 256, is_aligned);

  for (int64_t sample = 0; sample < of.samples; ++sample) {
    const Windows one = whole.sample(sample).x;
    unfold(one, 0, positions, windows.data());
    for (int64_t i = 0; i < positions; ++i) {
      for (int64_t o = 0; o < out; ++o) {
        check::Exact exact;
        for (int64_t k = 0; k < depth; ++k) {
          const int64_t row = i / columns * of.stride - of.padding + k % taps / of.kernel,
                        column = i % columns * of.stride - of.padding + k % of.kernel;
          const bool is_there = row >= 0 && row < of.height && column >= 0 && column < of.width;
          const float number =
              is_there ? x.data()[sample * x_sample + k / taps * plane + row * of.width + column] : 0.0f;
          require(windows.data()[i * depth + k] == number, "a window has the numbers of its places, and zeros");
          exact.add(double{number} * matrix.weights().value(o, k));
        }
        if (has_bias) exact.add(bias.data()[o]);
        require(exact.is_near(y.data()[sample * y_sample + o * positions + i]), "a convolution is near the exact one");
      }
    }
  }
}

template <class Matrix>
void check_convs() {
  int count = 0;
  for (int64_t kernel : {1, 3}) {
    for (int64_t stride : {1, 2, 3}) {
      for (int64_t padding : {0, 1, 2}) {
        for (int64_t width : {3, 5, 17, 40}) {
          const Picture of{1 + count % 2, 1 + count % 3, 4, width, kernel, stride, padding};
          check_conv<Matrix>(of, std::array{1, 5, 16, 19}[count % 4], count % 3 == 0, count % 5 > 0);
          ++count;
        }
      }
    }
  }
  check_conv<Matrix>({2, 86, 18, 17, 3, 1, 1}, 18, false, true);  // more than is packed at once, in both directions
  check_conv<Matrix>({1, 150, 5, 6, 3, 1, 1}, 7, false, true);    // parts of two sizes
}

// Widened rows are the numbers themselves, bit for bit, in every instruction set.
template <class Matrix>
void check_widening() {
  for (int64_t in : {0, 1, 7, 8, 9, 16, 31, 32, 33, 72, 101}) {
    for (bool is_aligned : {true, false}) {
      const int64_t out = 5, first = 1, last = 4;
      const Matrix matrix(out, in, is_aligned);
      const Buffer<float> wide((last - first) * in, is_aligned);
      widen(matrix.weights(), first, last, wide.data());
      for (int64_t i = first; i < last; ++i) {
        for (int64_t k = 0; k < in; ++k) {
          require(wide.data()[(i - first) * in + k] == matrix.weights().value(i, k), "a number is widened as it is");
        }
      }
    }
  }
}

void check_nibbles() {
  const Nibbles pair{0xF0};
  require(widened(&pair, 0) == -8 && widened(&pair, 1) == 7, "the first of two numbers is in the low half");
}

// Twice the transform is what it was, for a few rows at a time.
template <class Number>
void check_hadamard() {
  for (int64_t n = 1; n <= 16384; n *= 2) {
    for (bool is_aligned : {true, false}) {
      const int64_t rows = n > 1024 ? 1 : 3;
      const Buffer<Number> x(rows * n, is_aligned), y(rows * n, is_aligned), again(rows * n, is_aligned);
      for (int64_t i = 0; i < rows * n; ++i) x.data()[i] = check::random_number();
      for (int64_t row = 0; row < rows; ++row) hadamard(Hadamard<Number>{x.data(), y.data(), n}, row, row + 1);
      hadamard(Hadamard<Number>{y.data(), again.data(), n}, 0, rows);
      for (int64_t i = 0; i < rows * n; ++i) {
        require(std::fabs(again.data()[i] - x.data()[i]) < 1e-4, "a transform of a transform is what it was");
      }
    }
  }
}

// Each row of the sketch is the sum of its rows of x, and the same bits however the columns are shared.
template <class Number>
void check_sketch() {
  for (int64_t n : {1, 3, 8, 13, 40}) {
    for (int64_t nonzeros : {1, 3, 4}) {
      const int64_t rows = 9, size = 7;
      const Buffer<Number> x(rows * n, false), whole(size * n, false), parts(size * n, true);
      for (int64_t i = 0; i < rows * n; ++i) x.data()[i] = check::random_number();
      std::fill_n(whole.data(), size * n, Number{0});
      std::fill_n(parts.data(), size * n, Number{0});
      const auto places = entries<Number>(rows, 5, size, 3, nonzeros);
      sparse_sign_sketch(SparseSignSketch<Number>{x.data(), places.data(), whole.data(), rows, n, nonzeros}, 0, n);
      for (int64_t first = 0; first < n; first += 3) {
        sparse_sign_sketch(SparseSignSketch<Number>{x.data(), places.data(), parts.data(), rows, n, nonzeros}, first,
                           std::min(first + 3, n));
      }
      require(std::memcmp(whole.data(), parts.data(), size * n * sizeof(Number)) == 0, "sharing changes no bit");
      double sum = 0;
      for (int64_t i = 0; i < size * n; ++i) sum += std::fabs(static_cast<double>(whole.data()[i]));
      require(sum > 0, "something was added");
    }
  }
}

// Sums and products of the rows that are chosen, whatever pairs of panels a call multiplies; nothing above the
// diagonal.
template <class Sum>
void check_moments() {
  const MomentsShape shape = moments_shape();
  for (int64_t n : {1, 7, 16, 23, 33, 70, 26 * static_cast<int>(shape.width) + 5}) {  // the last of many tiles
    for (int64_t count : {int64_t{1}, int64_t{6}, shape.depth + 3}) {
      if (n > 70 && count > 6) continue;
      const int64_t stride = n + 2, blocks = shape.blocks(count), size = shape.block_size(n), pairs = shape.pairs(n);
      const Buffer<float> x(2 * count * stride, false), shift(n, true), packed(blocks * size, true), some(n, false);
      const Buffer<Sum> products(n * n, true), parts(n * n, false);
      const Buffer<double> sums(n, false), alone(n, true);
      std::vector<int64_t> chosen(count);
      for (int64_t i = 0; i < 2 * count * stride; ++i) x.data()[i] = check::random_number();
      for (int64_t i = 0; i < n; ++i) shift.data()[i] = check::random_number();
      for (int64_t r = 0; r < count; ++r) chosen[r] = 2 * r + r % 2;
      std::fill_n(products.data(), n * n, Sum{0});
      std::fill_n(parts.data(), n * n, Sum{0});
      std::fill_n(sums.data(), n, 0.0);
      std::fill_n(alone.data(), n, 0.0);
      const Rows rows{x.data(), stride, chosen.data(), shift.data(), count, n};
      for (int64_t b = 0; b < blocks; ++b) {
        pack_block(rows, b * shape.depth, packed.data() + b * size, some.data());
        for (int64_t i = 0; i < n; ++i) sums.data()[i] += some.data()[i];
      }
      add_products(packed.data(), count, n, 0, pairs, products.data());
      for (int64_t pair = 0; pair < pairs; pair += 2) {
        add_products(packed.data(), count, n, pair, std::min(pairs, pair + 2), parts.data());
      }
      add_sums(rows, 0, n, alone.data());
      require(std::memcmp(products.data(), parts.data(), n * n * sizeof(Sum)) == 0, "sharing pairs changes no bit");
      require(std::memcmp(sums.data(), alone.data(), n * sizeof(double)) == 0, "sums have the same bits alone");
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          Exact exact;
          for (int64_t r = 0; i >= j && r < count; ++r) {
            const auto z = [&](int64_t k) { return rows.at(r)[k] - shift.data()[k]; };
            exact.add(static_cast<double>(z(i)) * z(j));
          }
          require(exact.is_near(static_cast<float>(products.data()[i * n + j]), 1e-7),
                  "a product is the sum of its rows'");
        }
      }
    }
  }
}

void check_bfloat16() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float wide = widened(BFloat16{static_cast<uint16_t>(bits)});
    const uint32_t quiet = wide == wide ? bits : bits | 0x40u;
    require(to_bfloat16(wide).bits == quiet, "a bfloat16 is itself after widening");
  }
}

void check_unknown_instruction_set() {
  try {
    instruction_set_named("none");
  } catch (const std::invalid_argument&) {
    return;
  }
  require(false, "an unknown instruction set is refused");
}

}  // namespace

// The instruction sets to check, by name; all of this processor where none is given.
int main(int count, char** names) {
  check_bfloat16();
  check_nibbles();
  check_unknown_instruction_set();
  const std::vector<std::string> asked(names + 1, names + count);
  for (InstructionSet set : instruction_sets()) {
    if (!asked.empty() && std::find(asked.begin(), asked.end(), name_of(set)) == asked.end()) continue;
    instruction_set_in_use() = set;
    check_products<PlainMatrix<float>>();
    check_products<PlainMatrix<BFloat16>>();
    check_products<WholeMatrix<int8_t, 5>>();
    check_products<WholeMatrix<int8_t, 62>>();
    check_products<WholeMatrix<Nibbles, 5>>();
    check_products<WholeMatrix<Nibbles, 62>>();
    check_factors();
    check_gemms();
    check_widened_gemms<PlainMatrix<BFloat16>>();
    check_widened_gemms<WholeMatrix<int8_t, 5>>();
    check_widened_gemms<WholeMatrix<Nibbles, 62>>();
    check_convs<PlainMatrix<float>>();
    check_convs<PlainMatrix<BFloat16>>();
    check_convs<WholeMatrix<int8_t, 5>>();
    check_convs<WholeMatrix<Nibbles, 62>>();
    check_widening<WholeMatrix<int8_t, 5>>();
    check_widening<WholeMatrix<Nibbles, 5>>();
    check_widening<WholeMatrix<Nibbles, 62>>();
    check_hadamard<float>();
    check_hadamard<double>();
    check_sketch<float>();
    check_sketch<double>();
    check_moments<float>();
    check_moments<double>();
    std::printf("%s\n", name_of(set).c_str());
  }
}
