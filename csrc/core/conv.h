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

// What threads share: up to most_windows() windows of a sample, about as many in each part, by kChannels channels of y.
inline constexpr int64_t kChannels = 16;

inline constexpr int64_t kMostWindows = 256;

// As many as stay in the second cache when they are packed: of processors without AVX-512 it is half as large.
inline int64_t most_windows() { return instruction_set_in_use().load() == InstructionSet::avx2 ? 128 : kMostWindows; }

inline int64_t parts_of(int64_t whole, int64_t most) { return (whole + most - 1) / most; }

template <class W>
int64_t parts_of(const Conv<W>& p) {
  return p.samples * parts_of(p.x.positions, most_windows()) * parts_of(p.out, kChannels);
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

namespace avx2 {

using Bits = uint8_t;  // a lane each
using Indices = __m256i;

inline Bits first_bits(int64_t count) { return static_cast<Bits>((1u << count) - 1); }
PANTHER_AVX2 inline Indices load_indices(const int32_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

PANTHER_AVX2 inline Mask mask_of(Bits some) {
  const __m256i of_lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(some), of_lanes), of_lanes);
}

// As below.
inline bool are_one_run(const int64_t* windows, int64_t count, int64_t step) {
  if (step != 1 && step != 2) return false;
  bool is_one = true;
  for (int64_t i = 1; i < count; ++i) is_one &= windows[i] == windows[0] + i * step;
  return is_one;
}

PANTHER_AVX2 inline Vector every_second(const float* numbers, Bits some) {
  const __m256i spread = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3),
                even = _mm256_setr_epi32(-1, 0, -1, 0, -1, 0, -1, 0);
  const auto lanes = [&](int of) PANTHER_AVX2 {
    return _mm256_and_si256(_mm256_permutevar8x32_epi32(mask_of(static_cast<Bits>(of)), spread), even);
  };
  __m256 fours;
  if (some == 0xFF) {  // numbers 0, 2, 8, 10 and 4, 6, 12, 14
    fours = _mm256_shuffle_ps(load(numbers), load(numbers + kLanes - 1), 0xD8);
  } else {
    const __m256 low = load_masked(numbers, lanes(some)), high = load_masked(numbers + kLanes, lanes(some >> 4));
    fours = _mm256_shuffle_ps(low, high, 0x88);
  }
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(fours), 0xD8));
}

PANTHER_AVX2 inline Vector filled(Vector values, const float* from, Bits some) {
  if (some == 0xFF) return load(from);
  return _mm256_or_ps(values, load_masked(from, mask_of(some)));  // which has zeros there
}

PANTHER_AVX2 inline Vector joined(Vector values, Vector others, Bits) { return _mm256_or_ps(values, others); }

PANTHER_AVX2 inline Vector gathered(const float* from, Indices places, Bits some) {
  const Mask lanes = mask_of(some);
  return _mm256_mask_i32gather_ps(_mm256_setzero_ps(), from, places, _mm256_castsi256_ps(lanes), sizeof(float));
}

PANTHER_AVX2 inline Bits bits_within(const int32_t* begins, int32_t shift, int32_t size, Bits some) {
  const __m256i places = _mm256_add_epi32(_mm256_maskload_epi32(begins, mask_of(some)), _mm256_set1_epi32(shift));
  const __m256i nearest = _mm256_min_epu32(places, _mm256_set1_epi32(size - 1));  // below 0: a large number
  const __m256i is_within = _mm256_cmpeq_epi32(places, nearest);
  return static_cast<Bits>(_mm256_movemask_ps(_mm256_castsi256_ps(is_within)) & some);
}

#define PANTHER_VECTOR PANTHER_AVX2
#include "core/conv_block.h"
#undef PANTHER_VECTOR

}  // namespace avx2

namespace avx512 {

using Bits = __mmask16;  // a lane each
using Indices = __m512i;

PANTHER_AVX512 inline Bits first_bits(int64_t count) { return first_lanes(count); }
PANTHER_AVX512 inline Indices load_indices(const int32_t* from) { return _mm512_loadu_si512(from); }

// Whether each window begins `step` numbers after the one before.
PANTHER_AVX512 inline bool are_one_run(const int64_t* windows, int64_t count, int64_t step) {
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

// Number 2 i in lane i, for some lanes; no others are read.
PANTHER_AVX512 inline __m512 every_second(const float* numbers, Bits some) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const uint32_t spread = _pdep_u32(some, 0x55555555u);
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(spread), numbers);
  const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(spread >> 16), numbers + kLanes);
  return _mm512_permutex2var_ps(low, even, high);
}

// `values`, and in some lanes the numbers from there on.
PANTHER_AVX512 inline Vector filled(Vector values, const float* from, Bits some) {
  return _mm512_mask_loadu_ps(values, some, from);
}

PANTHER_AVX512 inline Vector joined(Vector values, Vector others, Bits some) {
  return _mm512_mask_mov_ps(values, some, others);
}

// Zeros elsewhere.
PANTHER_AVX512 inline Vector gathered(const float* from, Indices places, Bits some) {
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, places, from, sizeof(float));
}

// Those of some lanes in which a number from there on, plus `shift`, is not negative and less than `size`.
PANTHER_AVX512 inline Bits bits_within(const int32_t* begins, int32_t shift, int32_t size, Bits some) {
  const __m512i places = _mm512_add_epi32(_mm512_maskz_loadu_epi32(some, begins), _mm512_set1_epi32(shift));
  return _mm512_mask_cmplt_epu32_mask(some, places, _mm512_set1_epi32(size));  // below 0: a large number
}

#define PANTHER_VECTOR PANTHER_AVX512
#include "core/conv_block.h"
#undef PANTHER_VECTOR

}  // namespace avx512

#endif

// Fills parts of y, each thread its own.
template <class W>
class Convolver {
 public:
  explicit Convolver(const Conv<W>& whole)
      : whole_(whole),
        of_out_(parts_of(whole.out, kChannels)),
        of_positions_(parts_of(whole.x.positions, most_windows())) {
#if PANTHER_HAS_AVX
    const InstructionSet set = instruction_set_in_use().load();
    if (set == InstructionSet::avx512) avx512_.reset(new avx512::ConvRoom(whole.x));
    if (set == InstructionSet::avx2) avx2_.reset(new avx2::ConvRoom(whole.x));
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
    if (avx512_) return avx512::conv_part(p, part, *avx512_);
    if (avx2_) return avx2::conv_part(p, part, *avx2_);
#endif
    conv_part_scalar(p, part);
  }

  const Conv<W>& whole_;
  const int64_t of_out_;
  const int64_t of_positions_;
#if PANTHER_HAS_AVX
  std::unique_ptr<avx512::ConvRoom> avx512_;
  std::unique_ptr<avx2::ConvRoom> avx2_;
#endif
};

}  // namespace panther::core
