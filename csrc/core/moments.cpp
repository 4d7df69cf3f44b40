#include "core/moments.h"

#include <algorithm>

#include "core/vectors.h"

namespace panther::core {

// Two panels, of which q is not before p: all with the first panel, then all others with the second, and so on.
struct Pair {
  int64_t p = 0;
  int64_t q;
  int64_t panels;

  Pair(int64_t index, int64_t of) : q(index), panels(of) {
    while (q >= panels - p) q -= panels - p++;
    q += p;
  }
  void next() {
    if (++q == panels) q = ++p;
  }
};

// That are summed up before they are added to what may be doubles: with AVX2 320 KB, beside a block of 384 numbers a
// row.
constexpr int64_t kTiles = 320;

// The twin without intrinsics.
namespace scalar {

constexpr int64_t kWidth = 16, kDepth = 128;

static void pack_block(const Rows& rows, int64_t first, float* packed, float* sums) {
  const int64_t count = std::min(kDepth, rows.count - first);
  std::fill(sums, sums + rows.n, 0.0f);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t i = 0; i < rows.n; ++i) {
      const float z = rows.shift ? rows.at(first + r)[i] - rows.shift[i] : rows.at(first + r)[i];
      packed[i / kWidth * kWidth * kDepth + r * kWidth + i % kWidth] = z;
      sums[i] += z;
    }
  }
}

template <class Sum>
static void add_products(const float* packed, int64_t count, int64_t n, int64_t first, int64_t last, Sum* products) {
  const int64_t panels = (n + kWidth - 1) / kWidth, block = panels * kWidth * kDepth;
  for (Pair pair(first, panels); first < last; ++first, pair.next()) {
    for (int64_t j = pair.q * kWidth; j < std::min(n, (pair.q + 1) * kWidth); ++j) {
      for (int64_t i = pair.p * kWidth; i < std::min(j + 1, (pair.p + 1) * kWidth); ++i) {
        float sum = 0;
        for (int64_t r = 0; r < count; ++r) {
          const float* row = packed + r / kDepth * block + r % kDepth * kWidth;
          sum += row[pair.p * kWidth * kDepth + i % kWidth] * row[pair.q * kWidth * kDepth + j % kWidth];
        }
        products[j * n + i] += sum;
      }
    }
  }
}

}  // namespace scalar

#if PANTHER_HAS_AVX

namespace avx2 {

constexpr int64_t kDepth = 128;  // rows, of which two panels stay in the first cache
constexpr int64_t kColumns = 4;

#define PANTHER_VECTOR PANTHER_AVX2
#include "core/moments_block.h"
#undef PANTHER_VECTOR

}  // namespace avx2

namespace avx512 {

constexpr int64_t kDepth = 96;  // the same of wider panels; its speed was not measured
constexpr int64_t kColumns = 8;

#define PANTHER_VECTOR PANTHER_AVX512
#include "core/moments_block.h"
#undef PANTHER_VECTOR

}  // namespace avx512

#endif

MomentsShape moments_shape() {
#if PANTHER_HAS_AVX
  const InstructionSet set = instruction_set_in_use().load();
  if (set == InstructionSet::avx512) return {avx512::kWidth, avx512::kDepth};
  if (set == InstructionSet::avx2) return {avx2::kWidth, avx2::kDepth};
#endif
  return {scalar::kWidth, scalar::kDepth};
}

void pack_block(const Rows& rows, int64_t first, float* packed, float* sums) {
#if PANTHER_HAS_AVX
  const InstructionSet set = instruction_set_in_use().load();
  if (set == InstructionSet::avx512) return avx512::pack_block(rows, first, packed, sums);
  if (set == InstructionSet::avx2) return avx2::pack_block(rows, first, packed, sums);
#endif
  scalar::pack_block(rows, first, packed, sums);
}

template <class Sum>
void add_products(const float* packed, int64_t count, int64_t n, int64_t first, int64_t last, Sum* products) {
#if PANTHER_HAS_AVX
  const InstructionSet set = instruction_set_in_use().load();
  if (set == InstructionSet::avx512) return avx512::add_products(packed, count, n, first, last, products);
  if (set == InstructionSet::avx2) return avx2::add_products(packed, count, n, first, last, products);
#endif
  scalar::add_products(packed, count, n, first, last, products);
}

template void add_products(const float*, int64_t, int64_t, int64_t, int64_t, float*);
template void add_products(const float*, int64_t, int64_t, int64_t, int64_t, double*);

void add_sums(const Rows& rows, int64_t first, int64_t last, double* sums) {
  constexpr int64_t kTogether = 64;
  const int64_t depth = moments_shape().depth;
  for (; first < last; first += kTogether) {
    const int64_t count = std::min(kTogether, last - first);
    for (int64_t r = 0; r < rows.count; r += depth) {
      float some[kTogether] = {};
      for (int64_t row = r; row < std::min(rows.count, r + depth); ++row) {
        const float* x = rows.at(row) + first;
        if (rows.shift) {
          for (int64_t i = 0; i < count; ++i) some[i] += x[i] - rows.shift[first + i];
        } else {
          for (int64_t i = 0; i < count; ++i) some[i] += x[i];
        }
      }
      for (int64_t i = 0; i < count; ++i) sums[first + i] += some[i];
    }
  }
}

}  // namespace panther::core
