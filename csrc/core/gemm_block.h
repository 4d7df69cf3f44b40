// The body of core/gemm.cpp for one set of instructions, whose namespace includes this file. No pragma once: it is
// compiled once for each. PANTHER_EACH is what a loop over registers needs so that they stay what they are.

// As first_lanes, of any number.
PANTHER_VECTOR inline Mask up_to(int64_t count) { return first_lanes(std::clamp<int64_t>(count, 0, kLanes)); }

// A register of rows of A, of which `count` are there, as lanes: packed[r * width + lane] = A[lane][r].
PANTHER_VECTOR inline void pack_lanes(const Strided& a, int64_t count, int64_t depth, int64_t width, float* packed) {
  if (a.row == 1) {
    const Mask lanes = up_to(count);
    for (int64_t r = 0; r < depth; ++r) store(packed + r * width, load_masked(a.at(0, r), lanes));
    return;
  }
  if (a.column != 1) {
    for (int64_t r = 0; r < depth; ++r) {
      for (int64_t lane = 0; lane < kLanes; ++lane) packed[r * width + lane] = lane < count ? *a.at(lane, r) : 0.0f;
    }
    return;
  }
  constexpr int64_t kLine = 16;
  // The next rows are asked for, unless they would push these out of the first cache.
  const bool fetches = kFetchesRows && a.row % 1024 != 0;
  for (int64_t r = 0; r < depth; r += kLanes) {
    if (fetches && r % kLine == 0) {
      for (int64_t lane = 0; lane < kLanes; ++lane) __builtin_prefetch(a.at(lane + kLanes, r));
    }
    const Mask there = up_to(depth - r);
    Vector rows[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane)
      rows[lane] = lane < count ? load_masked(a.at(lane, r), there) : zeros();
    transpose(rows);
    for (int64_t s = 0; s < kLanes && r + s < depth; ++s) store(packed + (r + s) * width, rows[s]);
  }
}

// Sums leave the registers inside of `panel_block`: they must not go through memory to get here.
PANTHER_VECTOR __attribute__((always_inline)) inline void store_lanes(float* c, bool adds, Mask lanes, Vector sum) {
  if (adds) sum = add(sum, load_masked(c, lanes));
  store_masked(c, sum, lanes);
}

PANTHER_VECTOR __attribute__((always_inline)) inline void store_column(const Block& to, Vector sum, int64_t j) {
  float* c = to.c + j * to.column;
  if (to.gap == 0 || to.near >= kLanes) {
    if (to.count < kLanes) return store_lanes(c, to.adds, up_to(to.count), sum);
    return store(c, to.adds ? add(sum, load(c)) : sum);
  }
  const Mask lanes = up_to(to.count), near = up_to(to.near);
  store_lanes(c, to.adds, both(lanes, near), sum);
  store_lanes(c + to.gap, to.adds, without(lanes, near), sum);
}

template <int Columns>
PANTHER_VECTOR __attribute__((always_inline)) inline void store_block(const Block& to, Vector (&sums)[Columns],
                                                                      int64_t j) {
  PANTHER_EACH for (int s = 0; s < Columns; ++s) {
    if (to.of_rows) sums[s] = add(sums[s], load_masked(to.of_rows, up_to(to.count)));
    if (to.of_columns) sums[s] = add(sums[s], all_lanes(to.of_columns[j + s]));
  }
  if (to.row == 1) {
    PANTHER_EACH for (int s = 0; s < Columns; ++s) store_column(to, sums[s], j + s);
  } else if (to.column == 1) {
    store_rows<Columns>(to, sums, j);
  } else {
    PANTHER_EACH for (int s = 0; s < Columns; ++s) {
      float lanes[kLanes];
      store(lanes, sums[s]);
      for (int64_t lane = 0; lane < std::min(to.count, kLanes); ++lane) {
        float& c = to.c[lane * to.row + (j + s) * to.column];
        c = to.adds ? c + lanes[lane] : lanes[lane];
      }
    }
  }
}

// A panel of kLanes * Registers rows times `Columns` rows of B.
template <int Registers, int Columns, bool IsHalf>
PANTHER_VECTOR __attribute__((noinline)) void panel_block(const float* panel, const Strided& b, int64_t depth,
                                                          const Block& to, int64_t j) {
  Vector sums[Registers][Columns];
  add_panel<Registers, Columns, IsHalf>(panel, Strided{b.at(j, 0), b.row, b.column}, depth, to.is_first, sums);
  PANTHER_EACH for (int v = 0; v < Registers; ++v) {
    if (v * kLanes < to.count) store_block<Columns>(to.from(v * kLanes), sums[v], j);
  }
}

// Fewer columns than `Columns`, in blocks of the powers of two below it.
template <int Registers, int Columns>
PANTHER_VECTOR inline void last_columns(const float* panel, const Strided& b, int64_t depth, const Block& to,
                                        int64_t first, int64_t last) {
  if constexpr (Columns > 1) {
    constexpr int kFewer = Columns == 6 ? 4 : Columns / 2;
    if (last - first >= kFewer) {
      panel_block<Registers, kFewer, false>(panel, b, depth, to, first);
      first += kFewer;
    }
    last_columns<Registers, kFewer>(panel, b, depth, to, first, last);
  }
}

