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

#include "core/instruction_set.h"
#include "core/weights.h"

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

// What threads share: up to most_windows() windows of a sample, about as many in each part, by kChannels channels of y.
inline constexpr int64_t kChannels = 16;

inline constexpr int64_t kMostWindows = 256;

// As many as stay in the second cache when they are packed: of processors without AVX-512 it is half as large.
inline int64_t most_windows() { return instruction_set_in_use().load() == InstructionSet::avx2 ? 128 : kMostWindows; }

// How much of so many numbers of a window is multiplied at a time: all of them, or about 512, of whole groups of w.
inline int64_t depth_at_once(int64_t depth) {
  constexpr int64_t kDepth = 512, kGroups = 128;
  const int64_t times = std::max<int64_t>(1, (depth + kDepth / 2) / kDepth);
  return times == 1 ? depth : (depth + times * kGroups - 1) / (times * kGroups) * kGroups;
}

inline int64_t parts_of(int64_t whole, int64_t most) { return (whole + most - 1) / most; }

template <class W>
int64_t parts_of(const Conv<W>& p) {
  return p.samples * parts_of(p.x.positions, most_windows()) * parts_of(p.out, kChannels);
}

inline constexpr int64_t kUnit = 16;  // windows, one or two registers of them

// Where part i of `count` begins: at a whole number of registers.
inline int64_t start_of(int64_t i, int64_t count, int64_t positions) {
  return std::min(positions, parts_of(positions, kUnit) * i / count * kUnit);
}

// A chain of two: y[o, p] = bias[o] + the sum over r of up[o, r] times the sum over k of w[r, k] times number k of
// window p, where w (rank, depth) is that of `down`, and all else of `down` is as in one convolution. What is between
// the two stays in a near cache.
struct LowRankConv {
  Conv<Plain<float>> down;
  Plain<float> up;  // (out, rank)
  int64_t windows;  // that are packed together: a multiple of kUnit, at most kMostWindows

  int64_t rank() const { return up.in; }
};

// Fills parts [first, last) of y, those of the same windows together.
template <class W>
void conv(const Conv<W>& p, int64_t first, int64_t last);

// The parts [first, last) of the channels, of all windows: each number of the weight is read by one thread alone.
template <class W>
void conv_channels(const Conv<W>& p, int64_t first, int64_t last);

// Fills windows of y, of which there are parts_of(p); all channels of each.
void low_rank_conv(const LowRankConv& p, int64_t first, int64_t last);

inline int64_t parts_of(const LowRankConv& p) { return p.down.samples * parts_of(p.down.x.positions, p.windows); }

}  // namespace panther::core
