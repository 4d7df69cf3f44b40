// Convolutions as products with a matrix of windows that is never written down: its numbers are read where they lie in
// the input, some rows of it at a time are packed into lanes, and a few rows of the weight are widened for them.
//
// Notation: number k of window p is x[start(p) + offsets[k]], or 0 where that is outside the input; w (out, depth),
// bias (out) or null; y (out, positions): y[o, p] = bias[o] + the sum over k of w[o, k] times number k of window p.
// A batch has the same windows in each sample; samples may be joined, and then y has a gap behind the windows of each.
//
// Each number of y is summed in the same order whatever the part of y that a call fills, so that the number of threads
// changes no bit.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>

#include "core/gemm.h"

namespace panther::core {

// Of the windows along one axis of the input.
struct Axis {
  int64_t windows = 1;
  int64_t apart = 0;   // numbers of the input from the start of one to that of the next
  int32_t begin = 0;   // where the first one begins along the axis
  int32_t stride = 0;  // and how much later the next one
  int32_t size = 0;    // of the input, where windows reach over its edge; else 0
};

inline constexpr int kAxes = 4;  // three, and before them one of samples that are joined

// Where some windows are: `starts` (count), and along each axis `begins` (kAxes, count).
struct Places {
  int64_t* starts;
  int32_t* begins;
  int64_t count;
};

// Number k of a window is at place k % taps of the kernel.
struct Windows {
  const float* numbers;
  std::array<Axis, kAxes> axes;  // the last one's neighbours follow each other
  int64_t start;                 // of the first window
  const int64_t* offsets;        // (depth): from there to each number
  const int32_t* shifts;         // (kAxes, taps): how far places are from where their window begins
  int64_t positions;
  int64_t depth;
  int64_t taps;

  // Those from `first` on.
  void locate(int64_t first, const Places& to) const {
    std::array<int64_t, kAxes> at;
    for (int axis = kAxes - 1; axis >= 0; --axis) {
      at[axis] = first % axes[axis].windows;
      first /= axes[axis].windows;
    }
    const Axis& last = axes[kAxes - 1];
    for (int64_t i = 0, run; i < to.count; i += run) {
      run = std::min(last.windows - at[kAxes - 1], to.count - i);
      int64_t begins = start;
      for (int axis = 0; axis < kAxes; ++axis) begins += at[axis] * axes[axis].apart;
      for (int64_t j = 0; j < run; ++j) to.starts[i + j] = begins + j * last.apart;
      for (int axis = 0; axis < kAxes; ++axis) {
        if (axes[axis].size == 0) continue;
        const int32_t place = axes[axis].begin + static_cast<int32_t>(at[axis]) * axes[axis].stride;
        const int32_t step = axis == kAxes - 1 ? last.stride : 0;
        int32_t* along = to.begins + axis * to.count + i;
        for (int32_t j = 0; j < run; ++j) along[j] = place + j * step;
      }
      at[kAxes - 1] += run;
      for (int axis = kAxes - 1; axis > 0 && at[axis] == axes[axis].windows; --axis) {
        at[axis] = 0;
        ++at[axis - 1];
      }
    }
  }

  // Whether window i of some has a number at a place of the kernel.
  bool has(const Places& of, int64_t i, int64_t tap) const {
    for (int axis = 0; axis < kAxes; ++axis) {
      if (axes[axis].size == 0) continue;
      const int32_t place = of.begins[axis * of.count + i] + shifts[axis * taps + tap];
      if (place < 0 || place >= axes[axis].size) return false;
    }
    return true;
  }
};

// Where the results of a window lie.
struct Results {
  float* numbers;
  int64_t channel;  // from one to the next
  int64_t each;     // windows, between two gaps
  int64_t gap = 0;

  float* at(int64_t o, int64_t i) const { return numbers + o * channel + i + i / each * gap; }
};

template <class W>
struct Conv {
  Windows x;
  W w;
  const float* bias;
  Results y;
  int64_t out;
  int64_t samples;
  int64_t x_sample;  // from a sample to the next one
  int64_t y_sample;

