// Runs the kernels of csrc/core over sizes at the edges, in every instruction set of this processor: each result is
// near the exact sum, and the same bits however the columns are shared.
#include <cstring>
#include <stdexcept>

#include "check.h"
#include "core/thin_linear.h"

namespace {

using namespace panther::core;
using check::Buffer;
using check::require;

template <class W>
W narrowed(float value);
template <>
float narrowed(float value) {
  return value;
}
template <>
BFloat16 narrowed(float value) {
  return to_bfloat16(value);
}

template <class W>
void check_product(int64_t rows, int64_t in, int64_t out, bool is_aligned, bool has_bias) {
  const Buffer<float> x(rows * in, is_aligned), bias(out, is_aligned), y(rows * out, is_aligned),
      again(rows * out, true);
  const Buffer<W> w(out * in, is_aligned);
  for (int64_t i = 0; i < rows * in; ++i) x.data()[i] = check::random_number();
  for (int64_t i = 0; i < out * in; ++i) w.data()[i] = narrowed<W>(check::random_number());
  for (int64_t i = 0; i < out; ++i) bias.data()[i] = check::random_number();

  ThinLinear<W> product{x.data(), w.data(), has_bias ? bias.data() : nullptr, y.data(), rows, in, out};
  thin_linear(product, 0, out);
  product.y = again.data();
  for (int64_t first = 0; first < out; first += 5) thin_linear(product, first, std::min(first + 5, out));

  require(std::memcmp(y.data(), again.data(), rows * out * sizeof(float)) == 0, "sharing the columns changes no bit");
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < out; ++j) {
      check::Exact exact;
      for (int64_t k = 0; k < in; ++k) exact.add(double{x.data()[i * in + k]} * widened(w.data()[j * in + k]));
      if (has_bias) exact.add(bias.data()[j]);
      require(exact.is_near(y.data()[i * out + j]), "a product is near the exact one");
    }
  }
}

template <class W>
void check_products() {
  for (int64_t rows = 1; rows <= 13; ++rows) {
    for (int64_t in : {0, 1, 7, 8, 9, 16, 31, 72}) {
      for (int64_t out : {1, 2, 3, 4, 5, 8, 11, 12, 13, 25, 40}) {
        for (bool is_aligned : {true, false}) {
          for (bool has_bias : {true, false}) check_product<W>(rows, in, out, is_aligned, has_bias);
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

int main() {
  check_bfloat16();
  check_unknown_instruction_set();
  for (InstructionSet set : instruction_sets()) {
    instruction_set_in_use() = set;
    check_products<float>();
    check_products<BFloat16>();
    std::printf("%s\n", name_of(set).c_str());
  }
}
