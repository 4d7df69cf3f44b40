// The body of core/thin_linear.cpp for one set of instructions, whose namespace includes this file. No pragma once: it
// is compiled once for each.

template <class T>
PANTHER_VECTOR inline Vector lanes_of(const T* numbers, int64_t count) {
  return count == kLanes ? load(numbers) : load(numbers, count);
}

// A register of a row of w, or its first `count` lanes.
template <class W>
PANTHER_VECTOR inline Vector weights_of(const W& w, int64_t column, int64_t k, int64_t count) {
  const auto* numbers = w.numbers + w.at(column, k);
  if constexpr (W::kHasScales) {
    const Vector factor = factor_of(numbers, w.scale(column, k));
    return count == kLanes ? scaled(numbers, factor) : scaled(numbers, count, factor);
  } else {
    return lanes_of(numbers, count);
  }
}

// Adds the products of a register of each row of x with that of each row of w, or of their first `count` lanes. What
// there is less of stays in registers meanwhile, beside the sums and one of the others.
template <int Rows, int Columns, class W>
PANTHER_VECTOR inline void add_products(const ThinLinear<W>& p, const float* x, int64_t column, int64_t k,
                                        int64_t count, Vector (&sums)[Rows][Columns]) {
  if constexpr (Rows < Columns) {
    Vector values[Rows];
    for (int i = 0; i < Rows; ++i) values[i] = lanes_of(x + i * p.x_stride + k, count);
    for (int j = 0; j < Columns; ++j) {
      Vector weights = weights_of(p.w, column + j, k, count);
      if constexpr (Rows > 1) load_once(weights);
      for (int i = 0; i < Rows; ++i) sums[i][j] = multiply_add(values[i], weights, sums[i][j]);
    }
  } else {
    Vector weights[Columns];
    for (int j = 0; j < Columns; ++j) weights[j] = weights_of(p.w, column + j, k, count);
    for (int i = 0; i < Rows; ++i) {
      const Vector value = lanes_of(x + i * p.x_stride + k, count);
      for (int j = 0; j < Columns; ++j) sums[i][j] = multiply_add(value, weights[j], sums[i][j]);
    }
  }
}

// The processor's own guess of what is read next comes late where a register is less than a line of the cache, and
// where several rows of x leave registers for four rows of w only. With this, weights that come from memory are
// read 1.0 to 2.4 times as fast; one or two rows of floats no faster, or slower. What is asked for is the next block,
// or what is to be read after as many bytes as memory is late by. Where four rows of 768 floats and more lie in the
// caches already, it costs up to a tenth or two.
template <class T>
inline constexpr int64_t kLine = (64 << kHeldShift<T>) / sizeof(T);  // numbers

// What is asked for while some rows of w are read: lines as they lie in memory where rows are short (row by row took up
// to 1.5 times as long), else the same places of as many other rows (the other way took up to 1.3 times as long).
template <class T>
struct Ahead {
  const T* numbers;
  int64_t step;   // elements, for each element of a row that is read
  int64_t apart;  // elements, from one line to the next one

  template <int Columns>
  PANTHER_VECTOR __attribute__((always_inline)) inline void fetch(int64_t k) const {
    const T* lines = numbers + (k >> kHeldShift<T>)*step;
    PANTHER_UNROLL for (int64_t j = 0; j < Columns; ++j) __builtin_prefetch(lines + j * apart);
  }
};

template <class W>
PANTHER_VECTOR inline Ahead<typename W::Number> ahead_of(const W& w, int64_t column, int64_t columns) {
  using Number = typename W::Number;
  constexpr int64_t kAhead = (sizeof(Number) > 1 ? 6144 : 10240) / sizeof(Number), kShort = 2048 / sizeof(Number);
  const int64_t row = w.at(1, 0);
  const Number* numbers = w.numbers + (row == 0 ? 0 : w.at(column, 0) + std::max(w.at(columns, 0), kAhead));
  if (row < kShort) return {numbers, columns, 64 / sizeof(Number)};
  return {numbers, 1, row};
}

// Adds the products of groups of 32 numbers, the smallest ones there are, whose scale is read once: where few rows
// leave registers for it, or where a number takes longer to widen than to read x again. An address can add a step or
// two to a pointer, so that a third of the pointers is enough. Gives how many numbers of each row that were: whole
// groups.
template <int Rows, int Columns, class T>
PANTHER_VECTOR inline int64_t add_groups(const ThinLinear<Whole<T>>& p, const float* x, int64_t column,
                                         Vector (&sums)[Rows][Columns]) {
  constexpr int64_t kGroup = 32;
  constexpr int kPointers = (Columns + 2) / 3;
  const int64_t stride = p.w.at(1, 0), whole = p.in - p.in % kGroup;
  const Ahead<T> ahead = ahead_of(p.w, column, Columns);
  const T* numbers[kPointers];
  for (int q = 0; q < kPointers; ++q) numbers[q] = p.w.numbers + (column + 3 * q) * stride;
  for (int64_t k = 0; k < whole; k += kGroup, x += kGroup) {
    if (k % kLine<T> == 0) ahead.template fetch<Columns>(k);
    const float* scales = p.w.scales + (column * p.w.groups + (k >> p.w.shift));
    PANTHER_UNROLL for (int j = 0; j < Columns; ++j) {
      const Vector factor = factor_of(p.w.numbers, scales[j * p.w.groups]);
      const T* from = numbers[j / 3] + j % 3 * stride;
      PANTHER_UNROLL for (int64_t s = 0; s < kGroup; s += kLanes) {
        const Vector weights = scaled(from + (s >> kHeldShift<T>), factor);
        PANTHER_UNROLL for (int i = 0; i < Rows; ++i) {
          sums[i][j] = multiply_add(load(x + i * p.x_stride + s), weights, sums[i][j]);
        }
      }
    }
    PANTHER_UNROLL for (int q = 0; q < kPointers; ++q) numbers[q] += kGroup >> kHeldShift<T>;
  }
  return whole;
}

