// The body of core/conv.cpp for one set of instructions, whose namespace includes this file. No pragma once: it is
// compiled once for each.

// A register of windows at most as lanes: those that begin one or two numbers apart are read together, else one by one.
struct WindowLanes {
  static constexpr int kMostRuns = 6;  // above, a gather is faster
  int64_t begin;
  int64_t starts[kMostRuns];  // of the lane 0 that a run would have
  Bits lanes[kMostRuns];      // of a run
  int runs = 0;
  Indices places;  // of all lanes, from `begin` on, where there are more than one run

  PANTHER_VECTOR WindowLanes(const int64_t* windows, int64_t count, int64_t step) : begin(windows[0]) {
    if (are_one_run(windows, count, step)) {
      runs = 1;
      starts[0] = begin;
      lanes[0] = first_bits(count);
      return;
    }
    alignas(64) int32_t indices[kLanes] = {};
    for (int64_t lane = 0; lane < count; ++lane) {
      indices[lane] = static_cast<int32_t>(windows[lane] - begin);
      const bool is_new = lane == 0 || step > 2 || windows[lane] != windows[lane - 1] + step;
      if (is_new && ++runs <= kMostRuns) {
        starts[runs - 1] = windows[lane] - (step == 2 ? 2 : 1) * lane;
        lanes[runs - 1] = 0;
      }
      if (runs <= kMostRuns) lanes[runs - 1] |= static_cast<Bits>(1u << lane);
    }
    places = load_indices(indices);
  }
};

// Number `offset` of the windows in those of their lanes that have it, and zeros. Runs: as many as there are, 0: any.
template <int Step, int Runs>
PANTHER_VECTOR inline Vector window_numbers(const WindowLanes& of, const float* x, int64_t offset, Bits there) {
  if constexpr (Step == 0) return gathered(x + (of.begin + offset), of.places, there);
  Vector values = zeros();
  for (int run = 0; run < (Runs ? Runs : of.runs); ++run) {
    const Bits some = Runs == 1 ? there : static_cast<Bits>(of.lanes[run] & there);
    const float* from = x + (of.starts[run] + offset);
    values = Step == 1 ? filled(values, from, some) : joined(values, every_second(from, some), some);
  }
  return values;
}

// The lanes of `count` windows from window i of some on that have a number at a place of the kernel.
PANTHER_VECTOR inline Bits lanes_with(const Windows& x, const Places& of, int64_t i, int64_t count, int64_t tap) {
  Bits there = first_bits(count);
  for (int axis = 0; axis < kAxes; ++axis) {
    const int32_t size = x.axes[axis].size;
    if (size == 0) continue;
    there = bits_within(of.begins + axis * of.count + i, x.shifts[axis * x.taps + tap], size, there);
  }
  return there;
}

template <int Step, int Runs>
PANTHER_VECTOR inline void pack_runs(const WindowLanes& lanes, const Windows& x, int64_t r, int64_t depth,
                                     const Bits* there, int64_t width, float* packed) {
  for (int64_t k = 0, tap = r % x.taps; k < depth; ++k) {
    store(packed + k * width, window_numbers<Step, Runs>(lanes, x.numbers, x.offsets[r + k], there[tap]));
    if (++tap == x.taps) tap = 0;
  }
}

// Numbers [r, r + depth) of up to a register of windows, as lanes: packed[k * width + lane].
PANTHER_VECTOR inline void pack_windows(const Windows& x, const int64_t* starts, int64_t count, int64_t r,
                                        int64_t depth, const Bits* there, int64_t width, float* packed) {
  const int64_t step = x.axes[kAxes - 1].apart;
  const WindowLanes lanes(starts, count, step);
  if (lanes.runs > WindowLanes::kMostRuns) {
    pack_runs<0, 0>(lanes, x, r, depth, there, width, packed);
  } else if (step == 2) {
    pack_runs<2, 0>(lanes, x, r, depth, there, width, packed);
  } else if (lanes.runs == 1) {
    pack_runs<1, 1>(lanes, x, r, depth, there, width, packed);
  } else if (lanes.runs == 2) {
    pack_runs<1, 2>(lanes, x, r, depth, there, width, packed);
  } else {
    pack_runs<1, 0>(lanes, x, r, depth, there, width, packed);
  }
}

// What a thread needs besides.
struct ConvRoom {
  std::unique_ptr<Line[]> packed;
  std::unique_ptr<Line[]> wide;   // widened rows of the weight
  std::unique_ptr<Line[]> inner;  // what is between the two convolutions of a chain, which has no numbers to widen
  std::unique_ptr<Bits[]> there;  // (registers, taps)
  std::unique_ptr<int64_t[]> starts;
  std::unique_ptr<int32_t[]> begins;

