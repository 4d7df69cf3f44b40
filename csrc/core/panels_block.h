// The part of core/panels.h that is alike for all sets of instructions, whose namespaces include this file. No pragma
// once: it is compiled once for each.

// How up to kMostPacked rows are packed: in panels of one to kMostRegisters registers, of about the same size.
struct Panels {
  int64_t registers;
  int64_t count;
  int64_t starts[panels_of(kMostPacked / kLanes) + 2] = {0};  // in registers

  explicit Panels(int64_t rows) : registers((rows + kLanes - 1) / kLanes), count(panels_of(registers)) {
    for (int64_t q = 0; q < count; ++q) starts[q + 1] = registers * (q + 1) / count;
  }

  int64_t panel_of(int64_t v) const { return std::upper_bound(starts, starts + count + 1, v) - starts - 1; }
  // Numbers of the panel that register v is in, for each of its columns.
  int64_t width_at(int64_t v) const {
    const int64_t q = panel_of(v);
    return (starts[q + 1] - starts[q]) * kLanes;
  }
  // Where the first number of register v lies.
  int64_t place(int64_t v, int64_t depth) const {
    const int64_t q = panel_of(v);
    return starts[q] * kLanes * depth + (v - starts[q]) * kLanes;
  }
};

// The panel of `width` registers times the rows [first, last) of B, which `to` has columns for. In core/gemm.cpp.
PANTHER_VECTOR void panel_times(int64_t width, const float* panel, const Strided& b, int64_t depth, const Block& to,
                                int64_t first, int64_t last);

// Packed rows times the rows [first, last) of B, which `to` has columns for from its first one on. In core/gemm.cpp.
PANTHER_VECTOR void panels_times(const Panels& panels, const float* packed, const Strided& b, int64_t depth,
                                 const Block& to, int64_t first, int64_t last);

// Rows [first, last) of w from column r on, as floats that stay where they are or in `wide`.
PANTHER_VECTOR inline Strided rows_of(const Strided& w, int64_t first, int64_t, int64_t r, int64_t, float*) {
  return {w.at(first, r), w.row, w.column};
}

PANTHER_VECTOR inline Strided rows_of(const Plain<float>& w, int64_t first, int64_t, int64_t r, int64_t, float*) {
  return {w.numbers + first * w.in + r, w.in, 1};
}

template <class W>
PANTHER_VECTOR inline Strided rows_of(const W& w, int64_t first, int64_t last, int64_t r, int64_t depth, float* wide) {
  widen_rows(w, first, last, r, r + depth, wide);
  return {wide, depth, 1};
}