  Conv sample(int64_t index) const {
    Conv one = *this;
    one.x.numbers += index * x_sample;
    one.y.numbers += index * y_sample;
    return one;
  }
};

// The windows [first, last) one after another, each of `depth` numbers.
inline void unfold(const Windows& x, int64_t first, int64_t last, float* rows) {
  for (int64_t position = first; position < last; ++position, rows += x.depth) {
    int64_t start;
    int32_t begins[kAxes];
    const Places one{&start, begins, 1};
    x.locate(position, one);
    for (int64_t tap = 0; tap < x.taps; ++tap) {
      const bool is_there = x.has(one, 0, tap);
      for (int64_t k = tap; k < x.depth; k += x.taps) rows[k] = is_there ? x.numbers[start + x.offsets[k]] : 0;
    }
  }
}

// What threads share: up to kWindows windows of a sample, about as many in each part, by kChannels channels of y.
inline constexpr int64_t kWindows = 256, kChannels = 16;

inline int64_t parts_of(int64_t whole, int64_t most) { return (whole + most - 1) / most; }

template <class W>
int64_t parts_of(const Conv<W>& p) {
  return p.samples * parts_of(p.x.positions, kWindows) * parts_of(p.out, kChannels);
}

// Where part i of `count` begins: at a whole number of registers.
inline int64_t start_of(int64_t i, int64_t count, int64_t positions) {
  return std::min(positions, parts_of(positions, 16) * i / count * 16);
}

// Windows [i, i + rows) times rows [first, last) of w.
struct ConvPart {
  int64_t i;
  int64_t rows;
  int64_t first;
  int64_t last;
};

// The twin without intrinsics.
template <class W>
inline void conv_part_scalar(const Conv<W>& p, const ConvPart& part) {
  const std::unique_ptr<float[]> window(new float[p.x.depth]);
  for (int64_t i = part.i; i < part.i + part.rows; ++i) {
    unfold(p.x, i, i + 1, window.get());
    for (int64_t o = part.first; o < part.last; ++o) {
      float sum = 0;
      for (int64_t k = 0; k < p.x.depth; ++k) sum += window[k] * p.w.value(o, k);
      *p.y.at(o, i) = p.bias ? sum + p.bias[o] : sum;
    }
  }
}

#if PANTHER_HAS_AVX

namespace avx512 {

// Sixteen windows at most as lanes: those that begin one or two numbers apart are read together, else one by one.
struct WindowLanes {
  static constexpr int kMostRuns = 6;  // above, a gather is faster
  int64_t begin;
  int64_t starts[kMostRuns];   // of the lane 0 that a run would have
  __mmask16 lanes[kMostRuns];  // of a run
  int runs = 0;
  __m512i places;  // of all lanes, from `begin` on, where there are more than one run

  // Whether each window begins `step` numbers after the one before.
  PANTHER_AVX512 static bool is_one_run(const int64_t* windows, int64_t count, int64_t step) {
    if (step != 1 && step != 2) return false;
    const __m512i zero_to_seven = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i steps = step == 2 ? _mm512_add_epi64(zero_to_seven, zero_to_seven) : zero_to_seven;
    for (int64_t i = 0; i < count; i += 8) {
      const __mmask8 some = static_cast<__mmask8>((1u << std::min<int64_t>(8, count - i)) - 1);
      const __m512i wanted = _mm512_add_epi64(_mm512_set1_epi64(windows[0] + i * step), steps);
      if (_mm512_mask_cmpneq_epi64_mask(some, _mm512_maskz_loadu_epi64(some, windows + i), wanted) != 0) return false;
    }
    return true;
  }