  explicit ConvRoom(const Windows& x, int64_t windows = kMostWindows, int64_t rank = 0)
      : packed(lines_of(rounded_up(windows) * depth_at_once(x.depth))),
        wide(lines_of(rank > 0 ? 0 : kChannels * depth_at_once(x.depth))),
        inner(lines_of(rounded_up(windows) * rank)),
        there(new Bits[rounded_up(windows) / kLanes * x.taps]),
        starts(new int64_t[windows]),
        begins(new int32_t[kAxes * windows]) {}

  static int64_t rounded_up(int64_t windows) { return (windows + kLanes - 1) / kLanes * kLanes; }
};

// Some windows, whose numbers are packed a part of the depth at a time.
class PackedWindows {
 public:
  PANTHER_VECTOR PackedWindows(const Windows& x, const ConvPart& part, const ConvRoom& room)
      : panels(part.rows), x_(x), room_(room), places_{room.starts.get(), room.begins.get(), part.rows} {
    x.locate(part.i, places_);
    for (int64_t v = 0; v < panels.registers; ++v) {
      for (int64_t tap = 0; tap < x.taps; ++tap) {
        room.there[v * x.taps + tap] = lanes_with(x, places_, v * kLanes, count(v), tap);
      }
    }
  }

  // Numbers [r, r + depth).
  PANTHER_VECTOR const float* packed(int64_t r, int64_t depth) const {
    float* to = room_.packed[0].numbers;
    for (int64_t v = 0; v < panels.registers; ++v) {
      pack_windows(x_, places_.starts + v * kLanes, count(v), r, depth, room_.there.get() + v * x_.taps,
                   panels.width_at(v), to + panels.place(v, depth));
    }
    return to;
  }

  const Panels panels;

 private:
  int64_t count(int64_t v) const { return std::min(kLanes, places_.count - v * kLanes); }

  const Windows& x_;
  const ConvRoom& room_;
  const Places places_;
};

// Rows of y from channel o on, of all windows of a part.
inline Block results_of(const Results& y, const ConvPart& part, int64_t o, const float* bias, bool adds) {
  return {y.at(o, part.i),          1,     y.channel, part.rows, nullptr, bias ? bias + o : nullptr, adds, y.gap,
          y.each - part.i % y.each, y.each};
}

template <class W>
PANTHER_VECTOR void conv_part(const Conv<W>& p, const ConvPart& part, const ConvRoom& room) {
  const PackedWindows windows(p.x, part, room);
  const int64_t most_depth = depth_at_once(p.x.depth);
  for (int64_t r = 0; r < p.x.depth; r += most_depth) {
    const int64_t depth = std::min(most_depth, p.x.depth - r);
    const float* packed = windows.packed(r, depth);
    const float* bias = r + depth == p.x.depth ? p.bias : nullptr;
    for (int64_t o = part.first; o < part.last; o += kChannels) {
      const int64_t channels = std::min(kChannels, part.last - o);
      panels_times(windows.panels, packed, rows_of(p.w, o, o + channels, r, depth, room.wide[0].numbers), depth,
                   results_of(p.y, part, o, bias, r > 0), 0, channels);
    }
  }
}

// What comes out of the first convolution are panels for the second one: a column of a panel is a channel.
PANTHER_VECTOR inline void low_rank_part(const LowRankConv& p, const ConvPart& part, const ConvRoom& room) {
  const PackedWindows windows(p.down.x, part, room);
  const Panels& panels = windows.panels;
  const int64_t whole = p.down.x.depth, most_depth = depth_at_once(whole), rank = p.rank();
  float* inner = room.inner[0].numbers;
  for (int64_t r = 0; r < whole; r += most_depth) {
    const int64_t depth = std::min(most_depth, whole - r);
    const float* packed = windows.packed(r, depth);
    for (int64_t o = 0; o < rank; o += kTogether) {
      const int64_t channels = std::min(kTogether, rank - o);
      const Strided weight = rows_of(p.down.w, o, o + channels, r, depth, nullptr);
      for (int64_t q = 0; q < panels.count; ++q) {
        const int64_t row = panels.starts[q] * kLanes, width = panels.starts[q + 1] - panels.starts[q];
        const int64_t lanes = width * kLanes;
        const Block to{inner + row * rank + o * lanes, 1, lanes, lanes, nullptr, nullptr, r > 0};
        panel_times(width, packed + row * depth, weight, depth, to, 0, channels);
      }
    }
  }
  for (int64_t o = part.first; o < part.last; o += kTogether) {
    const int64_t channels = std::min(kTogether, part.last - o);
    panels_times(panels, inner, rows_of(p.up, o, o + channels, 0, rank, nullptr), rank,
                 results_of(p.down.y, part, o, p.down.bias, false), 0, channels);
  }
}
