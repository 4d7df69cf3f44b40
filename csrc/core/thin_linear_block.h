// The body of core/thin_linear.h for one set of instructions, whose namespace includes this file. No pragma once: it is
// compiled once for each.

// A scale as `scaled` needs it.
template <class T>
PANTHER_VECTOR inline Vector factor_of(const T*, float scale) {
  return all_lanes(scale);
}

template <class T>
PANTHER_VECTOR inline Vector scaled(const T* numbers, Vector factor) {
  return multiply(load(numbers), factor);
}

template <class T>
PANTHER_VECTOR inline Vector scaled(const T* numbers, int64_t count, Vector factor) {
  return multiply(load(numbers, count), factor);
}

// A register of a row of w, or its first `count` lanes.
template <int Rows, class W>
PANTHER_VECTOR inline Vector weights_at(const ThinLinear<W>& p, int64_t column, int64_t k, int64_t count,
                                        Vector factor) {
  const auto* numbers = p.w.numbers + p.w.at(column, k);
  if constexpr (W::kHasScales) {
    if constexpr (Rows > 1) factor = factor_of(numbers, p.w.scale(column, k));
    return count == kLanes ? scaled(numbers, factor) : scaled(numbers, count, factor);
  } else {
    return count == kLanes ? load(numbers) : load(numbers, count);
  }
}

// Adds the products of a register of each row of x with that of each row of w, or of their first `count` lanes. What
// there is less of stays in registers meanwhile, beside the sums and one of the others.
template <int Rows, int Columns, class W>
PANTHER_VECTOR inline void add_products(const ThinLinear<W>& p, const float* x, int64_t column, int64_t k,
                                        int64_t count, const Vector (&factors)[Columns],
                                        Vector (&sums)[Rows][Columns]) {
  const auto value_at = [&](int i) PANTHER_VECTOR {
    const float* values = x + i * p.x_stride + k;
    return count == kLanes ? load(values) : load(values, count);
  };
  if constexpr (Rows < Columns) {
    Vector values[Rows];
    for (int i = 0; i < Rows; ++i) values[i] = value_at(i);
    for (int j = 0; j < Columns; ++j) {
      const Vector weights = weights_at<Rows>(p, column + j, k, count, factors[j]);
      for (int i = 0; i < Rows; ++i) sums[i][j] = multiply_add(values[i], weights, sums[i][j]);
    }
  } else {
    Vector weights[Columns];
    for (int j = 0; j < Columns; ++j) weights[j] = weights_at<Rows>(p, column + j, k, count, factors[j]);
    for (int i = 0; i < Rows; ++i) {
      const Vector value = value_at(i);
      for (int j = 0; j < Columns; ++j) sums[i][j] = multiply_add(value, weights[j], sums[i][j]);
    }
  }
}

// Asks for the lines of the cache that lie `ahead` elements behind number k of each of some rows of w.
template <int Columns, class W>
PANTHER_VECTOR inline void fetch(const ThinLinear<W>& p, int64_t column, int64_t k, int64_t ahead) {
  for (int j = 0; j < Columns; ++j) __builtin_prefetch(p.w.numbers + p.w.at(column + j, k) + ahead);
}