  PANTHER_AVX512 WindowLanes(const int64_t* windows, int64_t count, int64_t step) : begin(windows[0]) {
    if (is_one_run(windows, count, step)) {
      runs = 1;
      starts[0] = begin;
      lanes[0] = first_lanes(count);
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
      if (runs <= kMostRuns) lanes[runs - 1] |= static_cast<__mmask16>(1u << lane);
    }
    places = _mm512_load_si512(indices);
  }
};

// Number 2 i in lane i, for some lanes; no others are read.
PANTHER_AVX512 inline __m512 every_second(const float* numbers, __mmask16 some) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const uint32_t spread = _pdep_u32(some, 0x55555555u);
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(spread), numbers);
  const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(spread >> 16), numbers + kLanes);
  return _mm512_permutex2var_ps(low, even, high);
}

// Number `offset` of the windows in those of their lanes that have it, and zeros. Runs: as many as there are, 0: any.
template <int Step, int Runs>
PANTHER_AVX512 inline __m512 window_numbers(const WindowLanes& of, const float* x, int64_t offset, __mmask16 there) {
  if constexpr (Step == 0) {
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, of.places, x + (of.begin + offset), sizeof(float));
  }
  __m512 values = _mm512_setzero_ps();
  for (int run = 0; run < (Runs ? Runs : of.runs); ++run) {
    const __mmask16 some = Runs == 1 ? there : of.lanes[run] & there;
    const float* from = x + (of.starts[run] + offset);
    values = Step == 1 ? _mm512_mask_loadu_ps(values, some, from)
                       : _mm512_mask_mov_ps(values, some, every_second(from, some));
  }
  return values;
}

// The lanes of `count` windows from window i of some on that have a number at a place of the kernel.
PANTHER_AVX512 inline __mmask16 lanes_with(const Windows& x, const Places& of, int64_t i, int64_t count, int64_t tap) {
  __mmask16 there = first_lanes(count);
  for (int axis = 0; axis < kAxes; ++axis) {
    if (x.axes[axis].size == 0) continue;
    const __m512i begins = _mm512_maskz_loadu_epi32(there, of.begins + axis * of.count + i);
    const __m512i places = _mm512_add_epi32(begins, _mm512_set1_epi32(x.shifts[axis * x.taps + tap]));
    there =
        _mm512_mask_cmplt_epu32_mask(there, places, _mm512_set1_epi32(x.axes[axis].size));  // below 0: a large number
  }
  return there;
}

template <int Step, int Runs>
PANTHER_AVX512 inline void pack_runs(const WindowLanes& lanes, const Windows& x, int64_t r, int64_t depth,
                                     const __mmask16* there, int64_t width, float* packed) {
  for (int64_t k = 0, tap = r % x.taps; k < depth; ++k) {
    _mm512_storeu_ps(packed + k * width, window_numbers<Step, Runs>(lanes, x.numbers, x.offsets[r + k], there[tap]));
    if (++tap == x.taps) tap = 0;
  }
}