template <int Registers>
PANTHER_VECTOR inline void panel_columns(const float* panel, const Strided& b, int64_t depth, const Block& to,
                                         int64_t first, int64_t last) {
  constexpr int kMost = most_columns(Registers);
  const bool is_half = kHasHalves && to.count <= Registers * kLanes - kLanes / 2;
  for (; last - first >= kMost; first += kMost) {
    if (is_half) {
      panel_block<Registers, kMost, kHasHalves>(panel, b, depth, to, first);
    } else {
      panel_block<Registers, kMost, false>(panel, b, depth, to, first);
    }
  }
  last_columns<Registers, kMost>(panel, b, depth, to, first, last);
}

// A panel of `width` registers, at most `Registers` of them.
template <int Registers>
PANTHER_VECTOR inline void panel_of_width(int64_t width, const float* panel, const Strided& b, int64_t depth,
                                          const Block& to, int64_t first, int64_t last) {
  if (width == Registers) return panel_columns<Registers>(panel, b, depth, to, first, last);
  if constexpr (Registers > 1) panel_of_width<Registers - 1>(width, panel, b, depth, to, first, last);
}

PANTHER_VECTOR void panel_times(int64_t width, const float* panel, const Strided& b, int64_t depth, const Block& to,
                                int64_t first, int64_t last) {
  panel_of_width<kMostRegisters>(width, panel, b, depth, to, first, last);
}

PANTHER_VECTOR void panels_times(const Panels& panels, const float* packed, const Strided& b, int64_t depth,
                                 const Block& to, int64_t first, int64_t last) {
  for (int64_t q = 0; q < panels.count; ++q) {
    const int64_t row = panels.starts[q] * kLanes, width = panels.starts[q + 1] - panels.starts[q];
    Block part = to.from(row);
    part.is_first = q == 0;
    panel_of_width<kMostRegisters>(width, packed + row * depth, b, depth, part, first, last);
  }
}

// Some rows of a matrix for an operand.
template <class W>
struct Rows {
  const W& matrix;
  int64_t from;
};

// Rows [i, i + rows) of A and `depth` of their numbers, packed, times all of B, kTogether rows of it after the others.
template <class A, class B>
PANTHER_VECTOR inline void packed_rows(const Gemm& p, const Rows<A>& a, const Rows<B>& b, int64_t i, int64_t rows,
                                       int64_t r, int64_t depth, float* packed, float* wide) {
  const Panels panels(rows);
  for (int64_t v = 0; v < panels.registers; ++v) {
    const int64_t first = i + v * kLanes, count = std::min(kLanes, rows - v * kLanes);
    const Strided some = rows_of(a.matrix, a.from + first, a.from + first + count, r, depth, wide);
    pack_lanes(some, count, depth, panels.width_at(v), packed + panels.place(v, depth));
  }
  const float* bias = r + depth == p.k ? p.bias : nullptr;
  for (int64_t j = 0; j < p.n; j += kTogether) {
    const int64_t last = std::min(p.n, j + kTogether);
    const Block to{p.c + i * p.c_row + j * p.c_column,
                   p.c_row,
                   p.c_column,
                   rows,
                   bias && p.bias_is_of_rows ? bias + i : nullptr,
                   bias && !p.bias_is_of_rows ? bias + j : nullptr,
                   r > 0};
    panels_times(panels, packed, rows_of(b.matrix, b.from + j, b.from + last, r, depth, wide), depth, to, 0, last - j);
  }
}

// With a and b instead of p.a and p.b. Parts of the depth begin with a group of them.
template <class A, class B>
PANTHER_VECTOR inline void gemm(const Gemm& p, const Rows<A>& a, const Rows<B>& b) {
  constexpr bool kWidens = !std::is_same_v<A, Strided> || !std::is_same_v<B, Strided>;
  const int64_t most_depth = std::min(p.k, kDepth);
  const std::unique_ptr<Line[]> packed = lines_of((std::min(p.m, kPackedRows) + kLanes) * most_depth);
  const std::unique_ptr<Line[]> wide = lines_of(kWidens ? std::max(kTogether, kLanes) * most_depth : 0);
  for (int64_t r = 0; r < p.k || r == 0; r += kDepth) {
    const int64_t depth = std::min(kDepth, p.k - r);
    for (int64_t i = 0; i < p.m; i += kPackedRows) {
      packed_rows(p, a, b, i, std::min(kPackedRows, p.m - i), r, depth, packed[0].numbers, wide[0].numbers);
    }
  }
}

PANTHER_VECTOR inline void gemm(const Gemm& p) { gemm(p, Rows<Strided>{p.a, 0}, Rows<Strided>{p.b, 0}); }

template <class W>
PANTHER_VECTOR inline void widened_gemm(const Gemm& p, const W& w, int64_t from, bool is_a) {
  if (is_a) return gemm(p, Rows<W>{w, from}, Rows<Strided>{p.b, 0});
  gemm(p, Rows<Strided>{p.a, 0}, Rows<W>{w, from});
}
