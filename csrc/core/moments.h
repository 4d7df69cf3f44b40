// Moments of rows: their sum, and the sum of their products with themselves, which is half of a product of matrices.
//
// Notation: z_r = x_r - shift for those of the rows of x that count, x (rows, n). They are packed into panels of some
// numbers of each row, a few rows at a time, which stay in the first cache while two panels are multiplied: four
// numbers of one by two registers of the other are in eight registers while they are summed up (eight numbers in
// sixteen with AVX-512). Sums of the rows that are packed at once are floats, and what they are added to may be
// doubles.
//
// Each product is summed in the same order whatever pairs of panels a call multiplies, so that the number of threads
// changes no bit.
#pragma once

#include <cstdint>

namespace panther::core {

struct Rows {
  const float* x;
  int64_t stride;         // from a row to the next one
  const int64_t* chosen;  // which rows, or null
  const float* shift;     // (n), or null
  int64_t count;
  int64_t n;

  const float* at(int64_t r) const { return x + (chosen ? chosen[r] : r) * stride; }
};

// How rows are packed with the instructions in use: panels of `width` numbers of `depth` rows each.
struct MomentsShape {
  int64_t width;
  int64_t depth;

  int64_t panels(int64_t n) const { return (n + width - 1) / width; }
  int64_t blocks(int64_t count) const { return (count + depth - 1) / depth; }
  int64_t pairs(int64_t n) const { return panels(n) * (panels(n) + 1) / 2; }
  int64_t block_size(int64_t n) const { return panels(n) * width * depth; }
};

MomentsShape moments_shape();

// Packs a block, at most `depth` rows from `first` on; `sums` (n) are what they add up to.
void pack_block(const Rows& rows, int64_t first, float* packed, float* sums);

// Adds the products of `count` packed rows, in one block after the other, to `products` (n, n), on and below the
// diagonal: those of the pairs of panels [first, last). Sum is float or double.
template <class Sum>
void add_products(const float* packed, int64_t count, int64_t n, int64_t first, int64_t last, Sum* products);

// The sums of the numbers [first, last) of each row, in doubles; the same bits as of all blocks one after the other.
void add_sums(const Rows& rows, int64_t first, int64_t last, double* sums);

}  // namespace panther::core
