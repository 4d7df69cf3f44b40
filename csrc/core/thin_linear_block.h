// The body of core/thin_linear.h for one set of instructions, whose namespace includes this file. No pragma once: it is
// compiled once for each.

// Adds the products of a register of each row of x with that of each row of w, or of their first `count` lanes.
template <int Rows, int Columns, class W>
PANTHER_VECTOR inline void add_products(const ThinLinear<W>& p, const float* x, int64_t column, int64_t k,
                                        int64_t count, const Vector (&scales)[Columns], Vector (&sums)[Rows][Columns]) {
  Vector weights[Columns];
  for (int j = 0; j < Columns; ++j) {
    const auto* numbers = p.w.numbers + p.w.at(column + j, k);
    if constexpr (Rows <= 2 && sizeof(*numbers) < sizeof(float)) {
      // What the next block starts with: a register is less than a line of the cache, so that the processor's own guess
      // comes late. Out of the caches int8 is 1.3 to 1.5 times as fast with it; float is no faster, or slower.
      __builtin_prefetch(numbers + Columns * p.in);
    }
    weights[j] = count == kLanes ? load(numbers) : load(numbers, count);
    if constexpr (W::kHasScales) {
      weights[j] = multiply(weights[j], Rows == 1 ? scales[j] : all_lanes(p.w.scale(column + j, k)));
    }
  }
  for (int i = 0; i < Rows; ++i) {
    const float* values = x + i * p.x_stride + k;
    const Vector value = count == kLanes ? load(values) : load(values, count);
    for (int j = 0; j < Columns; ++j) sums[i][j] = multiply_add(value, weights[j], sums[i][j]);
  }
}

// A block of `Rows` rows of x times `Columns` rows of w, all of whose sums are in registers. Four sums leave together:
// those of a row, or of a column.
template <int Rows, int Columns, class W>
PANTHER_VECTOR inline void block(const ThinLinear<W>& p, int64_t row, int64_t column) {
  const float* x = p.x + row * p.x_stride;
  Vector sums[Rows][Columns], scales[Columns] = {};
  for (auto& of_row : sums) {
    for (Vector& sum : of_row) sum = zeros();
  }
  for (int64_t k = 0, end; k < p.in; k = end) {
    end = Rows == 1 ? p.w.group_end(k) : p.in;
    if constexpr (W::kHasScales && Rows == 1) {  // more rows leave no registers for the scales
      for (int j = 0; j < Columns; ++j) scales[j] = all_lanes(p.w.scale(column + j, k));
    }
    for (; end - k >= kLanes; k += kLanes) add_products(p, x, column, k, kLanes, scales, sums);
    if (k < end) add_products(p, x, column, k, end - k, scales, sums);
  }
  float* y = p.y + row * p.y_stride + column;
  const float* bias = p.bias ? p.bias + column : nullptr;
  if constexpr (Columns % 4 == 0) {
    for (int i = 0; i < Rows; ++i) {
      for (int j = 0; j < Columns; j += 4) {
        store_sums(sums[i][j], sums[i][j + 1], sums[i][j + 2], sums[i][j + 3], bias ? bias + j : nullptr,
                   y + i * p.y_stride + j);
      }
    }
  } else {
    for (int j = 0; j < Columns; ++j) {
      for (int i = 0; i < Rows; i += 4) {
        float dots[4];
        store_sums(sums[i][j], sums[i + 1 < Rows ? i + 1 : i][j], sums[i + 2 < Rows ? i + 2 : i][j],
                   sums[i + 3 < Rows ? i + 3 : i][j], nullptr, dots);
        for (int s = 0; s < 4 && i + s < Rows; ++s) y[(i + s) * p.y_stride + j] = bias ? dots[s] + bias[j] : dots[s];
      }
    }
  }
}

// `Rows` rows of x times `Columns` rows of w, in blocks that fit into the registers.
template <int Rows, int Columns, class W>
PANTHER_VECTOR inline void blocks(const ThinLinear<W>& p, int64_t row, int64_t column) {
  constexpr int kWidth = width(Rows, Columns);
  for (int j = 0; j < Columns; j += kWidth) block<Rows, kWidth>(p, row, column + j);
}

template <int Rows, int Columns, class W>
PANTHER_VECTOR inline void blocks_of(int count, const ThinLinear<W>& p, int64_t row, int64_t column) {
  if (count == Rows) return blocks<Rows, Columns>(p, row, column);
  if constexpr (Rows > 1) blocks_of<Rows - 1, Columns>(count, p, row, column);
}

// All rows of x, in parts of about the same size, times some rows of w, which stay in the nearest caches meanwhile.
template <int Columns, class W>
PANTHER_VECTOR inline void strip(const ThinLinear<W>& p, int64_t column) {
  constexpr int kMost = most_rows(Columns);
  for (int64_t row = 0, parts = (p.rows + kMost - 1) / kMost; parts > 0; --parts) {
    const int count = static_cast<int>((p.rows - row + parts - 1) / parts);
    blocks_of<kMost, Columns>(count, p, row, column);
    row += count;
  }
}

// A single row needs eight rows of w at a time to hide the latency of an addition.
template <class W>
PANTHER_VECTOR inline void thin_linear(const ThinLinear<W>& p, int64_t first, int64_t last) {
  int64_t column = first;
  if (p.rows == 1) {
    for (; last - column >= 8; column += 8) block<1, 8>(p, 0, column);
  } else {
    for (; last - column >= kStrip; column += kStrip) strip<kStrip>(p, column);
  }
  for (; last - column >= 4; column += 4) strip<4>(p, column);
  for (; column < last; ++column) strip<1>(p, column);
}
