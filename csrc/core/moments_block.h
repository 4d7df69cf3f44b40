// The body of core/moments.cpp for one set of instructions, whose namespace includes this file. No pragma once: it is
// compiled once for each.

inline constexpr int64_t kWidth = 2 * kLanes;
inline constexpr int64_t kRowsATurn = 4;

PANTHER_VECTOR inline Vector shifted(const float* numbers, const float* shift) {
  return shift ? subtract(load(numbers), load(shift)) : load(numbers);
}

PANTHER_VECTOR inline Vector shifted(const float* numbers, const float* shift, int64_t count) {
  return shift ? subtract(load(numbers, count), load(shift, count)) : load(numbers, count);
}

PANTHER_VECTOR void pack_block(const Rows& rows, int64_t first, float* packed, float* sums) {
  const int64_t count = std::min(kDepth, rows.count - first), n = rows.n;
  const int64_t padded = (count + kRowsATurn - 1) / kRowsATurn * kRowsATurn;  // with rows of zeros
  for (int64_t r = 0; r < count; ++r) {
    const float* x = rows.at(first + r);
    float* to = packed + r * kWidth;
    for (int64_t i = 0; i < n; i += kWidth, to += kWidth * kDepth) {
      const float* shift = rows.shift ? rows.shift + i : nullptr;
      if (n - i >= kWidth) {
        store(to, shifted(x + i, shift));
        store(to + kLanes, shifted(x + i + kLanes, shift ? shift + kLanes : nullptr));
        continue;
      }
      store(to, shifted(x + i, shift, std::min(kLanes, n - i)));
      store(to + kLanes,
            n - i <= kLanes ? zeros() : shifted(x + i + kLanes, shift ? shift + kLanes : nullptr, n - i - kLanes));
    }
  }
  for (int64_t i = 0; i < n; i += kWidth, packed += kWidth * kDepth) {
    std::fill(packed + count * kWidth, packed + padded * kWidth, 0.0f);
    Vector low = zeros(), high = zeros();
    for (int64_t r = 0; r < count; ++r) {
      low = add(low, load(packed + r * kWidth));
      high = add(high, load(packed + r * kWidth + kLanes));
    }
    store(sums + i, low, std::min(kLanes, n - i));
    if (n - i > kLanes) store(sums + i + kLanes, high, std::min(kLanes, n - i - kLanes));
  }
}

// The products of a panel with kColumns numbers of each row of another one: as many rows of a tile. Inlined, its sums
// would share their registers with the loops around it.
PANTHER_VECTOR __attribute__((noinline)) inline void multiply_panel(const float* panel, const float* numbers,
                                                                    int64_t count, bool adds, float* tile) {
  Vector sums[kColumns][2];
  PANTHER_UNROLL for (int s = 0; s < kColumns; ++s) {
    sums[s][0] = adds ? load(tile + s * kWidth) : zeros();
    sums[s][1] = adds ? load(tile + s * kWidth + kLanes) : zeros();
  }
  for (int64_t r = 0; r < count; r += kRowsATurn, panel += kRowsATurn * kWidth, numbers += kRowsATurn * kWidth) {
    PANTHER_UNROLL for (int64_t t = 0; t < kRowsATurn; ++t) {
      const Vector low = load(panel + t * kWidth), high = load(panel + t * kWidth + kLanes);
      PANTHER_UNROLL for (int s = 0; s < kColumns; ++s) {
        const Vector number = all_lanes(numbers[t * kWidth + s]);
        accumulate(sums[s][0], low, number);
        accumulate(sums[s][1], high, number);
      }
    }
  }
  PANTHER_UNROLL for (int s = 0; s < kColumns; ++s) {
    store(tile + s * kWidth, sums[s][0]);
    store(tile + s * kWidth + kLanes, sums[s][1]);
  }
}

// Adds a tile, the products of the numbers from i on with those from j on, to what they are summed up in.
template <class Sum>
PANTHER_VECTOR void add_tile(const float* tile, int64_t n, int64_t i, int64_t j, Sum* products) {
  for (int64_t row = j; row < std::min(n, j + kWidth); ++row, tile += kWidth) {
    Sum* to = products + row * n + i;
    if (i < j) {
      add_to(to, load(tile));
      add_to(to + kLanes, load(tile + kLanes));
      continue;
    }
    for (int64_t lane = 0; i + lane <= row; ++lane) to[lane] += tile[lane];
  }
}

template <class Sum>
PANTHER_VECTOR void add_products(const float* packed, int64_t count, int64_t n, int64_t first, int64_t last,
                                 Sum* products) {
  constexpr int64_t kSize = kWidth * kWidth;
  const int64_t panels = (n + kWidth - 1) / kWidth, block = panels * kWidth * kDepth;
  const auto room = lines_of(std::min(last - first, kTiles) * kSize);
  float* tiles = room[0].numbers;
  for (Pair start(first, panels); first < last;) {
    const int64_t pairs = std::min(kTiles, last - first);
    for (int64_t r = 0; r < count; r += kDepth) {
      const float* rows = packed + r / kDepth * block;
      const int64_t padded = (std::min(kDepth, count - r) + kRowsATurn - 1) / kRowsATurn * kRowsATurn;
      Pair pair = start;
      for (int64_t t = 0; t < pairs; ++t, pair.next()) {
        const float *panel = rows + pair.p * kWidth * kDepth, *others = rows + pair.q * kWidth * kDepth;
        for (int64_t s = 0; s < kWidth; s += kColumns) {
          multiply_panel(panel, others + s, padded, r > 0, tiles + t * kSize + s * kWidth);
        }
      }
    }
    for (int64_t t = 0; t < pairs; ++t, start.next()) {
      add_tile(tiles + t * kSize, n, start.p * kWidth, start.q * kWidth, products);
    }
    first += pairs;
  }
}
