// The part of core/vectors.h that is alike for all sets of instructions, whose namespaces include this file. No pragma
// once: it is compiled once for each.

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

// The numbers [begin, end) of the rows [first, last) of w as floats, one row after another. `begin` is that of a group.
template <class W>
PANTHER_VECTOR inline void widen_rows(W w, int64_t first, int64_t last, int64_t begin, int64_t end, float* wide) {
  for (int64_t column = first; column < last; ++column, wide += end - begin) {
    for (int64_t k = begin, until; k < end; k = until) {
      until = std::min(end, w.group_end(k));
      if constexpr (W::kHasScales) {
        const Vector factor = factor_of(w.numbers + w.at(column, k), w.scale(column, k));
        for (; until - k >= 32; k += 32) {
          const auto* numbers = w.numbers + w.at(column, k);
          PANTHER_UNROLL for (int64_t s = 0; s < 32; s += kLanes) {
            store(wide + (k - begin + s), scaled(numbers + (s >> kHeldShift<typename W::Number>), factor));
          }
        }
        for (; until - k >= kLanes; k += kLanes) store(wide + (k - begin), scaled(w.numbers + w.at(column, k), factor));
      } else {
        for (; until - k >= 32; k += 32) {
          const auto* numbers = w.numbers + w.at(column, k);
          PANTHER_UNROLL for (int64_t s = 0; s < 32; s += kLanes) store(wide + (k - begin + s), load(numbers + s));
        }
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