// A block of `Rows` rows of x times `Columns` rows of w, all of whose sums are in registers. Four sums leave together:
// those of a row, or of a column. It stays a function of its own: inlined beside others its sums leave the registers,
// which has cost more than half of the speed of AVX2.
template <int Rows, int Columns, class W>
PANTHER_VECTOR __attribute__((noinline)) void block(const ThinLinear<W>& p, int64_t row, int64_t column) {
  Vector sums[Rows][Columns];
  for (auto& of_row : sums) {
    for (Vector& sum : of_row) sum = zeros();
  }
  const float* x = p.x + row * p.x_stride;
  using Number = typename W::Number;
  constexpr bool kFetches = Rows > 2 || sizeof(Number) < sizeof(float);
  constexpr int64_t kStep = !kFetches ? kLanes : sizeof(Number) > 1 ? kLine<Number> : 32;
  const Ahead<Number> ahead = ahead_of(p.w, column, Columns);
  int64_t k = 0;
  if constexpr (W::kHasScales) {
    if constexpr (Rows <= most_rows_of_groups<Number>()) k = add_groups(p, x, column, sums);
  }
  while (p.in - k >= kStep) {
    if (kFetches && (kStep == kLine<Number> || k % kLine<Number> == 0)) ahead.template fetch<Columns>(k);
    for (int64_t s = 0; s < kStep / kLanes; ++s, k += kLanes) add_products(p, x, column, k, kLanes, sums);
  }
  for (; p.in - k >= kLanes; k += kLanes) add_products(p, x, column, k, kLanes, sums);
  if (k < p.in) add_products(p, x, column, k, p.in - k, sums);
  float* y = p.y + row * p.y_stride + column;
  const float* factors = p.factors ? p.factors + column : nullptr;
  const float* bias = p.bias ? p.bias + column : nullptr;
  if constexpr (Columns % 4 == 0) {
    for (int i = 0; i < Rows; ++i) {
      for (int j = 0; j < Columns; j += 4) {
        store_sums(sums[i][j], sums[i][j + 1], sums[i][j + 2], sums[i][j + 3], factors ? factors + j : nullptr,
                   bias ? bias + j : nullptr, y + i * p.y_stride + j);
      }
    }
  } else {
    for (int j = 0; j < Columns; ++j) {
      for (int i = 0; i < Rows; i += 4) {
        float dots[4];
        store_sums(sums[i][j], sums[i + 1 < Rows ? i + 1 : i][j], sums[i + 2 < Rows ? i + 2 : i][j],
                   sums[i + 3 < Rows ? i + 3 : i][j], nullptr, nullptr, dots);
        for (int s = 0; s < 4 && i + s < Rows; ++s) {
          const float sum = factors ? dots[s] * factors[j] : dots[s];
          y[(i + s) * p.y_stride + j] = bias ? sum + bias[j] : sum;
        }
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

// Strips of w that are widened once for all rows of x, and then read as floats. Gives the column after the last one.
template <class W>
PANTHER_VECTOR inline int64_t widened_strips(const ThinLinear<W>& p, int64_t first, int64_t last) {
  const std::unique_ptr<Line[]> lines = lines_of(kStrip * p.in);
  float* wide = lines[0].numbers;
  int64_t column = first;
  for (; last - column >= kStrip; column += kStrip) {
    widen_rows(p.w, column, column + kStrip, 0, p.in, wide);
    const float* bias = p.bias ? p.bias + column : nullptr;
    const float* factors = p.factors ? p.factors + column : nullptr;
    const Plain<float> w{wide, p.in};
    strip<kStrip>(
        ThinLinear<Plain<float>>{p.x, w, bias, p.y + column, p.rows, p.in, kStrip, p.x_stride, p.y_stride, factors}, 0);
  }
  return column;
}

// A single row needs eight rows of w at a time to hide the latency of an addition, unless memory is slower.
template <class W>
PANTHER_VECTOR inline void thin_linear(const ThinLinear<W>& p, int64_t first, int64_t last) {
  int64_t column = first;
  if (p.rows == 1 && p.in < long_row<W>()) {
    for (; last - column >= 8; column += 8) block<1, 8>(p, 0, column);
  }
  if constexpr (sizeof(typename W::Number) == 1) {
    if (p.rows > most_rows_read_as_stored<W>(p.in) && last - column >= kStrip) {
      column = widened_strips(p, column, last);
    }
  }
  if (p.rows > 1) {
    for (; last - column >= kStrip; column += kStrip) strip<kStrip>(p, column);
  }
  for (; last - column >= 4; column += 4) strip<4>(p, column);
  for (; column < last; ++column) strip<1>(p, column);
}