// A block of `Rows` rows of x times `Columns` rows of w, all of whose sums are in registers. Four sums leave together:
// those of a row, or of a column. It stays a function of its own: inlined beside others its sums leave the registers,
// which has cost more than half of the speed of AVX2.
template <int Rows, int Columns, class W>
PANTHER_VECTOR __attribute__((noinline)) void block(const ThinLinear<W>& p, int64_t row, int64_t column) {
  const float* x = p.x + row * p.x_stride;
  Vector sums[Rows][Columns], factors[Columns] = {};
  for (auto& of_row : sums) {
    for (Vector& sum : of_row) sum = zeros();
  }
  // The processor's own guess of what is read next comes late where a register is less than a line of the cache, and
  // where several rows of x leave registers for four rows of w only. With this, weights that come from memory are read
  // 1.0 to 2.4 times as fast; one or two rows of floats no faster, or slower. What is asked for is the next block, or
  // what is to be read after as many bytes as memory is late by. Where four rows of 768 floats and more lie in the
  // caches already, it costs up to a tenth or two.
  using Number = typename W::Number;
  constexpr bool kFetches = Rows > 2 || sizeof(Number) < sizeof(float);
  constexpr int64_t kLine = (64 << kHeldShift<Number>) / sizeof(Number);
  constexpr int64_t kStep = kFetches && sizeof(Number) > 1 ? kLine : kLanes;  // a line of others can be several groups
  constexpr int64_t kAhead = (sizeof(Number) > 1 ? 6144 : 10240) / sizeof(Number);
  const int64_t ahead = std::max(p.w.at(Columns, 0), kAhead);
  for (int64_t k = 0, end; k < p.in; k = end) {
    end = Rows == 1 ? p.w.group_end(k) : p.in;
    if constexpr (W::kHasScales && Rows == 1) {  // more rows leave no registers for the scales
      for (int j = 0; j < Columns; ++j) factors[j] = factor_of(p.w.numbers, p.w.scale(column + j, k));
    }
    while (end - k >= kStep) {
      if (kFetches && (kStep == kLine || k % kLine == 0)) fetch<Columns>(p, column, k, ahead);
      for (int64_t s = 0; s < kStep / kLanes; ++s, k += kLanes) add_products(p, x, column, k, kLanes, factors, sums);
    }
    for (; end - k >= kLanes; k += kLanes) add_products(p, x, column, k, kLanes, factors, sums);
    if (k < end) add_products(p, x, column, k, end - k, factors, sums);
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

// The numbers [begin, end) of the rows [first, last) of w as floats, one row after another. `begin` is that of a group.
template <class W>
PANTHER_VECTOR inline void widen_rows(W w, int64_t first, int64_t last, int64_t begin, int64_t end, float* wide) {
  for (int64_t column = first; column < last; ++column, wide += end - begin) {
    for (int64_t k = begin, until; k < end; k = until) {
      until = std::min(end, w.group_end(k));
      if constexpr (W::kHasScales) {
        const Vector factor = factor_of(w.numbers + w.at(column, k), w.scale(column, k));
        for (; until - k >= kLanes; k += kLanes) store(wide + (k - begin), scaled(w.numbers + w.at(column, k), factor));
      } else {
        for (; until - k >= kLanes; k += kLanes) store(wide + (k - begin), load(w.numbers + w.at(column, k)));
      }
      if (k < until) {  // the last ones lie before whatever comes after the row
        const auto* numbers = w.numbers + w.at(column, k);
        if constexpr (W::kHasScales) {
          store(wide + (k - begin), scaled(numbers, until - k, factor_of(numbers, w.scale(column, k))), until - k);
        } else {
          store(wide + (k - begin), load(numbers, until - k), until - k);
        }
      }
    }
  }
}

// Strips of w that are widened once for all rows of x, and then read as floats. Gives the column after the last one.
template <class W>
PANTHER_VECTOR inline int64_t widened_strips(const ThinLinear<W>& p, int64_t first, int64_t last) {
  const std::unique_ptr<Line[]> lines = lines_of(kStrip * p.in);
  float* wide = lines[0].numbers;
  int64_t column = first;
  for (; last - column >= kStrip; column += kStrip) {
    widen_rows(p.w, column, column + kStrip, 0, p.in, wide);
    const float* bias = p.bias ? p.bias + column : nullptr;
    const Plain<float> w{wide, p.in};
    strip<kStrip>(ThinLinear<Plain<float>>{p.x, w, bias, p.y + column, p.rows, p.in, kStrip, p.x_stride, p.y_stride},
                  0);
  }
  return column;
}

// A single row needs eight rows of w at a time to hide the latency of an addition. Four are enough where they come from
// memory, as long ones do: eight streams are more than the processor follows.
template <class W>
PANTHER_VECTOR inline void thin_linear(const ThinLinear<W>& p, int64_t first, int64_t last) {
  int64_t column = first;
  if (p.rows == 1) {
    const bool is_long = sizeof(typename W::Number) == sizeof(float) && p.in >= 3072;
    for (; last - column >= 8 && !is_long; column += 8) block<1, 8>(p, 0, column);
  }
  if constexpr (W::kHasScales) {
    if (p.rows > most_rows(kStrip) && last - column >= kStrip) column = widened_strips(p, column, last);
  }
  if (p.rows > 1) {
    for (; last - column >= kStrip; column += kStrip) strip<kStrip>(p, column);
  }
  for (; last - column >= 4; column += 4) strip<4>(p, column);
  for (; column < last; ++column) strip<1>(p, column);
}