// Numbers [r, r + depth) of up to sixteen windows, as lanes: packed[k * width + lane].
PANTHER_AVX512 inline void pack_windows(const Windows& x, const int64_t* starts, int64_t count, int64_t r,
                                        int64_t depth, const __mmask16* there, int64_t width, float* packed) {
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

// Rows [first, last) of w from column r on, as floats that stay where they are or in `wide`.
PANTHER_AVX512 inline Strided rows_of(const Plain<float>& w, int64_t first, int64_t, int64_t r, int64_t, float*) {
  return {w.numbers + first * w.in + r, w.in, 1};
}

template <class W>
PANTHER_AVX512 inline Strided rows_of(const W& w, int64_t first, int64_t last, int64_t r, int64_t depth, float* wide) {
  widen_rows(w, first, last, r, r + depth, wide);
  return {wide, depth, 1};
}

// What a thread needs besides.
struct ConvRoom {
  std::unique_ptr<float[]> packed;
  std::unique_ptr<float[]> wide;
  std::unique_ptr<__mmask16[]> there;  // (registers, taps)
  std::unique_ptr<int64_t[]> starts;
  std::unique_ptr<int32_t[]> begins;

  explicit ConvRoom(const Windows& x)
      : packed(new float[kWindows * std::min(kDepth, x.depth)]),
        wide(new float[kChannels * std::min(kDepth, x.depth)]),
        there(new __mmask16[kWindows / kLanes * x.taps]),
        starts(new int64_t[kWindows]),
        begins(new int32_t[kAxes * kWindows]) {}
};

template <class W>
PANTHER_AVX512 void conv_part(const Conv<W>& p, const ConvPart& part, const ConvRoom& room) {
  const Panels panels(part.rows);
  const Places places{room.starts.get(), room.begins.get(), part.rows};
  p.x.locate(part.i, places);
  const auto count = [&](int64_t v) { return std::min(kLanes, part.rows - v * kLanes); };
  for (int64_t v = 0; v < panels.registers; ++v) {
    for (int64_t tap = 0; tap < p.x.taps; ++tap) {
      room.there[v * p.x.taps + tap] = lanes_with(p.x, places, v * kLanes, count(v), tap);
    }
  }
  for (int64_t r = 0; r < p.x.depth; r += kDepth) {
    const int64_t depth = std::min(kDepth, p.x.depth - r);
    for (int64_t v = 0; v < panels.registers; ++v) {
      pack_windows(p.x, places.starts + v * kLanes, count(v), r, depth, room.there.get() + v * p.x.taps,
                   panels.width_at(v), room.packed.get() + panels.place(v, depth));
    }
    const float* bias = r + depth == p.x.depth ? p.bias : nullptr;
    for (int64_t o = part.first; o < part.last; o += kChannels) {
      const int64_t channels = std::min(kChannels, part.last - o);
      const Block to{p.y.at(o, part.i),
                     1,
                     p.y.channel,
                     part.rows,
                     nullptr,
                     bias ? bias + o : nullptr,
                     r > 0,
                     p.y.gap,
                     p.y.each - part.i % p.y.each,
                     p.y.each};
      panels_times(panels, room.packed.get(), rows_of(p.w, o, o + channels, r, depth, room.wide.get()), depth, to, 0,
                   channels);
    }
  }
}

}  // namespace avx512

#endif

// Fills parts of y, each thread its own.
template <class W>
class Convolver {
 public:
  explicit Convolver(const Conv<W>& whole)
      : whole_(whole), of_out_(parts_of(whole.out, kChannels)), of_positions_(parts_of(whole.x.positions, kWindows)) {
#if PANTHER_HAS_AVX
    if (instruction_set_in_use().load() == InstructionSet::avx512) room_.reset(new avx512::ConvRoom(whole.x));
#endif
  }

  // Parts [first, last), those of the same windows together.
  void parts(int64_t first, int64_t last) const {
    for (int64_t count; first < last; first += count) {
      const int64_t begin = first % of_out_;
      count = std::min(of_out_ - begin, last - first);
      part(first / of_out_, begin, begin + count);
    }
  }

  // The parts [first, last) of the channels, of all windows: each number of the weight is read by one thread alone.
  void channels(int64_t first, int64_t last) const {
    for (int64_t windows = 0; windows < whole_.samples * of_positions_; ++windows) part(windows, first, last);
  }

 private:
  void part(int64_t windows, int64_t first, int64_t last) const {
    const int64_t i = start_of(windows % of_positions_, of_positions_, whole_.x.positions),
                  end = start_of(windows % of_positions_ + 1, of_positions_, whole_.x.positions);
    const ConvPart part{i, end - i, first * kChannels, std::min(whole_.out, last * kChannels)};
    const Conv<W> p = whole_.sample(windows / of_positions_);
#if PANTHER_HAS_AVX
    if (room_) return avx512::conv_part(p, part, *room_);
#endif
    conv_part_scalar(p, part);
  }

  const Conv<W>& whole_;
  const int64_t of_out_;
  const int64_t of_positions_;
#if PANTHER_HAS_AVX
  std::unique_ptr<avx512::ConvRoom> room_;
#endif
};

}  // namespace panther::core
